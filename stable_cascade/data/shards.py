"""One shard's table of contents: a single pass over a tar that reads headers and decodes nothing."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from stable_cascade import bounds
from stable_cascade.wording import quoted

from .captions import CaptionSource, json_object, text_of
from .images import IMAGE_EXTENSIONS, image_size, looks_like_image, plain_size
from .locations import ShardFailure, open_shard
from .samples import HEAD_BYTES, TAIL_BYTES, content_hash, content_hash_of_parts
from .tars import Span, end_of, tar_members

MEMBERS = ("image", "txt", "json", "mask")

_TEXTS = ("txt", "json", "cls", "id", "index", "inx")
_OTHER_NAME = 1 << 20
"""Rank of an image that only its bytes tell: after all that are called so."""


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

    Shapes: spans (N, 4, 2) int64 in the order of MEMBERS; sizes (N, 2) int32 width and height, (0, 0) when the image
        or its JSON is unreadable; hashes (N, 3) uint64 of the contents of image, mask and caption member (0:
        none); captioned (N,) bool; `fields` holds the JSON values that filters need, `faults` why a sample cannot be
        used, '' where it can.
    """

    keys: StringColumn
    spans: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    captioned: np.ndarray
    fields: StringColumn
    faults: StringColumn


def scan_shard(location: str, fields: Sequence[str], captions: CaptionSource) -> ShardTable:
    """The table of one shard.

    Raises:
        ShardFailure: it is truncated or damaged, or a remote one kept failing.
        ValueError: it cannot be opened, is not a tar, or holds no images.
    """
    # Group the members by key.
    want_json = bool(fields) or captions.member == "json"
    with open_shard(location) as file:
        samples = _samples(file, location, want_json, captions.member)
    groups = {key: sample for key, sample in samples.items() if sample.counts(captions.member)}
    if not any("image" in sample.spans for sample in groups.values()):
        kinds = sorted({extension for sample in samples.values() for extension in sample.spans})
        raise ValueError(
            f"shard {location!r} holds no images (members: {', '.join(kinds[:8]) or 'none'}); "
            f"images end in .{', .'.join(IMAGE_EXTENSIONS[:4])}, …"
        )
    # One column per property, for a million samples in little memory.
    spans = [[sample.spans.get(member, (-1, -1)) for member in MEMBERS] for sample in groups.values()]
    return ShardTable(
        keys=StringColumn.of(groups),
        spans=np.array(spans, np.int64),
        sizes=np.array([(0, 0) if sample.fault else sample.size for sample in groups.values()], np.int32),
        hashes=np.array([(sample.hash, sample.mask_hash, sample.text_hash) for sample in groups.values()], np.uint64),
        captioned=np.array([sample.has_caption(captions) for sample in groups.values()], bool),
        fields=StringColumn.of(sample.values(fields) for sample in groups.values()),
        faults=StringColumn.of(sample.fault for sample in groups.values()),
    )


def shard_samples(
    file: BinaryIO, location: str, fields: Sequence[str], captions: CaptionSource, start: int = 0
) -> Iterator[tuple[str, _Sample, int]]:
    """Every sample whose members lie together, in order: key, sample, and the byte at which the next one begins.

    As webdataset groups them. Of a shard that ends early, what came before is given first.

    Raises:
        ShardFailure: it is truncated or damaged, or a remote one kept failing.
        ValueError: it is not a tar.
    """
    wanted = {captions.member, "json"} if fields else {captions.member}
    key, sample, end = "", _Sample({}), start
    failure: Exception | None = None
    try:
        for name, span in tar_members(file, location, start=start):
            own, extension = _split(name)
            # With another key the sample before is complete.
            if extension and own != key:
                if sample.counts(captions.member):
                    _tell_dotted({}, key, sample, captions.member)
                    yield key, sample, end
                key, sample = own, _Sample({})
            if extension:
                _take(sample, key, extension, file, span, location, wanted)
            end = end_of(span)
    except ValueError as error:
        failure = error
    # The last one, and then what stopped it.
    if sample.counts(captions.member):
        _tell_dotted({}, key, sample, captions.member)
        yield key, sample, end
    if failure is not None:
        raise failure


