"""Stage A: images to latents a quarter their size and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from .base import PretrainedMixin
from .tiling import WHOLE_BELOW, decode_margin, default_tile_side, encode_margin, tile_side, tiled

COMMITMENT_WEIGHT = 0.25
ROWS_AT_ONCE = 16384  # rows of the distance table computed together: 0.5 GB for 8192 codes in float32


@dataclass
class VQGANEncoderOutput(BaseOutput):
    """What `encode` returns: `latents` (B, latent_channels, h, w), neither scaled nor quantised."""

    latents: Tensor


@dataclass
class Quantized(BaseOutput):
    """Nearest codes of a latent.

    `latents` (B, C, h, w), with the gradient of the input; `indices` (B, h, w) int64; `loss`, a scalar: mean squared
    error of the codes plus `COMMITMENT_WEIGHT` times that of the input.
    """

    latents: Tensor
    indices: Tensor
    loss: Tensor


@dataclass
class VQGANOutput(BaseOutput):
    """What `decode` and `forward` return: `sample` (B, 3, H, W), and what quantising gave where it was asked for."""

    sample: Tensor
    latents: Tensor | None = None
    quantized: Quantized | None = None


class MixingBlock(nn.Module):
    """Depthwise 3x3 mixing, then an MLP over channels, each added with six learned scalars.

    Shapes: (B, C, H, W) -> (B, C, H, W), no copies when channels lie last in memory.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(channels, channels, 3, groups=channels))
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        # Zero as in the original: every block starts as the identity, and wakes up through gammas[2] and gammas[5].
        self.gammas = nn.Parameter(torch.zeros(6))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` mixed over space, then over channels."""
        scale, shift, gain, scale2, shift2, gain2 = self.gammas.unbind()
        x = x + self.depthwise(_normalised(x.permute(0, 2, 3, 1), scale, shift).permute(0, 3, 1, 2)) * gain
        mixed = self.channelwise(_normalised(x.permute(0, 2, 3, 1), scale2, shift2))
        return x + mixed.permute(0, 3, 1, 2) * gain2


def _normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm over the last axis, times (1 + scale), plus shift, in one kernel."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,), (1 + scale).expand(width), shift.expand(width), eps=1e-6)


class VectorQuantizer(nn.Module):
    """A codebook: `embedding.weight` (codes, channels).

    Source: van den Oord et al. 2017, eq. 1 to 3.
    """

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def indices(self, latents: Tensor) -> Tensor:
        """Index of the nearest code at every position.

        Shapes: (B, C, h, w) -> (B, h, w) int64.
        """
        batch, channels, height, width = latents.shape
        rows = latents.detach().permute(0, 2, 3, 1).reshape(-1, channels)
        # The squared norm of a row is the same for all codes, so it is left out: less to cancel.
        precision = torch.promote_types(rows.dtype, torch.float32)
        codes = self.embedding.weight.detach().to(precision)
        norms = codes.square().sum(dim=1)
        with torch.autocast(latents.device.type, enabled=False):
            parts = [
                torch.addmm(norms, part.to(precision), codes.t(), alpha=-2).argmin(dim=1)
                for part in rows.split(ROWS_AT_ONCE)
            ]
        return torch.cat(parts).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes at `indices`.

        Shapes: (B, h, w) int64 -> (B, C, h, w).
        """
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> Quantized:
        """Nearest codes, with the gradient passed straight through, and the loss that trains codebook and encoder.

        Shapes: (B, C, h, w) -> latents (B, C, h, w), indices (B, h, w), loss ().
        """
        indices = self.indices(latents)
        codes = self.lookup(indices).to(latents.dtype)
        loss = F.mse_loss(codes, latents.detach()) + COMMITMENT_WEIGHT * F.mse_loss(latents, codes.detach())
        return Quantized(latents=latents + (codes - latents).detach(), indices=indices, loss=loss)


class StableCascadeVQGAN(PretrainedMixin, ModelMixin, ConfigMixin):
    """Autoencoder between pixels and `vq_latents`; the defaults are the released Stage A.

    Names, config keys and behaviour are those of diffusers' `PaellaVQModel`. `scale_factor` is applied by the caller:
    the decoder works on `encode(x).latents / scale_factor`, the pipeline decodes `scale_factor * latents`.

    Shapes: pixels (B, 3, H, W) in [0, 1] <-> latents (B, latent_channels, H/stride, W/stride).
    """

    component = "vqgan"

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MixingBlock"]
    _repeated_blocks = ["MixingBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.43,
    ) -> None:
        super().__init__()
        _check(levels=levels, embed_dim=embed_dim, bottleneck_blocks=bottleneck_blocks, scale_factor=scale_factor)
        # The outermost level first, as in the encoder; the decoder goes the other way.
        widths = [embed_dim // 2**level for level in reversed(range(levels))]
        patch = up_down_scale_factor
        self.gradient_checkpointing = False
        self.use_tiling: bool | None = None
        side = default_tile_side(self.stride, decode_margin(levels, bottleneck_blocks))
        self.tile_sample_min_height = self.tile_sample_min_width = side
        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(in_channels * patch**2, widths[0], kernel_size=1)
        )
        self.down_blocks = nn.Sequential(*_down_blocks(widths, latent_channels))
        self.vquantizer = VectorQuantizer(num_vq_embeddings, latent_channels)
        self.up_blocks = nn.Sequential(*_up_blocks(widths[::-1], latent_channels, bottleneck_blocks))
        self.out_block = nn.Sequential(
            nn.Conv2d(widths[0], out_channels * patch**2, kernel_size=1), nn.PixelShuffle(patch)
        )

    @property
    def stride(self) -> int:
        """Pixels per latent, along each side."""
        return self.config.up_down_scale_factor * 2 ** (self.config.levels - 1)

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        """Makes `decode` and `encode` work in tiles, one at a time: memory for one tile, and the same result.

        Without this call they do so for `WHOLE_BELOW` pixels of a batch and more.

        Args:
            tile_sample_min_height, tile_sample_min_width: of a tile in pixels, its margins included.

        Raises:
            ValueError: a side that is no multiple of the stride, or that is all margin.
        """
        margin = decode_margin(self.config.levels, self.config.bottleneck_blocks)
        sides = {"tile_sample_min_height": tile_sample_min_height, "tile_sample_min_width": tile_sample_min_width}
        chosen = {
            name: tile_side(side, getattr(self, name), name, stride=self.stride, margin=margin)
            for name, side in sides.items()
        }
        self.tile_sample_min_height, self.tile_sample_min_width = chosen.values()
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Makes `decode` and `encode` work on whole images, however large."""
        self.use_tiling = False

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQGANEncoderOutput | tuple[Tensor]:
        """Latents of images, neither scaled nor quantised.

        Shapes: (B, 3, H, W) in [0, 1] -> `.latents` (B, latent_channels, H/stride, W/stride).

        Raises:
            ValueError: a side of `x` is not a multiple of the stride.
        """
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            sides = f"{x.shape[-2]}x{x.shape[-1]}"
            raise ValueError(f"pixels are {sides} (height x width); both sides must be multiples of {self.stride}")
        x = x.to(next(self.in_block.parameters()).dtype)
        # In training the batch norm before the latents looks at the whole batch.
        if self._tiles(x, 1) and not self.training:
            latents = tiled(self._encode, x, margin=encode_margin(self.config.levels), cell=(self.stride, 1),
                            tile=self._tile())  # fmt: skip
        else:
            latents = self._encode(x)
        return VQGANEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, h: Tensor, force_not_quantize: bool = True, return_dict: bool = True
    ) -> VQGANOutput | tuple[Tensor]:
        """Images of latents; not clamped.

        Shapes: (B, latent_channels, h, w), unscaled -> `.sample` (B, 3, h * stride, w * stride), about [0, 1].
        """
        h = h.to(next(self.up_blocks.parameters()).dtype)
        quantized = None if force_not_quantize else self.vquantizer(h)
        h = h if quantized is None else quantized.latents
        if self._tiles(h, self.stride):
            margin = decode_margin(self.config.levels, self.config.bottleneck_blocks)
            sample = tiled(self._decode, h, margin=margin, cell=(1, self.stride), tile=self._tile())
        else:
            sample = self._decode(h)
        return VQGANOutput(sample=sample, quantized=quantized) if return_dict else (sample,)

    def forward(
        self, sample: Tensor, return_dict: bool = True, *, force_not_quantize: bool = True
    ) -> VQGANOutput | tuple[Tensor]:
        """Images, encoded and decoded; with the latents and, if quantised, the codebook loss for a trainer.

        Shapes: (B, 3, H, W) -> `.sample` (B, 3, H, W), `.latents`, `.quantized`.
        """
        (latents,) = self.encode(sample, return_dict=False)
        decoded = self.decode(latents, force_not_quantize=force_not_quantize)
        decoded.latents = latents
        return decoded if return_dict else (decoded.sample,)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._run(self.down_blocks, self.in_block(pixels))

    def _decode(self, latents: Tensor) -> Tensor:
        return self.out_block(self._run(self.up_blocks, latents))

    def _tile(self) -> tuple[int, int]:
        return self.tile_sample_min_height // self.stride, self.tile_sample_min_width // self.stride

    def _tiles(self, x: Tensor, stride: int) -> bool:
        """Whether a batch with `stride` pixels per position is computed in tiles."""
        pixels = len(x) * x.shape[-2] * x.shape[-1] * stride**2
        if self.use_tiling is None:  # where a gradient is asked for, all tiles would be kept anyway
            return pixels >= WHOLE_BELOW and not torch.is_grad_enabled()
        return self.use_tiling and pixels > 0

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled() and isinstance(block, MixingBlock):
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x


def _down_blocks(widths: list[int], latent_channels: int) -> list[nn.Module]:
    blocks: list[nn.Module] = [MixingBlock(widths[0])]
    for before, width in pairwise(widths):
        blocks += [nn.Conv2d(before, width, kernel_size=4, stride=2, padding=1), MixingBlock(width)]
    to_latents = nn.Conv2d(widths[-1], latent_channels, kernel_size=1, bias=False)
    return [*blocks, nn.Sequential(to_latents, nn.BatchNorm2d(latent_channels))]


def _up_blocks(widths: list[int], latent_channels: int, bottleneck_blocks: int) -> list[nn.Module]:
    blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(latent_channels, widths[0], kernel_size=1))]
    blocks += [MixingBlock(widths[0]) for _ in range(bottleneck_blocks)]
    for before, width in pairwise(widths):
        blocks += [nn.ConvTranspose2d(before, width, kernel_size=4, stride=2, padding=1), MixingBlock(width)]
    return blocks


def _check(*, levels: int, embed_dim: int, bottleneck_blocks: int, scale_factor: float) -> None:
    if levels < 1:
        raise ValueError(f"levels is {levels}; must be at least 1")
    if embed_dim % 2 ** (levels - 1) or embed_dim < 1:
        raise ValueError(
            f"embed_dim is {embed_dim}; with levels={levels} it must be a multiple of {2 ** (levels - 1)}"
        )
    if bottleneck_blocks < 0:
        raise ValueError(f"bottleneck_blocks is {bottleneck_blocks}; must not be negative")
    if not scale_factor > 0:
        raise ValueError(f"scale_factor is {scale_factor}; must be positive")


class PatchDiscriminator(nn.Module):
    """The judge of Stage A's training, no part of a cascade: a score per patch of 54 x 54 pixels, every 8 pixels.

    High for photographs, low for rebuilt images.

    Its norms see one image at a time (GroupNorm, no batch norm), so a score does not depend on the batch around it.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 1, H/8, W/8).

    Source: Isola et al. 2017, section 3.2.2 (PatchGAN); Esser et al. 2021, section 3.1.
    """

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"discriminator channels are {channels}; must be at least 1")
        # Three halvings, then two convolutions of the same size; the first layer has no norm.
        widths = [in_channels, channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, kernel_size=4, stride=2, padding=1)]
            layers += [_group_norm(width), nn.LeakyReLU(0.2)] if before != in_channels else [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(widths[-1], 4 * channels, kernel_size=3, padding=1), _group_norm(4 * channels)]
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


def _group_norm(channels: int) -> nn.GroupNorm:
    """Groups of four channels or more: alone, a channel of a single patch would always be zero."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)
