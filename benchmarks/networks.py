"""Rows of single networks: prior, Stage B, Stage A, with diffusers' classes on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from stable_cascade.models.presets import PRESETS

from .measure import Row, in_turns
from .proxies import decoder_inputs, decoder_pair, prior_inputs, prior_pair, vqgan_pair
from .scale import Scale


def rows(scale: Scale) -> Iterator[Row]:
    """Forward of the prior, forward and backward, forward of Stage B, decoding by Stage A."""
    ours, peer = (network.to(scale.device) for network in prior_pair(scale.prior, scale.dtype))
    inputs = prior_inputs(scale.prior, 2, scale.semantic, scale.dtype, scale.device)
    yield compared(scale, "prior forward, batch 2", ours, peer, lambda network: forward(network, inputs), "UNet")
    inputs = prior_inputs(scale.prior, 1, scale.semantic, scale.dtype, scale.device)
    yield compared(scale, "prior forward + backward", ours, peer, lambda network: gradients(network, inputs), "UNet")
    del ours, peer
    ours, peer = (network.to(scale.device) for network in decoder_pair(scale.decoder, scale.dtype))
    inputs = decoder_inputs(scale.decoder, 1, scale.vq, scale.semantic, scale.dtype, scale.device)
    yield compared(scale, "decoder forward", ours, peer, lambda network: forward(network, inputs), "UNet")
    del ours, peer
    ours, peer = (network.to(scale.device) for network in vqgan_pair(PRESETS["vqgan"]["released"], scale.dtype))
    latents = torch.randn(1, 4, scale.vq, scale.vq, device=scale.device, dtype=scale.dtype)
    row = f"decode {4 * scale.vq} px"
    yield compared(scale, row, ours, peer, lambda network: decode(network, latents), "PaellaVQModel")


def compared(
    scale: Scale, row: str, ours: nn.Module, peer: nn.Module, work: Callable[[Any], Any], peer_class: str
) -> Row:
    """One row of two networks doing the same."""
    name = f"diffusers {peer_class}, eager"
    return in_turns(row, lambda: work(ours), lambda: work(peer), peer_name=name, rounds=scale.rounds)


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
