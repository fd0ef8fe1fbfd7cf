"""Stage B: the network that turns semantic latents into the VQGAN's latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .base import UNetMixin
from .conditioning import (
    StableCascadeUNetOutput,
    as_sequence,
    embed_sample,
    embed_times,
    joined_mappers,
    map_grid,
    map_tokens,
    modulate,
    read_out,
)
from .layers import TiledConv2d, layer_norm, resize, to_channels_last
from .unet import NO_SPLIT, Conditions, DeepCache, Run, add_stack, initialise, keys_values, run_stack

PLAIN = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
ATTENDED = (*PLAIN, "SDCascadeAttnBlock")


class StableCascadeDecoder(UNetMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Stage B's network, with the weights' names and the config of diffusers' `StableCascadeUNet`.

    Without arguments it is the larger released one (the guide's "3B"). `num_attention_heads` may be 0 or -1 on a level
    without attention; `dropout` is one number or one per level.

    Raises:
        ValueError: lists of the config disagree in length, or it asks for inputs that only the prior has.
    """

    component = "decoder"
    _supports_gradient_checkpointing = True
    _no_split_modules = NO_SPLIT
    _repeated_blocks = NO_SPLIT

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        timestep_ratio_embedding_dim: int = 64,
        patch_size: int = 2,
        conditioning_dim: int = 1280,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        num_attention_heads: Sequence[int] = (-1, -1, 20, 20),
        down_num_layers_per_block: Sequence[int] = (2, 6, 28, 6),
        up_num_layers_per_block: Sequence[int] = (6, 28, 6, 2),
        down_blocks_repeat_mappers: Sequence[int] = (1, 1, 1, 1),
        up_blocks_repeat_mappers: Sequence[int] = (3, 3, 2, 2),
        block_types_per_layer: Sequence[Sequence[str]] = (PLAIN, PLAIN, ATTENDED, ATTENDED),
        clip_text_in_channels: int | None = None,
        clip_text_pooled_in_channels: int = 1280,
        clip_image_in_channels: int | None = None,
        clip_seq: int = 4,
        effnet_in_channels: int = 16,
        pixel_mapper_in_channels: int = 3,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = (0.0, 0.0, 0.1, 0.1),
        self_attn: bool | Sequence[bool] = True,
        timestep_conditioning_type: Sequence[str] = ("sca",),
        switch_level: Sequence[bool] | None = None,
    ):
        super().__init__()
        # Every value counts as given: diffusers' class has other defaults, which would take the place of ours.
        self.register_to_config(_use_default_values=[])
        for key in ("clip_text_in_channels", "clip_image_in_channels"):
            if self.config[key] is not None:
                raise ValueError(
                    f"{key} is {self.config[key]}: only StableCascadePrior has that input, use it or null"
                )
        for key in ("effnet_in_channels", "pixel_mapper_in_channels"):
            if self.config[key] is None:
                raise ValueError(f"{key} is None: Stage B draws what it says; give the number of its channels")
        width = block_out_channels[0]
        self.effnet_mapper = _grid_mapper(effnet_in_channels, width)
        self.pixels_mapper = _grid_mapper(pixel_mapper_in_channels, width)
        self.clip_txt_pooled_mapper = nn.Linear(clip_text_pooled_in_channels, conditioning_dim * clip_seq)
        self.clip_norm = layer_norm(conditioning_dim)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch_size), TiledConv2d(in_channels * patch_size**2, width, 1), layer_norm(width)
        )
        add_stack(self, self.config)
        self.clf = nn.Sequential(
            layer_norm(width), TiledConv2d(width, out_channels * patch_size**2, 1), nn.PixelShuffle(patch_size)
        )
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts from scratch, as the original does."""
        initialise(self, sum(self.config.down_num_layers_per_block))
        mappers: list[Any] = [self.clip_txt_pooled_mapper]
        mappers += [mapper[layer] for mapper in (self.effnet_mapper, self.pixels_mapper) for layer in (0, 2)]
        for mapper in mappers:
            nn.init.normal_(mapper.weight, std=0.02)

    def encode_conditions(
        self, clip_text_pooled: Tensor, effnet: Tensor | None = None, pixels: Tensor | None = None
    ) -> Conditions:
        """What does not depend on the step: pass it as `conditions=` for every step of a sampling run.

        It holds for the weights of now (adapters, dtype, device) and for any size of the sample.
        """
        tokens = self._tokens(clip_text_pooled)
        joined = joined_mappers(self, torch.float64 if tokens.dtype is torch.float64 else torch.float32)
        return Conditions(tokens, keys_values(self, tokens), joined, effnet, pixels, maps={})

    def forward(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        clip_text_pooled: Tensor | None = None,
        effnet: Tensor | None = None,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
        return_dict: bool = True,
        conditions: Conditions | None = None,
        cache: DeepCache | None = None,
    ) -> StableCascadeUNetOutput | tuple[Tensor]:
        """The prediction for noised VQGAN latents.

        Shapes: sample (B, in_channels, H, W), sides multiples of patch_size; timestep_ratio (B,) in [0, 1], best in
        float32 whatever the weights are; clip_text_pooled (B, c) or (B, n, c); effnet (B, effnet_in_channels, h, w),
        the semantic latents at any size; pixels (B, 3, h, w); sca (B,).

        Args:
            effnet: left out altogether where None (zeros are another condition, the one for guidance).
            pixels: zeros where None.
            conditions: what `encode_conditions` returned, instead of the three conditions.
            cache: of a sampling run; the deeper half of the levels runs only where it is empty, and fills it.

        Raises:
            ValueError: neither `clip_text_pooled` nor `conditions` is given; the sample does not fit the patches.
        """
        if conditions is None:
            if clip_text_pooled is None:
                raise ValueError("clip_text_pooled is missing: give it, or conditions from encode_conditions()")
            conditions = Conditions(self._tokens(clip_text_pooled), effnet=effnet, pixels=pixels)
        times = embed_times(self.config, sample.shape[0], timestep_ratio, {"sca": sca})
        x = embed_sample(self.embedding, sample, self.config.patch_size)
        modulation = modulate(self, times, conditions.modulation, x.dtype)
        x = x + self._grid(conditions, (x.shape[1], x.shape[2]))
        x = run_stack(self, x, Run(times, conditions, modulation, iter(()), cache))
        output = read_out(self.clf, x)
        return StableCascadeUNetOutput(sample=output) if return_dict else (output,)

    def _tokens(self, pooled: Tensor) -> Tensor:
        tokens = map_tokens(self.clip_txt_pooled_mapper, as_sequence(pooled), self.config.conditioning_dim)
        return nn.functional.silu(self.clip_norm(tokens))

    def _grid(self, conditions: Conditions, size: tuple[int, int]) -> Tensor:
        """Mapped semantic latents and pixels on the sample's grid, kept for the next step of a run.

        Shapes: -> (B or 1, *size, width).
        """
        if conditions.maps is not None and size in conditions.maps:
            return conditions.maps[size]
        pixels = conditions.pixels
        if pixels is None:
            # All positions of zeros map to the same vector, so one position stands for any size.
            pixels = conditions.tokens.new_zeros(1, self.config.pixel_mapper_in_channels, 1, 1)
        grid = resize(map_grid(self.pixels_mapper, to_channels_last(pixels)), size)
        if conditions.effnet is not None:
            grid = grid + map_grid(self.effnet_mapper, resize(to_channels_last(conditions.effnet), size))
        if conditions.maps is not None:
            conditions.maps[size] = grid
        return grid


def _grid_mapper(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        TiledConv2d(in_channels, 4 * width, 1), nn.GELU(), TiledConv2d(4 * width, width, 1), layer_norm(width)
    )
