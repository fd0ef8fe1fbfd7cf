"""Rows of single networks: prior, Stage B, Stage A, with diffusers' classes on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from stable_cascade.compilation import expect_many_sizes
from stable_cascade.files.presets import PRESETS
from stable_cascade.models.unet import NO_SPLIT

from .measure import Row, in_turns, seconds
from .proxies import decoder_inputs, decoder_pair, prior_inputs, prior_pair, vqgan_pair
from .scale import Scale


def rows(scale: Scale) -> Iterator[Row]:
    """Forward of the prior, forward and backward, forward of Stage B, decoding by Stage A."""
    ours, peer = prior_pair(scale.prior, scale.dtype, scale.device)
    inputs = prior_inputs(scale.prior, 2, scale.semantic, scale.dtype, scale.device)
    yield compared(scale, "prior forward, batch 2", ours, peer, lambda network: forward(network, inputs), "UNet")
    inputs = prior_inputs(scale.prior, 1, scale.semantic, scale.dtype, scale.device)
    yield compared(scale, "prior forward + backward", ours, peer, lambda network: gradients(network, inputs), "UNet")
    yield compiled_row(scale, ours, peer)
    del ours, peer
    ours, peer = decoder_pair(scale.decoder, scale.dtype, scale.device)
    inputs = decoder_inputs(scale.decoder, 1, scale.vq, scale.semantic, scale.dtype, scale.device)
    many = 4 * scale.rounds if scale.device == "cpu" else scale.rounds  # a short row, which the machine's moods shake
    yield compared(scale, "decoder forward", ours, peer, lambda network: forward(network, inputs), "UNet", many)
    del ours, peer
    ours, peer = vqgan_pair(PRESETS["vqgan"]["released"], scale.dtype, scale.device)
    latents = torch.randn(1, 4, scale.vq, scale.vq, device=scale.device, dtype=scale.dtype)
    row = f"decode {4 * scale.vq} px"
    yield compared(scale, row, ours, peer, lambda network: decode(network, latents), "PaellaVQModel")


def compiled_row(scale: Scale, ours: Any, peer: Any) -> Row:
    """Forward and backward of the prior once more, both networks compiled block by block.

    Compiling is the warm-up, outside the figures; the row's note has its time.
    """
    inputs = prior_inputs(scale.prior, 1, scale.semantic, scale.dtype, scale.device)
    start_compiler(scale)
    for network in (ours, peer):
        compile_repeated(network)
    times = []
    for network in (ours, peer):
        with fresh_cache():  # otherwise the second one finds what both have in common compiled
            times.append(seconds(partial(gradients, network, inputs)))
    own, theirs = times
    return in_turns(
        "prior forward + backward, compiled", partial(gradients, ours, inputs), partial(gradients, peer, inputs),
        peer_name="diffusers UNet, compiled by block", rounds=max(1, scale.rounds // 2),
        note=f"compiling took ours {own:.0f} s, the peer {theirs:.0f} s",
    )  # fmt: skip


def start_compiler(scale: Scale) -> None:
    """Compiles a small layer, so that what the compiler does once per process counts for neither network."""
    layer = nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(scale.device, scale.dtype)
    layer.compile()
    layer(torch.ones(2, 8, device=scale.device, dtype=scale.dtype)).sum().backward()


def compile_repeated(network: Any) -> None:
    """Compiles each block, in diffusers' class too, which does not name those that repeat."""
    expect_many_sizes()
    for block in network.modules():
        if type(block).__name__ in NO_SPLIT:
            block.compile(dynamic=True)


def compared(
    scale: Scale,
    row: str,
    ours: nn.Module,
    peer: nn.Module,
    work: Callable[[Any], Any],
    peer_class: str,
    rounds: int | None = None,
) -> Row:
    """One row of two networks doing the same."""
    name = f"diffusers {peer_class}, eager"
    return in_turns(row, lambda: work(ours), lambda: work(peer), peer_name=name, rounds=rounds or scale.rounds)


@torch.no_grad()
def forward(network: Any, inputs: dict[str, Any]) -> Any:
    """One prediction."""
    return network(**inputs).sample


def gradients(network: Any, inputs: dict[str, Any]) -> None:
    """Gradients of every weight."""
    network.zero_grad(set_to_none=True)
    network(**inputs).sample.float().square().mean().backward()


@torch.no_grad()
def decode(network: Any, latents: torch.Tensor) -> Any:
    """Pixels."""
    return network.decode(latents).sample
