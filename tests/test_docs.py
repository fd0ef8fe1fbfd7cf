"""Every code block of README.md and docs/ runs as it stands: one folder and one namespace per page, without a network.

A page's blocks run from top to bottom. Python blocks are executed, with `cuda` read as `cpu`; shell blocks go through
tests/docs_commands.py; YAML is read, and a trainer's keys are checked as the trainer would. `text` and `console`
blocks show something and do not run. `<!-- not run: reason -->` above a block excuses it, and few may be excused.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.docs_blocks import LANGUAGES, ROOT, Block, blocks_of, indented_blocks, pages
from tests.docs_commands import commands_of, run_command
from tests.docs_folder import copy_folder, make_folder, make_hub

MOST_EXCUSED = 3
SLOW = {"memory.md": "traces steps of the 3.6B prior", "commands.md": "draws some thirty images"}
"""Page -> why running it takes long."""
EXAMPLES = {
    "LoraConfig": "lora_embedded.yaml",
    "TextToImageConfig": "text_to_image_embedded.yaml",
    "ControlNetConfig": "controlnet_embedded.yaml",
    "DecoderConfig": "decoder_embedded.yaml",
    "VQGANConfig": "vqgan_embedded.yaml",
}
"""Trainer's config -> a complete file of it, into which a fragment's keys are put."""


def named(page: Path) -> Any:
    marks = [pytest.mark.slow] if page.name in SLOW else []
    return pytest.param(page, id=page.stem, marks=marks)


PAGES = [named(page) for page in pages() if any(block.language != "text" for block in blocks_of(page))]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> tuple[Path, Path]:
    """The folder with the files that blocks use, and the stand-in for the download cache."""
    folder, hub = tmp_path_factory.mktemp("docs"), tmp_path_factory.mktemp("hub")
    make_folder(folder)
    make_hub(hub)
    return folder, hub


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch) -> Path:
    """An own copy of the folder as working directory; nothing is read or written outside it."""
    from huggingface_hub import constants

    folder, hub = prepared
    copy_folder(folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # otherwise credentials are asked for over the network
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, workplace):
    known = set(sys.modules)
    names: dict[str, Any] = {"__name__": f"documented_{page.stem}"}
    try:
        with torch.random.fork_rng():
            for block in blocks_of(page):
                if block.reason is None:
                    run_block(block, names)
    finally:
        for module in [name for name in sys.modules if name not in known and (workplace / f"{name}.py").exists()]:
            del sys.modules[module]


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Runs or checks one block in the working directory; an error is told with the block's place."""
    if block.file_name:
        Path(block.file_name).write_text(block.text + "\n", encoding="utf-8")
    try:
        RUNNERS.get(block.language, lambda block, names: None)(block, names)
    except Exception as error:
        error.add_note(f"in the block at {block.place}") if hasattr(error, "add_note") else None
        raise


def run_python(block: Block, names: dict[str, Any]) -> None:
    text = re.sub(r"(['\"])cuda\1", r"\1cpu\1", block.text)
    text = re.sub(r"\.enable_\w+_cpu_offload\(\)", ".to('cpu')", text)
    # Empty lines in front give tracebacks the page's line numbers.
    exec(compile("\n" * (block.line - 1) + text, str(block.page), "exec"), names)


def run_bash(block: Block, names: dict[str, Any]) -> None:
    for words in commands_of(block.text):
        run_command(words)


def run_yaml(block: Block, names: dict[str, Any]) -> None:
    """A config, or some keys of one, as its trainer reads them."""
    from stable_cascade import config

    given = yaml.safe_load(block.text)
    assert isinstance(given, dict), "no keys"
    fitting, errors = [], []
    for name, file in EXAMPLES.items():
        cls = getattr(config, name)
        if not given.keys() <= set(cls.__dataclass_fields__):
            continue
        fitting.append(name)
        values = yaml.safe_load((ROOT / "examples" / "configs" / file).read_text(encoding="utf-8")) | given
        try:
            config.make_config(cls, {key: (value, block.place) for key, value in values.items()})
        except ValueError as error:
            errors.append(f"{name}: {error}")
    assert fitting, f"no trainer has all of {sorted(given)}"
    assert len(errors) < len(fitting), "\n".join(errors)


def run_toml(block: Block, names: dict[str, Any]) -> None:
    if sys.version_info >= (3, 11):
        import tomllib

        tomllib.loads(block.text)


RUNNERS = {
    "python": run_python,
    "bash": run_bash,
    "yaml": run_yaml,
    "json": lambda block, names: json.loads(block.text),
    "toml": run_toml,
}


def test_every_block_has_a_language():
    blocks = [block for page in pages() for block in blocks_of(page)]
    assert not [block.place for block in blocks if block.language not in LANGUAGES]
    indented = [
        f"{page.name}:{line}" for page in pages() if page.name != "README.md" for line in indented_blocks(page)
    ]
    assert not indented, f"code that is indented and not fenced: {', '.join(indented)}"


def test_few_blocks_are_excused():
    excused = [block.place for page in pages() for block in blocks_of(page) if block.reason is not None]
    assert len(excused) <= MOST_EXCUSED, "\n".join(excused)


def test_every_page_can_be_run():
    """A block that fails must fail the test; so a page with a wrong block is made and run."""
    for language, text in (
        ("python", "1 / 0"),
        ("bash", "stable-cascade estimate --nonsense x.yaml"),
        ("bash", "python examples/train_lora.py --config examples/configs/lora_embedded.yaml --rank much"),
        ("bash", "make nonsense"),
        ("bash", "pip install 'stable-cascade[nonsense]'"),
        ("bash", "rm -r ."),
        ("yaml", "rnak: 4"),
        ("yaml", "rank: many"),
        ("json", "{"),
    ):
        with pytest.raises(Exception):  # noqa: B017
            run_block(Block(ROOT / "README.md", 1, language, text, None), {})
