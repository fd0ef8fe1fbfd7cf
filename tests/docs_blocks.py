"""The fenced blocks of the documentation's pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {"python", "bash", "yaml", "json", "toml", "text", "console"}
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
FENCE = re.compile(r"^( *)```(\S*)(.*)$")
FILE_NAME = re.compile(r"^# ([\w./-]+\.(?:py|yaml|json|toml))$")


@dataclass(frozen=True)
class Block:
    """What stands between two fences; `line` is the number of its first line in the page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, from the comment above it."""

    @property
    def place(self) -> str:
        """`docs/x.md:12`."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The file that this is, where the first line is a comment with nothing but a file's name."""
        found = FILE_NAME.match(self.text.split("\n", 1)[0])
        return found.group(1) if found else None


def pages() -> list[Path]:
    """README.md and every page of docs/, in the order of their names."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The page's fenced blocks from top to bottom, without the indentation of the list that they stand in.

    Raises:
        ValueError: a fence does not end.
    """
    blocks, lines, number = [], page.read_text(encoding="utf-8").split("\n"), 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if not opening:
            continue
        indentation, language = len(opening.group(1)), opening.group(2)
        end = next((n for n in range(number, len(lines)) if lines[n].strip() == "```"), None)
        if end is None:
            raise ValueError(f"{page.name}:{number}: the block does not end")
        text = "\n".join(line[indentation:] for line in lines[number:end])
        skipped = NOT_RUN.search(lines[number - 2]) if number > 1 else None
        blocks.append(Block(page, number + 1, language, text, skipped and skipped.group(1)))
        number = end + 1
    return blocks


def without_blocks(page: Path) -> str:
    """The page's text with its fenced blocks emptied, line numbers kept."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for block in blocks_of(page):
        for number in range(block.line - 1, block.line - 1 + block.text.count("\n") + 1):
            lines[number] = ""
    return "\n".join("" if FENCE.match(line) else line for line in lines)


def indented_blocks(page: Path) -> list[int]:
    """Lines at which code starts that is indented instead of fenced, so that nobody knows its language."""
    lines, found, in_list = without_blocks(page).split("\n"), [], False
    for number, line in enumerate(lines):
        if line and not line.startswith(" "):
            in_list = bool(re.match(r"(\d+\.|[-*]) ", line))
        if line.startswith("    ") and not in_list and number and not lines[number - 1].strip():
            found.append(number + 1)
    return found
