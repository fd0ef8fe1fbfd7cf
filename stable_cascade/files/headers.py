"""What a weights file says about itself before any tensor is read: names, types, shapes, metadata."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from stable_cascade import bounds
from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

MAX_HEADER = 16 * 2**20
"""The largest header that is read; those of the released files have some hundred thousand bytes."""
MAX_BRACKETS = 1_000_000
"""Lists and objects in a header; a network has two lists and one object a tensor."""
MAX_TENSORS = 200_000
MAX_RANK = 16

DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8), "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6), "F4": ("float4", 4), "C64": ("complex64", 64), "I64": ("int64", 64),
    "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8), "U64": ("uint64", 64), "U32": ("uint32", 32),
    "U16": ("uint16", 16), "U8": ("uint8", 8), "BOOL": ("bool", 8),
}  # fmt: skip
"""Type in a safetensors header -> torch's name and bits."""

_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"GGUF", "a GGUF file; get the .safetensors file of this model"),
    (b"\x89PNG", "a PNG image, no weights"),
    (b"\xff\xd8\xff", "a JPEG image, no weights"),
    (b"<!DOCTYPE", "a web page, saved in place of the file; download the file itself"),
    (b"<!doctype", "a web page, saved in place of the file; download the file itself"),
    (b"<html", "a web page, saved in place of the file; download the file itself"),
)
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorInfo:
    """Type (torch's name) and shape of a tensor that was not read."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Tensors by name, the metadata, and the size of the whole file in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def file_type(path: str | PathLike[str]) -> str:
    """`pickle`, `tar`, or `safetensors` where the beginning tells nothing else.

    Raises:
        ValueError: there is no such file, or it is of a known kind that holds no weights.
    """
    place = local_path(path)
    if not place.is_file():
        reason = "is a folder" if place.is_dir() else "does not exist"
        raise ValueError(f"{quoted(path)} {reason}; give the path of a weights file")
    with place.open("rb") as file:
        start = file.read(512)
    if start.startswith(PICKLED):
        return "pickle"
    if start[257:262] == b"ustar":
        return "tar"
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning):
            raise ValueError(f"{quoted(path)} is {what}")
    return "safetensors"


def read_header(path: str | PathLike[str]) -> Header:
    """The header of a safetensors file; no tensor is read, and a damaged header takes bounded time and memory.

    Raises:
        ValueError: there is no such file, it is no safetensors file, or its header does not fit the file.
    """
    name, place = quoted(path), local_path(path)
    kind = file_type(place)
    if kind != "safetensors":
        raise ValueError(f"{name} is a {kind} file, no safetensors file")
    # Read the header's length, and so much of the file only if it can be true.
    with place.open("rb") as file:
        size = place.stat().st_size
        if size < 10:
            raise ValueError(f"{name} has {size} bytes, too few for a safetensors file; download it again")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{name} is damaged or no safetensors file: its header would have {length:,} bytes, the file has "
                f"{size:,} (at most {MAX_HEADER:,} are read); download it again"
            )
        text = file.read(length)
    # Check every entry against the size of the file.
    entries = _parsed(text, name)
    metadata = _metadata(entries.pop("__metadata__", {}), name)
    return Header(_tensors(entries, size - 8 - length, name), metadata, size)


def _parsed(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object of a header.

    Raises:
        ValueError: it is none, or larger than any network needs.
    """
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > MAX_BRACKETS:
        raise ValueError(f"{name} has a header with {brackets:,} brackets; at most {MAX_BRACKETS:,} are read")
    try:
        entries = json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else brief(error, 80)
        raise ValueError(
            f"{name} is damaged in its header, or no .safetensors file ({reason}); get it again"
        ) from None
    if not isinstance(entries, dict):
        raise ValueError(f"{name} is damaged in its header: no JSON object; download it again")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{name} has {len(entries):,} tensors; at most {MAX_TENSORS:,} are read")
    return entries


def _metadata(values: Any, name: str) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{name} is damaged in its header: its metadata is no table of texts; download it again")
    return values


