"""Finding the samples to train on: every one's place and size, once, so that reading is random access."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stable_cascade.redaction import bare_address
from stable_cascade.wording import printable

from .captions import CaptionSource, caption_source
from .filters import Filter, apply_filters, parse_filters
from .hf_datasets import index_dataset, stream_dataset
from .locations import ByteReader, ShardFailure, is_remote, shard_locations, shard_stamp
from .samples import IndexReport, SampleIndex, check_kept, check_masks, check_unreadable, missing_captions, with_masks
from .shard_lanes import ShardLanes
from .shards import MEMBERS, ShardTable, StringColumn, scan_shard
from .stream import HubColumns, SampleStream

log = logging.getLogger(__name__)


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
        return printable(f"{self.names[self.shard_numbers[index]]}/{self.keys[index]}")

    def identity(self) -> bytes:
        """All names in their order."""
        names = "\n".join(self.names).encode("utf-8", errors="surrogateescape")
        return names + self.shard_numbers.tobytes() + self.keys.ends.tobytes() + self.keys.data.tobytes()

    def read(self, index: int) -> tuple[bytes, str]:
        """The image file and the caption ('' where the index found none)."""
        wanted = ["image", self.captions.member] if self.captioned[index] else ["image"]
        image, *caption = self._members(index, wanted)
        return image, self.captions.from_bytes(caption[0]) if caption else ""

    def caption(self, index: int) -> str:
        """The caption alone."""
        if not self.captioned[index]:
            return ""
        return self.captions.from_bytes(self._members(index, [self.captions.member])[0])

    def mask(self, index: int) -> bytes | None:
        """The mask's file; None where the sample has none."""
        return self._members(index, ["mask"])[0] if self.spans[index, MEMBERS.index("mask"), 0] >= 0 else None

    def _members(self, index: int, names: Sequence[str]) -> list[bytes]:
        spans = [tuple(self.spans[index, MEMBERS.index(name)].tolist()) for name in names]
        return self.reader.read(self.locations[self.shard_numbers[index]], spans)


def _short_names(locations: Sequence[str]) -> list[str]:
    """File names of the shards, with as many folders before them as it takes to tell them apart."""
    parts = [bare_address(location).replace("\\", "/").split("/") for location in locations]
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
    streaming: bool | str = False,
    dataset_filters: Iterable[Sequence[str]] | None = None,
    captions_getter: str | Sequence[str] | None = None,
    max_broken_share: float = 0.1,
    cache_dir: str | None = None,
    allow_missing_captions: bool = False,
    masks: bool = False,
    mask_column: str = "mask",
    stream_lanes: int = 64,
    shuffle_buffer: int = 1024,
) -> SampleIndex | SampleStream:
    """The samples to train on, from shards or from a Hugging Face dataset.

    Args:
        webdataset_path: shards, in the forms that `shard_locations` lists.
        dataset_name: a dataset of the hub or a local folder, instead of shards.
        image_column: the dataset's column of images.
        caption_column: its column of captions.
        streaming: read while training instead of looking at everything first; the result is then a `SampleStream`.
            "auto" does so for shards that would take long to look at.
        dataset_filters: pairs such as ['aesthetic_score', 'lambda s: s > 4.5'] over JSON keys (columns of a dataset).
        captions_getter: where shards hold the caption; default the .txt member.
        max_broken_share: how large a share of unreadable samples is accepted.
        cache_dir: where scanned shards are remembered; default `~/.cache/stable_cascade/index`.
        allow_missing_captions: use '' where a caption is missing instead of stopping.
        masks: also read the masks: the member KEY.mask.png (or .mask.jpg, .mask.webp) of shards, `mask_column` of a
            dataset. White counts fully; a sample without one counts fully everywhere.
        mask_column: the dataset's column of masks.
        stream_lanes: how many shards are read at a time, over all processes; of fewer shards a divisor of it.
        shuffle_buffer: samples that all lanes together hold to draw from.

    Raises:
        ValueError: nothing usable is there; the message says what is wrong with which file or setting.
    """
    # Check the arguments.
    filters = parse_filters(dataset_filters)
    captions = caption_source(captions_getter)
    if (webdataset_path is None) == (dataset_name is None):
        given = "both" if dataset_name else "neither"
        raise ValueError(f"give either webdataset_path or dataset_name; {given} of them is set")
    if not 0 <= max_broken_share <= 1:
        raise ValueError(f"max_broken_share {max_broken_share} must lie in [0, 1]")
    # A Hugging Face dataset.
    if dataset_name is not None:
        columns = HubColumns(image_column, caption_column, allow_missing_captions, mask_column if masks else None)
        if streaming is not True:
            return index_dataset(dataset_name, columns, filters, max_broken_share)
        sizes = {"lanes": stream_lanes, "shuffle_buffer": shuffle_buffer}
        return stream_dataset(dataset_name, columns, filters, max_broken_share, **sizes)
    # Shards: find them, scan them or load their tables, and join what can be used.
    assert webdataset_path is not None
    locations = shard_locations(webdataset_path)
    why = long_to_index(locations) if streaming == "auto" else ""
    if why or streaming is True:
        fields = sorted({item.key for item in filters})
        lanes = ShardLanes(locations, _short_names(locations), fields, captions, allow_missing_captions, masks)
        stream = SampleStream(
            lanes, len(locations), stream_lanes, shuffle_buffer, max_broken_share, tuple(filters), masks, why
        )
        stream.first()
        return stream
    found = _tables(locations, filters, captions, cache_dir)
    locations, tables, failures = _without_failures(locations, found, max_broken_share)
    limits = _Limits(max_broken_share, allow_missing_captions, masks, failures)
    return _select(locations, tables, filters, captions, limits)


