"""A run's folder: what in it is the run's own, who holds it, and how whole folders get into it.

checkpoint_path/experiment_id/
  step-00001000/  backup-00005000/  final/    what the run writes (see `checkpoints`)
  before-1/                                   what `resume: never` moved aside
  run.lock                                    held by the training that writes here

Nothing that a run did not write is deleted or moved: names have to match to the letter, links stay. A folder appears
under its name only when it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from stable_cascade.config import TrainingSettings
from stable_cascade.wording import quoted

log = logging.getLogger(__name__)

LOCK = "run.lock"
RECORD = "run.json"

_LONGEST_NAME = ".tmp-old-backup-00000000-0000000"
_UNFINISHED = re.compile(r"\.tmp-(old-)?((step|backup)-\d{8,}|final)-\d+")
_FULL = (
    "No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "File too large", "os error 27",
    "file write failed", "iostream error",
)  # fmt: skip
"""What torch and safetensors, which write files themselves, say of a full disk; their errors have no number."""


def run_folder(config: TrainingSettings) -> Path:
    """The folder of the run's checkpoints."""
    return Path(config.checkpoint_path) / config.experiment_id


def step_folder(run: Path, step: int, kind: str = "step") -> Path:
    """Where the checkpoint, or with the kind `backup` its copy, of a step is."""
    return run / f"{kind}-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's or backup's folder, by its name; None when it has another name."""
    named = re.fullmatch(r"(?:step|backup)-(\d{8,})", folder.name)
    return int(named[1]) if named else None


def resumable(run: Path) -> list[Path]:
    """The checkpoints and backups with a record, newest first; links to such folders count."""
    found = [path for path in run.glob("*-*") if step_of(path) is not None and (path / RECORD).is_file()]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def rotate(run: Path, limit: int | None, newest: Path) -> None:
    """Delete all but `limit` checkpoints of a run: `newest` in any case, and those of the highest steps."""
    own = [path for path in resumable(run) if path.name.startswith("step-") and _written_here(path)]
    others = [path for path in own if path != newest]
    for folder in others[limit - 1 :] if limit else []:
        remove_folder(folder)


def sweep(run: Path) -> None:
    """Delete what interrupted writes left behind."""
    for folder in run.glob(".tmp-*"):
        if _UNFINISHED.fullmatch(folder.name) and _written_here(folder):
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(run: Path) -> Path | None:
    """Move a run's old checkpoints to `before-1`, `before-2`, …, so that a new run cannot be confused with them."""
    old = [path for path in run.glob("*") if step_of(path) is not None or path.name == "final"]
    old = [path for path in old if path.is_dir()]
    if not old:
        return None
    number = 1 + max([int(f.name[7:]) for f in run.glob("before-*") if f.name[7:].isdecimal()], default=0)
    aside = run / f"before-{number}"
    aside.mkdir()
    for folder in old:
        os.replace(folder, aside / folder.name)
    return aside


def _written_here(folder: Path) -> bool:
    """Whether this is a folder, and no link to one elsewhere."""
    return folder.is_dir() and not folder.is_symlink()


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """The run's folder for one training alone, from beginning to end of the `with` block.

    The lock is the operating system's (`flock`) on a file, so that it ends with the process however that ends. On file
    systems that know no locks, and on Windows, nothing is held.

    Raises:
        ValueError: another training holds it.
    """
    # Where files cannot be locked nothing is.
    try:
        import fcntl
    except ImportError:
        yield
        return
    # Take the lock; whoever has it is named.
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200)
            raise ValueError(
                f"{run} is in use by another training ({quoted(holder)}); wait for its end, stop it, or choose "
                "another experiment_id"
            ) from None
        except OSError as error:
            log.warning("%s is not locked (%s): start no second training on it", run, error.strerror)
            yield
            return
        # Write down who holds it, for the next one's message.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _opened(path: Path) -> TextIO:
    """The lock file, opened to be locked; never one that its holder is about to delete."""
    while True:
        file = path.open("a+")
        file.seek(0)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def check_run_folders(config: Any) -> None:
    """Passes when the run's two folders can be written to and no other training holds them; leaves nothing behind.

    Raises:
        ValueError: a folder cannot be made or written to, or is in use.
    """
    for key in ("checkpoint_path", "output_path"):
        folder = Path(getattr(config, key)) / config.experiment_id
        with _missing_folders_removed([folder, *folder.parents]):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder, prefix=_LONGEST_NAME).close()
            except OSError as error:
                raise ValueError(
                    f"{key}: {quoted(folder)} cannot be written to ({error.strerror}); give another folder, or mend "
                    "its rights"
                ) from None
    if (run := run_folder(config)).is_dir():
        with held(run):
            pass


@contextlib.contextmanager
def _missing_folders_removed(folders: Sequence[Path]) -> Iterator[None]:
    """Removes again, as far as they are empty, those of `folders` (the deepest first) that appear in the block."""
    missing = []
    with contextlib.suppress(OSError):  # a name too long to look for
        missing = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


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


@contextlib.contextmanager
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


@contextlib.contextmanager
def named_if_full(folder: Path) -> Iterator[None]:
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
        if full or any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


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
