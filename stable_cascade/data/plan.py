"""What the steps of a training show: samples in buckets and batches, as integers, so that any step is near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from .decoding import CropChoice
from .draws import draws, permutation, uniforms
from .samples import Mixture, SampleIndex

_CHUNK = 65536
Waiting = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Plan:
    """What a training shows at each of its steps, and which part of it this process loads.

    Everything that decides the order, the buckets and the crops of the samples is here and nowhere else; two
    trainings with equal plans on equal samples see the same images.

    Raises:
        ValueError: the batch size does not divide, or a setting is impossible.
    """

    image_size: int
    """Side of a square of the images' area, in pixels."""
    batch_size: int
    """Samples of one step over all processes, all in one bucket."""
    grad_accum_steps: int = 1
    """Micro-batches of a step."""
    num_processes: int = 1
    """Processes that share a global batch."""
    process_index: int = 0
    """Which of them this is."""
    seed: int = 0
    """Of order, buckets, crops and the samples' own seeds."""
    multi_aspect_ratio: Sequence[str | float] | None = None
    """Width / height such as '9/16', mirrored; None for squares only."""
    bucket_factor: int = 32
    """What both sides are multiples of."""
    random_bucket_share: float = 0.05
    """How often an image goes to a drawn bucket instead of the nearest."""
    crop: str = "random"
    """random, center or smart."""
    crops_per_image: int | None = None
    """How many random crops of an image there are, for each bucket size; None takes a fresh one every time. The only
    crop of center and smart is then the same in every run."""
    known_broken: frozenset[str] = frozenset()
    """Keys of samples to replace untried, as if they were found broken."""

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.grad_accum_steps, self.num_processes)
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index {self.process_index} must lie in 0..{self.num_processes - 1}")
        if not 0 <= self.random_bucket_share <= 1:
            raise ValueError(f"random_bucket_share {self.random_bucket_share} must lie in [0, 1]")
        for part in ("crops", "buckets"):  # made now, so that a setting that is impossible is refused here
            getattr(self, part)

    @cached_property
    def buckets(self) -> Buckets:
        """The sizes that images are cropped to."""
        return make_buckets(self.image_size, self.multi_aspect_ratio, factor=self.bucket_factor)

    @cached_property
    def crops(self) -> CropChoice:
        """Which crop each position shows."""
        return CropChoice(self.crop, self.seed, self.crops_per_image)

    def order(self, samples: SampleIndex) -> Order:
        """The endless sequence that a training on this index shows."""
        nearest = self.buckets.nearest(samples.widths, samples.heights)
        return Order(len(samples), nearest, self.buckets, self.seed, self.random_bucket_share, samples.mixture)

    def part(self, batch: GlobalBatch) -> Iterator[GlobalBatch]:
        """The micro-batches of a global batch that this process loads."""
        return micro_batches(
            batch,
            grad_accum_steps=self.grad_accum_steps,
            num_processes=self.num_processes,
            process_index=self.process_index,
        )


@dataclass(frozen=True)
class GlobalBatch:
    """One step's samples: global positions, sample numbers (both (batch_size,)) and the bucket they share."""

    positions: np.ndarray
    samples: np.ndarray
    bucket: int


