"""Reads `released_keys.txt`: which keys and shapes a released file has, by component."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

FILE = Path(__file__).parent / "released_keys.txt"
Shapes = dict[str, tuple[int, ...]]


def released_keys(section: str) -> Shapes:
    """`{key: shape}` of a section, such as `vqgan` or `controlnet canny`, in original names."""
    body = FILE.read_text().split(f"\n[{section}]\n")[1].split("\n\n[")[0]
    found: Shapes = {}
    for line in body.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        pattern, shape, *count = re.split(r"  +", line.strip())
        keys = _expand(pattern)
        assert len(keys) == (int(count[0][1:]) if count else 1), line
        found |= dict.fromkeys(keys, tuple(int(n) for n in re.findall(r"\d+", shape)))
    return found


def _expand(pattern: str) -> list[str]:
    parts = re.split(r"\[(.*?)\]", pattern)
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if "|" in text:
        return text.split("|")
    first, last, *step = (int(n) for n in re.split(r"\.\.|:", text))
    return [str(n) for n in range(first, last + 1, *step)]
