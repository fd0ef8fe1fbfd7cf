"""Files and folders that appear under their name only when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from stable_cascade.wording import brief, quoted

_OURS = ("config.json", "model_index.json", "*.safetensors", "*/config.json")


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Passes when something may be written under this name.

    Raises:
        ValueError: it exists and may not be replaced, or it is what is read, or around it.
    """
    real, origin = target.resolve(), source.resolve()
    if real == origin or real in origin.parents:
        raise ValueError(f"{quoted(target)} is what is read, or holds it; name another place")
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{quoted(target)} exists; name another place, or add --overwrite")
    known = target.is_file() or any(next(target.glob(pattern), None) for pattern in _OURS)
    if not known and any(target.iterdir()):
        raise ValueError(f"{quoted(target)} is a folder of other things and is not replaced; name another place")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A name beside `target` to write a file or a folder to, which takes the place of `target` at the end.

    After an error nothing is left of it, and what `target` was stays.

    Raises:
        ValueError: it cannot be written, for want of space for example.
    """
    from safetensors import SafetensorError

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    _remove(temporary)
    try:
        yield temporary
        _sync(temporary)
        if target.is_dir():
            _remove(target)
        os.replace(temporary, target)
    except SafetensorError as error:
        raise ValueError(f"{quoted(target)} cannot be written ({brief(error)}); nothing is left of it") from None
    finally:
        _remove(temporary)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; `format` says that the tensors are torch's, which some readers insist on."""
    from safetensors.torch import save_file

    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode & 0o777  # safetensors makes files that nobody else may read
    save_file(ready, path, {"format": "pt"} | dict(metadata))
    path.chmod(mode)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _sync(place: Path) -> None:
    """Waits until a file, or a folder and all in it, is on the disk."""
    for path in [*(place.rglob("*") if place.is_dir() else ()), place]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
