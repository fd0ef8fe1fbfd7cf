"""The semantic encoder: images to the latents that the prior generates."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from os import PathLike
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .efficientnet import EfficientNetFeatures
from .pretrained import PretrainedMixin

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class StableCascadeSemanticEncoder(PretrainedMixin, ModelMixin, ConfigMixin):
    """Semantic latents of images in [0, 1]; the defaults are the released encoder.

    EfficientNetV2 features, a 1x1 convolution and a batch norm without weights, which gives latents of about unit
    variance. Input is normalised here, by `image_mean` and `image_std`.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, latent_channels, H/stride, W/stride), rounded up.

    Raises:
        ValueError: a stage list has the wrong length, or mean and std do not have one entry per channel.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["InvertedBottleneck"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        *,
        stem_width: int = 24,
        stem_stride: int = 2,
        block_types: Sequence[str] = ("fused", "fused", "fused", "mbconv", "mbconv", "mbconv"),
        widths: Sequence[int] = (24, 48, 64, 128, 160, 256),
        depths: Sequence[int] = (2, 4, 4, 6, 9, 15),
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2),
        expansions: Sequence[int] = (1, 4, 4, 4, 6, 6),
        head_width: int = 1280,
        stochastic_depth: float = 0.2,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != in_channels:
                raise ValueError(
                    f"{name} has {len(values)} entries for in_channels={in_channels}; give one per channel"
                )
        self.backbone = EfficientNetFeatures(
            in_channels,
            stem_width=stem_width,
            stem_stride=stem_stride,
            block_types=block_types,
            widths=widths,
            depths=depths,
            strides=strides,
            expansions=expansions,
            head_width=head_width,
            stochastic_depth=stochastic_depth,
        )
        self.mapper = nn.Sequential(
            nn.Conv2d(head_width, latent_channels, 1, bias=False), nn.BatchNorm2d(latent_channels, affine=False)
        )

    @property
    def stride(self) -> int:
        """Pixels per latent, along each side."""
        return self.config.stem_stride * prod(self.config.strides)

    def forward(self, pixels: Tensor) -> Tensor:
        """Semantic latents of `pixels`, in the dtype of the weights.

        Shapes: (B, 3, H, W) in [0, 1] -> (B, latent_channels, H/stride, W/stride), rounded up.

        Raises:
            ValueError: `pixels` is not a batch of images with `in_channels` channels, or holds integers.
        """
        channels = self.config.in_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}; expected (batch, {channels}, height, width)")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels are {pixels.dtype}; expected floats in [0, 1], so divide by 255")
        return self.mapper(self.backbone(self._normalised(pixels)))

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | PathLike[str] | dict[str, Tensor],
        config: dict[str, Any] | str | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> StableCascadeSemanticEncoder:
        """A network from one local file with the names of the original or ours; see `load_single_file`."""
        from .loading import load_single_file

        return load_single_file(
            cls, "semantic_encoder", pretrained_model_link_or_path_or_dict, config, torch_dtype, **kwargs
        )

    def to_original(self) -> dict[str, Tensor]:
        """The weights under the original's names."""
        from stable_cascade.files.networks import to_original

        return to_original(self.state_dict(), "semantic_encoder")

    def _normalised(self, pixels: Tensor) -> Tensor:
        # In float32 at least: bfloat16 pixels minus the mean would lose the lowest of eight bits twice.
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.config.image_mean, self.config.image_std))
        return ((pixels - mean) / std).to(next(self.mapper.parameters()).dtype)
