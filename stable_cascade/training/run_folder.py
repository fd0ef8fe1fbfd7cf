"""A run's folder: which folders in it are the run's own, who holds it, and whether it can be written to.

checkpoint_path/experiment_id/
  step-00001000/  backup-00005000/  final/    what the run writes (see `checkpoints`)
  before-1/                                   what `resume: never` moved aside
  run.lock                                    held by the training that writes here

Nothing that a run did not write is deleted or moved: names have to match to the letter, links stay.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from stable_cascade.config import TrainingSettings
from stable_cascade.training.folders import remove_folder
from stable_cascade.wording import quoted

log = logging.getLogger(__name__)

LOCK = "run.lock"
RECORD = "run.json"

_LONGEST_NAME = ".tmp-old-backup-00000000-0000000"
_UNFINISHED = re.compile(r"\.tmp-(old-)?((step|backup)-\d{8,}|final)-\d+")


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
    try:
        import fcntl
    except ImportError:
        yield
        return
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
