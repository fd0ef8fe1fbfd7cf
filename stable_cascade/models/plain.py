"""Tells when a layer may be replaced by the bare matrix product it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
COMPUTABLE = (*HALF, torch.float32, torch.float64)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """True when calling `module` does nothing but what `kind` does with weights that are there.

    False for adapters, quantised or sharded weights, parametrisations, offloading and hooks, whose own call must run.
    """
    if type(module) is not kind or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in COMPUTABLE


def to_channels_first(x: Tensor) -> Tensor:
    """A (B, C, H, W) view in channels-last memory. Shapes: (B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """The image with channels on the last axis. Shapes: (B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def cast_for(module: Any, x: Tensor, stored: torch.dtype | None = None) -> Tensor:
    """`x` in the type in which a layer computes: its weights' own, also inside an adapter.

    Weights stored in another way (quantised, eight bits) do not tell; there `x` takes the type `stored`, or stays.
    """
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    return x.to(dtype if dtype in COMPUTABLE else stored or x.dtype)


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is at least that."""
    return x.float() if x.dtype in HALF else x


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize with aligned corners, computed in float32 at least. Shapes: (B, H, W, C) -> (B, *size, C)."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    resized = F.interpolate(full(to_channels_first(x)), size=tuple(size), mode="bilinear", align_corners=True)
    return to_channels_last(resized).to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """`x` as it travels from block to block: in float32 where the weights are float16.

    The released prior's last blocks make it larger than float16 can hold. Every layer sees it normalised, so that the
    layers themselves can be float16.
    """
    return x.float() if x.dtype is torch.float16 else x


def narrow(x: Tensor, weight: Any) -> Tensor:
    """`x` for a layer with these weights: in float16, within its range, where they are float16; as it is elsewhere."""
    if weight.dtype is not torch.float16 or x.dtype is torch.float16:
        return x
    return x.clamp(-65504.0, 65504.0).half()


def saturate(x: Tensor) -> Tensor:
    """`x`, with float16 infinities replaced by the largest float16, so that the next norm stays finite."""
    if x.dtype is not torch.float16:
        return x
    return x.clamp(-65504.0, 65504.0)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products keep the type of their factors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
