"""Runs the commands of the documentation's shell blocks in this process, or checks what cannot run here.

* `stable-cascade …` runs. Only what needs the hub (`publish`) or waits for a browser (`app`) is parsed and no more.
* A trainer, started in any way, runs with `--check`: its config is read and everything it needs is looked at. The
  launcher's own arguments go through accelerate's parser.
* Of other programs of ours the file and every flag have to exist.
* What installs, uploads or watches is checked for the make target, extra or file that it names, see `CHECKED`.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.docs_blocks import ROOT

PARSED_ONLY = {"publish", "app"}
TRAINERS = re.compile(r"^examples/(train_\w+|minimal_train_lora)\.py$")


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; assignments in front and comments are gone."""
    for line in text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line, comments=True)
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def run_command(words: list[str]) -> None:
    """Runs or checks one command in the working directory.

    Raises:
        AssertionError: it fails, or what it names does not exist.
    """
    program, rest = words[0], words[1:]
    if program == "stable-cascade":
        run_stable_cascade(rest)
    elif program == "accelerate":
        run_script(launched(rest))
    elif program in ("python", "sbatch"):
        run_script(rest[next(i for i, word in enumerate(rest) if word.endswith((".py", ".sh"))) :])
    else:
        assert program in CHECKED, f"'{program}' is no program that the documentation's test knows: {' '.join(words)}"
        CHECKED[program](rest)


def run_stable_cascade(argv: list[str]) -> None:
    """One of our commands; its status has to be 0."""
    from stable_cascade.cli.main import main, make_parser

    if argv[0] in PARSED_ONLY and "--card-only" not in argv:
        make_parser().parse_args(argv)
        return
    if argv[0] == "train":
        arguments = make_parser().parse_args(argv if {"--help", "--check"} & set(argv) else [*argv, "--check"])
        return call(lambda: arguments.run(arguments), " ".join(argv))
    try:
        status = main(argv)
    except SystemExit as stop:  # --help and --version, or argparse on a mistake
        status = stop.code
    assert not status, f"`stable-cascade {' '.join(argv)}` ended with {status}"
    folders = [path.name for path in Path().glob("*.png") if path.is_dir()]
    assert not folders, f"{folders} are folders; --output names one, so leave the .png away"


def launched(argv: list[str]) -> list[str]:
    """The script and arguments that `accelerate launch` would start."""
    from accelerate.commands.launch import launch_command_parser

    assert argv[0] == "launch", f"accelerate {argv[0]} is not run here"
    known = launch_command_parser().parse_args(argv[1:])
    if known.config_file:
        assert Path(known.config_file).is_file(), f"{known.config_file} does not exist"
    return [known.training_script, *known.training_script_args]


def run_script(words: list[str]) -> None:
    """A program of the repository: trainers with `--check`, see this module's first lines."""
    name, argv = words[0], words[1:]
    if name.endswith(".sh"):  # slurm.sh starts the trainer that it is given
        assert (ROOT / name).is_file(), f"{name} does not exist"
        return run_script(argv)
    path = ROOT / name
    assert path.is_file(), f"{name} does not exist"
    if TRAINERS.match(name):
        return call_main(path, argv if {"--help", "--check"} & set(argv) else [*argv, "--check"])
    text = path.read_text(encoding="utf-8")
    missing = [word for word in argv if word.startswith("--") and f'"{word}"' not in text]
    assert not missing, f"{name} has no {', '.join(missing)}"
    return None


def call_main(path: Path, argv: list[str]) -> None:
    """`main(argv)` of a file."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    call(lambda: module.main(argv), path.name)


def call(main: Callable[[], Any], name: str) -> None:
    """Calls a program that may end with status 0, or miss files of the reader's."""
    status = None
    try:
        main()
    except SystemExit as stop:  # --help
        status = stop.code
    except ValueError as error:
        if not str(error).startswith("a training would stop, missing or wrong: "):
            raise
    assert not status, f"{name} ended with {status}"


def check_make(argv: list[str]) -> None:
    """The targets exist."""
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    wanted = {word for word in argv if "=" not in word}
    assert wanted <= targets, f"no such make target: {sorted(wanted - targets)}"


def check_pip(argv: list[str]) -> None:
    """The extras of this package and the files exist."""
    names = (ROOT / "setup.py").read_text(encoding="utf-8")
    for word in argv:
        for extra in re.findall(r"(?:stable-cascade|\.)\[([\w,]+)\]", word):
            missing = [name for name in extra.split(",") if f'"{name}": [' not in names]
            assert not missing, f"setup.py has no extra {missing}"
    if "-c" in argv:
        assert (ROOT / argv[argv.index("-c") + 1]).is_file()


def check_files(argv: list[str]) -> None:
    """Every file or folder that is named exists here; options, their numbers and what follows a pipe do not count."""
    before = argv[: argv.index("|")] if "|" in argv else argv
    missing = [word for word in before if "/" in word and not Path(word).exists()]
    assert not missing, f"{', '.join(missing)} is not what the pages' folder has"


def check_nothing(argv: list[str]) -> None:
    """Programs of others, of which nothing here can be checked."""


CHECKED: dict[str, Callable[[list[str]], Any]] = {
    "make": check_make,
    "pip": check_pip,
    "tail": check_files,
    "tensorboard": check_nothing,
    "hf": check_nothing,
    "git": check_nothing,
    "cd": check_nothing,
}
