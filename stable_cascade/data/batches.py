"""From an index to this process's micro-batches, the same for every number of workers and processes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .buckets import make_buckets
from .crops import check_crop, crop_to
from .draws import draws, sample_seeds
from .images import decode_image, resize_to_cover
from .index import SampleIndex
from .plan import Order, check_batch_size, global_batches, micro_batches

if TYPE_CHECKING:
    from .stream import SampleStream

log = logging.getLogger(__name__)

_ATTEMPTS = 16
_FIRST_JUDGED = 100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process; all pictures have the size of one bucket.

    Shapes: pixels (B, 3, H, W) float32 in [0, 1]; seeds (B,) int64, functions of (seed, position) only; positions
        (B,) int64 global sample positions; `step_seed` is a function of (seed, step), one for every part of a global
        batch; `broken` counts the samples that another one replaces.
    """

    pixels: Tensor
    captions: list[str]
    keys: list[str]
    seeds: Tensor
    positions: Tensor
    broken: int = 0
    step_seed: int = 0


@dataclass(frozen=True)
class Decoded:
    """One sample ready for a batch, and the keys of the broken ones it stands in for."""

    pixels: Tensor
    caption: str
    key: str
    seed: int
    position: int
    broken_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Undecodable:
    """Why no sample could be found for a position. A value, since errors raised in a worker arrive as tracebacks."""

    reason: str


