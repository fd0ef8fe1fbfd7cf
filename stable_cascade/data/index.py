"""What there is to train on: every sample's place and size, found once, so that reading is random access."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .captions import CaptionSource, caption_source
from .filters import Filter, apply_filters, parse_filters
from .index_cache import load_table, save_table, table_path
from .locations import ByteReader, shard_locations, shard_stamp
from .shards import ShardTable, StringColumn, scan_shard

if TYPE_CHECKING:
    from .stream import SampleStream

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where an index reads its samples from."""

    def key(self, index: int) -> str:
        """The sample's name in messages."""

    def read(self, index: int) -> tuple[bytes, str]:
        """The picture file and the caption.

        Raises:
            ValueError, OSError: they cannot be read.
        """

    def identity(self) -> bytes:
        """What tells these samples from others: all names in their order."""


@dataclass(frozen=True)
class IndexReport:
    """How many samples were found, and why others are not used."""

    found: int
    shards: int = 0
    unreadable: int = 0
    unreadable_keys: tuple[str, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    uncaptioned: int = 0

    def __str__(self) -> str:
        parts = [f"{self.found:,} samples" + (f" in {self.shards:,} shards" if self.shards else "")]
        if self.unreadable:
            parts.append(f"{self.unreadable:,} unreadable (for example {', '.join(self.unreadable_keys[:3])})")
        parts += [f"{count:,} rejected by {name}" for name, count in self.rejected.items()]
        if self.uncaptioned:
            parts.append(f"{self.uncaptioned:,} without a caption")
        return ", ".join(parts)


@dataclass(frozen=True)
class SampleIndex:
    """The usable samples: sizes after EXIF rotation, and a source that reads each of them at random.

    Shapes: widths, heights (N,) int32.
    """

    source: Source
    widths: np.ndarray
    heights: np.ndarray
    report: IndexReport
    max_broken_share: float = 0.1

    def __len__(self) -> int:
        return len(self.widths)

    def key(self, index: int) -> str:
        """The sample's name, such as `shard.tar/0001`."""
        return self.source.key(index)

    def read(self, index: int) -> tuple[bytes, str]:
        """The picture file and the caption of one sample."""
        return self.source.read(index)

    @property
    def fingerprint(self) -> str:
        """A hash of names and sizes: equal when the same samples are there in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.widths.astype("<i4").tobytes() + self.heights.astype("<i4").tobytes())
        digest.update(self.source.identity())
        return digest.hexdigest()


class ShardSource:
    """Samples in tars, read by (offset, size)."""

    def __init__(
        self,
        locations: Sequence[str],
        shard_numbers: np.ndarray,
        tables: Sequence[ShardTable],
        captions: CaptionSource,
        reader: ByteReader,
    ):
        self.locations = list(locations)
        self.names = _short_names(locations)
        self.shard_numbers = shard_numbers
        self.keys = StringColumn.joined([table.keys for table in tables])
        self.spans = np.concatenate([table.spans for table in tables])
        self.captioned = np.concatenate([table.captioned for table in tables])
        self.captions = captions
        self.reader = reader

    def key(self, index: int) -> str:
        """`shard.tar/0001`."""
        return f"{self.names[self.shard_numbers[index]]}/{self.keys[index]}"

    def identity(self) -> bytes:
        """All names in their order."""
        names = "\n".join(self.names).encode("utf-8", errors="surrogateescape")
        return names + self.shard_numbers.tobytes() + self.keys.ends.tobytes() + self.keys.data.tobytes()

    def read(self, index: int) -> tuple[bytes, str]:
        """The picture file and the caption ('' where the index found none)."""
        wanted = [self.spans[index, 0]]
        if self.captioned[index]:
            wanted.append(self.spans[index, 1 if self.captions.member == "txt" else 2])
        spans = [(int(offset), int(size)) for offset, size in wanted]
        image, *caption = self.reader.read(self.locations[self.shard_numbers[index]], spans)
        return image, self.captions.from_bytes(caption[0]) if caption else ""


def _short_names(locations: Sequence[str]) -> list[str]:
    """File names of the shards, with as many folders before them as it takes to tell them apart."""
    parts = [location.replace("\\", "/").split("/") for location in locations]
    depth = 1
    while len({tuple(part[-depth:]) for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def index_samples(
    webdataset_path: str | Iterable[str] | None = None,
    *,
    dataset_name: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    streaming: bool = False,
    dataset_filters: Iterable[Sequence[str]] | None = None,
    captions_getter: str | Sequence[str] | None = None,
    max_broken_share: float = 0.1,
    cache_dir: str | None = None,
    allow_missing_captions: bool = False,
) -> SampleIndex | SampleStream:
    """The samples to train on, from shards or from a Hugging Face dataset.

    Args:
        webdataset_path: shards, in the forms that `shard_locations` lists.
        dataset_name: a dataset of the hub or a local folder, instead of shards.
        image_column: the dataset's column of pictures.
        caption_column: its column of captions.
        streaming: read the dataset in order without downloading it; the result is then a `SampleStream`.
        dataset_filters: pairs such as ['aesthetic_score', 'lambda s: s > 4.5'] over JSON keys (columns of a dataset).
        captions_getter: where shards hold the caption; default the .txt member.
        max_broken_share: how large a share of unreadable samples is accepted.
        cache_dir: where scanned shards are remembered; default `~/.cache/stable_cascade/index`.
        allow_missing_captions: use '' where a caption is missing instead of stopping.

    Raises:
        ValueError: nothing usable is there; the message says what is wrong with which file or setting.
    """
    filters = parse_filters(dataset_filters)
    captions = caption_source(captions_getter)
    if (webdataset_path is None) == (dataset_name is None):
        given = "both" if dataset_name else "neither"
        raise ValueError(f"give either webdataset_path or dataset_name; {given} of them is set")
    if not 0 <= max_broken_share <= 1:
        raise ValueError(f"max_broken_share {max_broken_share} must lie in [0, 1]")
    if dataset_name is not None:
        from .hub import HubColumns, index_dataset, stream_dataset

        columns = HubColumns(image_column, caption_column, allow_missing_captions)
        open_dataset = stream_dataset if streaming else index_dataset
        return open_dataset(dataset_name, columns, filters, max_broken_share)
    assert webdataset_path is not None
    locations = shard_locations(webdataset_path)
    tables = _tables(locations, filters, captions, cache_dir)
    return _select(locations, tables, filters, captions, (max_broken_share, allow_missing_captions))


def _tables(
    locations: Sequence[str], filters: Sequence[Filter], captions: CaptionSource, cache_dir: str | None
) -> list[ShardTable]:
    fields = sorted({item.key for item in filters})

    def table(location: str) -> ShardTable:
        size, version = shard_stamp(location)
        path = table_path(cache_dir, (location, size, version, fields, captions.name))
        known = load_table(path)
        if known is None:
            known = scan_shard(location, fields, captions)
            save_table(path, known)
        return known

    with ThreadPoolExecutor(max_workers=min(16, len(locations))) as pool:  # the order of `map` is that of the shards
        return list(pool.map(table, locations))


def _select(
    locations: Sequence[str],
    tables: Sequence[ShardTable],
    filters: Sequence[Filter],
    captions: CaptionSource,
    limits: tuple[float, bool],
) -> SampleIndex:
    """The index of what is readable, passes the filters and has a caption."""
    max_broken_share, allow_missing_captions = limits
    numbers = np.concatenate([np.full(len(table.keys), n, np.int32) for n, table in enumerate(tables)])
    source = ShardSource(locations, numbers, tables, captions, ByteReader())
    sizes = np.concatenate([table.sizes for table in tables])
    readable = sizes[:, 0] > 0
    broken = [source.key(int(index)) for index in np.flatnonzero(~readable)[:10]]
    check_unreadable(int((~readable).sum()), len(sizes), broken, max_broken_share)
    keep = readable.copy()
    rejected: dict[str, int] = {}
    if filters:
        texts = (text for table in tables for text in table.fields)
        rows = ((text, size) for text, size, fine in zip(texts, sizes, readable, strict=True) if fine)
        keep[readable], counts = apply_filters(filters, rows)
        rejected = {f"{item.key}: {item.expression.text}": n for item, n in zip(filters, counts, strict=True)}
    check_kept(int(keep.sum()), len(sizes), rejected)
    uncaptioned = keep & ~source.captioned
    if uncaptioned.any() and not allow_missing_captions:
        example = source.key(int(np.flatnonzero(uncaptioned)[0]))
        raise missing_captions(int(uncaptioned.sum()), int(keep.sum()), example, captions)
    report = IndexReport(
        int(keep.sum()), len(locations), int((~readable).sum()), tuple(broken), rejected, int(uncaptioned.sum())
    )
    if broken:
        log.warning("%s", report)
    source.keys, source.spans = source.keys.take(keep), source.spans[keep]
    source.captioned, source.shard_numbers = source.captioned[keep], numbers[keep]
    return SampleIndex(source, sizes[keep, 0], sizes[keep, 1], report, max_broken_share)


def check_unreadable(broken: int, found: int, keys: Sequence[str], max_broken_share: float) -> None:
    """Passes when few enough of the found samples are unreadable.

    Raises:
        ValueError: too many are, or all.
    """
    if broken and (broken > max_broken_share * found or broken == found):
        raise ValueError(
            f"{broken:,} of {found:,} samples have no readable picture header (for example {', '.join(keys[:3])}), "
            f"more than max_broken_share {max_broken_share}; make the shards again or raise max_broken_share"
        )


def check_kept(kept: int, found: int, rejected: dict[str, int]) -> None:
    """Passes when the filters together leave something.

    Raises:
        ValueError: they leave nothing.
    """
    if not kept:
        counts = "; ".join(f"{name} rejects {count:,}" for name, count in rejected.items())
        raise ValueError(f"dataset_filters leave none of {found:,} samples ({counts}); loosen one")


def missing_captions(count: int, total: int, example: str, captions: Any) -> ValueError:
    """The error for samples without a caption."""
    name = captions.name if isinstance(captions, CaptionSource) else captions
    return ValueError(
        f"{count:,} of {total:,} samples have no caption under captions_getter {name!r}, for example {example}; "
        "name the right member or key, add the captions, or set allow_missing_captions to train them with ''"
    )
