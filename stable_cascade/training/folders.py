"""Folders that appear under their name only when they are whole and on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class DiskFullError(ValueError):
    """A checkpoint could not be written for want of space; the earlier ones are whole, and nothing is left of it."""


def write_folder(
    target: Path,
    fill: Callable[[Path], None],
    *,
    begun: Path | None = None,
    needs: int = 0,
    keep_others: bool = False,
) -> None:
    """Make the folder `target` with what `fill` writes, replacing one that is there, in one step.

    Args:
        begun: the folder of `begin_folder`, where something is in it already.
        needs: about how many bytes it takes, for the message when there are too few.
        keep_others: files and folders in the replaced one that `fill` does not write stay in it.

    Raises:
        DiskFullError: there is no space for it.
    """
    temporary = begun or begin_folder(target)
    with cleared_if_full(temporary, target, needs):
        fill(temporary)
        _sync(temporary)
    if keep_others and target.is_dir():
        for other in target.iterdir():
            if not (temporary / other.name).exists():
                os.replace(other, temporary / other.name)
    if target.exists():
        remove_folder(target)
    os.replace(temporary, target)
    _sync_one(target.parent)


def begin_folder(target: Path) -> Path:
    """An empty folder beside `target`, to be filled and then renamed to it."""
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    with cleared_if_full(temporary, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    return temporary


@contextmanager
def cleared_if_full(temporary: Path, target: Path, needs: int = 0) -> Iterator[None]:
    """Turns a failure for want of space into one line, after deleting what was written of the folder.

    Raises:
        DiskFullError: the disk is full, or a quota is used up.
    """
    try:
        yield
    except Exception as error:
        if not out_of_space(error):
            raise
        needs = max(needs, _size_of_last(target), sum(map(_size, temporary.rglob("*"))))
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskFullError(
            f"no space to write {target}: it needs about {needs / 1e6:.1f} MB, {_free(target.parent) / 1e6:.1f} MB "
            "are free (a quota may allow less); earlier checkpoints are whole. Make space there, or set "
            "checkpoint_path to another disk and resume to the newest checkpoint, and start the command again"
        ) from error


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Turns a failure for want of space anywhere else (log, previews) into one line; `folder` is where they lie.

    Raises:
        DiskFullError: the disk is full, or a quota is used up.
    """
    try:
        yield
    except OSError as error:
        if not out_of_space(error):
            raise
        raise DiskFullError(
            f"no space to write {error.filename or folder}, {_free(folder) / 1e6:.1f} MB are free (a quota may allow "
            "less); checkpoints are whole. Make space there and start the command again to resume"
        ) from error


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk is full."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # torch and safetensors write files themselves and tell the reason as text only.
        if full or any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


_FULL = (
    "No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "File too large", "os error 27",
    "file write failed", "iostream error",
)  # fmt: skip


def _size_of_last(target: Path) -> int:
    """Bytes of the newest whole folder of the same kind, as an estimate of this one."""
    whole = sorted(target.parent.glob(f"{target.name.split('-')[0]}-*"))
    return sum(map(_size, whole[-1].rglob("*"))) if whole else 0


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a folder."""
    return path.stat().st_size if path.is_file() else 0


def _free(folder: Path) -> int:
    """Free bytes of the disk a folder is on."""
    return shutil.disk_usage(folder if folder.exists() else folder.parent).free


def remove_folder(folder: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its name."""
    doomed = folder.with_name(f".tmp-old-{folder.name}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def checked(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    return [path.stat().st_size, _checksum(path)]


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _sync(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    """Wait until one file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
