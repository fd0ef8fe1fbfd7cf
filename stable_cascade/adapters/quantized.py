"""Frozen linear layers stored in eight or four bits: adapters train beside them in full precision.

The weights are restored for one product at a time. Autograd keeps none of them: the backward pass restores them
again, where a plain product with restored weights would hold every one until then, and save nothing.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.models.layers import WideLinear

FORMATS = ("int8", "int4", "nf4")
_GROUP = 64
"""Neighbours in a row that share a scale in four bits."""
_PRECISE = ("mapper", "clip_")
"""Layers that stay as they are: modulations and what CLIP's vectors enter by, three in a hundred of the weights."""


class QuantizedLinear(nn.Module):
    """A linear layer that does not train, with its weights stored as `form`: int8, int4 or nf4.

    int8 has a scale per output, int4 a scale and an offset per group of 64 inputs, nf4 bitsandbytes' sixteen
    quantiles of the normal distribution and a scale per 64 weights.
    """

    def __init__(self, linear: nn.Linear, form: str):
        """Stores the layer's weights where they are; the layer itself is left alone."""
        super().__init__()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        self.stored_dtype = linear.weight.dtype
        packed, scale, offset = _PACK[form](linear.weight.detach().float())
        # Parameters and not buffers: what does not train is neither saved in run checkpoints nor sent around by DDP.
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.offset = None if offset is None else nn.Parameter(offset, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def W_q(self) -> Tensor:
        """The stored weights under the name by which PEFT knows that it has to ask `dequantize` for their values."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights as they act, by default in the type they had.

        Shapes: -> (out_features, in_features).
        """
        return _UNPACK[self.form](self, dtype or self.stored_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The product in the input's type (autocast's, where it is on); gradients reach the input.

        Shapes: (..., in_features) -> (..., out_features).
        """
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        product = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"{self.in_features}, {self.out_features}, {self.form}"


class _Product(torch.autograd.Function):
    """x @ weights.T with the weights restored in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantize(grads[0].dtype), None


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network whose storage in few bits costs little quality, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, WideLinear)
        and module.in_features % 2 == 0
        and not any(part.startswith(_PRECISE) for part in name.split("."))
    }


def quantize(model: nn.Module, form: str, device: torch.device | str | None = None) -> list[str]:
    """Names of the layers that were replaced by quantised ones, one at a time, so that no second copy of all exists.

    Args:
        device: where each layer is quantised and stays; absent: where it is.

    Raises:
        ValueError: the format is none, its package is missing, or the network has adapters already.
    """
    check_format(form)
    if getattr(model, "peft_config", None):
        raise ValueError(f"quantization {form} comes before adapters, and this network has some; remove_lora first")
    names = list(quantizable(model))
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        layer = getattr(holder, child)
        setattr(holder, child, QuantizedLinear(layer.to(device) if device is not None else layer, form))
    return names


def check_format(form: str) -> None:
    """Passes for a format that this machine can store.

    Raises:
        ValueError: it is none, or needs a package that is not there.
    """
    if form not in FORMATS:
        raise ValueError(f"quantization '{form}' is none of {', '.join(FORMATS)}")
    if form == "nf4" and not _has("bitsandbytes"):
        raise ValueError("quantization nf4 needs bitsandbytes; pip install bitsandbytes, or set quantization: int4")


def quantized_bytes(model: nn.Module, form: str) -> tuple[int, int]:
    """How many weights a format would store in how many bytes, from shapes alone (the meta device will do)."""
    layers = quantizable(model).values()
    weights = sum(layer.weight.numel() for layer in layers)
    if form == "int8":
        return weights, weights + sum(4 * layer.out_features for layer in layers)
    if form == "nf4":
        return weights, weights // 2 + sum(4 * math.ceil(layer.weight.numel() / _GROUP) for layer in layers)
    return weights, weights // 2 + sum(4 * layer.weight.numel() // _group(layer.in_features) for layer in layers)


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its place in sys.modules says None
        return False


def _group(inputs: int) -> int:
    return math.gcd(inputs, _GROUP)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round().to(torch.int8), scale, None


def _unpack_int8(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    return layer.weight.to(dtype) * layer.scale.to(dtype)


def _pack_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, _group(weight.shape[1])))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    # In the 16 bits that are stored, so that rounding makes up for their errors; bfloat16 has room for any size.
    offset, smallest = low.bfloat16(), torch.finfo(torch.bfloat16).tiny
    scale = ((high - offset.float()) / 15).clamp(min=smallest).bfloat16()
    codes = ((groups - offset.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale, offset


def _unpack_int4(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    codes = torch.stack((layer.weight & 15, layer.weight >> 4), -1).flatten(1).to(dtype)
    groups = codes.unflatten(1, (-1, _group(layer.in_features)))
    assert layer.offset is not None
    return torch.addcmul(layer.offset.to(dtype), groups, layer.scale.to(dtype)).flatten(1)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=_GROUP, quant_type="nf4")
    return packed, state.absmax, None


def _unpack_nf4(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = torch.Size((layer.out_features, layer.in_features))
    scale = layer.scale.detach().float()
    state = QuantState(absmax=scale, shape=shape, dtype=dtype, blocksize=_GROUP, quant_type="nf4")
    return dequantize_4bit(layer.weight.detach(), state)


_PACK: dict[str, Any] = {"int8": _pack_int8, "int4": _pack_int4, "nf4": _pack_nf4}
_UNPACK: dict[str, Any] = {"int8": _unpack_int8, "int4": _unpack_int4, "nf4": _unpack_nf4}