@dataclass
class _Sample:
    """One sample while its shard is being read."""

    spans: dict[str, Span]
    rank: int = 1 << 30
    mask_rank: int = 1 << 30
    size: tuple[int, int] = (0, 0)
    hash: int = 0
    mask_hash: int = 0
    text_hash: int = 0
    content: dict[str, Any] | None = None
    fault: str = ""
    compound: set[str] = field(default_factory=set)
    """The extensions of its images that have a dot, such as `thumb.png`."""
    lost: bool = False
    """It has an image and a caption, of which the tar's names or kinds of members let nothing be read."""

    def counts(self, caption_member: str) -> bool:
        """Whether it was meant to be trained: it has an image, or a caption whose image is missing."""
        if "image" not in self.spans and caption_member in self.spans:
            self.fault = self.fault or f"it has a caption and no image ({', '.join(map(quoted, self.spans))})"
            return True
        return self.lost or "image" in self.spans

    def has_caption(self, captions: CaptionSource) -> bool:
        if captions.member != "json" or self.content is None:
            return captions.member in self.spans and not self.fault
        try:
            captions.from_content(self.content)
        except ValueError:
            return False
        return True

    def values(self, fields: Sequence[str]) -> str:
        found = {name: self.content[name] for name in fields if name in self.content} if self.content else {}
        return json.dumps(found) if found else ""


def _samples(file: BinaryIO, location: str, want_json: bool, caption_member: str) -> dict[str, _Sample]:
    """Every sample by its key. Headers and texts are read on the way, so that a remote shard is passed once."""
    samples: dict[str, _Sample] = {}
    others: list[tuple[str, str]] = []
    hidden: list[str] = []
    wanted = {caption_member, "json"} if want_json else {caption_member}
    for name, span in tar_members(file, location, others):
        key, extension = _split(name)
        if extension:
            _take(samples.setdefault(key, _Sample({})), key, extension, file, span, location, wanted)
        else:
            hidden.append(name)
    # Say which members are of no use.
    for name, kind in others:
        _tell_other(samples, name, kind, caption_member)
    for key, sample in list(samples.items()):
        _tell_dotted(samples, key, sample, caption_member)
    _tell_hidden(samples, hidden, caption_member)
    return samples


def _take(
    sample: _Sample, key: str, extension: str, file: BinaryIO, span: Span, location: str, wanted: Collection[str]
) -> None:
    """Adds a member to its sample; the texts of the `wanted` extensions are read."""
    # A key ends at the first dot; what comes behind it is the kind of member.
    rank = _image_rank(extension)
    mask_rank = _mask_rank(extension)
    # Masks, the best kind where there are several.
    if mask_rank is not None:
        if mask_rank < sample.mask_rank:
            sample.mask_rank, sample.spans["mask"] = mask_rank, span
            sample.mask_hash = _header(file, span)[1]
        return
    # Images under other names are known by their first bytes; the rest is text or ignored.
    if rank is None and extension not in _TEXTS and looks_like_image(_read(file, (span[0], min(span[1], 32)))):
        rank = _OTHER_NAME
    if rank is None:
        sample.spans[extension] = span
        if extension in wanted:
            _read_text(file, span, sample, extension)
        return
    # Images, the best kind where there are several.
    if rank == sample.rank:
        raise ValueError(
            f"shard {location!r}: two images share the sample key {key!r} (a key ends at the first dot of the "
            "name); rename them, or make the shard with `stable-cascade prepare`"
        )
    if rank < sample.rank:
        sample.rank, sample.spans["image"] = rank, span
        sample.size, sample.hash, fault = _header(file, span)
        sample.fault = sample.fault or fault
    if extension not in IMAGE_EXTENSIONS:
        sample.compound.add(extension)


def _tell_other(samples: dict[str, _Sample], name: str, kind: str, caption_member: str) -> None:
    """An image or a caption that is a link or a device is its sample's fault."""
    key, extension = _split(name)
    image = bool(extension) and _image_rank(extension) is not None and _mask_rank(extension) is None
    if not image and extension != caption_member:
        return
    sample = samples.setdefault(key, _Sample({}))
    if ("image" if image else caption_member) in sample.spans:
        return
    sample.lost = sample.lost or image
    sample.fault = sample.fault or f"its {'image' if image else 'caption'} is {kind} in the tar, not a file"