def _tensors(entries: dict[str, Any], size: int, name: str) -> dict[str, TensorInfo]:
    """The tensors of a header, after checking that they fill the file's `size` bytes without gaps."""
    # Every tensor takes as many bytes as its shape and type say.
    found, places = {}, []
    for key, entry in entries.items():
        dtype, shape, begin, end = _entry(key, entry, name)
        label, bits = DTYPES[dtype]
        if (end - begin) * 8 != math.prod(shape) * bits:
            raise ValueError(
                f"{name} is damaged in its header: tensor {quoted(key)} of {math.prod(shape):,} {label} values takes "
                f"{end - begin:,} bytes; download it again"
            )
        found[key] = TensorInfo(label, shape)
        places.append((begin, end))
    # Together they fill the file without gaps or overlaps.
    reached = 0
    for begin, end in sorted(places):
        if begin != reached:
            raise ValueError(f"{name} is damaged in its header: its tensors overlap or leave gaps; download it again")
        reached = end
    if reached != size:
        problem = "cut short" if reached > size else "it goes on behind its last tensor"
        raise ValueError(
            f"{name} is damaged, {problem}: its header tells of {reached:,} bytes of tensors, there are {size:,}; "
            "download it again"
        )
    return found


def _entry(key: str, entry: Any, name: str) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and place of one tensor.

    Raises:
        ValueError: one of them is missing or senseless.
    """
    if isinstance(entry, dict):
        dtype, shape, place = (entry.get(part, "") for part in ("dtype", "shape", "data_offsets"))
        sound = isinstance(dtype, str) and dtype in DTYPES
        sound = sound and _whole(shape) and len(shape) <= MAX_RANK
        if sound and _whole(place) and len(place) == 2 and place[0] <= place[1]:
            return str(dtype), tuple(shape), place[0], place[1]
    raise ValueError(
        f"{name} is damaged in its header: tensor {quoted(key)} is not described by a known dtype, a shape and two "
        "data_offsets; download it again"
    )


def _whole(values: Any) -> bool:
    """Whether this is a list of counts that a file can have."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_pickled(path: str | PathLike[str]) -> dict[str, TensorInfo]:
    """Names, types and shapes of the tensors in a pickle file, which are mapped and not read; nothing in it is run.

    Raises:
        ValueError: it holds no state dict, or things that are no tensors.
    """
    return {
        key: TensorInfo(str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for key, value in pickled_tensors(path).items()
    }


def pickled_tensors(path: str | PathLike[str]) -> dict[str, Any]:
    """The state dict of a pickle file, mapped into memory; only tensors and plain containers are accepted.

    Raises:
        ValueError: it holds no state dict, or things that are no tensors.
    """
    import torch

    _check_archive(local_path(path))
    try:
        content = torch.load(local_path(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes its reader say
        raise ValueError(
            f"{quoted(path)} is a pickle file that cannot be read safely ({brief(error, 80)}); get .safetensors"
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):  # a token of A1111
        rows = list(content["string_to_param"].values())
        content = {str(content.get("name") or "emb_params"): rows[0]} if len(rows) == 1 else {}
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{quoted(path)} is a pickle file that holds no state dict; give a file of network weights")
    for name, value in content.items():
        if value.layout != torch.strided or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(f"{quoted(path)}: {quoted(name, 60)} claims more values than the file has")
    return content


def _check_archive(path: Path) -> None:
    """Passes when a pickle file is what torch.save writes: an archive whose entries are stored as they are.

    Compressed entries are refused, since some kilobytes of them can hold gigabytes of instructions.

    Raises:
        ValueError: it is none.
    """
    import zipfile

    # An archive that opens, with a bounded number of entries.
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        raise ValueError(
            f"{quoted(path)} is a damaged pickle file, or one of a torch before 1.6; get the .safetensors file"
        ) from None
    if len(entries) > bounds.PICKLE_ENTRIES:
        raise ValueError(f"{quoted(path)} has {len(entries):,} entries; at most {bounds.PICKLE_ENTRIES:,} are read")
    # Stored entries only: a compressed one could unpack to any size.
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        entry = quoted(packed.filename, 60)
        raise ValueError(f"{quoted(path)} has the compressed entry {entry}; torch.save writes none")
    program = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if program > MAX_HEADER:
        raise ValueError(f"{quoted(path)} has {program:,} bytes of pickled names; at most {MAX_HEADER:,} are read")
