"""Edges as control images: hard ones (Canny) and soft ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .arguments import (
    checked_count,
    checked_number,
    checked_range,
    checked_sizes,
    draw_choice,
    draw_uniform,
    needed_module,
    per_sample,
)
from .kernels import dilate, gaussian_blur, resized

LONGEST_SHAPE = 100
OPENCV = "pip install 'stable-cascade[controls]'"


class CannyFilter:
    """Canny's edges, found at `resize` x `resize` pixels and enlarged bilinearly to the image's size.

    Every image is squeezed into the square, as the released weights were trained; `resize=None` keeps its size.

    Args:
        resize: side at which edges are found.
        low: weaker gradients are no edges.
        high: stronger gradients are edges; between the two are edges that continue a strong one.

    Source: Canny 1986, as OpenCV computes it; the original's size and thresholds.
    """

    channels = 1

    def __init__(self, resize: int | None = 224, low: float = 100, high: float = 200) -> None:
        self.resize = checked_count("resize", resize, lowest=8, optional=True)
        self.low = checked_number("low", low, 0, 10000)
        self.high = checked_number("high", high, self.low, 10000)

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1]; nothing is drawn."""
        edges = [self._edges(image) for image, _ in per_sample(pixels, generators)]
        return torch.stack(edges).to(pixels.device)

    def _edges(self, image: Tensor) -> Tensor:
        cv2 = needed_module("cv2", "CannyFilter", OPENCV)
        small = resized(image, self.resize).clamp(0, 1)
        # Truncated, not rounded: the original computes its edges so.
        levels = (small * 255).byte().permute(1, 2, 0).contiguous().numpy()
        edges = torch.from_numpy(cv2.Canny(levels, self.low, self.high))[None].float() / 255
        return resized(edges, None if self.resize is None else image.shape[-2:]).clamp(0, 1)


class SoftEdgeFilter:
    """How strongly the image changes at each place: a smoothed gradient, no network.

    The gradient of the blurred image, the strongest of the three colours, divided by the value that 2 % of the
    places exceed (at least `floor`, so that the noise of an even surface stays dark).

    Args:
        resize: the shorter side at which gradients are taken; None keeps the image's size.
        sigma: blur before the gradient, in pixels at that size.
        dilation_kernels: widths by which edges are thickened, one drawn per sample; the first without a generator.
        binarize: edges are 0 or 1, above a threshold drawn from `threshold`; its middle without a generator.
        threshold: [low, high], with `binarize`.
        floor: gradients that count as full edges at least, in brightness per pixel.

    Source: Sobel's gradient. The original's filter of this kind is a network (PidiNet), which no package ships;
        sizes, dilation and thresholds are the original's.
    """

    channels = 1

    def __init__(
        self,
        resize: int | None = 224,
        sigma: float = 1.0,
        dilation_kernels: Sequence[int] = (0, 3, 5),
        binarize: bool = False,
        threshold: Sequence[float] = (0.05, 0.7),
        floor: float = 0.05,
    ) -> None:
        self.resize = checked_count("resize", resize, lowest=8, optional=True)
        self.sigma = checked_number("sigma", sigma, 0, 100)
        self.dilation_kernels = checked_sizes("dilation_kernels", dilation_kernels)
        self.binarize = bool(binarize)
        self.threshold = checked_range("threshold", threshold)
        self.floor = checked_number("floor", floor, 1e-6, 1)

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1]."""
        edges = [self._edges(image, generator) for image, generator in per_sample(pixels, generators)]
        return torch.stack(edges).to(pixels.device)

    def _edges(self, image: Tensor, generator: Generator | None) -> Tensor:
        size = image.shape[-2:]
        width = draw_choice(self.dilation_kernels, generator)
        threshold = draw_uniform(*self.threshold, generator)
        strength = gradient(gaussian_blur(resized(image, self._working_size(size), antialias=True), self.sigma))
        strongest = max(_quantile(strength, 0.98), self.floor)
        edges = dilate((strength / strongest).clamp(0, 1), width)
        if self.binarize:
            edges = (edges > threshold).float()
        return resized(edges, size).clamp(0, 1)

    def _working_size(self, size: Sequence[int]) -> tuple[int, int] | None:
        if self.resize is None:
            return None
        if max(size) > LONGEST_SHAPE * min(size):
            raise ValueError(
                f"SoftEdgeFilter takes images up to {LONGEST_SHAPE} times as long as wide, this one is {size[0]} x "
                f"{size[1]} (height x width); cut it"
            )
        scale = self.resize / min(size)
        return max(3, round(size[0] * scale)), max(3, round(size[1] * scale))


def _quantile(values: Tensor, share: float) -> float:
    """The value that `share` of the values do not exceed; torch's own takes 16 million at most."""
    if values.numel() <= 2**24:
        return float(values.quantile(share))
    import numpy as np

    return float(np.quantile(values.cpu().numpy(), share))


def gradient(image: Tensor) -> Tensor:
    """Length of Sobel's gradient, in brightness per pixel, the strongest of the channels.

    Shapes: (C, H, W) -> (1, H, W).
    """
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    padded = F.pad(image[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).square().sum(dim=1).sqrt().amax(dim=0, keepdim=True)
