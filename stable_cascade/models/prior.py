"""Stage C: the network that turns text, and sometimes an image's embedding, into semantic latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .base import UNetMixin
from .clip import attended_tokens
from .conditioning import (
    StableCascadeUNetOutput,
    as_sequence,
    embed_sample,
    embed_times,
    joined_mappers,
    map_tokens,
    modulate,
    read_out,
)
from .layers import TiledConv2d, layer_norm
from .unet import NO_SPLIT, Conditions, DeepCache, Run, add_stack, initialise, keys_values, run_stack

TEXT_TOKENS = 77
LAYER = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


class StableCascadePrior(UNetMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Stage C's network, with the weights' names and the config of diffusers' `StableCascadeUNet`.

    Without arguments it is the released 3.6B. `num_attention_heads` may be 0 or -1 on a level without attention;
    `dropout` is one number or one per level.

    Raises:
        ValueError: lists of the config disagree in length, or it asks for inputs that only the decoder has.
    """

    component = "prior"
    _supports_gradient_checkpointing = True
    _no_split_modules = NO_SPLIT
    _repeated_blocks = NO_SPLIT

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        timestep_ratio_embedding_dim: int = 64,
        patch_size: int = 1,
        conditioning_dim: int = 2048,
        block_out_channels: Sequence[int] = (2048, 2048),
        num_attention_heads: Sequence[int] = (32, 32),
        down_num_layers_per_block: Sequence[int] = (8, 24),
        up_num_layers_per_block: Sequence[int] = (24, 8),
        down_blocks_repeat_mappers: Sequence[int] = (1, 1),
        up_blocks_repeat_mappers: Sequence[int] = (1, 1),
        block_types_per_layer: Sequence[Sequence[str]] = (LAYER, LAYER),
        clip_text_in_channels: int = 1280,
        clip_text_pooled_in_channels: int = 1280,
        clip_image_in_channels: int = 768,
        clip_seq: int = 4,
        effnet_in_channels: int | None = None,
        pixel_mapper_in_channels: int | None = None,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = (0.1, 0.1),
        self_attn: bool | Sequence[bool] = True,
        timestep_conditioning_type: Sequence[str] = ("sca", "crp"),
        switch_level: Sequence[bool] | None = (False,),
    ):
        super().__init__()
        # Every value counts as given: diffusers' class has other defaults, which would take the place of ours.
        self.register_to_config(_use_default_values=[])
        for key in ("effnet_in_channels", "pixel_mapper_in_channels"):
            if self.config[key] is not None:
                raise ValueError(
                    f"{key} is {self.config[key]}: only StableCascadeDecoder has that input, use it or null"
                )
        self.clip_txt_pooled_mapper = nn.Linear(clip_text_pooled_in_channels, conditioning_dim * clip_seq)
        self.clip_txt_mapper = nn.Linear(clip_text_in_channels, conditioning_dim)
        self.clip_img_mapper = nn.Linear(clip_image_in_channels, conditioning_dim * clip_seq)
        self.clip_norm = layer_norm(conditioning_dim)
        width = block_out_channels[0]
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
        for mapper in (self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper):
            nn.init.normal_(mapper.weight, std=0.02)

    def encode_conditions(
        self,
        clip_text_pooled: Tensor,
        clip_text: Tensor | None = None,
        clip_img: Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> Conditions:
        """What does not depend on the step: pass it as `conditions=` for every step of a sampling run.

        It holds for the weights of now (adapters, dtype, device) and for any size of the sample. Zeros at the end of a
        row of `clip_text` fill it up to the longest of the batch: nothing attends to them.

        Args:
            image_weights: (n,), how much each image of `clip_img` counts: 1 as it is, 0 like none.
        """
        tokens = self._tokens(clip_text_pooled, clip_text, clip_img)
        if clip_img is not None and image_weights is not None:
            tokens = self._weighted(tokens, image_weights)
        attended = None if clip_text is None else attended_tokens(clip_text)
        if attended is not None:  # pooled text and images follow the text, and always count
            attended = F.pad(attended, (0, tokens.shape[1] - attended.shape[1]), value=True)
        joined = joined_mappers(self, torch.float64 if tokens.dtype is torch.float64 else torch.float32)
        return Conditions(tokens, keys_values(self, tokens, attended), joined)

    def forward(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        clip_text_pooled: Tensor | None = None,
        clip_text: Tensor | None = None,
        clip_img: Tensor | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
        return_dict: bool = True,
        conditions: Conditions | None = None,
        cache: DeepCache | None = None,
    ) -> StableCascadeUNetOutput | tuple[Tensor]:
        """The prediction for noised semantic latents.

        Shapes: sample (B, in_channels, H, W); timestep_ratio (B,) in [0, 1], best in float32 whatever the weights are;
        clip_text_pooled (B, c) or (B, n, c); clip_text (B, L, c); clip_img (B, c) or (B, n, c); sca, crp (B,).
        Where clip_text or clip_img is missing it counts as zeros.

        Args:
            control: what a ControlNet returned: per residual block, in order of execution, a residual or None.
            conditions: what `encode_conditions` returned, instead of the three embeddings.
            cache: of a sampling run; the deeper half of the levels runs only where it is empty, and fills it.

        Raises:
            ValueError: neither `clip_text_pooled` nor `conditions` is given; `control` is longer than the network.
        """
        if conditions is None:
            if clip_text_pooled is None:
                raise ValueError("clip_text_pooled is missing: give it, or conditions from encode_conditions()")
            conditions = Conditions(self._tokens(clip_text_pooled, clip_text, clip_img))
        times = embed_times(self.config, sample.shape[0], timestep_ratio, {"sca": sca, "crp": crp})
        x = embed_sample(self.embedding, sample, self.config.patch_size)
        modulation = modulate(self, times, conditions.modulation, x.dtype)
        x = run_stack(self, x, Run(times, conditions, modulation, iter(control or ()), cache))
        output = read_out(self.clf, x)
        return StableCascadeUNetOutput(sample=output) if return_dict else (output,)

    def _tokens(self, pooled: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        """The activated stack of text, pooled text and image tokens. Shapes: -> (B, L, conditioning_dim)."""
        config, batch = self.config, pooled.shape[0]
        if text is None:
            text = pooled.new_zeros(batch, TEXT_TOKENS, config.clip_text_in_channels)
        if image is None:
            image = pooled.new_zeros(batch, 1, config.clip_image_in_channels)
        parts = [
            map_tokens(self.clip_txt_mapper, text),
            map_tokens(self.clip_txt_pooled_mapper, as_sequence(pooled), config.conditioning_dim),
            map_tokens(self.clip_img_mapper, as_sequence(image), config.conditioning_dim),
        ]
        return nn.functional.silu(self.clip_norm(torch.cat(parts, dim=1)))

    def _weighted(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """The tokens, those of each image on the way from no image (0) to their own (1).

        The embedding itself cannot be weighed: the norm after its mapping takes any factor out again.

        Shapes: (B, L, conditioning_dim), the image tokens last; (n,) -> (B, L, conditioning_dim).
        """
        config, count = self.config, len(weights)
        zeros = tokens.new_zeros(1, 1, config.clip_image_in_channels)
        absent = nn.functional.silu(
            self.clip_norm(map_tokens(self.clip_img_mapper, zeros, config.conditioning_dim))
        ).repeat(1, count, 1)
        text, image = tokens.split([tokens.shape[1] - absent.shape[1], absent.shape[1]], dim=1)
        share = weights.to(tokens).repeat_interleave(absent.shape[1] // count)[:, None]
        return torch.cat([text, torch.lerp(absent.expand_as(image), image, share)], dim=1)