def _tell_dotted(samples: dict[str, _Sample], key: str, sample: _Sample, caption_member: str) -> None:
    """Images with captions whose names have another dot: `a.v2.jpg` and `a.v2.txt` belong to the sample `a`."""
    ending = f".{caption_member}"
    captions = {extension.removesuffix(ending) for extension in sample.spans if extension.endswith(ending)}
    if captions and caption_member not in sample.spans:
        sample.fault = sample.fault or f"its caption is not found, because {_DOTTED}"
        return
    for extension in sorted(sample.compound):
        middle, _, last = extension.rpartition(".")
        if middle in captions and last in IMAGE_EXTENSIONS:
            samples.setdefault(f"{key}.{middle}", _Sample({}, fault=f"it is not found, because {_DOTTED}", lost=True))


_DOTTED = (
    "a key ends at the first dot of a name and this one has more; `stable-cascade prepare` makes shards of files with "
    "such names"
)


def _tell_hidden(samples: dict[str, _Sample], names: Sequence[str], caption_member: str) -> None:
    """Pairs of image and caption whose names begin with a dot; the `._` shadows of macOS are nothing."""
    found: dict[str, set[str]] = {}
    for name in names:
        stem, dot, extension = name.rpartition(".")
        if dot and not posixpath.basename(name).startswith("._"):
            found.setdefault(stem, set()).add(extension.lower())
    for stem, extensions in found.items():
        if caption_member in extensions and extensions & set(IMAGE_EXTENSIONS):
            samples[stem] = _Sample({}, fault="its name begins with a dot, so it is hidden; rename it", lost=True)


def _read_text(file: BinaryIO, span: Span, sample: _Sample, kind: str) -> None:
    """The hash of a member with text, and of JSON its content; a text that cannot be used is the sample's fault."""
    try:
        if span[1] > bounds.JSON_FILE:
            raise ValueError(f"its {kind} member has {span[1]:,} bytes; at most {bounds.JSON_FILE:,} are read")
        data = _read(file, span)
        sample.text_hash = content_hash(data)
        if kind == "json":
            sample.content = json_object(data)
        else:
            text_of(data)
    except ShardFailure:
        raise
    except ValueError as error:
        sample.fault = sample.fault or str(error)


def _image_rank(extension: str) -> int | None:
    """Preference among a sample's images: `jpg` before `png` …, a compound `thumb.png` last; None for no image."""
    if extension in IMAGE_EXTENSIONS:
        return IMAGE_EXTENSIONS.index(extension)
    last = extension.rsplit(".", 1)[-1]
    return len(IMAGE_EXTENSIONS) + IMAGE_EXTENSIONS.index(last) if last in IMAGE_EXTENSIONS else None


def _mask_rank(extension: str) -> int | None:
    """Preference among a sample's masks, `mask.jpg` before `mask.png` …; None for no mask."""
    first, _, last = extension.partition(".")
    return IMAGE_EXTENSIONS.index(last) if first == "mask" and last in IMAGE_EXTENSIONS else None


def _split(name: str) -> tuple[str, str]:
    """(key, extension) by webdataset's rule: the key ends at the first dot of the file name."""
    folder, base = posixpath.split(name.removeprefix("./"))
    if base.startswith("."):  # hidden files, among them macOS's ._ shadows of images
        return "", ""
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _header(file: BinaryIO, span: Span) -> tuple[tuple[int, int], int, str]:
    """(width, height), (0, 0) when the header is unreadable, the hash of the content, and what is wrong."""
    offset, length = span
    if length > bounds.IMAGE_FILE:
        return (0, 0), 0, f"its image has {length:,} bytes; at most {bounds.IMAGE_FILE:,} are read"
    # The head for the size, the tail for the hash: enough to know a file by.
    head = _read(file, (offset, min(length, HEAD_BYTES)))
    tail = _read(file, (offset + length - TAIL_BYTES, TAIL_BYTES)) if length > HEAD_BYTES else b""
    hashed = content_hash_of_parts(length, head, tail)
    plain = plain_size(head)
    # The plain reader first; Pillow where it cannot tell, if need be with the whole file.
    try:
        if plain is not None:
            bounds.check_shape(*plain)
            return plain, hashed, ""
        size = image_size(head, whole=length <= HEAD_BYTES)
        return size or image_size(_read(file, span)) or (0, 0), hashed, ""
    except ShardFailure:
        raise
    except ValueError as error:
        return (0, 0), hashed, str(error)


def _read(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1])