@dataclass(frozen=True)
class Order:
    """The endless sequence of samples: one permutation after the other, and a bucket for every position.

    With a `mixture` there is such a sequence for each set, interleaved by their shares.
    """

    count: int
    nearest: np.ndarray
    buckets: Buckets
    seed: int
    random_bucket_share: float = 0.0
    mixture: Mixture | None = None

    def bucket_numbers(self, positions: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The bucket of each position: the sample's nearest, or a drawn one for the random share."""
        return with_random_buckets(
            self.nearest[samples], positions, self.buckets, seed=self.seed, share=self.random_bucket_share
        )


def with_random_buckets(
    nearest: np.ndarray, positions: np.ndarray, buckets: Buckets, *, seed: int, share: float
) -> np.ndarray:
    """`nearest`, where a `share` of the positions gets a bucket drawn from (seed, position) instead.

    Shapes: (N,), (N,) -> (N,).
    """
    if share <= 0 or len(buckets) == 1:
        return nearest
    first = np.array([buckets.sizes.index(size) for size in buckets.sizes], nearest.dtype)
    drawn = first[(draws(seed, "bucket", positions) % np.uint64(len(buckets))).astype(np.int64)]
    return np.where(uniforms(seed, "bucket share", positions) < share, drawn, nearest)


def global_batches(order: Order, batch_size: int, start_step: int = 0) -> Iterator[GlobalBatch]:
    """The batches of step start_step, start_step + 1, … without end.

    Positions fill their buckets in order; the bucket that first holds `batch_size` samples is the next batch, what
    is left over waits for the next epoch.
    """
    single = len(order.buckets) == 1
    position = start_step * batch_size if single else 0  # with one bucket the arithmetic is closed
    skip = 0 if single else start_step
    chunk = max(batch_size, 1024, min(_CHUNK, order.count))  # of no influence on the order, only on the speed
    waiting: Waiting = {}
    shown = _Shown(order)
    while True:
        positions = np.arange(position, position + chunk)
        samples = shown.samples(position, position + chunk)
        numbers = order.bucket_numbers(positions, samples)
        ready, waiting = _fill(waiting, positions, samples, numbers, batch_size)
        position += chunk
        yield from ready[skip:]
        skip = max(0, skip - len(ready))


class _Shown:
    """The sample at every position: epoch after epoch, or those of several sets interleaved by their shares."""

    def __init__(self, order: Order):
        mixture = order.mixture or Mixture((0,), (Fraction(1),), (1.0,), (False,))
        self.firsts = mixture.firsts
        ends = (*mixture.firsts[1:], order.count)
        self.epochs = [
            _Epochs(order.seed, end - first, _stream(number, mixture))
            for number, (first, end) in enumerate(zip(mixture.firsts, ends, strict=True))
        ]
        # The share of each set among itself and those before it.
        self.shares = [
            (mixture.shares[number] / sum(mixture.shares[: number + 1])).limit_denominator(1_000_000)
            for number in range(len(mixture.shares))
        ]

    def samples(self, start: int, stop: int) -> np.ndarray:
        """The sample numbers at the positions start, …, stop - 1."""
        shown = np.empty(stop - start, np.int64)
        # Of the places that later sets leave, a set takes one where floor(n share) rises; the first takes the rest.
        places = np.arange(start, stop + 1)
        for number in reversed(range(len(self.shares))):
            share = self.shares[number]
            counts = places * share.numerator // share.denominator
            before, after = int(counts[0]), int(counts[-1])
            own = np.diff(counts) == 1
            shown[own] = self.epochs[number].samples(before, after) + self.firsts[number]
            places = places - counts
        return shown


def _stream(number: int, mixture: Mixture) -> str:
    """The name under which a set's permutations are drawn."""
    if not number:
        return "epoch"
    return "regularization epoch" if number == 1 and mixture.regularization[1] else f"epoch of set {number}"


class _Epochs:
    """Permutations of `count` samples one after the other; the current one is kept for chunk after chunk."""

    def __init__(self, seed: int, count: int, stream: str):
        self.seed, self.count, self.stream = seed, count, stream
        self.epoch = -1
        self.permutation = np.zeros(0, np.int64)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """The sample numbers at the places start, …, stop - 1 of this sequence."""
        parts = [self.permutation[:0]]
        while start < stop:
            epoch, offset = divmod(start, self.count)
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, permutation(self.seed, epoch, self.count, self.stream)
            part = self.permutation[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)


def _fill(
    waiting: Waiting, positions: np.ndarray, samples: np.ndarray, numbers: np.ndarray, batch_size: int
) -> tuple[list[GlobalBatch], Waiting]:
    """The batches that a chunk completes, in order of completion, and what then waits in each bucket."""
    ready: list[GlobalBatch] = []
    left: Waiting = dict(waiting)
    for number in np.unique(numbers):
        bucket = int(number)
        mask = numbers == number
        # What waits in the bucket comes first; whole batches leave it.
        old = waiting.get(bucket, (positions[:0], samples[:0]))
        where = np.concatenate([old[0], positions[mask]])
        what = np.concatenate([old[1], samples[mask]])
        full = len(where) // batch_size * batch_size
        ready += [
            GlobalBatch(where[i : i + batch_size], what[i : i + batch_size], bucket)
            for i in range(0, full, batch_size)
        ]
        left[bucket] = (where[full:], what[full:])
    # A batch is complete at its last position.
    ready.sort(key=lambda batch: int(batch.positions[-1]))
    return ready, left


def micro_batches(
    batch: GlobalBatch, *, grad_accum_steps: int, num_processes: int, process_index: int
) -> Iterator[GlobalBatch]:
    """One process's part of a global batch: sample j belongs to micro-batch j // (P m), process (j // m) % P."""
    size = len(batch.positions) // (grad_accum_steps * num_processes)
    for micro in range(grad_accum_steps):
        start = (micro * num_processes + process_index) * size
        yield GlobalBatch(batch.positions[start : start + size], batch.samples[start : start + size], batch.bucket)


def check_batch_size(batch_size: int, grad_accum_steps: int, num_processes: int) -> None:
    """Passes when the global batch divides evenly.

    Raises:
        ValueError: it does not, or a number is below one.
    """
    parts = grad_accum_steps * num_processes
    if batch_size < 1 or grad_accum_steps < 1 or num_processes < 1:
        raise ValueError(
            f"batch_size {batch_size}, grad_accum_steps {grad_accum_steps} and {num_processes} processes "
            "must each be at least 1"
        )
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        raise ValueError(
            f"batch_size {batch_size} is the global batch and does not divide by {num_processes} processes x "
            f"{grad_accum_steps} grad_accum_steps = {parts}; nearest: {below or above} or {above}"
        )


@dataclass(frozen=True)
class Buckets:
    """Ratios (width / height) and the (height, width) of each; sizes may repeat."""

    ratios: tuple[float, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def nearest(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """The bucket number of each image: the smallest |ratio - width / height|, the first one at a tie.

        Shapes: (N,), (N,) pixels -> (N,) int16.
        """
        wanted = np.asarray(widths, np.float64) / np.asarray(heights, np.float64)
        best = np.zeros(wanted.shape, np.int16)
        gap = np.full(wanted.shape, np.inf)
        for number, ratio in enumerate(self.ratios):
            distance = np.abs(ratio - wanted)
            closer = distance < gap
            best[closer] = number
            gap[closer] = distance[closer]
        # Duplicate sizes count as one bucket, or their images would wait for a batch twice as long.
        first = np.array([self.sizes.index(size) for size in self.sizes], np.int16)
        return first[best]


def make_buckets(
    image_size: int,
    ratios: Sequence[str | float] | None = None,
    *,
    factor: int = 32,
    mirror: bool = True,
) -> Buckets:
    """The buckets of density image_size², both sides multiples of `factor`; one square when there are no ratios.

    `mirror` appends 1 / ratio for every ratio that is not there yet.

    Raises:
        ValueError: a ratio is no positive fraction, or a side would be shorter than `factor`.
    """
    if image_size < 1 or factor < 1:
        raise ValueError(f"image_size {image_size} and the bucket factor {factor} must be positive")
    if not ratios:
        if image_size % factor:
            below, above = image_size // factor * factor, -(-image_size // factor) * factor
            raise ValueError(
                f"image_size {image_size} is not a multiple of {factor}, the stride of the image encoder; "
                f"nearest: {below or above} or {above}"
            )
        return Buckets((1.0,), ((image_size, image_size),))
    values = [_ratio(value) for value in ratios]
    if mirror:
        known = {_fraction(value) for value in ratios}
        values += [1 / _ratio(value) for value in ratios if 1 / _fraction(value) not in known]
    return Buckets(tuple(values), tuple(_size(value, image_size, factor) for value in values))


def _fraction(value: str | float) -> Fraction:
    try:
        fraction = Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if fraction <= 0:
        raise ValueError(f"multi_aspect_ratio {value!r} is no ratio; write width/height, for example '9/16'")
    return fraction


def _ratio(value: str | float) -> float:
    fraction = _fraction(value)
    return fraction.numerator / fraction.denominator


def _size(ratio: float, image_size: int, factor: int) -> tuple[int, int]:
    density = image_size**2
    height = int((density / ratio) ** 0.5 // factor * factor)
    width = int((density * ratio) ** 0.5 // factor * factor)
    if not height or not width:
        raise ValueError(
            f"multi_aspect_ratio {ratio:.4g} at image_size {image_size} gives a side shorter than {factor} pixels; "
            "remove the ratio or raise image_size"
        )
    return height, width
