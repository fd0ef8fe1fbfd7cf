"""Where a bucket is cut out of a picture that covers it: centre, random or smart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .draws import uniforms

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


def crop_to(pixels: Tensor, size: tuple[int, int], crop: str, seed: int) -> Tensor:
    """A `size` window of the picture; its place is a function of the picture and the sample's seed.

    Shapes: (3, H, W), H >= size[0], W >= size[1] -> (3, size[0], size[1]).
    """
    free = (pixels.shape[1] - size[0], pixels.shape[2] - size[1])
    top, left = _place(pixels, size, free, crop, seed)
    return pixels[:, top : top + size[0], left : left + size[1]]


def _place(pixels: Tensor, size: tuple[int, int], free: tuple[int, int], crop: str, seed: int) -> tuple[int, int]:
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