_MANY_REMOTE, _MANY, _LARGE = 64, 2000, 500 * 2**30


def long_to_index(locations: Sequence[str]) -> str:
    """Why a look at every shard would take long; '' where it does not.

    Of a remote shard every byte is fetched for it, of a local one the headers.
    """
    remote = sum(map(is_remote, locations))
    if remote > _MANY_REMOTE:
        return f"auto: {remote:,} remote shards; streaming: false would read all of them first"
    if len(locations) > _MANY:
        return f"auto: {len(locations):,} shards; streaming: false would look at all of them first"
    size = sum(os.path.getsize(location) for location in locations if not is_remote(location))
    if size > _LARGE:
        return f"auto: {size / 2**30:,.0f} GiB; streaming: false would look at all of it first"
    return ""


def _tables(
    locations: Sequence[str], filters: Sequence[Filter], captions: CaptionSource, cache_dir: str | None
) -> list[ShardTable | ShardFailure]:
    """The table of each shard, or why it cannot be used."""
    fields = sorted({item.key for item in filters})

    def table(location: str) -> ShardTable | ShardFailure:
        try:
            size, version = shard_stamp(location)
            path = table_path(cache_dir, (location, size, version, fields, captions.name))
            known = load_table(path)
            if known is None:
                known = scan_shard(location, fields, captions)
                save_table(path, known)
            return known
        except ShardFailure as failure:
            return failure

    with ThreadPoolExecutor(max_workers=min(16, len(locations))) as pool:  # the order of `map` is that of the shards
        return list(pool.map(table, locations))


def _without_failures(
    locations: Sequence[str], tables: Sequence[ShardTable | ShardFailure], max_broken_share: float
) -> tuple[list[str], list[ShardTable], tuple[str, ...]]:
    """The usable shards, their tables, and what is wrong with the others.

    Raises:
        ValueError: more than max_broken_share of the shards fail, or all.
    """
    failures = [str(table) for table in tables if isinstance(table, ShardFailure)]
    if failures and (len(failures) > max_broken_share * len(tables) or len(failures) == len(tables)):
        more = f"{len(failures):,} of {len(tables):,} shards fail, more than max_broken_share {max_broken_share}; "
        raise ValueError((more if len(tables) > 1 else "") + failures[0])
    for failure in failures:
        log.warning("skipped in this run: %s", failure)
    pairs = [(place, table) for place, table in zip(locations, tables, strict=True) if isinstance(table, ShardTable)]
    return [place for place, _ in pairs], [table for _, table in pairs], tuple(failures)


@dataclass(frozen=True)
class _Limits:
    """What is accepted, and what is asked for."""

    max_broken_share: float
    allow_missing_captions: bool
    masks: bool
    failures: tuple[str, ...] = ()


