"""Which crops the first steps of a training show, each once: what a cache of latents has to hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from .batches import Batch, Loading, check_random_bucket_share, load_batches, sample_order, stacked_batch
from .buckets import make_buckets
from .crops import CropChoice
from .decoding import BrokenWatch, Decoded, Decoder, Place, identity_of
from .indexed import Replacements, candidate, usable
from .plan import check_batch_size, global_batches
from .samples import SampleIndex
from .stream import SampleStream


@dataclass(frozen=True)
class PlannedCrop:
    """One crop, the first position that shows it, and the (height, width) of its bucket."""

    identity: str
    key: str
    sample: int
    position: int
    size: tuple[int, int]


def planned_crops(
    samples: SampleIndex | SampleStream,
    *,
    image_size: int,
    batch_size: int,
    steps: int,
    seed: int = 0,
    multi_aspect_ratio: Sequence[str | float] | None = None,
    bucket_factor: int = 32,
    random_bucket_share: float = 0.05,
    crop: str = "random",
    crops_per_image: int | None = None,
    known_broken: Collection[str] = (),
) -> list[PlannedCrop]:
    """The distinct crops that `training_batches` with the same arguments shows in the steps 0, …, steps - 1.

    In the order of their first positions, reading nothing. `crop_batches` decodes them. Where that finds broken
    samples, a second plan with `known_broken` has what is shown in their place.

    Raises:
        ValueError: the samples are a stream, or a setting is impossible.
    """
    if not isinstance(samples, SampleIndex):
        raise ValueError("streaming: true has no plan to make a cache from; set streaming: false")
    check_batch_size(batch_size, 1, 1)
    check_random_bucket_share(random_bucket_share)
    if steps < 0:
        raise ValueError(f"steps {steps} must not be negative")
    choice = CropChoice(crop, seed, crops_per_image)
    decoder = Decoder(choice, samples.masks, frozenset(known_broken))
    buckets = make_buckets(image_size, multi_aspect_ratio, factor=bucket_factor)
    order = sample_order(samples, buckets, seed, random_bucket_share)
    replacements = Replacements(order)
    shown: dict[tuple[int, int, int], PlannedCrop] = {}
    for _, batch in zip(range(steps), global_batches(order, batch_size), strict=False):
        numbers = batch.samples
        if decoder.known_broken:
            pairs = zip(batch.positions.tolist(), batch.samples.tolist(), strict=True)
            numbers, _ = usable(samples, [(p, n, batch.bucket) for p, n in pairs], replacements, decoder)
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
    *,
    batch_size: int,
    seed: int = 0,
    crop: str = "random",
    crops_per_image: int | None = None,
    num_workers: int = 0,
    as_stored: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The planned crops, decoded, in batches of one size; `seed`, `crop`, `crops_per_image` are those of the plan.

    A crop whose image is broken is left out, counted in `Batch.broken`, and its key logged; the others keep their
    order among the crops of their size. The last batch of a size may be smaller. `as_stored` and `pin_memory` are as
    in `training_batches`.

    Raises:
        ValueError: more than max_broken_share of the samples are broken.
    """
    groups: dict[tuple[int, int], list[PlannedCrop]] = {}
    for planned in crops:
        groups.setdefault(planned.size, []).append(planned)
    plan = [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]
    dataset = _PlannedImages(samples, Decoder(CropChoice(crop, seed, crops_per_image), samples.masks))
    loading = Loading(num_workers, BrokenWatch(samples.max_broken_share), as_stored, pin_memory)
    yield from (batch for batch in load_batches(dataset, plan, loading, _without_broken) if batch.keys)


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
