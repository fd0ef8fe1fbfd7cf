"""ControlNet: residuals for the prior, computed from a control image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from stable_cascade.disk import local_path
from stable_cascade.files.controlnet import read_description

from .base import PretrainedMixin
from .semantic_encoder import EfficientNetFeatures

BOTTLENECKS = ("effnet", "simple", "large")
RELEASED_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)


class StableCascadeControlNet(PretrainedMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Residuals for chosen residual blocks of the prior.

    The prior resizes each to its grid and adds it before that block, counted over down then up, repeats included.
    Last projections start at zero, so that an untrained ControlNet changes nothing.

    Args:
        in_channels: channels of the control image: 1 canny, 4 inpainting, 16 super resolution, 512 identity.
        projection_channels: width of the prior.
        blocks: which residual blocks get a residual.
        bottleneck: `effnet` (an image, through EfficientNetV2-S), `simple` (two convolutions) or `large` (eight
            residual blocks); the latter two keep the size of their input.
        backbone_config: keyword arguments of the bottleneck, for one of another size.

    Raises:
        ValueError: an unknown bottleneck; `blocks` is empty, repeats an index or holds a negative one.
    """

    component = "controlnet"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["InvertedBottleneck", "ControlResBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        projection_channels: int = 2048,
        blocks: Sequence[int] = RELEASED_BLOCKS,
        bottleneck: str = "effnet",
        backbone_config: Mapping | None = None,
    ) -> None:
        super().__init__()
        _check(blocks, bottleneck)
        builders: dict[str, Callable[..., Any]] = {
            "effnet": _effnet,
            "simple": SimpleBottleneck,
            "large": LargeBottleneck,
        }
        self.backbone = builders[bottleneck](in_channels, **(backbone_config or {}))
        width = self.backbone.out_channels
        self.projections = nn.ModuleList(_projection(width, projection_channels) for _ in blocks)

    def forward(self, image: Tensor) -> list[Tensor | None]:
        """One entry per residual block up to the highest chosen one: its residual, or None.

        Shapes: (B, in_channels, H, W) -> list of (B, projection_channels, h, w). `simple` and `large` keep the size;
        the released `effnet` gives H/32 rounded up, or just above a multiple of 32 rounded down where its stem pads
        nothing.

        Raises:
            ValueError: `image` is not a batch with `in_channels` channels.
        """
        channels = self.config.in_channels
        if image.ndim != 4 or image.shape[1] != channels:
            raise ValueError(
                f"control image has shape {tuple(image.shape)}; expected (batch, {channels}, height, width)"
            )
        features = self.backbone(image.to(next(self.projections.parameters()).dtype))
        residuals: list[Tensor | None] = [None] * (max(self.config.blocks) + 1)
        for index, projection in zip(self.config.blocks, self.projections, strict=True):
            residuals[index] = projection(features)
        return residuals

    def train(self, mode: bool = True) -> StableCascadeControlNet:
        """Training mode, in which batch norms keep their statistics: a sample does not depend on its neighbours.

        So a batch means the same on one process as on two, and whole as in parts.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    @torch.no_grad()
    def load_backbone(self, features: EfficientNetFeatures) -> None:
        """Starts the `effnet` bottleneck from trained features, those of the image encoder for example.

        A stem for fewer channels takes the first ones; one for more gets zeros in the further ones.

        Raises:
            ValueError: the bottleneck is not `effnet`, or the two backbones differ beyond their stems.
        """
        if self.config.bottleneck != "effnet":
            raise ValueError(f"bottleneck is {self.config.bottleneck!r}; only 'effnet' can start from image features")
        state = dict(features.state_dict())
        stem, key = state["0.0.weight"], "0.0.weight"
        adapted = stem.new_zeros(stem.shape[0], self.config.in_channels, *stem.shape[2:])
        shared = min(stem.shape[1], self.config.in_channels)
        adapted[:, :shared] = stem[:, :shared]
        state[key] = adapted
        own = {name: value.shape for name, value in self.backbone.state_dict().items()}
        if own != {name: value.shape for name, value in state.items()}:
            raise ValueError(
                "backbone_config differs from the given features; use the widths and depths of the image encoder"
            )
        self.backbone.load_state_dict(state)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | PathLike[str] | dict[str, Tensor],
        config: dict[str, Any] | str | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> StableCascadeControlNet:
        """A network from one local file with the names of the original or ours; see `load_single_file`.

        A file of ours says itself which config it has.
        """
        if config is None and isinstance(pretrained_model_link_or_path_or_dict, (str, PathLike)):
            if local_path(pretrained_model_link_or_path_or_dict).is_file():
                config = read_description(pretrained_model_link_or_path_or_dict).get("config")
        return super().from_single_file(pretrained_model_link_or_path_or_dict, config, torch_dtype, **kwargs)


class StableCascadeMultiControlNet(ModelMixin):
    """Several ControlNets as one component of a pipeline; their residuals are summed by the sampling.

    `save_pretrained(folder)` writes each into a numbered folder of its own, in diffusers' layout: `folder/0`,
    `folder/1` and so on, each with `config.json` and `diffusion_pytorch_model.safetensors`. The component `controlnet`
    of a saved pipeline holds several when it has `controlnet/0`, and one when it has `controlnet/config.json`.

    Raises:
        ValueError: no ControlNet, or something else among them.
    """

    def __init__(self, controlnets: Sequence[StableCascadeControlNet]) -> None:
        super().__init__()
        others = [type(net).__name__ for net in controlnets if not isinstance(net, StableCascadeControlNet)]
        if not len(controlnets) or others:
            raise ValueError(f"controlnets holds {others or 'nothing'}; give a list of StableCascadeControlNet")
        self.nets = nn.ModuleList(controlnets)

    def forward(self, images: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """What each ControlNet returns for its own control image."""
        return [net(image) for net, image in zip(self.nets, images, strict=True)]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | PathLike[str], safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Writes the folders `0`, `1` and so on."""
        for number, net in enumerate(self.nets):
            assert isinstance(net, StableCascadeControlNet)
            folder = local_path(save_directory) / str(number)
            net.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> StableCascadeMultiControlNet:
        """The ControlNets of the local folders `0`, `1` and so on; `kwargs` go to each one's `from_pretrained`.

        Raises:
            ValueError: there is no folder `0`.
        """
        root = local_path(pretrained_model_name_or_path)
        nets: list[StableCascadeControlNet] = []
        while (root / str(len(nets))).is_dir():
            nets.append(StableCascadeControlNet.from_pretrained(root / str(len(nets)), **kwargs))
        if not nets:
            raise ValueError(f"'{root}' has no folder '0'; several ControlNets lie in folders 0, 1 and so on")
        return cls(nets)