def training_batches(
    samples: SampleIndex | SampleStream,
    *,
    image_size: int,
    batch_size: int,
    grad_accum_steps: int = 1,
    num_processes: int = 1,
    process_index: int = 0,
    seed: int = 0,
    multi_aspect_ratio: Sequence[str | float] | None = None,
    bucket_factor: int = 32,
    random_bucket_share: float = 0.05,
    crop: str = "random",
    start_step: int = 0,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The micro-batches of one process, of step start_step, start_step + 1, … without end.

    `grad_accum_steps` micro-batches in a row are one step; `batch_size` counts the samples of one step over all
    processes, all in one bucket. Skipping to `start_step` decodes nothing.

    Args:
        samples: what `index_samples` returns.
        image_size: side of a square of the pictures' area.
        batch_size: global batch size.
        grad_accum_steps: micro-batches of a step.
        num_processes: processes that share a global batch.
        process_index: which of them this is.
        seed: of order, buckets, crops and the samples' own seeds.
        multi_aspect_ratio: width / height such as '9/16', mirrored; None for squares only.
        bucket_factor: what both sides are multiples of.
        random_bucket_share: how often a picture goes to a drawn bucket instead of the nearest.
        crop: random, center or smart.
        start_step: the first step.
        num_workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: the batch size does not divide, a setting is impossible, or too many samples are broken.
    """
    check_batch_size(batch_size, grad_accum_steps, num_processes)
    check_crop(crop)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index {process_index} must lie in 0..{num_processes - 1}")
    if not 0 <= random_bucket_share <= 1:
        raise ValueError(f"random_bucket_share {random_bucket_share} must lie in [0, 1]")
    if start_step < 0 or num_workers < 0:
        raise ValueError(f"start_step {start_step} and num_workers {num_workers} must not be negative")
    buckets = make_buckets(image_size, multi_aspect_ratio, factor=bucket_factor)
    part = {"grad_accum_steps": grad_accum_steps, "num_processes": num_processes, "process_index": process_index}
    if isinstance(samples, SampleIndex):
        nearest = buckets.nearest(samples.widths, samples.heights)
        order = Order(len(samples), nearest, buckets, seed, random_bucket_share)
        dataset: Dataset = IndexedPictures(samples, order, crop)
        plan: Iterable[list[Any]] = IndexedPlan(order, batch_size, start_step, part)
    else:
        from .stream import StreamedPictures, StreamedPlan

        dataset = StreamedPictures(buckets, crop, seed)
        settings = (batch_size, start_step, seed, random_bucket_share)
        plan = StreamedPlan(samples, buckets, settings, part)
    loaded = _load(dataset, plan, num_workers, BrokenWatch(samples.max_broken_share))
    return _with_step_seeds(loaded, seed, start_step, grad_accum_steps)


def _with_step_seeds(batches: Iterator[Batch], seed: int, start_step: int, grad_accum_steps: int) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        step = start_step + number // grad_accum_steps
        yield replace(batch, step_seed=int(draws(seed, "step", np.array([step]))[0] >> 1))


def _load(dataset: Dataset, plan: Iterable[list[Any]], num_workers: int, watch: BrokenWatch) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        batch_sampler=plan,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # otherwise the loader draws from torch's global generator
        prefetch_factor=2 if num_workers else None,
    )
    for loaded in loader:
        if isinstance(loaded, Undecodable):
            raise ValueError(loaded.reason)
        batch, broken_keys = loaded
        watch.see(len(batch.keys), broken_keys)
        yield batch


@dataclass(frozen=True)
class IndexedPlan:
    """The batch sampler of an index: lists of (position, sample, bucket)."""

    order: Order
    batch_size: int
    start_step: int
    part: dict[str, int]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for batch in global_batches(self.order, self.batch_size, self.start_step):
            for micro in micro_batches(batch, **self.part):
                pairs = zip(micro.positions, micro.samples, strict=True)
                yield [(int(position), int(sample), micro.bucket) for position, sample in pairs]


class IndexedPictures(Dataset):
    """Decodes (position, sample, bucket); a broken sample is replaced by one of the same bucket."""

    def __init__(self, samples: SampleIndex, order: Order, crop: str):
        self.samples, self.order, self.crop = samples, order, crop
        self._members: dict[int, np.ndarray] = {}

    def __getitem__(self, item: tuple[int, int, int]) -> Decoded | Undecodable:
        position, sample, bucket = item
        seed = int(sample_seeds(self.order.seed, np.array([position]))[0])
        size = self.order.buckets.sizes[bucket]
        reads = (
            (self.samples.key(candidate), functools.partial(self.samples.read, candidate))
            for candidate in self._candidates(position, sample, bucket)
        )
        return first_decodable(reads, size, self.crop, seed, position)

    def _candidates(self, position: int, sample: int, bucket: int) -> Iterator[int]:
        """The sample, then replacements that depend on (seed, position) alone."""
        yield sample
        members = self._of_bucket(bucket)
        for attempt in range(_ATTEMPTS):
            drawn = int(draws(self.order.seed, f"replacement {attempt}", np.array([position]))[0])
            yield int(members[drawn % len(members)])

    def _of_bucket(self, bucket: int) -> np.ndarray:
        if bucket not in self._members:
            members = np.flatnonzero(self.order.nearest == bucket)
            self._members[bucket] = members if len(members) > 1 else np.arange(self.order.count)
        return self._members[bucket]


def first_decodable(
    candidates: Iterable[tuple[str, Callable[[], tuple[bytes, str]]]],
    size: tuple[int, int],
    crop: str,
    seed: int,
    position: int,
) -> Decoded | Undecodable:
    """The first of the (key, read) candidates that is not broken, fitted to the bucket."""
    broken: list[str] = []
    for key, read in candidates:
        try:
            data, caption = read()
            pixels = fit_picture(data, size, crop, seed)
        except (ValueError, OSError) as error:
            broken.append(f"{key}: {error}")
            continue
        return Decoded(pixels, caption, key, seed, position, tuple(broken))
    return Undecodable(f"{len(broken)} samples in a row are broken, the last is {broken[-1]}; check the data")


def fit_picture(data: bytes, size: tuple[int, int], crop: str, seed: int) -> Tensor:
    """A picture file, decoded, resized and cropped to a bucket.

    Shapes: -> (3, *size) float32 in [0, 1].

    Raises:
        ValueError: it cannot be decoded.
    """
    pixels = decode_image(data, at_least=size)
    return crop_to(resize_to_cover(pixels, size), size, crop, seed).contiguous()


def collate(items: list[Decoded | Undecodable]) -> tuple[Batch, list[str]] | Undecodable:
    """The batch of these samples, and what was broken."""
    failed = [item for item in items if isinstance(item, Undecodable)]
    if failed:
        return failed[0]
    return _stack([item for item in items if isinstance(item, Decoded)])


def _stack(items: list[Decoded]) -> tuple[Batch, list[str]]:
    batch = Batch(
        pixels=torch.stack([item.pixels for item in items]),
        captions=[item.caption for item in items],
        keys=[item.key for item in items],
        seeds=torch.tensor([item.seed for item in items], dtype=torch.int64),
        positions=torch.tensor([item.position for item in items], dtype=torch.int64),
        broken=sum(bool(item.broken_keys) for item in items),
    )
    return batch, [key for item in items for key in item.broken_keys]


class BrokenWatch:
    """Counts broken samples, logs each one once, and stops a training that would run on few of its pictures."""

    def __init__(self, max_broken_share: float):
        self.max_broken_share = max_broken_share
        self.seen = 0
        self.broken = 0
        self._logged: set[str] = set()

    def see(self, count: int, broken_keys: Sequence[str]) -> None:
        """Adds a micro-batch of `count` samples.

        Raises:
            ValueError: more than max_broken_share of what was seen is broken; the first 100 are judged together.
        """
        self.seen += count
        self.broken += len(broken_keys)
        for key in broken_keys:
            if key not in self._logged:
                self._logged.add(key)
                log.warning("broken sample replaced: %s", key)
        if self.broken > self.max_broken_share * max(self.seen, _FIRST_JUDGED):
            raise ValueError(
                f"{self.broken:,} broken samples among {self.seen:,} are more than max_broken_share "
                f"{self.max_broken_share}, the last is {broken_keys[-1] if broken_keys else ''}; check the shards"
            )
