"""One shard's table of contents: a single pass over a tar that reads headers and decodes nothing."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .captions import CaptionSource
from .images import HEAD_BYTES, IMAGE_EXTENSIONS, image_size
from .locations import open_shard

MEMBERS = ("image", "txt", "json")
Span = tuple[int, int]


class StringColumn:
    """Many strings in two arrays, which a forked worker shares instead of copying."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringColumn:
        """The column of these strings."""
        encoded = [text.encode("utf-8", errors="surrogateescape") for text in strings]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64) if encoded else np.zeros(0, np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @classmethod
    def joined(cls, columns: Sequence[StringColumn]) -> StringColumn:
        """The columns one after the other."""
        shifts = np.cumsum([0, *[len(column.data) for column in columns]])
        ends = [column.ends + shift for column, shift in zip(columns, shifts, strict=False)]
        return cls(np.concatenate([c.data for c in columns]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes().decode("utf-8", errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def take(self, mask: np.ndarray) -> StringColumn:
        """The strings where `mask` is true."""
        starts = np.concatenate([[0], self.ends[:-1]]) if len(self.ends) else self.ends
        lengths = (self.ends - starts)[mask]
        return StringColumn(self.data[np.repeat(mask, self.ends - starts)], np.cumsum(lengths, dtype=np.int64))


@dataclass(frozen=True)
class ShardTable:
    """What is in one shard. Row i is one sample; a span is (offset, size) in the tar, (-1, -1) without that member.

    Shapes: spans (N, 3, 2) int64 in the order of MEMBERS; sizes (N, 2) int32 width and height, (0, 0) when the picture
        or its JSON is unreadable; captioned (N,) bool; `fields` holds the JSON values that filters need.
    """

    keys: StringColumn
    spans: np.ndarray
    sizes: np.ndarray
    captioned: np.ndarray
    fields: StringColumn


def scan_shard(location: str, fields: Sequence[str], captions: CaptionSource) -> ShardTable:
    """The table of one shard.

    Raises:
        ValueError: it cannot be opened, is not a tar, is truncated, or holds no images.
    """
    want_json = bool(fields) or captions.member == "json"
    with open_shard(location) as file:
        samples = _samples(file, location, want_json)
    groups = {key: sample for key, sample in samples.items() if "image" in sample.spans}
    if not groups:
        kinds = sorted({extension for sample in samples.values() for extension in sample.spans})
        raise ValueError(
            f"shard {location!r} holds no images (members: {', '.join(kinds[:8]) or 'none'}); "
            f"pictures end in .{', .'.join(IMAGE_EXTENSIONS[:4])}, …"
        )
    spans = [[sample.spans.get(member, (-1, -1)) for member in MEMBERS] for sample in groups.values()]
    return ShardTable(
        keys=StringColumn.of(groups),
        spans=np.array(spans, np.int64),
        sizes=np.array([(0, 0) if sample.damaged else sample.size for sample in groups.values()], np.int32),
        captioned=np.array([sample.has_caption(captions) for sample in groups.values()], bool),
        fields=StringColumn.of(sample.values(fields) for sample in groups.values()),
    )


@dataclass
class _Sample:
    """One sample while its shard is being read."""

    spans: dict[str, Span]
    rank: int = 1 << 30
    size: tuple[int, int] = (0, 0)
    content: dict[str, Any] | None = None
    damaged: bool = False

    def has_caption(self, captions: CaptionSource) -> bool:
        if captions.member != "json" or self.content is None:
            return captions.member in self.spans and not self.damaged
        try:
            captions.from_content(self.content)
        except ValueError:
            return False
        return True

    def values(self, fields: Sequence[str]) -> str:
        found = {name: self.content[name] for name in fields if name in self.content} if self.content else {}
        return json.dumps(found) if found else ""


def _samples(file: BinaryIO, location: str, want_json: bool) -> dict[str, _Sample]:
    """Every sample by its key. Headers and JSON are read on the way, so that a remote shard is passed once."""
    samples: dict[str, _Sample] = {}
    for name, span in _walk(file, location):
        key, extension = _split(name)
        if not extension:
            continue
        sample = samples.setdefault(key, _Sample({}))
        rank = _image_rank(extension)
        if rank is None:
            sample.spans[extension] = span
            if extension == "json" and want_json:
                _read_json(file, span, sample)
            continue
        if rank == sample.rank:
            raise ValueError(
                f"shard {location!r}: two pictures share the sample key {key!r} (a key ends at the first dot of the "
                "name); rename them, or make the shard with `stable-cascade prepare`"
            )
        if rank < sample.rank:
            sample.rank, sample.spans["image"], sample.size = rank, span, _header_size(file, span)
    return samples


def _read_json(file: BinaryIO, span: Span, sample: _Sample) -> None:
    try:
        content = json.loads(_read(file, span))
    except ValueError:
        content = None
    sample.damaged = not isinstance(content, dict)
    sample.content = None if sample.damaged else content


def _image_rank(extension: str) -> int | None:
    """Preference among a sample's pictures: `jpg` before `png` …, a compound `mask.png` last; None for no picture."""
    if extension in IMAGE_EXTENSIONS:
        return IMAGE_EXTENSIONS.index(extension)
    last = extension.rsplit(".", 1)[-1]
    return len(IMAGE_EXTENSIONS) + IMAGE_EXTENSIONS.index(last) if last in IMAGE_EXTENSIONS else None


def _split(name: str) -> tuple[str, str]:
    """(key, extension) by webdataset's rule: the key ends at the first dot of the file name."""
    folder, base = posixpath.split(name.removeprefix("./"))
    if base.startswith("."):  # hidden files, among them macOS's ._ shadows of pictures
        return "", ""
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _walk(file: BinaryIO, location: str) -> Iterator[tuple[str, Span]]:
    """Name and (offset, size) of every regular file in the tar."""
    start = file.read(6)
    file.seek(0)
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if start.startswith(magic):
            raise ValueError(f"shard {location!r} is compressed with {kind}; unpack it to a plain .tar first")
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, (member.offset_data, member.size)
            end = tar.offset
    except tarfile.ReadError as error:
        if "unexpected end" in str(error):
            raise _truncated(location) from None
        raise ValueError(f"shard {location!r} is not a tar: {error}") from None
    file.seek(end)
    block = file.read(512)
    # A tar ends with empty blocks; tarfile takes a missing end, or a damaged header, for the end in silence.
    if len(block) < 512:
        raise _truncated(location)
    if any(block):
        raise ValueError(f"shard {location!r} is damaged: the header at byte {end} is invalid; copy or make it again")


def _truncated(location: str) -> ValueError:
    return ValueError(f"shard {location!r} is truncated: it ends before the tar's end marker; copy or make it again")


def _header_size(file: BinaryIO, span: Span) -> tuple[int, int]:
    """(width, height), or (0, 0) when the header is unreadable."""
    offset, length = span
    try:
        size = image_size(_read(file, (offset, min(length, HEAD_BYTES))), whole=length <= HEAD_BYTES)
        return size or image_size(_read(file, span)) or (0, 0)
    except ValueError:
        return 0, 0


def _read(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1])
