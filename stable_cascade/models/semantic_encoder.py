"""The semantic encoder: images to the latents that the prior generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .base import PretrainedMixin

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

    component = "semantic_encoder"

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
        # One mean and deviation per channel; features; latents of unit variance.
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

    def _normalised(self, pixels: Tensor) -> Tensor:
        # In float32 at least: bfloat16 pixels minus the mean would lose the lowest of eight bits twice.
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.config.image_mean, self.config.image_std))
        return ((pixels - mean) / std).to(next(self.mapper.parameters()).dtype)


BATCH_NORM_EPS = 1e-3


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and SiLU unless `activation` is off.

    Shapes: (B, in, H, W) -> (B, out, H/stride, W/stride), rounded up with the default padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1,
        *, groups: int = 1, activation: bool = True, padding: int | None = None,
    ) -> None:  # fmt: skip
        padding = kernel_size // 2 if padding is None else padding
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        layers: list[nn.Module] = [convolution, nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)]
        super().__init__(*layers, *([nn.SiLU()] if activation else []))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) computed from the channel means.

    Shapes: (B, C, H, W) -> (B, C, H, W).

    Source: Hu et al. 2018, eq. 2 to 4.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` times its gate."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(mean))))


class InvertedBottleneck(nn.Module):
    """Expand, convolve, project; plus the input where the shape stays.

    `fused` expands and convolves with one dense 3x3; otherwise a 1x1, a depthwise 3x3 and squeeze-excitation.

    Shapes: (B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride)).

    Source: Tan and Le 2021, figure 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, fused: bool, expansion: int, stride: int, drop: float
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.drop = drop
        build = _fused_layers if fused else _depthwise_layers
        self.block = nn.Sequential(*build(in_channels, out_channels, expansion, stride))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; in training, whole samples skip the block with probability `drop`."""
        y = self.block(x)
        if not self.residual:
            return y
        if self.training and self.drop:
            y = y * F.dropout(y.new_ones(len(y), 1, 1, 1), self.drop)
        return x + y


def _fused_layers(in_channels: int, out_channels: int, expansion: int, stride: int) -> list[nn.Module]:
    if expansion == 1:
        return [ConvNorm(in_channels, out_channels, 3, stride)]
    hidden = in_channels * expansion
    return [ConvNorm(in_channels, hidden, 3, stride), ConvNorm(hidden, out_channels, 1, activation=False)]


def _depthwise_layers(in_channels: int, out_channels: int, expansion: int, stride: int) -> list[nn.Module]:
    hidden = in_channels * expansion
    expand = [ConvNorm(in_channels, hidden, 1)] if expansion != 1 else []
    return [
        *expand,
        ConvNorm(hidden, hidden, 3, stride, groups=hidden),
        SqueezeExcitation(hidden, max(1, in_channels // 4)),
        ConvNorm(hidden, out_channels, 1, activation=False),
    ]


class EfficientNetFeatures(nn.Sequential):
    """Stem, stages and head: images to feature maps. The defaults are EfficientNetV2-S.

    Shapes: (B, in_channels, H, W) -> (B, head_width, H/stride, W/stride), rounded up at every halving.

    Args:
        stem_padding: the released ControlNets' stems, unless they take three channels, pad nothing.
        stochastic_depth: the drop probability that the last block would have, growing linearly from 0.

    Raises:
        ValueError: the stage lists differ in length, or a block type is unknown.

    Source: Tan and Le 2021, table 4.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int = 3,
        *,
        stem_width: int = 24,
        stem_stride: int = 2,
        stem_padding: int = 1,
        block_types: Sequence[str] = ("fused", "fused", "fused", "mbconv", "mbconv", "mbconv"),
        widths: Sequence[int] = (24, 48, 64, 128, 160, 256),
        depths: Sequence[int] = (2, 4, 4, 6, 9, 15),
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2),
        expansions: Sequence[int] = (1, 4, 4, 4, 6, 6),
        head_width: int = 1280,
        stochastic_depth: float = 0.2,
    ) -> None:
        _check_stages(block_types, widths=widths, depths=depths, strides=strides, expansions=expansions)
        # A convolution, stages of blocks whose first changes the size, a convolution to the head's width.
        layers: list[nn.Module] = [ConvNorm(in_channels, stem_width, 3, stem_stride, padding=stem_padding)]
        total, placed, before = sum(depths), 0, stem_width
        for kind, width, depth, stride, expansion in zip(
            block_types, widths, depths, strides, expansions, strict=True
        ):
            stage = []
            for index in range(depth):
                block = InvertedBottleneck(
                    before,
                    width,
                    fused=kind == "fused",
                    expansion=expansion,
                    stride=stride if index == 0 else 1,
                    drop=stochastic_depth * placed / total,
                )
                stage.append(block)
                placed, before = placed + 1, width
            layers.append(nn.Sequential(*stage))
        layers.append(ConvNorm(before, head_width, 1))
        super().__init__(*layers)
        self.out_channels = head_width
        self.gradient_checkpointing = False
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps of `x`."""
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(_counted_once(stage), x)
            else:
                x = stage(x)
        return x


def _counted_once(stage: nn.Module) -> Callable[[Tensor], Tensor]:
    """A call of `stage` that leaves the running statistics alone from its second time on."""
    again = False

    def run(x: Tensor) -> Tensor:
        nonlocal again
        if again:
            with statistics_kept(stage):
                return stage(x)
        again = True
        return stage(x)

    return run


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise as in training but leave their running statistics alone.

    Checkpointing runs a stage twice per step; without this the statistics would move twice.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _initialise(module: nn.Module) -> None:
    """He normal by fan-out for convolutions and zero biases, as EfficientNet was trained."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_stages(block_types: Sequence[str], **lists: Sequence[int]) -> None:
    for kind in block_types:
        if kind not in ("fused", "mbconv"):
            raise ValueError(f"block_types holds {kind!r}; allowed: 'fused', 'mbconv'")
    for name, values in lists.items():
        if len(values) != len(block_types):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(block_types)} block_types; give one per stage"
            )
        if min(values) < 1:
            raise ValueError(f"{name} is {list(values)}; every entry must be at least 1")