def _effnet(in_channels: int, **config) -> EfficientNetFeatures:
    # The original replaces the stem for anything but three channels, and its replacement pads nothing.
    return EfficientNetFeatures(in_channels, **{"stem_padding": int(in_channels == 3), **config})


class SimpleBottleneck(nn.Sequential):
    """Two 3x3 convolutions, four times as wide in between.

    Shapes: (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, in_channels: int, *, expansion: int = 4) -> None:
        hidden = in_channels * expansion
        super().__init__(
            nn.Conv2d(in_channels, hidden, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, in_channels, 3, padding=1),
        )
        self.out_channels = in_channels
        self.gradient_checkpointing = False  # two layers: nothing to gain, and asking for it is no error


class LargeBottleneck(nn.Sequential):
    """A wide 1x1 mapping followed by residual blocks.

    Shapes: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self, in_channels: int, *, hidden: int = 16384, width: int = 1024, depth: int = 8, out_channels: int = 1280
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, hidden, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, width, 1),
            *(ControlResBlock(width) for _ in range(depth)),
            nn.Conv2d(width, out_channels, 1),
        )
        self.out_channels = out_channels
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Features of `x`."""
        for layer in self:
            if self.gradient_checkpointing and torch.is_grad_enabled() and isinstance(layer, ControlResBlock):
                x = self._gradient_checkpointing_func(layer, x)
            else:
                x = layer(x)
        return x


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised at every position."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ControlResBlock(nn.Module):
    """Twice norm, GELU, 3x3 convolution; plus the input.

    Shapes: (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ChannelNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` plus its residual."""
        return x + self.blocks(x)


def _projection(width: int, projection_channels: int) -> nn.Sequential:
    last = nn.Conv2d(width, projection_channels, 1, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.LeakyReLU(0.2), last)


def _check(blocks: Sequence[int], bottleneck: str) -> None:
    if bottleneck not in BOTTLENECKS:
        raise ValueError(f"bottleneck is {bottleneck!r}; allowed: {', '.join(map(repr, BOTTLENECKS))}")
    if not blocks or min(blocks) < 0 or len(set(blocks)) != len(blocks):
        raise ValueError(f"blocks is {list(blocks)}; give distinct block numbers, counted from 0")
