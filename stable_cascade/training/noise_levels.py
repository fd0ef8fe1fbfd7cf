"""The loss by noise level: added up on the device, read where the log is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOWEST, WIDTH, BUCKETS = -10.0, 2.0, 10
MEANS, COUNTS = "loss_by_log_snr", "samples_by_log_snr"
"""The keys in `log.jsonl`, each a mapping from the middle of a bucket."""


def middle(bucket: int) -> str:
    """The log_snr in the middle of a bucket, as the log names it."""
    return f"{LOWEST + WIDTH * (bucket + 0.5):g}"


class LossByNoiseLevel:
    """The unweighted loss in buckets of log_snr since it was last read.

    `add` never waits for the device. What lies outside the buckets counts in the nearest one.
    """

    def __init__(self) -> None:
        self.totals: Tensor | None = None  # (2, BUCKETS): sums of the loss, numbers of samples

    def add(self, log_snr: Tensor, loss: Tensor) -> None:
        """Count samples.

        Shapes: (B,), (B,).
        """
        if self.totals is None:
            self.totals = torch.zeros(2, BUCKETS, device=loss.device)
        loss = loss.detach().float()
        bucket = ((log_snr.detach().to(loss.device).float() - LOWEST) / WIDTH).long().clamp(0, BUCKETS - 1)
        self.totals.index_add_(1, bucket, torch.stack([loss, torch.ones_like(loss)]))

    def read(self, accelerator: Any) -> dict[str, dict[str, float]]:
        """What all processes counted since the last time: mean loss and number of samples of each bucket that has any.

        Every process has to call it. Without noise levels the result is empty.
        """
        totals, self.totals = self.totals, None
        if totals is None:
            return {}
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), "sum")
        sums, counts = totals.tolist()
        seen = [bucket for bucket in range(BUCKETS) if counts[bucket]]
        return {
            MEANS: {middle(bucket): sums[bucket] / counts[bucket] for bucket in seen},
            COUNTS: {middle(bucket): int(counts[bucket]) for bucket in seen},
        }


@dataclass(frozen=True)
class Span:
    """The mean loss by log_snr over the steps `first` to `last` of a run."""

    first: int
    last: int
    points: tuple[tuple[float, float], ...]


def spans_of_log(log: Path, count: int = 5) -> list[Span]:
    """A run's log in at most `count` spans of equally many lines, the oldest first."""
    with log.open() as file:
        lines = [line for line in map(json.loads, file) if line.get(MEANS)]
    cuts = [round(number * len(lines) / count) for number in range(count + 1)]
    parts = [lines[start:stop] for start, stop in pairwise(cuts) if stop > start]
    starts = [1, *(part[-1]["step"] + 1 for part in parts)]
    return [_span(first, part) for first, part in zip(starts, parts, strict=False)]


def _span(first: int, lines: Sequence[dict[str, Any]]) -> Span:
    """Lines of the log as one span; every sample counts alike."""
    points = []
    for name in sorted({name for line in lines for name in line[MEANS]}, key=float):
        pairs = [(line[MEANS][name], line[COUNTS][name]) for line in lines if name in line[MEANS]]
        points.append((float(name), _weighted_mean(pairs)))
    return Span(first, lines[-1]["step"], tuple(points))


def _weighted_mean(pairs: Iterable[tuple[float, float]]) -> float:
    pairs = list(pairs)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
