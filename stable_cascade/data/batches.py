"""From an index to this process's micro-batches, the same for every number of workers and processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .buckets import Buckets, make_buckets
from .crops import CropChoice
from .decoding import BrokenWatch, Decoded, Decoder, Undecodable
from .draws import draws
from .images import in_unit_range
from .indexed import IndexedImages, IndexedPlan, planned_rows
from .plan import Order, check_batch_size
from .samples import SampleIndex
from .stream import SampleStream, StreamedImages, StreamedPlan


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process; all images have the size of one bucket.

    `identities` name what each row shows, before any decoding: sample key, a hash of the image's content (and its
    mask's), bucket size, and crop. Equal identities are equal pixels, in every run on every machine. `step_seed` is a
    function of (seed, step), one for every part of a global batch; `broken` counts the samples that another one
    replaces.

    Shapes: pixels (B, 3, H, W) float32 in [0, 1], or bytes where they were asked for as stored, None when nothing was
        decoded; masks (B, 1, H, W) float32 in [0, 1],
        1 where the loss counts fully, None when the index was made without masks or nothing was decoded; weights (B,)
        float32, what each sample's loss is multiplied by, None standing for all ones; seeds (B,) int64, functions of
        (seed, position) only; positions (B,) int64 global sample positions.
    """

    pixels: Tensor | None
    captions: list[str]
    keys: list[str]
    seeds: Tensor
    positions: Tensor
    broken: int = 0
    step_seed: int = 0
    masks: Tensor | None = None
    weights: Tensor | None = None
    identities: list[str] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a CUDA device copies while the host goes on.

        torch's DataLoader calls it; without this method it would leave the tensors of an unknown class where they are.
        """
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in self.tensors().items()}
        return replace(self, **pinned)

    def tensors(self) -> dict[str, Tensor]:
        """What of the batch is tensors, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


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
    decode: bool = True,
    crops_per_image: int | None = None,
    known_broken: Collection[str] = (),
    as_stored: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The micro-batches of one process, of step start_step, start_step + 1, … without end.

    `grad_accum_steps` micro-batches in a row are one step; `batch_size` counts the samples of one step over all
    processes, all in one bucket. Skipping to `start_step` decodes nothing. `planned_crops` lists what the first steps
    show without making batches.

    Args:
        samples: what `index_samples` returns; with masks where it was asked for masks.
        image_size: side of a square of the images' area.
        batch_size: global batch size.
        grad_accum_steps: micro-batches of a step.
        num_processes: processes that share a global batch.
        process_index: which of them this is.
        seed: of order, buckets, crops and the samples' own seeds.
        multi_aspect_ratio: width / height such as '9/16', mirrored; None for squares only.
        bucket_factor: what both sides are multiples of.
        random_bucket_share: how often an image goes to a drawn bucket instead of the nearest.
        crop: random, center or smart.
        start_step: the first step.
        num_workers: processes that decode; 0 decodes in this one.
        decode: False reads no image: pixels and masks are None, everything else is the same.
        crops_per_image: how many random crops of an image there are, for each bucket size; None takes a fresh one
            every time. The only crop of center and smart is then the same in every run.
        known_broken: keys of samples to replace untried, as if they were found broken.
        as_stored: leave pixels that are bytes as bytes, for `in_unit_range` to make floats of on the device.
        pin_memory: put the batches into page-locked memory, for a CUDA device.

    Raises:
        ValueError: the batch size does not divide, a setting is impossible, or too many samples are broken.
    """
    check_batch_size(batch_size, grad_accum_steps, num_processes)
    choice = CropChoice(crop, seed, crops_per_image)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index {process_index} must lie in 0..{num_processes - 1}")
    check_random_bucket_share(random_bucket_share)
    if start_step < 0 or num_workers < 0:
        raise ValueError(f"start_step {start_step} and num_workers {num_workers} must not be negative")
    buckets = make_buckets(image_size, multi_aspect_ratio, factor=bucket_factor)
    part = {"grad_accum_steps": grad_accum_steps, "num_processes": num_processes, "process_index": process_index}
    decoder = Decoder(choice, samples.masks, frozenset(known_broken))
    loading = Loading(num_workers, BrokenWatch(samples.max_broken_share), as_stored, pin_memory)
    if isinstance(samples, SampleIndex):
        order = sample_order(samples, buckets, seed, random_bucket_share)
        rows = IndexedPlan(order, batch_size, start_step, part)
        if decode:
            loaded = load_batches(IndexedImages(samples, order, decoder), rows, loading)
        else:
            loaded = (stacked_batch(made)[0] for made in planned_rows(samples, order, rows, decoder))
    else:
        settings = (batch_size, start_step, seed, random_bucket_share)
        items, images = StreamedPlan(samples, buckets, settings, part), StreamedImages(buckets, decoder)
        if decode:
            loaded = load_batches(images, items, loading)
        else:
            loaded = (stacked_batch([images.undecoded(item) for item in micro])[0] for micro in items)
    return _with_step_seeds(loaded, seed, start_step, grad_accum_steps)


def sample_order(samples: SampleIndex, buckets: Buckets, seed: int, random_bucket_share: float) -> Order:
    """The endless sequence that a training on this index shows."""
    nearest = buckets.nearest(samples.widths, samples.heights)
    return Order(len(samples), nearest, buckets, seed, random_bucket_share, samples.regularization)


def check_random_bucket_share(share: float) -> None:
    """Passes for a share.

    Raises:
        ValueError: it is none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"random_bucket_share {share} must lie in [0, 1]")


