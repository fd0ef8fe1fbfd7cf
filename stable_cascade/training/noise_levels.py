"""The loss by noise level: added up on the device, read where the log is written, and plotted."""

from __future__ import annotations

import json
import math
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


SCALE = 2  # drawn this much larger and shrunk, which smooths the lines
SIZE = (720, 440)
LEFT, TOP, RIGHT, BOTTOM = 64, 38, 150, 58
OLDEST, NEWEST = (190, 205, 230), (20, 50, 120)
GRID, INK = (225, 225, 225), (40, 40, 40)


def plot_spans(spans: Sequence[Span], path: Path) -> Path:
    """Draw the loss over log_snr, on a logarithmic axis; returns the path.

    Raises:
        ValueError: there is nothing to draw.
    """
    from PIL import Image, ImageDraw, ImageFont

    values = [value for span in spans for _, value in span.points if value > 0 and math.isfinite(value)]
    if not values:
        raise ValueError(f"{path.name}: no loss was logged by noise level")
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
    font = ImageFont.load_default(size=12 * SCALE)
    axes = _Axes(ImageDraw.Draw(image), font, *_limits(values))
    axes.frame()
    for number, span in enumerate(spans):
        share = 1.0 if len(spans) == 1 else number / (len(spans) - 1)
        colour = tuple(round(old + share * (new - old)) for old, new in zip(OLDEST, NEWEST, strict=True))
        axes.curve([point for point in span.points if point[1] > 0 and math.isfinite(point[1])], colour)
        axes.text(SIZE[0] - RIGHT + 14, TOP + 8 + 18 * number, f"steps {span.first}-{span.last}", colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path)
    return path


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and highest of 1, 2, 5, 10, … around the values."""
    steps = sorted(digit * 10.0**power for power in range(-12, 9) for digit in (1, 2, 5))
    low = max((step for step in steps if step <= min(values)), default=steps[0])
    high = min((step for step in steps if step >= max(values)), default=steps[-1])
    return (low, high) if high > low else (low / 2, high * 2)


class _Axes:
    """The frame of the plot: from log_snr and loss to pixels."""

    def __init__(self, draw: Any, font: Any, low: float, high: float):
        self.draw, self.font, self.low, self.high = draw, font, low, high
        self.area = (LEFT, TOP, SIZE[0] - RIGHT, SIZE[1] - BOTTOM)

    def place(self, log_snr: float, loss: float) -> tuple[float, float]:
        """Pixels of a point."""
        left, top, right, bottom = self.area
        across = (log_snr - LOWEST) / (WIDTH * BUCKETS)
        up = math.log(min(max(loss, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return left + across * (right - left), bottom - up * (bottom - top)

    def frame(self) -> None:
        """Grid, ticks and titles."""
        left, top, right, bottom = self.area
        for bucket in range(0, BUCKETS + 1):
            log_snr = LOWEST + WIDTH * bucket
            x, _ = self.place(log_snr, self.low)
            self.line([(x, top), (x, bottom)], GRID)
            self.text(x, bottom + 6, f"{log_snr:g}", INK, "ma")
        ticks = [digit * 10.0**power for power in range(-12, 9) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if self.low <= tick * 1.000001 and tick <= self.high * 1.000001]
        if len(ticks) > 10:
            ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")] or ticks
        for tick in ticks:
            _, y = self.place(LOWEST, tick)
            self.line([(left, y), (right, y)], GRID)
            self.text(left - 8, y, f"{tick:g}", INK, "rm")
        self.line([(left, top), (left, bottom), (right, bottom)], INK)
        self.text(left, 12, "mean unweighted loss", INK)
        self.text((left + right) / 2, bottom + 30, "more noise   <   logSNR   >   less noise", INK, "ma")

    def curve(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...]) -> None:
        """One line with a dot per bucket."""
        placed = [self.place(*point) for point in points]
        self.line(placed, colour, width=2)
        for x, y in placed:
            box = [(x - 3) * SCALE, (y - 3) * SCALE, (x + 3) * SCALE, (y + 3) * SCALE]
            self.draw.ellipse(box, fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: float = 1) -> None:
        """A line through points."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        if len(scaled) > 1:
            self.draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def text(self, x: float, y: float, text: str, colour: tuple[int, ...], anchor: str = "la") -> None:
        """Words at a place."""
        self.draw.text((x * SCALE, y * SCALE), text, fill=colour, font=self.font, anchor=anchor)
