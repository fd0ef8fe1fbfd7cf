"""Prints what setup.py declares, one requirement a line: the lowest versions as pins, or with --ranges all ranges.

`make test-floors` installs the pins and tries them; `make test-constraints` resolves the ranges for each Python.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from pathlib import Path

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


def declared(name: str) -> object:
    """The literal that setup.py assigns to `name`: "REQUIRES", a list, or "EXTRAS", lists by name."""
    for statement in ast.parse(SETUP.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name:
            return ast.literal_eval(statement.value)
    raise ValueError(f"setup.py assigns no {name}")


def lowest(requirement: str) -> str:
    """ "peft>=0.21" -> "peft==0.21"."""
    name, version = re.fullmatch(r"([\w.\[\]-]+)>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
    return f"{name}=={version}"


def ranges() -> list[str]:
    """All requirements and those of the extras, but for the extras whose packages bring torchvision or compile."""
    extras = declared("EXTRAS")
    tried = [wanted for name, wanted in extras.items() if name not in ("controlnet_aux", "identity")]
    return sorted({*declared("REQUIRES"), *itertools.chain(*tried)})


if __name__ == "__main__":
    print("\n".join(ranges() if "--ranges" in sys.argv else map(lowest, declared("REQUIRES"))))
