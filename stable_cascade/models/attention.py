"""Attention of image tokens to themselves and to conditioning tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_plain


def project(layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """`layer(x)` of several linear layers, as one matrix product where all are plain.

    Shapes: (B, N, C) -> one (B, N, C') per layer.
    """
    if not all(is_plain(layer, nn.Linear) for layer in layers):
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return list(F.linear(x, weight, bias).chunk(len(layers), dim=-1))


class SDCascadeAttention(nn.Module):
    """Multi-head attention whose dropout acts on the attention probabilities."""

    def __init__(self, c: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"num_attention_heads {heads} does not divide the {c} channels of a level with attention")
        self.heads, self.dropout = heads, dropout
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of conditioning tokens. Shapes: (B, L, C) -> two of (B, L, heads, C / heads)."""
        key, value = project([self.to_k, self.to_v], tokens)
        return self._split(key), self._split(value)

    def forward(self, tokens: Tensor, key: Tensor, value: Tensor, *, self_attn: bool = True) -> Tensor:
        """Shapes: (B, N, C), keys and values (B, L, heads, C / heads) -> (B, N, C)."""
        if self_attn:
            query, own_key, own_value = map(self._split, project([self.to_q, self.to_k, self.to_v], tokens))
            key, value = torch.cat([own_key, key], dim=1), torch.cat([own_value, value], dim=1)
        else:
            query = self._split(self.to_q(tokens))
        dropout = self.dropout if self.training else 0.0
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
