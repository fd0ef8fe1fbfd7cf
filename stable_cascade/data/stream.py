"""Training on a dataset that is only read in order: the same plan as for an index, made while reading."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from stable_cascade import bounds
from stable_cascade.disk import read_file

from .captions import check_caption
from .decoding import BrokenWatch, Candidate, Decoded, Decoder, Place, Undecodable, identity_of
from .draws import sample_seeds
from .filters import Filter, RejectionWatch, with_size
from .images import image_size
from .plan import Buckets, GlobalBatch, Plan, with_random_buckets
from .samples import content_hash, with_masks

_FALLBACKS = 3


@dataclass(frozen=True)
class StreamedRow:
    """One usable row, not decoded."""

    key: str
    data: bytes
    caption: str
    width: int
    height: int
    mask: bytes | None = None

    def content(self) -> tuple[bytes, str]:
        """The image file and the caption."""
        return self.data, self.caption

    def mask_file(self) -> bytes | None:
        """The mask's file, None without one."""
        return self.mask

    @property
    def content_hash(self) -> int:
        """As in an index."""
        image = np.array([content_hash(self.data)], np.uint64)
        return int(with_masks(image, np.array([content_hash(self.mask) if self.mask else 0], np.uint64))[0])


@dataclass(frozen=True)
class SampleStream:
    """The rows of an iterable dataset. Every process reads all of them and keeps its part."""

    name: str
    dataset: Any
    columns: HubColumns
    filters: tuple[Filter, ...]
    max_broken_share: float

    @property
    def masks(self) -> bool:
        """Whether masks are asked for."""
        return self.columns.mask is not None

    def rows(self) -> Iterator[StreamedRow]:
        """The usable rows, epoch after epoch without end.

        Raises:
            ValueError: too many images are unreadable, a caption is missing, or a filter rejects all of the first
                1,000 rows.
        """
        broken, rejections = BrokenWatch(self.max_broken_share), RejectionWatch(self.filters)
        while True:
            usable = 0
            for number, row in enumerate(self.dataset):
                streamed = self._row(number, row, broken, rejections)
                if streamed is not None:
                    usable += 1
                    yield streamed
            rejections.finish()
            if not usable:
                raise ValueError(f"dataset_name {self.name!r} has no usable row")

    def _row(
        self, number: int, row: dict[str, Any], broken: BrokenWatch, rejections: RejectionWatch
    ) -> StreamedRow | None:
        key = f"{self.name}/{number}"
        if self.columns.image not in row:
            raise ValueError(f"image_column {self.columns.image!r} is no column of {self.name!r} ({', '.join(row)})")
        # Readable, with a caption of a bearable length.
        try:
            data = self.columns.image_file(row)
            size = image_size(data)
            check_caption(self.columns.text(row) or "")
        except (ValueError, OSError) as error:
            broken.see(1, [f"{key}: {error}"])
            return None
        broken.see(1, [])
        assert size is not None
        # It passes the filters and has a caption.
        if self.filters and not all(rejections.verdicts(with_size(row, size))):
            return None
        caption = self.columns.text(row)
        if caption is None and not self.columns.allow_missing_captions:
            raise ValueError(
                f"{key} has no caption in caption_column {self.columns.caption!r}; name the right column, or set "
                "allow_missing_captions to train it with ''"
            )
        return StreamedRow(key, data, caption or "", *size, self.columns.mask_file(row))


@dataclass(frozen=True)
class StreamedItem:
    """What a worker gets: the row, and others of its global batch that may replace it."""

    position: int
    bucket: int
    row: StreamedRow
    fallbacks: tuple[StreamedRow, ...]


