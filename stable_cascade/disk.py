"""Files that a user or a stranger names: the one rule for paths, and reading that is bounded before it begins.

Imports of the package only `wording`, so that every layer may use it.
"""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from stable_cascade.wording import quoted


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user means: a leading `~` or `~user` is the home folder, and all else is taken literally.

    Variables (`$HOME`, `%TEMP%`) are not expanded: a shell does that before this library sees the text.
    """
    return Path(path).expanduser() if os.fspath(path).startswith("~") else Path(path)


def path_text(path: Any) -> Any:
    """`local_path` of a text, as a text; anything else, an address or a Hub name among it, is what it was."""
    return str(local_path(path)) if isinstance(path, str) and path.startswith("~") else path


def open_file(path: str | os.PathLike[str], *, at_most: int, what: str = "file") -> BinaryIO:
    """A regular file opened for reading; pipes and devices, which never end or never begin, are refused.

    Args:
        path: where it is, by the rule of `local_path`; links are followed.
        at_most: bytes that it may have.
        what: the noun that names it in errors.

    Raises:
        ValueError: it is missing, a folder, no regular file, too large, or may not be read.
    """
    name = f"{what} {quoted(path)}"
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
        handle = os.open(local_path(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder; name a file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be opened: {reason}") from None
    status = os.fstat(handle)
    fault = None
    if stat.S_ISDIR(status.st_mode):
        fault = "is a folder; name a file"
    elif not stat.S_ISREG(status.st_mode):
        fault = "is a pipe or a device; only regular files are read"
    elif status.st_size > at_most:
        fault = f"has {status.st_size:,} bytes; at most {at_most:,} are read"
    if fault is not None:
        os.close(handle)
        raise ValueError(f"{name} {fault}")
    return os.fdopen(handle, "rb")


def read_file(path: str | os.PathLike[str], *, at_most: int, what: str = "file") -> bytes:
    """The bytes of a regular file of at most `at_most` bytes.

    Raises:
        ValueError: as `open_file`, or it cannot be read to its end.
    """
    with open_file(path, at_most=at_most, what=what) as file:
        try:
            data = file.read(at_most + 1)
        except OSError as error:
            raise ValueError(f"{what} {quoted(path)} cannot be read: {error.strerror or error}") from None
    if len(data) > at_most:
        raise ValueError(f"{what} {quoted(path)} grew beyond {at_most:,} bytes while it was read")
    return data


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, with or without a byte-order mark, or UTF-16 with one.

    Raises:
        ValueError: it is neither. No other encoding is guessed: each would give some text for any bytes.
    """
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return data.decode("utf-16" if data.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is neither UTF-8 nor UTF-16 text; save it as UTF-8") from None


def read_text(path: str | os.PathLike[str], *, at_most: int, what: str = "file") -> str:
    """The text of a regular file of at most `at_most` bytes, by `decode_text`.

    Raises:
        ValueError: as `read_file` and `decode_text`, with the file's name.
    """
    data = read_file(path, at_most=at_most, what=what)
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"{what} {quoted(path)} {error}") from None
