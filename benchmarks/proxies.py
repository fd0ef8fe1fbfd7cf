"""Networks for the rows: smaller widths at the released depth proportions, and peers with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stable_cascade.files.presets import PRESETS

WIDTH, HEADS = 704, 11
PRIOR: dict[str, Any] = PRESETS["prior"]["3.6B"] | {
    "conditioning_dim": WIDTH, "block_out_channels": [WIDTH, WIDTH], "num_attention_heads": [HEADS, HEADS],
    "down_num_layers_per_block": [2, 6], "up_num_layers_per_block": [6, 2], "dropout": [0.0, 0.0],
}  # fmt: skip
"""117 million parameters: a third of the released width, a quarter of its depth, the same 1 : 3 of its levels."""
DECODER: dict[str, Any] = PRESETS["decoder"]["700M"] | {
    "block_out_channels": [128, 256, 512, 512], "num_attention_heads": [0, 4, 8, 8], "conditioning_dim": 512,
    "down_num_layers_per_block": [1, 2, 7, 2], "up_num_layers_per_block": [2, 7, 2, 1],
    "dropout": [0.0, 0.0, 0.0, 0.0],
}  # fmt: skip


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with every weight drawn anew, none of them zero: a zero hides work that a kernel can skip."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.02 if parameter.ndim > 1 else 0.01
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * scale)
    return network


def parameters(network: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def prior_pair(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, nn.Module]:
    """(ours, diffusers') prior with equal weights, in evaluation mode."""
    from diffusers.models import StableCascadeUNet

    from stable_cascade import StableCascadePrior

    return _pair(StableCascadePrior, StableCascadeUNet, config, dtype, device)


def decoder_pair(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, nn.Module]:
    """(ours, diffusers') Stage B with equal weights, in evaluation mode."""
    from diffusers.models import StableCascadeUNet

    from stable_cascade import StableCascadeDecoder

    return _pair(StableCascadeDecoder, StableCascadeUNet, config, dtype, device)


def vqgan_pair(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, nn.Module]:
    """(ours, diffusers') Stage A with equal weights, in evaluation mode."""
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    from stable_cascade import StableCascadeVQGAN

    return _pair(StableCascadeVQGAN, PaellaVQModel, config, dtype, device)


def _pair(
    ours: type[nn.Module], peer: type[nn.Module], config: dict[str, Any], dtype: torch.dtype, device: str
) -> tuple[nn.Module, nn.Module]:
    with torch.device(device):  # drawing billions of weights on the CPU takes minutes
        own, theirs = seeded(ours(**config)), peer(**config)
    theirs.load_state_dict(own.state_dict())
    return own.to(dtype).eval(), theirs.to(dtype).eval()


def prior_inputs(
    config: dict[str, Any], batch: int, side: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Random arguments of a prior's forward.

    Shapes: sample (batch, 16, side, side), 77 text tokens.
    """
    draw = torch.Generator().manual_seed(1)
    shapes = {
        "sample": (batch, config["in_channels"], side, side),
        "clip_text": (batch, 77, config["clip_text_in_channels"]),
        "clip_text_pooled": (batch, 1, config["clip_text_pooled_in_channels"]),
        "clip_img": (batch, 1, config["clip_image_in_channels"]),
    }
    tensors = {name: torch.randn(shape, generator=draw).to(device, dtype) for name, shape in shapes.items()}
    return tensors | {"timestep_ratio": torch.rand(batch, generator=draw).to(device, dtype)}


def decoder_inputs(
    config: dict[str, Any], batch: int, side: int, semantic: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """Random arguments of Stage B's forward.

    Shapes: sample (batch, 4, side, side), effnet (batch, 16, semantic, semantic).
    """
    draw = torch.Generator().manual_seed(1)
    shapes = {
        "sample": (batch, config["in_channels"], side, side),
        "clip_text_pooled": (batch, 1, config["clip_text_pooled_in_channels"]),
        "effnet": (batch, config["effnet_in_channels"], semantic, semantic),
    }
    tensors = {name: torch.randn(shape, generator=draw).to(device, dtype) for name, shape in shapes.items()}
    return tensors | {"timestep_ratio": torch.rand(batch, generator=draw).to(device, dtype)}
