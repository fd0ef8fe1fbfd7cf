"""torch.compile, block by block: a graph for each kind of block, not one for each block or for the whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

BACKEND = "inductor"
GRAPHS = 64
"""Graphs that one class of block may have: its widths, with and without a skip, training or not, alone or in batches.
torch stops at eight by default, and runs what comes after them uncompiled."""


def compile_blocks(model: nn.Module) -> list[str]:
    """Names of the networks in `model` whose repeated blocks are compiled from now on, each when it first runs.

    Weights, their names, hooks and copies stay as they are, and images of another shape do not compile anew.

    Raises:
        ValueError: no network in it has blocks that repeat.
    """
    networks: dict[str, Any] = {name: module for name, module in model.named_modules() if _repeats(module)}
    if not networks:
        raise ValueError(f"compile: {type(model).__name__} has no network with repeated blocks; set compile: false")
    expect_many_sizes()
    for network in networks.values():
        network.compile_repeated_blocks(dynamic=True, backend=BACKEND)
    return list(networks)


def _repeats(module: Any) -> bool:
    names = getattr(module, "_repeated_blocks", None) or ()
    return any(type(part).__name__ in names for part in module.modules()) if names else False


def expect_many_sizes() -> None:
    """Settings of torch, for the whole process, under which images of every shape run through the same graphs.

    Left alone, torch takes sides that are equal in the first image for equal in all, and compiles again for the
    first one that is not square.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as backward
    import torch.fx.experimental._config as symbols

    symbols.use_duck_shape = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    # A permuted image that is kept for the backward pass ends torch 2.13's compiler, which cannot order its strides
    # without knowing its sides; permuting again is free.
    backward.recompute_views = True


def check_compiler(device: str) -> None:
    """Passes where torch.compile finds what it needs for a kind of device, `cpu` or `cuda`.

    Raises:
        ValueError: there is no C++ compiler, or on a GPU no Triton.
    """
    if BACKEND != "inductor":
        return
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("compile needs Triton on a GPU, and none works here; install triton, or leave compile")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # its class lies in another place in each version of torch
        raise ValueError(
            "compile needs a C++ compiler, and torch finds none; install g++, name one in CXX, or leave compile"
        ) from error


def as_written() -> AbstractContextManager:
    """A context in which compiled blocks run as they are written, and nothing is compiled; nothing inside a graph."""
    return nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")
