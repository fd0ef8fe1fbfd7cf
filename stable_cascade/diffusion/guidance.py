"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_cascade.diffusion.process import expand


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor, *, rescale: float = 0.7) -> Tensor:
    """The guided prediction, unconditional + scale (conditional - unconditional), its spread pulled back by `rescale`.

    With `rescale` = 1 each sample has the standard deviation of its conditional prediction, with 0 nothing is
    rescaled. The deviation is taken per sample; the original takes one over the batch, so that a picture depends on
    its neighbours there. Half precision is computed in float32 and returned as it came.

    Shapes: (B, ...), (B, ...), scalar or (B,) -> (B, ...).

    Source: Ho and Salimans 2022, eq. 6; Lin et al. 2023 (common diffusion noise schedules are flawed), eq. 15 and 16.
    """
    dtype = conditional.dtype
    if dtype in (torch.float16, torch.bfloat16):
        conditional, unconditional = conditional.float(), unconditional.float()
    weight = expand(scale.to(conditional), conditional) if isinstance(scale, Tensor) and scale.ndim else scale
    guided = unconditional + weight * (conditional - unconditional)
    if rescale:
        guided = rescale * guided * (_deviation(conditional) / _deviation(guided)) + (1 - rescale) * guided
    return guided.to(dtype)


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation per sample, never zero: an untrained network predicts zeros and must not give NaN."""
    tiny = torch.finfo(x.dtype).tiny
    return expand(x.flatten(1).std(dim=1), x).clamp(min=tiny)
