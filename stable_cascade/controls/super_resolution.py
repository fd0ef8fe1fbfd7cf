"""A small version of the image as control image: for super resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .arguments import checked_number, checked_pixels


class SREffnetFilter:
    """Semantic latents of the image shrunk by `scale_factor`, enlarged to those of the whole image.

    Shrinking and enlarging take the nearest pixel, as the released weights were trained. To enlarge a small image
    of your own, enlarge it with nearest neighbours by 1 / `scale_factor` first: shrinking then gives it back exactly.

    Args:
        scale_factor: side of the small image over that of the image.
        encode: pixels in [0, 1] -> semantic latents; the trainers and pipelines give their image encoder.
    """

    channels = 16

    def __init__(self, scale_factor: float = 0.5, *, encode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.scale_factor = checked_number("scale_factor", scale_factor, 0.01, 1)
        self.encode = encode

    @torch.no_grad()
    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 16, H/32, W/32); nothing is drawn.

        Raises:
            ValueError: no `encode` was given.
        """
        if self.encode is None:
            raise ValueError("SREffnetFilter has no image encoder; make it with make_filter(..., encode=...)")
        latents = self.encode(shrunk(pixels, self.scale_factor)).float()
        return F.interpolate(latents, scale_factor=1 / self.scale_factor, mode="nearest").to(pixels.device)


class SRPixelFilter:
    """The image shrunk by `scale_factor` and enlarged again with nearest neighbours: blocks of pixels.

    Args:
        scale_factor: side of the small image over that of the image.
    """

    channels = 3

    def __init__(self, scale_factor: float = 0.25) -> None:
        self.scale_factor = checked_number("scale_factor", scale_factor, 0.01, 1)

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 3, H, W) in [0, 1]; nothing is drawn."""
        small = shrunk(pixels, self.scale_factor)
        return F.interpolate(small, size=tuple(pixels.shape[-2:]), mode="nearest")


def shrunk(pixels: Tensor, scale_factor: float) -> Tensor:
    """Every 1 / scale_factor-th pixel, at least one. Shapes: (B, 3, H, W) -> (B, 3, h, w) float32."""
    checked_pixels(pixels)
    if min(pixels.shape[-2:]) * scale_factor < 1:
        raise ValueError(
            f"scale_factor {scale_factor:g} leaves nothing of an image {tuple(pixels.shape[-2:])}; take a larger one"
        )
    return F.interpolate(pixels.detach().float(), scale_factor=scale_factor, mode="nearest")
