"""Whole weights of a sharded model (FSDP 1 and 2): gathered for checkpoints, exports and previews, and put back.

Every function here is called by all processes together; what it gathers is complete on the main process only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(accelerator: Any) -> bool:
    """Whether accelerate shards the model."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)) == "FSDP"


def blueprint(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights take no memory; `build` fills it.

    Buffers outside the state dict are copied, since no checkpoint could bring them back.
    """
    kept = set(model.state_dict(keep_vars=True))
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        kept.discard(name)
    for name, buffer in model.named_buffers():
        if name in kept:
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def build(plan: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A model of its own, made from a blueprint and whole weights."""
    whole = copy.deepcopy(plan)
    whole.load_state_dict(dict(weights), strict=True, assign=True)
    return whole.to(device)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers, whole, on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    gathered: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return gathered


def gather_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state, whole, on the CPU, by parameter name."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def spread_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give every process its part of whole weights; names that are absent keep theirs."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, strict=False))


def spread_optimizer(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give every process its part of an optimizer's whole state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, dict(state), options=StateDictOptions(full_state_dict=True))