def _select(
    locations: Sequence[str],
    tables: Sequence[ShardTable],
    filters: Sequence[Filter],
    captions: CaptionSource,
    limits: _Limits,
) -> SampleIndex:
    """The index of what is readable, passes the filters and has a caption."""
    # Join the tables of all shards.
    numbers = np.concatenate([np.full(len(table.keys), n, np.int32) for n, table in enumerate(tables)])
    source = ShardSource(locations, numbers, tables, captions, ByteReader())
    sizes = np.concatenate([table.sizes for table in tables])
    # Readable images.
    readable = sizes[:, 0] > 0
    faults = StringColumn.joined([table.faults for table in tables])
    broken = [f"{source.key(int(n))}: {faults[int(n)]}" for n in np.flatnonzero(~readable)[:10]]
    check_unreadable(int((~readable).sum()), len(sizes), broken, limits.max_broken_share, "make the shards again")
    # Those that pass the filters and have a caption.
    keep = readable.copy()
    rejected: dict[str, int] = {}
    if filters:
        texts = (text for table in tables for text in table.fields)
        rows = ((text, size) for text, size, fine in zip(texts, sizes, readable, strict=True) if fine)
        keep[readable], counts = apply_filters(filters, rows)
        rejected = {f"{item.key}: {item.expression.text}": n for item, n in zip(filters, counts, strict=True)}
    check_kept(int(keep.sum()), len(sizes), rejected)
    uncaptioned = keep & ~source.captioned
    if uncaptioned.any() and not limits.allow_missing_captions:
        example = source.key(int(np.flatnonzero(uncaptioned)[0]))
        raise missing_captions(int(uncaptioned.sum()), int(keep.sum()), example, captions.name)
    # Their content, and their masks where they are asked for.
    images, masks, texts = np.concatenate([table.hashes for table in tables])[keep].T
    masked = None
    if limits.masks:
        masked = int((masks != 0).sum())
        check_masks(masked, int(keep.sum()), "members KEY.mask.png to the shards")
    # Report what was left out, and let go of its rows.
    report = IndexReport(
        int(keep.sum()), len(locations), int((~readable).sum()), tuple(broken), rejected, int(uncaptioned.sum()),
        masked=masked, skipped_shards=limits.failures,
    )  # fmt: skip
    if broken:
        log.warning("%s", report)
    source.keys, source.spans = source.keys.take(keep), source.spans[keep]
    source.captioned, source.shard_numbers = source.captioned[keep], numbers[keep]
    hashes = with_masks(images, masks) if limits.masks else images
    return SampleIndex(
        source,
        sizes[keep, 0],
        sizes[keep, 1],
        hashes,
        report,
        limits.max_broken_share,
        limits.masks,
        text_hashes=texts,
    )


_FORMAT = 4
"""Raise it when the meaning of a column changes: older files are then scanned again."""


def table_path(cache_dir: str | None, identity: Any) -> Path:
    """Where the table of a shard with this identity (location, size, version, fields, captions) is kept."""
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache_dir = os.path.join(base, "stable_cascade", "index")
    name = hashlib.blake2b(json.dumps([_FORMAT, identity]).encode(), digest_size=16).hexdigest()
    return Path(cache_dir) / f"{name}.npz"


def load_table(path: Path) -> ShardTable | None:
    """The remembered table; None when there is none, or it is unreadable."""
    try:
        with np.load(path, allow_pickle=False) as columns:
            return ShardTable(
                keys=StringColumn(columns["keys"], columns["key_ends"]),
                spans=columns["spans"],
                sizes=columns["sizes"],
                hashes=columns["hashes"],
                captioned=columns["captioned"],
                fields=StringColumn(columns["fields"], columns["field_ends"]),
                faults=StringColumn(columns["faults"], columns["fault_ends"]),
            )
    except Exception:  # zipfile, zlib and numpy each have their own errors for a damaged file; all mean: scan again
        return None


def save_table(path: Path, table: ShardTable) -> None:
    """Remembers the table, atomically; in a folder that cannot be written it does nothing."""
    # Write beside, then rename.
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            np.savez(
                file,
                keys=table.keys.data,
                key_ends=table.keys.ends,
                spans=table.spans,
                sizes=table.sizes,
                hashes=table.hashes,
                captioned=table.captioned,
                fields=table.fields.data,
                field_ends=table.fields.ends,
                faults=table.faults.data,
                fault_ends=table.faults.ends,
            )
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
