"""The rows of an index, decoded or only named, in the order of its plan."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from .decoding import Candidate, Decoded, Decoder, Place, Undecodable, identity_of
from .draws import draws, sample_seeds
from .plan import Order, Plan, global_batches
from .samples import SampleIndex

_ATTEMPTS = 16
Row = tuple[int, int, int]
"""(position, sample, bucket)."""


@dataclass(frozen=True)
class IndexedRows:
    """The batch sampler of an index: one list of rows for every micro-batch."""

    order: Order
    plan: Plan
    start_step: int

    def __iter__(self) -> Iterator[list[Row]]:
        for batch in global_batches(self.order, self.plan.batch_size, self.start_step):
            for micro in self.plan.part(batch):
                pairs = zip(micro.positions.tolist(), micro.samples.tolist(), strict=True)
                yield [(position, sample, micro.bucket) for position, sample in pairs]


class Replacements:
    """What is shown in place of a broken sample: one of the same bucket and set, drawn from (seed, position)."""

    def __init__(self, order: Order):
        self.order = order
        self._members: dict[tuple[int, int], np.ndarray] = {}

    def candidates(self, row: Row) -> Iterator[int]:
        """The sample itself, then its replacements."""
        position, sample, bucket = row
        yield sample
        members = self._like(sample, bucket)
        for attempt in range(_ATTEMPTS):
            drawn = int(draws(self.order.seed, f"replacement {attempt}", np.array([position]))[0])
            yield int(members[drawn % len(members)])

    def _like(self, sample: int, bucket: int) -> np.ndarray:
        mixture = self.order.mixture
        firsts = (0,) if mixture is None else mixture.firsts
        number = 0 if mixture is None else int(mixture.set_of(np.array([sample]))[0])
        kind = (bucket, number)
        if kind not in self._members:
            start, stop = firsts[number], (*firsts[1:], self.order.count)[number]
            members = start + np.flatnonzero(self.order.nearest[start:stop] == bucket)
            self._members[kind] = members if len(members) > 1 else np.arange(start, stop)
        return self._members[kind]


class IndexedImages(Dataset):
    """Decodes rows; a broken sample is replaced by one of the same bucket."""

    def __init__(self, samples: SampleIndex, order: Order, decoder: Decoder):
        self.samples, self.order, self.decoder = samples, order, decoder
        self.replacements = Replacements(order)

    def __getitem__(self, row: Row) -> Decoded | Undecodable:
        position, sample, bucket = row
        place = Place(position, self.order.buckets.sizes[bucket], float(self.samples.weights(np.array([sample]))[0]))
        found = (candidate(self.samples, number) for number in self.replacements.candidates(row))
        return self.decoder.first_decodable(found, place)


def candidate(samples: SampleIndex, number: int) -> Candidate:
    """One sample of an index, not read yet."""
    read, mask = functools.partial(samples.read, number), functools.partial(samples.mask, number)
    return Candidate(samples.key(number), int(samples.content_hashes[number]), read, mask)


def planned_rows(
    samples: SampleIndex, order: Order, plan: Iterable[list[Row]], decoder: Decoder
) -> Iterator[list[Decoded]]:
    """The rows of each micro-batch without their images; only known broken samples are replaced."""
    replacements = Replacements(order)
    for rows in plan:
        positions = np.array([position for position, _, _ in rows])
        numbers, broken = usable(samples, rows, replacements, decoder)
        seeds = sample_seeds(order.seed, positions).tolist()
        crops, weights = decoder.choice.names(positions), samples.weights(numbers).tolist()
        size = order.buckets.sizes[rows[0][2]]
        made = []
        for row, number in enumerate(numbers.tolist()):
            key = samples.key(number)
            identity = identity_of(key, int(samples.content_hashes[number]), size, crops[row])
            known = {"broken_keys": broken.get(row, ()), "weight": weights[row], "identity": identity}
            made.append(Decoded(None, samples.caption(number), key, seeds[row], rows[row][0], **known))
        yield made


def usable(
    samples: SampleIndex, rows: list[Row], replacements: Replacements, decoder: Decoder
) -> tuple[np.ndarray, dict[int, tuple[str, ...]]]:
    """The sample that each row shows when the known broken ones are replaced, and the keys of those it replaces.

    Raises:
        ValueError: a row finds only broken ones.
    """
    numbers = np.array([sample for _, sample, _ in rows])
    broken: dict[int, tuple[str, ...]] = {}
    if not decoder.known_broken:
        return numbers, broken
    # The first candidate of each row that is not known to be broken.
    for place, row in enumerate(rows):
        passed: list[str] = []
        for number in replacements.candidates(row):
            key = samples.key(number)
            if key not in decoder.known_broken:
                break
            passed.append(key)
        else:
            raise ValueError(f"{len(passed)} samples in a row are broken, the last is {passed[-1]}; check the data")
        numbers[place] = number
        if passed:
            broken[place] = tuple(passed)
    return numbers, broken
