"""The judge of Stage A's training: which patches of a picture look rebuilt. No part of a cascade."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """A score per patch of 54 x 54 pixels, every 8 pixels: high for photographs, low for rebuilt pictures.

    Its norms see one picture at a time (GroupNorm, no batch norm), so a score does not depend on the batch around it.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 1, H/8, W/8).

    Source: Isola et al. 2017, section 3.2.2 (PatchGAN); Esser et al. 2021, section 3.1.
    """

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"discriminator channels are {channels}; must be at least 1")
        widths = [in_channels, channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, kernel_size=4, stride=2, padding=1)]
            layers += [_norm(width), nn.LeakyReLU(0.2)] if before != in_channels else [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(widths[-1], 4 * channels, kernel_size=3, padding=1), _norm(4 * channels)]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(4 * channels, 1, kernel_size=3, padding=1)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """The scores of the patches."""
        return self.layers(2 * pixels - 1)


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of four channels or more: alone, a channel of a single patch would always be zero."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)
