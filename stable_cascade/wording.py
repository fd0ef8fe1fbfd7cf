"""What a file or a caller gave, as part of an error of one line: printable, and short however long it is.

Imports nothing of the package, so that every layer may use it.
"""

from __future__ import annotations

from typing import Any

LONGEST = 120
"""Characters of a quoted name or value."""


def brief(value: Any, limit: int = LONGEST) -> str:
    """The text of a value or an error on one printable line of at most `limit` characters, its middle cut out.

    Whitespace becomes single spaces; what does not print (control characters, marks that turn the writing direction,
    halves of surrogate pairs) is escaped, so that a terminal shows what is there and does nothing else.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > 4 * limit:
        text = f"{text[: 2 * limit]}{text[-2 * limit :]}"
        cut = True
    else:
        cut = False
    line = "".join(one if one.isprintable() else _escaped(one) for one in " ".join(text.split()))
    if len(line) <= limit and not cut:
        return line
    head = limit * 2 // 3
    return f"{line[:head]} … {line[len(line) - (limit - head - 3) :]}"


def quoted(value: Any, limit: int = LONGEST) -> str:
    """`brief` in quotes, for names."""
    return f"'{brief(value, limit)}'"


def printable(text: str) -> str:
    """The text with everything escaped that does not print or that steers a terminal; spaces stay as they are."""
    return text if text.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
