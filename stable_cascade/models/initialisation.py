"""Starting weights of the diffusion networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .blocks import SDCascadeAttnBlock, SDCascadeFeedForwardBlock, SDCascadeResBlock, SDCascadeTimestepBlock


def initialise(model: Any, layers: int) -> None:
    """Starting weights of a network trained from scratch, in place; `layers` is the number of down layers.

    Source: the original implementation; its query, key and value weights are one matrix, whose Xavier bound is theirs.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    _scale_blocks(model, layers)
    nn.init.xavier_uniform_(model.embedding[1].weight, gain=0.02)
    nn.init.zeros_(model.clf[1].weight)


def _scale_blocks(model: Any, layers: int) -> None:
    for module in model.modules():
        if isinstance(module, SDCascadeAttnBlock):
            for projection in (module.attention.to_q, module.attention.to_k, module.attention.to_v):
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))
        elif isinstance(module, (SDCascadeResBlock, SDCascadeFeedForwardBlock)):
            last: Any = module.channelwise[-1]
            with torch.no_grad():
                last.weight.mul_(math.sqrt(1 / layers))
        elif isinstance(module, SDCascadeTimestepBlock):
            for mapper in module.mappers():
                nn.init.zeros_(mapper.weight)
