"""How much memory a computation takes at its peak, found by running it on the meta device, where nothing is computed.

Every tensor that an operation makes is followed until nobody needs it any more: what autograd keeps for the backward
pass, what checkpointing throws away and computes again, gradients as they appear, and all that lives for a moment.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

CUDA_GRANULE = 512
"""CUDA's allocator of torch hands out multiples of this many bytes."""

_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256
"""bitsandbytes keeps the states of smaller parameters in float32, and has a float32 scale per block of this size."""


def peak_bytes(
    run: Callable[[], Any],
    resident: Iterable[Tensor] = (),
    *,
    autocast: torch.dtype | None = None,
    granule: int = CUDA_GRANULE,
) -> int:
    """The largest sum of bytes of the tensors that exist at one time while `run()` runs, beside the resident ones.

    Args:
        run: a computation on tensors of the meta device.
        resident: tensors that were there before, such as parameters; they are not counted.
        autocast: type in which matrix products, convolutions and attention work, as under `torch.autocast`.
        granule: every tensor takes a multiple of it.
    """
    trace = _Trace(resident, granule)
    with trace, _LikeCuda(autocast):
        kept = run()
    del kept
    return trace.peak


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Of the two computations that checkpointing makes."""


def _none() -> Contexts:
    return contextlib.nullcontext(), contextlib.nullcontext()


def checkpointing(
    autocast: torch.dtype | None, context_fn: Callable[[], Contexts] | None = None
) -> Callable[..., Any]:
    """What `enable_gradient_checkpointing` is given inside `peak_bytes`; `context_fn` is torch's, where there is one.

    The second computation runs inside the backward pass, where the modes of the first are not in force.
    """

    def contexts() -> Contexts:
        first, again = (context_fn or _none)()
        return first, _both(again, _LikeCuda(autocast))

    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


class _Trace(TorchDispatchMode):
    """Follows the memory of all tensors that operations make inside its `with` block."""

    def __init__(self, resident: Iterable[Tensor], granule: int):
        super().__init__()
        self.resident = {tensor.untyped_storage()._cdata for tensor in resident}
        self.granule = granule
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.resident or key in self.sizes:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class _LikeCuda(TorchFunctionMode):
    """What differs between the meta device and CUDA and matters for memory: fused attention, and autocast."""

    def __init__(self, autocast: torch.dtype | None):
        super().__init__()
        self.autocast = autocast
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._cast(part) for part in (*args, *kwargs.values())[:3])
            return _FusedAttention.apply(query, key, value, kwargs.get("dropout_p", 0.0))
        if func is Tensor.backward:
            self.cached.clear()  # the end of the autocast region, which frees its casts of the weights
        if self.autocast is not None and func in _LOWER:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        elif self.autocast is not None and func in _HIGHER:
            args = tree_map(_as_float32, args)
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if self.autocast is None or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(self.autocast)
        if id(value) not in self.cached:  # autocast casts a weight that trains once per forward pass
            self.cached[id(value)] = (value, value.to(self.autocast))
        return self.cached[id(value)][1]


_LOWER = {
    F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, torch.conv2d, F.conv2d,
    torch.conv_transpose2d, F.conv_transpose2d,
}  # fmt: skip
_HIGHER = {F.layer_norm}


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


class _FusedAttention(torch.autograd.Function):
    """The memory of flash attention: no matrix of scores, one number per query for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Shapes: (B, heads, N, d), (B, heads, L, d) twice -> (B, heads, N, d)."""
        # The operation itself, so that selective checkpointing knows it; on the meta device it computes nothing.
        out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of query, key and value."""
        query, key, value, *_ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)  # in which the kernel adds up the gradient of the query
        gradients = tuple(torch.empty_like(part) for part in (query, key, value))
        del sums
        return *gradients, None


def optimizer_bytes(parameters: Iterable[nn.Parameter], optimizer: str) -> int:
    """What AdamW keeps: two float32 numbers per parameter; with `adamw_8bit` two bytes and the scales of blocks."""
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if optimizer == "adamw_8bit" and count >= _EIGHT_BIT_FROM:
            total += 2 * count + 2 * 4 * -(-count // _EIGHT_BIT_BLOCK)
        else:
            total += 8 * count
    return total


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
