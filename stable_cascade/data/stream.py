"""Training on a dataset that is only read in order: the same plan as for an index, made while reading."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from .batches import BrokenWatch, Decoded, Undecodable, first_decodable
from .buckets import Buckets
from .draws import sample_seeds
from .filters import Filter, RejectionWatch, with_size
from .images import image_size
from .plan import GlobalBatch, micro_batches, with_random_buckets

if TYPE_CHECKING:
    from .hub import HubColumns

_FALLBACKS = 3


@dataclass(frozen=True)
class StreamedRow:
    """One usable row, not decoded."""

    key: str
    data: bytes
    caption: str
    width: int
    height: int

    def content(self) -> tuple[bytes, str]:
        """The picture file and the caption."""
        return self.data, self.caption


@dataclass(frozen=True)
class SampleStream:
    """The rows of an iterable dataset. Every process reads all of them and keeps its part."""

    name: str
    dataset: Any
    columns: HubColumns
    filters: tuple[Filter, ...]
    max_broken_share: float

    def rows(self) -> Iterator[StreamedRow]:
        """The usable rows, epoch after epoch without end.

        Raises:
            ValueError: too many pictures are unreadable, a caption is missing, or a filter rejects all of the first
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
        try:
            data = self.columns.picture(row)
            size = image_size(data)
        except (ValueError, OSError) as error:
            broken.see(1, [f"{key}: {error}"])
            return None
        broken.see(1, [])
        assert size is not None
        if self.filters and not all(rejections.verdicts(with_size(row, size))):
            return None
        caption = self.columns.text(row)
        if caption is None and not self.columns.allow_missing_captions:
            raise ValueError(
                f"{key} has no caption in caption_column {self.columns.caption!r}; name the right column, or set "
                "allow_missing_captions to train it with ''"
            )
        return StreamedRow(key, data, caption or "", *size)


@dataclass(frozen=True)
class StreamedItem:
    """What a worker gets: the row, and others of its global batch that may replace it."""

    position: int
    bucket: int
    row: StreamedRow
    fallbacks: tuple[StreamedRow, ...]


@dataclass(frozen=True)
class StreamedPlan:
    """The batch sampler of a stream; `settings` is (batch_size, start_step, seed, random_bucket_share)."""

    stream: SampleStream
    buckets: Buckets
    settings: tuple[int, int, int, float]
    part: dict[str, int]

    def __iter__(self) -> Iterator[list[StreamedItem]]:
        batch_size, start_step, seed, share = self.settings
        waiting: dict[int, tuple[list[int], list[StreamedRow]]] = {}
        step = 0
        for position, row in enumerate(self.stream.rows()):
            nearest = self.buckets.nearest(np.array([row.width]), np.array([row.height]))
            where = np.array([position])
            bucket = int(with_random_buckets(nearest, where, self.buckets, seed=seed, share=share)[0])
            positions, rows = waiting.setdefault(bucket, ([], []))
            positions.append(position)
            rows.append(row)
            if len(rows) == batch_size:
                del waiting[bucket]
                if step >= start_step:
                    yield from self._micro(positions, rows, bucket)
                step += 1

    def _micro(self, positions: list[int], rows: list[StreamedRow], bucket: int) -> Iterator[list[StreamedItem]]:
        whole = GlobalBatch(np.array(positions), np.arange(len(rows)), bucket)
        for micro in micro_batches(whole, **self.part):
            yield [
                StreamedItem(positions[j], bucket, rows[j], tuple(rows[j + 1 :] + rows[:j])[:_FALLBACKS])
                for j in micro.samples.tolist()
            ]


class StreamedPictures(Dataset):
    """Decodes a `StreamedItem`; a broken row is replaced by its neighbours in the global batch."""

    def __init__(self, buckets: Buckets, crop: str, seed: int):
        self.buckets, self.crop, self.seed = buckets, crop, seed

    def __getitem__(self, item: StreamedItem) -> Decoded | Undecodable:
        seed = int(sample_seeds(self.seed, np.array([item.position]))[0])
        candidates = ((row.key, functools.partial(StreamedRow.content, row)) for row in (item.row, *item.fallbacks))
        return first_decodable(candidates, self.buckets.sizes[item.bucket], self.crop, seed, item.position)
