"""The previewer: a fast, rough look at semantic latents without Stage B."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .base import PretrainedMixin


class StableCascadePreviewer(PretrainedMixin, ModelMixin, ConfigMixin):
    """Rough images of semantic latents, eight times their size; the defaults are the released previewer.

    Trained towards pixels in [0, 1] and not clamped.

    Shapes: (B, in_channels, h, w) -> (B, out_channels, 8 h, 8 w).

    Raises:
        ValueError: `hidden_channels` is not a positive multiple of 4.
    """

    component = "previewer"

    @register_to_config
    def __init__(self, in_channels: int = 16, hidden_channels: int = 512, out_channels: int = 3) -> None:
        super().__init__()
        if hidden_channels < 4 or hidden_channels % 4:
            raise ValueError(f"hidden_channels is {hidden_channels}; must be a positive multiple of 4")
        wide, half, quarter = hidden_channels, hidden_channels // 2, hidden_channels // 4
        self.blocks = nn.Sequential(
            *_activated(nn.Conv2d(in_channels, wide, 1)),
            *_activated(nn.Conv2d(wide, wide, 3, padding=1)),
            *_activated(nn.ConvTranspose2d(wide, half, 2, stride=2)),
            *_activated(nn.Conv2d(half, half, 3, padding=1)),
            *_activated(nn.ConvTranspose2d(half, quarter, 2, stride=2)),
            *_activated(nn.Conv2d(quarter, quarter, 3, padding=1)),
            *_activated(nn.ConvTranspose2d(quarter, quarter, 2, stride=2)),
            *_activated(nn.Conv2d(quarter, quarter, 3, padding=1)),
            nn.Conv2d(quarter, out_channels, 1),
        )

    def forward(self, semantic_latents: Tensor) -> Tensor:
        """A rough image, in the dtype of the weights.

        Shapes: (B, in_channels, h, w) -> (B, out_channels, 8 h, 8 w), about [0, 1].
        """
        x = semantic_latents.to(next(self.parameters()).dtype)
        return self.blocks(x.contiguous(memory_format=torch.channels_last))


def _activated(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, nn.Module, nn.Module]:
    return convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)
