"""Gaussian blur, dilation and erosion with a disc, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_blur(x: Tensor, sigma: float, *, radius: int | None = None) -> Tensor:
    """`x` blurred along height and width; the border is repeated outwards.

    Shapes: (C, H, W) -> (C, H, W); `sigma` in pixels, `radius` 3 sigma when absent.
    """
    if sigma <= 0:
        return x
    radius = max(1, round(3 * sigma)) if radius is None else radius
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    weights = weights / weights.sum()
    channels = x.shape[0]
    rows = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    padded = F.pad(x[None], (0, 0, radius, radius), mode="replicate")
    blurred = F.pad(F.conv2d(padded, rows, groups=channels), (radius, radius, 0, 0), mode="replicate")
    return F.conv2d(blurred, rows.transpose(2, 3), groups=channels)[0]


def dilate(x: Tensor, size: int) -> Tensor:
    """The largest value under a disc around every pixel.

    Shapes: (C, H, W) -> (C, H, W); `size` odd, in pixels; 0 and 1 change nothing.
    """
    if size <= 1:
        return x
    radius = size // 2
    # Outside the image there is nothing to take: -inf never wins.
    padded = F.pad(x, (radius, radius, radius, radius), value=float("-inf"))
    height, width = x.shape[-2:]
    result = torch.full_like(x, float("-inf"))
    for row, column in disc(size):
        torch.maximum(result, padded[:, row : row + height, column : column + width], out=result)
    return result


def erode(x: Tensor, size: int) -> Tensor:
    """The smallest value under a disc around every pixel; shapes as in `dilate`."""
    return -dilate(-x, size)


def disc(size: int) -> list[tuple[int, int]]:
    """The (row, column) offsets of a disc in a square of side `size`.

    Source: the original's structuring element, (i / (size - 1) - 1/2)^2 + (j / (size - 1) - 1/2)^2 < 0.3.
    """
    places = [index / (size - 1) - 0.5 for index in range(size)]
    return [(i, j) for i in range(size) for j in range(size) if places[i] ** 2 + places[j] ** 2 < 0.3]


def resized(x: Tensor, size: int | Sequence[int] | None, *, antialias: bool = False) -> Tensor:
    """`x` bilinearly at `size` (one number: a square); as it is for None.

    Shapes: (C, H, W) -> (C, h, w).
    """
    if size is None:
        return x
    shape = [size, size] if isinstance(size, int) else list(size)
    return F.interpolate(x[None], size=shape, mode="bilinear", antialias=antialias)[0]
