"""Large linear layers whose products are computed in float8, while their weights stay as they are.

Layers that train are torchao's. Its backward pass computes the gradient of the weights whether they train or not, so
that frozen ones, such as those under a LoRA, have a layer of their own here: two products instead of three, no input
kept for the backward pass, and weights rounded once instead of in every step, for a byte per weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.training.optimizers import is_installed

SMALLEST = 1024
"""Layers with fewer inputs or outputs stay as they are: rounding would take longer than the product then saves."""
CAPABILITY = (8, 9)
"""The first CUDA devices that multiply in float8 (Ada; Hopper is 9.0)."""
_LEFT = ("clip_", "text_encoder")
"""Layers that stay as they are: what CLIP's vectors enter by, and a text encoder that trains along."""
_FACTORS, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_INSTEAD = "set float8: false, dtype: bfloat16 is the fastest without it"


def check_float8(device: torch.device) -> None:
    """Passes where layers can be computed in float8.

    Raises:
        ValueError: torchao is missing, or the device cannot multiply in float8.
    """
    if not is_installed("torchao"):
        raise ValueError("float8 needs torchao; pip install 'stable-cascade[float8]', or set float8: false")
    if device.type != "cuda":
        raise ValueError(f"float8 needs a CUDA device of compute capability 8.9, not {device.type}; {_INSTEAD}")
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"float8 needs a CUDA device of compute capability 8.9, which {name} is not; {_INSTEAD}")


def prepare_float8(model: nn.Module, accelerator: Any) -> list[str]:
    """Names of the layers that are computed in float8 from now on, in a model that is about to train.

    Raises:
        ValueError: as `check_float8`; no layer is large enough; or layers train in float32 by themselves.
    """
    check_float8(accelerator.device)
    names = float8_layers(model)
    if not names:
        raise ValueError(f"float8: no linear layer has {SMALLEST} inputs and outputs or more; set float8: false")
    training = any(model.get_submodule(name).weight.requires_grad for name in names)
    if training and accelerator.mixed_precision != "bf16":
        raise ValueError(
            f"float8: the network trains with mixed_precision {accelerator.mixed_precision}; launch with "
            "`accelerate launch --mixed_precision bf16`, or set float8: false"
        )
    convert_to_float8(model, names)
    return names


def float8_layers(model: nn.Module, smallest: int = SMALLEST) -> list[str]:
    """Names of the large linear layers, except those of a text encoder and of what CLIP's vectors enter by.

    Both sides are multiples of 16, as the devices need.
    """
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not any(part.startswith(_LEFT) for part in name.split("."))
        and min(layer.in_features, layer.out_features) >= smallest
        and layer.in_features % 16 == layer.out_features % 16 == 0
    ]


def convert_to_float8(model: nn.Module, names: list[str], *, emulate: bool = False) -> None:
    """Replaces these layers by float8 layers; parameters and their names stay.

    Args:
        emulate: for layers that train, round as float8 does and multiply in full precision, which runs everywhere.
    """
    trained = {name for name in names if model.get_submodule(name).weight.requires_grad}
    if trained:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        # The gradient of a weight is a product over all tokens, whose number need not be a multiple of 16.
        settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
        convert_to_float8_training(model, module_filter_fn=lambda _, name: name in trained, config=settings)
    for name in names:
        if name not in trained:
            parent, _, child = name.rpartition(".")
            holder = model.get_submodule(parent)
            setattr(holder, child, FrozenFloat8Linear(getattr(holder, child)))


class FrozenFloat8Linear(nn.Linear):
    """A linear layer that does not train; its products round both factors to float8, with a scale per tensor."""

    def __init__(self, linear: nn.Linear):
        """Takes over the layer's parameters and keeps its weights in float8 beside them."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        # Plain attributes, not buffers: nothing of them is saved, nor sent around by DDP.
        self._rounded = to_float8(linear.weight.detach(), _FACTORS)

    def forward(self, x: Tensor) -> Tensor:
        """The product in the input's type (autocast's, where it is on); gradients reach the input.

        Shapes: (..., in_features) -> (..., out_features).
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if self._rounded[0].device != x.device:
            self._rounded = to_float8(self.weight.detach(), _FACTORS)
        product = _Product.apply(x, *self._rounded)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """x @ weights.T in float8, and the gradient of x in it too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows = to_float8(x.reshape(-1, x.shape[-1]), _FACTORS)
        product = _multiply(rows, (weight.t(), scale), x.dtype, fast=True)
        return product.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        (grad,) = grads
        rows = to_float8(grad.reshape(-1, grad.shape[-1]), _GRADIENTS)
        columns = weight.t().contiguous().t()  # the devices want the second factor laid out by columns
        product = _multiply(rows, (columns, scale), grad.dtype, fast=False)
        return product.reshape(*grad.shape[:-1], -1), None, None


def to_float8(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor in float8, and what to multiply it with to have its values back: its largest value fills the range.

    Shapes: any -> the same, () float32.
    """
    limit = torch.finfo(kind).max
    scale = (x.abs().amax().float() / limit).clamp(min=torch.finfo(torch.float32).tiny * limit)
    return (x.float() / scale).clamp(-limit, limit).to(kind), scale


def _multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, *, fast: bool) -> Tensor:
    """The product of two scaled float8 matrices; `fast` adds up in fewer bits. Shapes: (M, K), (K, N) -> (M, N)."""
    (left, left_scale), (right, right_scale) = a, b
    return torch._scaled_mm(left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast)
