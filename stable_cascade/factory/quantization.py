"""The prior that adapters are put on: frozen, and stored in few bits if the config says so."""

from __future__ import annotations

from typing import Any

import torch

from stable_cascade.adapters.quantized import check_format, quantize, quantized_bytes

from .networks import network


def frozen_base(config: Any, device: torch.device) -> Any:
    """The prior without gradients on the device; with `quantization` its large linear layers in few bits.

    The weights are read into main memory once, in `dtype`. Each layer goes to the device, is quantised there and
    replaces the original, so that neither memory ever holds the network twice, and the device never holds it whole.

    Raises:
        ValueError: the format's package is missing.
    """
    if quantizes(config):
        check_format(config.quantization)
    prior = network(config, "prior", dtype=getattr(torch, config.dtype)).requires_grad_(False)
    if quantizes(config):
        quantize(prior, config.quantization, device)
    return prior.to(device)


def quantizes(config: Any) -> bool:
    """Whether the config asks for a quantised base."""
    return getattr(config, "quantization", "none") != "none"


def quantization_entry(config: Any, prior: torch.nn.Module) -> str:
    """What of the prior (the meta device will do) is stored how, in words; empty without quantisation.

    Raises:
        ValueError: the format's package is missing.
    """
    if not quantizes(config):
        return ""
    check_format(config.quantization)
    weights, size = quantized_bytes(prior, config.quantization)
    return f"{weights:>13,} weights of the frozen prior as {config.quantization}, {size / 2**20:,.1f} MiB"
