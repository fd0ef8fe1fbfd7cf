"""Bright and dark blobs as control images: what lets an image hide a QR code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .arguments import checked_count, checked_number, checked_sizes, draw_choice, draw_uniform, per_sample
from .kernels import dilate, erode, gaussian_blur, resized

EVEN = 0.004
"""A range of brightness, one level of 8 bits, below which an image has no blobs."""


class QRFilter:
    """1 where the image is bright, 0 where it is dark, 1/2 between: its brightest and darkest thirds, as blobs.

    Brightness is the largest of the three colours. A blur and a closing (dilation, then erosion, with a disc) make
    blobs of it; without a generator the first kernels are taken, which keep the modules of a QR image apart.
    (The original takes the extremes of the batch's first image for all of them; here each has its own.)

    Args:
        resize: side of the square at which blobs are made; None keeps the image's size.
        blobify: blur and close; False only for images that are blobs already.
        dilation_kernels: sizes of the disc, one drawn per sample.
        blur_kernels: sizes of the blur, one drawn per sample; its sigma is drawn from [0.1, 2].
        share: how much of the range of brightness counts as bright, and as dark.
    """

    channels = 1

    def __init__(
        self,
        resize: int | None = 224,
        blobify: bool = True,
        dilation_kernels: Sequence[int] = (3, 5, 7),
        blur_kernels: Sequence[int] = (15,),
        share: float = 0.33,
    ) -> None:
        self.resize = checked_count("resize", resize, lowest=8, optional=True)
        self.blobify = bool(blobify)
        self.dilation_kernels = checked_sizes("dilation_kernels", dilation_kernels)
        self.blur_kernels = checked_sizes("blur_kernels", blur_kernels)
        self.share = checked_number("share", share, 0, 0.5)

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1]."""
        controls = [self._blobs(image, generator) for image, generator in per_sample(pixels, generators)]
        return torch.stack(controls).to(pixels.device)

    def _blobs(self, image: Tensor, generator: Generator | None) -> Tensor:
        brightness = resized(image, self.resize).amax(dim=0, keepdim=True)
        if self.blobify:
            blur, disc = draw_choice(self.blur_kernels, generator), draw_choice(self.dilation_kernels, generator)
            sigma = draw_uniform(0.1, 2.0, generator)
            if blur:
                brightness = gaussian_blur(brightness, sigma, radius=blur // 2)
            brightness = erode(dilate(brightness, disc), disc)
        low, high = float(brightness.min()), float(brightness.max())
        # An even image is neither bright nor dark; the rounding of the blur must not be made blobs of.
        margin = (high - low) * self.share if high - low > EVEN else -1.0
        levels = 0.5 + 0.5 * (brightness > high - margin).float() - 0.5 * (brightness < low + margin).float()
        return resized(levels, None if self.resize is None else image.shape[-2:]).clamp(0, 1)
