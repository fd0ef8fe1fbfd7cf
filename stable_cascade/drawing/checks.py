"""Checks of single settings: each raises ValueError, in one line, for a value that means nothing."""

from __future__ import annotations

from typing import Any

from stable_cascade.wording import brief

SMALLEST_SIDE, LARGEST_SIDE = 64, 8192
MOST_ITEMS = 64
LONGEST_PATH = 4096


def shown(value: Any) -> str:
    """The value in an error, short."""
    return brief(repr(value), 60)


def check_kind(name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """An instance of a class, or with `optional` None."""
    if not isinstance(value, kind) and not (optional and value is None):
        raise ValueError(f"{name} {shown(value)} is a {type(value).__name__}; expected {kind.__name__}")


def check_items(name: str, value: Any, kind: type) -> None:
    """A tuple of at most `MOST_ITEMS` instances of a class."""
    if not isinstance(value, tuple) or len(value) > MOST_ITEMS:
        raise ValueError(f"{name} is not a tuple of at most {MOST_ITEMS} entries")
    for item in value:
        check_kind(name, item, kind)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} {shown(value)} is not one of {', '.join(allowed)}")


def check_text(name: str, value: Any, longest: int) -> None:
    """A string that is not too long, with whole characters and no zero."""
    check_kind(name, value, str)
    if len(value) > longest:
        raise ValueError(f"{name} has {len(value):,} characters; at most {longest:,} are allowed")
    if "\0" in value:
        raise ValueError(f"{name} holds a zero character; leave it away")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character at place {error.start}; write it again") from None


def check_path(name: str, value: Any) -> None:
    """A string that can be a path or a name; file names need not be UTF-8."""
    check_kind(name, value, str)
    if not value:
        raise ValueError(f"{name} is empty; give a file, a folder or a name")
    if len(value) > LONGEST_PATH or "\0" in value:
        raise ValueError(
            f"{name} {shown(value)} is no path, of at most {LONGEST_PATH} characters and none of them zero"
        )


def check_sha256(name: str, value: Any) -> None:
    """None, or 64 hexadecimal digits."""
    if value is None:
        return
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{name} {shown(value)} is not a SHA-256 sum, 64 hexadecimal digits")


def check_whole(name: str, value: Any, lowest: int, highest: int) -> None:
    """A whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name} {shown(value)} is not a whole number from {lowest} to {highest}")


def check_number(name: str, value: Any, lowest: float, highest: float) -> None:
    """A finite number within limits."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # NaN is within no limits
        raise ValueError(f"{name} {shown(value)} is not a number from {lowest} to {highest}")


def check_side(name: str, value: Any) -> None:
    """None, or a size that can be drawn."""
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value % 8 or not SMALLEST_SIDE <= value <= LARGEST_SIDE:
        nearest = min(max(SMALLEST_SIDE, (value + 3) // 8 * 8), LARGEST_SIDE) if whole else SMALLEST_SIDE
        raise ValueError(
            f"{name} {shown(value)} is not a multiple of 8 from {SMALLEST_SIDE} to {LARGEST_SIDE}; nearest: {nearest}"
        )
