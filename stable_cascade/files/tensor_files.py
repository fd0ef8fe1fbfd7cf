"""The tensors of safetensors files from anywhere, or one ValueError of one line that names the file."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_cascade import bounds
from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

from .headers import Header, file_type, pickled_tensors, read_header

MAX_NAME = 300
"""Characters of the longest name of a tensor; the longest of the released networks has 80."""


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, mapped and on the CPU, and its metadata.

    Raises:
        ValueError: it does not exist, is no safetensors file, or holds what is no tensor's name or type.
    """
    from safetensors import SafetensorError, safe_open

    header = checked_header(path)
    try:
        with safe_open(str(local_path(path)), "pt") as file:
            return {name: _tensor(file, name, path) for name in header.tensors}, header.metadata
    except SafetensorError as error:
        raise ValueError(f"{quoted(path)} is damaged ({brief(error)}); download it again") from None


def read_weights(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file or of a pickle of tensors, and the metadata, which only the first has.

    Raises:
        ValueError: as `read_tensors` and `pickled_tensors`.
    """
    place = local_path(path)
    if place.suffix == ".safetensors" or file_type(place) != "pickle":
        return read_tensors(place)
    warnings.warn(f"{place.name} is a pickle file; only its tensors are read. Prefer .safetensors", stacklevel=3)
    tensors = pickled_tensors(place)
    check_names(tensors, quoted(path))
    return tensors, {}


def checked_header(path: str | PathLike[str]) -> Header:
    """The header of a file whose names can be printed.

    Raises:
        ValueError: as `read_tensors`.
    """
    header = read_header(path)
    check_names(header.tensors, quoted(path))
    return header


def check_names(names: Iterable[Any], named: str) -> None:
    """Passes when every name could be one of a tensor's; `named` says what has them.

    Raises:
        ValueError: one is no text, empty, too long, or has characters that do not print.
    """
    names = list(names)
    if len(names) > bounds.TENSORS:
        raise ValueError(f"{named} has {len(names):,} tensors; at most {bounds.TENSORS:,} are read")
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ValueError(
                f"{named} has a tensor named {quoted(name, 60)}; names have 1 to {MAX_NAME} printable characters"
            )


def check_kinds(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], named: str) -> None:
    """Passes when every tensor is of floating-point numbers where the expected one of its name is, and only there.

    Raises:
        ValueError: one is not.
    """
    for name, value in tensors.items():
        if value.is_floating_point() != expected[name].is_floating_point():
            own, other = (str(one.dtype).removeprefix("torch.") for one in (value, expected[name]))
            raise ValueError(
                f"{named}: {name} is {own}, and the network has {other}; turn a quantised file into bfloat16 first"
            )


def _tensor(file: Any, name: str, path: str | PathLike[str]) -> Tensor:
    try:
        return file.get_tensor(name)
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:  # types that torch has not
        raise ValueError(f"{quoted(path)}: {name} cannot be read ({brief(error)}); download it again") from None


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
