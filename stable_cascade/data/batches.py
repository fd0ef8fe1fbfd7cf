"""From an index to this process's micro-batches, the same for every number of workers and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .decoding import BrokenWatch, Decoded, Decoder, Place, Undecodable, identity_of
from .draws import draws
from .images import in_unit_range
from .indexed import IndexedImages, IndexedRows, Replacements, candidate, planned_rows, usable
from .plan import Plan, global_batches
from .samples import SampleIndex
from .stream import SampleStream, StreamedImages, StreamedRows, StreamState


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process; all images have the size of one bucket.

    `identities` name what each row shows, before any decoding: sample key, a hash of the image's content (and its
    mask's), bucket size, and crop. Equal identities are equal pixels, in every run on every machine. `step_seed` is a
    function of (seed, step), one for every part of a global batch; `broken` counts the samples that another one
    replaces. `after` is where this process stands in a stream after the batch's step, None for an index.

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
    after: StreamState | None = None

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
    plan: Plan,
    *,
    start_step: int = 0,
    after: StreamState | None = None,
    decode: bool = True,
    num_workers: int = 0,
    as_stored: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The micro-batches of one process, of step start_step, start_step + 1, … without end.

    `plan.grad_accum_steps` micro-batches in a row are one step. Skipping to `start_step` decodes nothing.
    `planned_crops` lists what the first steps show without making batches.

    Args:
        samples: what `index_samples` returns; with masks where it was asked for masks.
        start_step: the first step.
        after: of a stream, what `Batch.after` was at the end of the step before, of all processes together; without
            it a stream is read from its beginning.
        decode: False reads no image: pixels and masks are None, everything else is the same.
        num_workers: processes that decode; 0 decodes in this one.
        as_stored: leave pixels that are bytes as bytes, for `in_unit_range` to make floats of on the device.
        pin_memory: put the batches into page-locked memory, for a CUDA device.

    Raises:
        ValueError: a number is negative, or too many samples are broken.
    """
    # Check the arguments and prepare what decodes.
    if start_step < 0 or num_workers < 0:
        raise ValueError(f"start_step {start_step} and num_workers {num_workers} must not be negative")
    decoder = Decoder(plan.crops, samples.masks, plan.known_broken)
    loading = Loading(num_workers, BrokenWatch(samples.max_broken_share), as_stored, pin_memory)
    loaded: Iterator[Batch]
    # An index is read in a shuffled order, a stream as it comes; without decoding only names are made.
    if isinstance(samples, SampleIndex):
        order = plan.order(samples)
        rows = IndexedRows(order, plan, start_step)
        if decode:
            loaded = load_batches(IndexedImages(samples, order, decoder), rows, loading)
        else:
            loaded = (stacked_batch(made)[0] for made in planned_rows(samples, order, rows, decoder))
    else:
        items, images = StreamedRows(samples, plan, start_step, after), StreamedImages(plan.buckets, decoder)
        if decode:
            loaded = load_batches(images, items, loading)
        else:
            loaded = (stacked_batch([images.undecoded(item) for item in micro])[0] for micro in items)
        loaded = (replace(batch, after=items.states.popleft()) for batch in loaded)
    return _with_step_seeds(loaded, plan, start_step)


def _with_step_seeds(batches: Iterator[Batch], plan: Plan, start_step: int) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        step = start_step + number // plan.grad_accum_steps
        yield replace(batch, step_seed=int(draws(plan.seed, "step", np.array([step]))[0] >> 1))


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


@dataclass(frozen=True)
class PlannedCrop:
    """One crop, the first position that shows it, and the (height, width) of its bucket."""

    identity: str
    key: str
    sample: int
    position: int
    size: tuple[int, int]


def planned_crops(samples: SampleIndex | SampleStream, plan: Plan, steps: int) -> list[PlannedCrop]:
    """The distinct crops that `training_batches` with this plan shows in the steps 0, …, steps - 1.

    In the order of their first positions, reading nothing. `crop_batches` decodes them. Where that finds broken
    samples, a second plan with `known_broken` has what is shown in their place.

    Raises:
        ValueError: the samples are a stream, or `steps` is negative.
    """
    if not isinstance(samples, SampleIndex):
        raise ValueError("streaming: true has no plan to make a cache from; set streaming: false")
    if steps < 0:
        raise ValueError(f"steps {steps} must not be negative")
    # The same order and the same replacements as in training.
    choice, buckets, order = plan.crops, plan.buckets, plan.order(samples)
    decoder = Decoder(choice, samples.masks, plan.known_broken)
    replacements = Replacements(order)
    shown: dict[tuple[int, int, int], PlannedCrop] = {}
    for _, batch in zip(range(steps), global_batches(order, plan.batch_size), strict=False):
        numbers = batch.samples
        if decoder.known_broken:
            pairs = zip(batch.positions.tolist(), batch.samples.tolist(), strict=True)
            numbers, _ = usable(samples, [(p, n, batch.bucket) for p, n in pairs], replacements, decoder)
        # A crop is known by bucket, sample and variant; it is listed where it is first used.
        variants = batch.positions if choice.fresh else choice.numbers(batch.positions)
        size = buckets.sizes[batch.bucket]
        entries = zip(numbers.tolist(), variants.tolist(), batch.positions.tolist(), strict=True)
        for sample, variant, position in entries:
            if (batch.bucket, sample, variant) not in shown:
                name = choice.names(np.array([position]))[0]
                key = samples.key(sample)
                identity = identity_of(key, int(samples.content_hashes[sample]), size, name)
                shown[batch.bucket, sample, variant] = PlannedCrop(identity, key, sample, position, size)
    return list(shown.values())


def crop_batches(
    samples: SampleIndex,
    crops: Sequence[PlannedCrop],
    plan: Plan,
    *,
    batch_size: int,
    num_workers: int = 0,
    as_stored: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The crops of `planned_crops`, decoded, in batches of one size.

    A crop whose image is broken is left out, counted in `Batch.broken`, and its key logged; the others keep their
    order among the crops of their size. The last batch of a size may be smaller. `as_stored` and `pin_memory` are as
    in `training_batches`.

    Raises:
        ValueError: more than max_broken_share of the samples are broken.
    """
    groups: dict[tuple[int, int], list[PlannedCrop]] = {}
    for planned in crops:
        groups.setdefault(planned.size, []).append(planned)
    rows = [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]
    dataset = _PlannedImages(samples, Decoder(plan.crops, samples.masks))
    loading = Loading(num_workers, BrokenWatch(samples.max_broken_share), as_stored, pin_memory)
    yield from (batch for batch in load_batches(dataset, rows, loading, _without_broken) if batch.keys)


def _without_broken(rows: list[Decoded]) -> tuple[Batch, list[str]]:
    batch, _ = stacked_batch([row for row in rows if row.pixels is not None])
    broken = [key for row in rows for key in row.broken_keys]
    return replace(batch, broken=len(broken)), broken


class _PlannedImages(Dataset):
    """Decodes a planned crop; a broken one is a row without pixels."""

    def __init__(self, samples: SampleIndex, decoder: Decoder):
        self.samples, self.decoder = samples, decoder

    def __getitem__(self, planned: PlannedCrop) -> Decoded:
        found = self.decoder.first_decodable(
            [candidate(self.samples, planned.sample)], Place(planned.position, planned.size)
        )
        if isinstance(found, Decoded):
            return found
        return Decoded(None, "", planned.key, 0, planned.position, (f"{planned.key}: {found.reason}",))
