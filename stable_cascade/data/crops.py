"""Where a bucket is cut out of an image that covers it: centre, random or smart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .draws import draws, mixed, sample_seeds, uniforms

CROPS = ("random", "center", "smart")

SMART_SHARE = 0.3
"""How often the smart crop takes a random good place instead of the best one (the original's randomise_p)."""

SMART_TOP = 0.2
"""Which share of the places counts as good then (the original's randomise_q)."""


def check_crop(crop: str) -> None:
    """Passes for a known kind of crop.

    Raises:
        ValueError: it is unknown.
    """
    if crop not in CROPS:
        raise ValueError(f"crop {crop!r} is none of {', '.join(CROPS)}")


@dataclass(frozen=True)
class CropChoice:
    """Which crop of an image a position shows.

    `per_image` None takes a fresh one at every position. Otherwise an image has that many of each bucket size (one,
    unless `crop` is random), each a function of (seed, the image's content, size, crop number), and the position
    draws the number. The only crop of center or smart does not depend on the seed.
    """

    crop: str
    seed: int
    per_image: int | None = None

    def __post_init__(self) -> None:
        check_crop(self.crop)
        if self.per_image is not None and self.per_image < 1:
            raise ValueError(f"crops_per_image {self.per_image} must be at least 1; leave it out for fresh crops")

    @property
    def fresh(self) -> bool:
        """Whether every position has a crop of its own."""
        return self.crop != "center" and self.per_image is None

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The crop number of each position.

        Shapes: (N,) -> (N,) int64.
        """
        if self.crop != "random" or self.per_image is None:
            return np.zeros(len(positions), np.int64)
        return (draws(self.seed, "crop number", positions) % np.uint64(self.per_image)).astype(np.int64)

    def seeds(self, positions: np.ndarray, content_hashes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """What decides the place of each position's crop, for `crop_place`.

        Shapes: (N,), (N,) uint64 -> (N,) int64.
        """
        if self.per_image is None:
            return sample_seeds(self.seed, positions)
        with np.errstate(over="ignore"):
            which = mixed(content_hashes) + self.numbers(positions).astype(np.uint64)
        seed = self.seed if self.crop == "random" else 0
        return (draws(seed, f"crop {size[0]}x{size[1]}", which) >> np.uint64(1)).astype(np.int64)

    def names(self, positions: np.ndarray) -> list[str]:
        """The crops' part of an identity: equal where image, size and this are enough to get the same crop."""
        if self.crop == "center" or (self.crop == "smart" and self.per_image is not None):
            return [self.crop] * len(positions)
        if self.per_image is None:
            return [f"{self.crop} fresh {seed:x}" for seed in sample_seeds(self.seed, positions).tolist()]
        return [f"random {number} of seed {self.seed}" for number in self.numbers(positions).tolist()]


def crop_to(pixels: Tensor, size: tuple[int, int], crop: str, seed: int) -> Tensor:
    """A `size` window of the image; its place is a function of the image and the sample's seed.

    Shapes: (3, H, W), H >= size[0], W >= size[1] -> (3, size[0], size[1]).
    """
    return window(pixels, size, crop_place(pixels, size, crop, seed))


def window(pixels: Tensor, size: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """The `size` window whose upper left corner is at `place` (row, column).

    Shapes: (C, H, W) -> (C, size[0], size[1]).
    """
    top, left = place
    return pixels[:, top : top + size[0], left : left + size[1]]


def crop_place(pixels: Tensor, size: tuple[int, int], crop: str, seed: int) -> tuple[int, int]:
    """Row and column of the window's upper left corner.

    Shapes: (3, H, W).
    """
    free = (pixels.shape[1] - size[0], pixels.shape[2] - size[1])
    if free == (0, 0):
        return 0, 0
    if crop == "center":
        return round(free[0] / 2), round(free[1] / 2)
    first, second = uniforms(seed, "crop", np.arange(2))
    if crop == "random":
        return int(first * (free[0] + 1)), int(second * (free[1] + 1))
    energy = _window_energy(pixels, size)
    if first >= SMART_SHARE:
        best = int(energy.argmax())
    else:
        good = energy.flatten().argsort(descending=True, stable=True)[: max(1, int(SMART_TOP * energy.numel()))]
        best = int(good[int(second * len(good))])
    return divmod(best, energy.shape[1])


def _window_energy(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient energy inside the window at every place it fits.

    Edges stand in for the saliency network of the original, which is not published: textured parts win, and a calm
    subject before a busy background loses.

    Shapes: (3, H, W) -> (H - size[0] + 1, W - size[1] + 1) float64.
    """
    grey = pixels.mean(0, dtype=torch.float64)
    edges = torch.zeros_like(grey)
    edges[1:] += (grey[1:] - grey[:-1]).abs()
    edges[:, 1:] += (grey[:, 1:] - grey[:, :-1]).abs()
    sums = torch.zeros(grey.shape[0] + 1, grey.shape[1] + 1, dtype=torch.float64)
    sums[1:, 1:] = edges.cumsum(0).cumsum(1)
    height, width = size
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
