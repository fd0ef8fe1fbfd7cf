"""Gradient checkpointing that keeps what is dear to compute and computes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stable_cascade.compilation import as_written

SELECTIVE = "selective"
"""The value of the config key `gradient_checkpointing` that means this."""
_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.linear.default, _aten.convolution.default, _aten._int_mm.default,
    _aten._scaled_mm.default,
}  # fmt: skip
BATCHED_PRODUCTS = {_aten.bmm.default, _aten.baddbmm.default}
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


def selective_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, whose backward pass repeats norms, activations, dropout and copies, but no matrix product.

    For `enable_gradient_checkpointing(selective_checkpoint)` of any network. Compiled blocks run as they are written:
    generated code uses the memory of results again, and so writes over those that are kept here.
    """
    return checkpoint(_as_written(function), *args, use_reentrant=False, context_fn=selective_contexts)


def chosen_checkpoint(choice: bool | str) -> Callable[..., Any] | None:
    """What `enable_gradient_checkpointing` takes for a config's `gradient_checkpointing`; None is torch's own."""
    return selective_checkpoint if choice == SELECTIVE else None


def chosen_contexts(choice: bool | str) -> Callable[[], tuple[Any, Any]] | None:
    """The `context_fn` of what `chosen_checkpoint` gives; None where it has none."""
    return selective_contexts if choice == SELECTIVE else None


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What `torch.utils.checkpoint.checkpoint` takes as `context_fn`: for the first run, and for its repetition."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = CheckpointPolicy.MUST_SAVE
    if operation in PRODUCTS:
        return kept
    # Attention written out: a matrix of scores is large, and its factors are kept anyway.
    if operation in BATCHED_PRODUCTS and not _grows(*args[-2:]):
        return kept
    # Dropout in a kernel that is skipped would leave other random numbers to those after it.
    if operation in ATTENTION and not _dropout(operation, args, kwargs):
        return kept
    return CheckpointPolicy.PREFER_RECOMPUTE


def _grows(left: Tensor, right: Tensor) -> bool:
    """Whether a batch of products has more numbers than its factors."""
    return left.shape[-2] * right.shape[-1] > left.shape[-2] * left.shape[-1] + right.shape[-2] * right.shape[-1]


def _dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    names = [argument.name for argument in operation._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0)


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` uncompiled, autocast casting weights at every use: casts left over would change the repetition."""

    def run(*args: Any) -> Any:
        device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
        with as_written():
            if device == "meta" or not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
                return function(*args)

    return run
