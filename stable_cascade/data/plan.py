"""Which sample is in which batch: integers only, so that going to any step decodes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .buckets import Buckets
from .draws import draws, permutation, uniforms
from .samples import Regularization

_CHUNK = 65536
Waiting = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class GlobalBatch:
    """One step's samples: global positions, sample numbers (both (batch_size,)) and the bucket they share."""

    positions: np.ndarray
    samples: np.ndarray
    bucket: int


@dataclass(frozen=True)
class Order:
    """The endless sequence of samples: one permutation after the other, and a bucket for every position.

    With `regularization` two such sequences are interleaved.
    """

    count: int
    nearest: np.ndarray
    buckets: Buckets
    seed: int
    random_bucket_share: float = 0.0
    regularization: Regularization | None = None

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
    """The sample at every position: epoch after epoch, or two kinds of samples interleaved by their share."""

    def __init__(self, order: Order):
        self.regularization = order.regularization
        first = order.count if order.regularization is None else order.regularization.first
        self.main = _Epochs(order.seed, first, "epoch")
        self.other = _Epochs(order.seed, order.count - first, "regularization epoch")
        self.first = first

    def samples(self, start: int, stop: int) -> np.ndarray:
        """The sample numbers at the positions start, …, stop - 1."""
        if self.regularization is None:
            return self.main.samples(start, stop)
        share = self.regularization.share
        # Position p shows a regularisation image where floor((p + 1) share) is one more than floor(p share).
        counts = np.arange(start, stop + 1) * share.numerator // share.denominator
        before, after = int(counts[0]), int(counts[-1])
        shown = np.empty(stop - start, np.int64)
        regularizes = np.diff(counts) == 1
        shown[regularizes] = self.other.samples(before, after) + self.first
        shown[~regularizes] = self.main.samples(start - before, stop - after)
        return shown


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
        old = waiting.get(bucket, (positions[:0], samples[:0]))
        where = np.concatenate([old[0], positions[mask]])
        what = np.concatenate([old[1], samples[mask]])
        full = len(where) // batch_size * batch_size
        ready += [
            GlobalBatch(where[i : i + batch_size], what[i : i + batch_size], bucket)
            for i in range(0, full, batch_size)
        ]
        left[bucket] = (where[full:], what[full:])
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
