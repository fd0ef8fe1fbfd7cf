"""diffusers' own Stable Cascade tests on our classes: `python tests/run_diffusers_tests.py CHECKOUT [--theirs]`.

CHECKOUT is a clone of diffusers near the installed version; nothing of it is kept here. Its tests import the package
`parameterized`. `--theirs` runs them on diffusers' classes, where newer versions skip them as deprecated. Prints each
test that does not pass with the first line of its error, why tests were skipped, and the counts of each class;
docs/migration.md says what remains and why. What a test would download is a tokenizer of letters.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PIPELINES = {
    "StableCascadePriorPipeline": "StableCascadePriorPipeline",
    "StableCascadeDecoderPipeline": "StableCascadeDecoderPipeline",
    "StableCascadeCombinedPipeline": "StableCascadePipeline",
}


MODELS = Path(__file__).with_name("diffusers_models.py")


class Report:
    """Counts outcomes per class of tests and keeps why tests did not pass."""

    def __init__(self) -> None:
        self.groups: dict[str, Counter[str]] = {}
        self.skipped: Counter[str] = Counter()
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self.groups.setdefault(report.nodeid.split("::")[1], Counter())[report.outcome] += 1
            if report.skipped:
                self.skipped[report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"] += 1
            if report.failed:
                text = str(report.longrepr).strip().splitlines()
                told = next((line[1:].strip() for line in text if line.startswith("E ")), text[-1] if text else "")
                self.lines.append(f"{report.nodeid.split('::', 1)[1]}: {told[:160]}")

    def __str__(self) -> str:
        outcomes = ("passed", "failed", "skipped")
        rows = {**self.groups, "all": sum(self.groups.values(), Counter())}
        table = [f"{'':45}" + "".join(f"{outcome:>9}" for outcome in outcomes)]
        table += [f"{name:45}" + "".join(f"{row[outcome]:9}" for outcome in outcomes) for name, row in rows.items()]
        reasons = [f"{count:5} {reason.removeprefix('Skipped: ')}" for reason, count in self.skipped.most_common()]
        return "\n".join([*self.lines, "", "skipped:", *reasons, "", *table])


def substitute_ours() -> None:
    """Puts our pipelines where the tests import diffusers' from."""
    import diffusers

    import stable_cascade

    for theirs, ours in PIPELINES.items():
        setattr(diffusers, theirs, getattr(stable_cascade, ours))
    network = diffusers.models.StableCascadeUNet

    def completed(**config: Any) -> Any:
        """The tests' small Stage B lacks the inputs that every real one has, and that ours always builds."""
        if config.get("in_channels") == 4:
            whole = "combined" in sys._getframe(1).f_code.co_filename  # there Stage C makes them, of 16 channels
            config = {"effnet_in_channels": 16 if whole else 4, "pixel_mapper_in_channels": 3, **config}
        return network(**config)

    diffusers.models.StableCascadeUNet = completed


def without_network(folder: Path) -> None:
    """Tokenizers of the Hub become one of single letters, whose vocabulary the tests' small text encoders hold."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    load = CLIPTokenizer.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        return load(cls, name if Path(str(name)).exists() else folder, *arguments, **options)

    CLIPTokenizer.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign]


def main(arguments: list[str]) -> int:
    """Runs the tests; the exit status is pytest's."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    checkout = Path(arguments[0]).resolve()
    folder = checkout / "tests/pipelines/stable_cascade"
    if not folder.is_dir():
        sys.exit(f"{folder} does not exist; give a checkout of diffusers")
    # Both repositories call their tests `tests`: theirs comes first, ours is this file alone.
    sys.path[:] = [str(checkout), *(path for path in sys.path if path and Path(path) != Path(__file__).parent)]
    without_network(Path(tempfile.mkdtemp()))
    if "--theirs" not in arguments:
        substitute_ours()
    report = Report()
    os.chdir(checkout)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-o",
        "addopts=",
        "--rootdir",
        str(checkout),
        "--tb=short",
    ]
    models = checkout / MODELS.name
    shutil.copyfile(MODELS, models)
    try:
        status = pytest.main([*options, "--disable-warnings", str(folder), str(models)], plugins=[report])
    finally:
        models.unlink()
    print(report)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