@dataclass(frozen=True)
class StreamedRows:
    """The batch sampler of a stream: the plan's batches, made while reading."""

    stream: SampleStream
    plan: Plan
    start_step: int

    def __iter__(self) -> Iterator[list[StreamedItem]]:
        plan = self.plan
        waiting: dict[int, tuple[list[int], list[StreamedRow]]] = {}
        step = 0
        for position, row in enumerate(self.stream.rows()):
            # The same bucket as in an index.
            nearest = plan.buckets.nearest(np.array([row.width]), np.array([row.height]))
            where = np.array([position])
            bucket = int(
                with_random_buckets(nearest, where, plan.buckets, seed=plan.seed, share=plan.random_bucket_share)[0]
            )
            positions, rows = waiting.setdefault(bucket, ([], []))
            positions.append(position)
            rows.append(row)
            # A full bucket is the next batch.
            if len(rows) == plan.batch_size:
                del waiting[bucket]
                if step >= self.start_step:
                    yield from self._micro(positions, rows, bucket)
                step += 1

    def _micro(self, positions: list[int], rows: list[StreamedRow], bucket: int) -> Iterator[list[StreamedItem]]:
        whole = GlobalBatch(np.array(positions), np.arange(len(rows)), bucket)
        for micro in self.plan.part(whole):
            yield [
                StreamedItem(positions[j], bucket, rows[j], tuple(rows[j + 1 :] + rows[:j])[:_FALLBACKS])
                for j in micro.samples.tolist()
            ]


class StreamedImages(Dataset):
    """Decodes a `StreamedItem`; a broken row is replaced by its neighbours in the global batch."""

    def __init__(self, buckets: Buckets, decoder: Decoder):
        self.buckets, self.decoder = buckets, decoder

    def __getitem__(self, item: StreamedItem) -> Decoded | Undecodable:
        candidates = (
            Candidate(
                row.key,
                row.content_hash,
                functools.partial(StreamedRow.content, row),
                functools.partial(StreamedRow.mask_file, row),
            )
            for row in (item.row, *item.fallbacks)
        )
        return self.decoder.first_decodable(candidates, Place(item.position, self.buckets.sizes[item.bucket]))

    def undecoded(self, item: StreamedItem) -> Decoded:
        """The row without its image."""
        known = self.decoder.known_broken
        rows = (item.row, *item.fallbacks)
        shown = next((row for row in rows if row.key not in known), None)
        if shown is None:
            raise ValueError(f"{len(rows)} samples in a row are broken, the last is {rows[-1].key}; check the data")
        where, choice = np.array([item.position]), self.decoder.choice
        identity = identity_of(shown.key, shown.content_hash, self.buckets.sizes[item.bucket], choice.names(where)[0])
        passed = tuple(row.key for row in rows[: rows.index(shown)])
        seed = int(sample_seeds(choice.seed, where)[0])
        return Decoded(None, shown.caption, shown.key, seed, item.position, passed, identity=identity)


@dataclass(frozen=True)
class HubColumns:
    """The columns' names; `mask` is None where masks are not asked for."""

    image: str
    caption: str
    allow_missing_captions: bool = False
    mask: str | None = None

    def image_file(self, row: Mapping[str, Any]) -> bytes:
        """The image file in a row.

        Raises:
            ValueError: the row has none.
        """
        found = _file(row[self.image])
        if found is None:
            raise ValueError(f"the column {self.image!r} holds no image")
        return found

    def mask_file(self, row: Mapping[str, Any]) -> bytes | None:
        """The mask in a row; None when there is none, or masks are not asked for."""
        return None if self.mask is None else _file(row.get(self.mask))

    def text(self, row: Mapping[str, Any]) -> str | None:
        """The caption in a row, the first one of a list; None when there is none."""
        value = row.get(self.caption)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[0] if value else None
        return value.strip() if isinstance(value, str) else None


def _file(value: Any) -> bytes | None:
    """The bytes of an image, given as such, as a path, or as the pair of both that `datasets` stores."""
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return value["bytes"]
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and os.path.isfile(value):
        return read_file(value, at_most=bounds.IMAGE_FILE, what="image")
    return None
