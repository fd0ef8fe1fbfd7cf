"""Tensors by name on the disk: safetensors shards of one folder, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD_BYTES, _SHARD_SECONDS = 64 * 2**20, 30.0
_PART, _ABANDONED_SECONDS = ".part", 3600  # a suffix of its own: glob patterns match names with a leading dot too


def digest(name: str) -> str:
    """The name under which a shard holds a tensor: 128 bits of a hash, so that any text can be a name."""
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Layout:
    """What many tensors of a store share."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class TensorStore:
    """The tensors in the shards of one folder.

    Memory holds 46 bytes for each of them: the hash of its name and the place in its file. A tensor is read from the
    file each time it is asked for, at that place, so that no file stays open and the system's own cache serves what
    is read again.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.refresh()

    def refresh(self) -> None:
        """Takes in the shards that are there now.

        Raises:
            ValueError: one of them is damaged.
        """
        self._files = sorted(self.folder.glob("*.safetensors"))
        layouts: dict[_Layout, int] = {}
        names, columns = [], []
        for number, file in enumerate(self._files):
            for name, layout, offset in _entries(file):
                names.append(name)
                columns.append((number, layouts.setdefault(layout, len(layouts)), offset))
        self._layouts = list(layouts)
        self._names, first = np.unique(np.array(names, dtype="S32"), return_index=True)
        table = np.array(columns, dtype=np.int64).reshape(-1, 3)[first]
        self._file, self._layout, self._offset = (
            table[:, 0].astype(np.int32),
            table[:, 1].astype(np.int16),
            table[:, 2],
        )

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return self._row(name) is not None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that have no tensor here, in their order."""
        return [name for name in names if name not in self]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        sizes = np.array([layout.size for layout in self._layouts], np.int64)
        return int(sizes[self._layout].sum()) if len(self) else 0

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a name, on the CPU.

        Raises:
            KeyError: there is none.
        """
        row = self._row(name)
        if row is None:
            raise KeyError(name)
        layout = self._layouts[self._layout[row]]
        file = self._files[self._file[row]]
        data = np.fromfile(file, np.uint8, count=layout.size, offset=int(self._offset[row]))
        return torch.from_numpy(data).view(layout.dtype).view(layout.shape)

    def _row(self, name: str) -> int | None:
        wanted = np.bytes_(digest(name).encode())
        row = int(np.searchsorted(self._names, wanted))
        return row if row < len(self._names) and self._names[row] == wanted else None


class StoreWriter:
    """Adds tensors to a store's folder; used in a `with` block, whose end writes the last shard.

    A shard appears under its name when it is complete and on the disk. It is written every 64 MB, and every half
    minute, so that a process that is killed loses no more than that.
    """

    def __init__(self, folder: str | os.PathLike[str], *, shard_bytes: int = _SHARD_BYTES):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0
        self._since = time.monotonic()

    def __enter__(self) -> StoreWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        _sweep(self.folder)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.flush()  # after an error too: what was computed until then is good

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors by name; they are copied to the CPU."""
        for name, tensor in tensors.items():
            copied = tensor.detach().to("cpu", copy=True).contiguous()
            self._waiting[digest(name)] = copied
            self._bytes += copied.nbytes
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since > _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one shard."""
        if self._waiting:
            write_shard(self.folder, self._waiting)
        self._waiting, self._bytes, self._since = {}, 0, time.monotonic()


def write_shard(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """One shard with these tensors, named after their names, so that the same ones written twice are one file."""
    from safetensors.torch import save_file

    target = folder / f"{digest(' '.join(sorted(tensors)))}.safetensors"
    temporary = folder / f"{target.stem}-{os.getpid()}{_PART}"
    save_file(dict(tensors), temporary)
    _sync(temporary)
    os.replace(temporary, target)
    _sync(folder)
    return target


def _entries(file: Path) -> list[tuple[str, _Layout, int]]:
    """Name, layout and place of every tensor of a shard, from its header."""
    damaged = f"cache file {file} is damaged; delete it, and what it held is computed again"
    size = file.stat().st_size
    with file.open("rb") as opened:
        # A length that the file can hold, then the table of tensors.
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(damaged)
        try:
            header = json.loads(opened.read(length))
            entries, end = [], 0
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, stop = entry["data_offsets"]
                    entries.append((name, _Layout(_DTYPES[entry["dtype"]], tuple(entry["shape"])), 8 + length + begin))
                    end = max(end, stop)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(damaged) from None
    # A shard that was cut short ends before its last tensor.
    if size != 8 + length + end:
        raise ValueError(damaged)
    return entries


def _sweep(folder: Path) -> None:
    """Deletes what killed writers left; a file younger than an hour may still be being written."""
    for path in folder.glob(f"*{_PART}"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            pass  # another process was faster


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