def _with_step_seeds(batches: Iterator[Batch], seed: int, start_step: int, grad_accum_steps: int) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        step = start_step + number // grad_accum_steps
        yield replace(batch, step_seed=int(draws(seed, "step", np.array([step]))[0] >> 1))


@dataclass(frozen=True)
class Loading:
    """How batches are loaded; `as_stored` and `pin_memory` as in `training_batches`."""

    num_workers: int
    watch: BrokenWatch
    as_stored: bool = False
    pin_memory: bool = False


def load_batches(
    dataset: Dataset,
    plan: Iterable[list[Any]],
    loading: Loading,
    collate: Callable[[list[Any]], tuple[Batch, list[str]] | Undecodable] | None = None,
) -> Iterator[Batch]:
    """The decoded batches of a plan, in its order.

    Workers live as long as the plan, which has no end in a training: there is no second pass to keep them for.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=plan,  # type: ignore[arg-type]
        num_workers=loading.num_workers,
        collate_fn=collate or whole_batch,
        generator=torch.Generator(),  # otherwise the loader draws from torch's global generator
        prefetch_factor=2 if loading.num_workers else None,
        pin_memory=loading.pin_memory,
    )
    for loaded in loader:
        if isinstance(loaded, Undecodable):
            raise ValueError(loaded.reason)
        batch, broken_keys = loaded
        loading.watch.see(len(batch.keys), broken_keys)
        if batch.pixels is not None and not loading.as_stored:
            batch = replace(batch, pixels=in_unit_range(batch.pixels))
        yield batch


def whole_batch(items: list[Decoded | Undecodable]) -> tuple[Batch, list[str]] | Undecodable:
    """The batch of these samples, and what was broken."""
    failed = [item for item in items if isinstance(item, Undecodable)]
    if failed:
        return failed[0]
    return stacked_batch([item for item in items if isinstance(item, Decoded)])


def stacked_batch(items: list[Decoded]) -> tuple[Batch, list[str]]:
    """The batch of these rows, and the keys of the broken samples that they replace."""
    batch = Batch(
        pixels=_stacked([item.pixels for item in items]),
        captions=[item.caption for item in items],
        keys=[item.key for item in items],
        seeds=torch.tensor([item.seed for item in items], dtype=torch.int64),
        positions=torch.tensor([item.position for item in items], dtype=torch.int64),
        broken=sum(bool(item.broken_keys) for item in items),
        masks=_stacked([item.mask for item in items]),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        identities=[item.identity for item in items],
    )
    return batch, [key for item in items for key in item.broken_keys]


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    """The rows as one tensor, in a worker process straight in shared memory; floats where one row is of floats."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.dtype for tensor in present}) > 1:
        present = [in_unit_range(tensor) for tensor in present]
    return default_collate(present) if present else None
