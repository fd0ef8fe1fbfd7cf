"""Aspect-ratio buckets: which image sizes exist, and which one an image goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


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


def covering_size(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the image's own shape that covers the bucket (exact integer arithmetic)."""
    short, long = min(height, width), max(height, width)
    edge = max(-(-bucket[0] * short // height), -(-bucket[1] * short // width))
    other = math.floor(Fraction(edge * long, short))
    resized = (edge, other) if height <= width else (other, edge)
    return max(resized[0], bucket[0]), max(resized[1], bucket[1])
