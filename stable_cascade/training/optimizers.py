"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stable_cascade.config import OptimizerSettings


def build_optimizer(settings: OptimizerSettings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the parameters that train.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.adam_betas,
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "optimizer adamw_8bit needs bitsandbytes; pip install bitsandbytes, or set optimizer: adamw"
            ) from error
        return AdamW8bit(parameters, **options)
    # The fused kernel is several times faster on the CPU than the default loop over tensors.
    return torch.optim.AdamW(parameters, fused=True, **options)


def learning_rate_share(name: str, step: int, *, warmup: int, updates: int, final: float = 0.0) -> float:
    """The share of the full learning rate in the step with number `step`, counted from 0.

    Step k of a warm-up over n steps uses (k + 1) / n, so that no step is idle.

    Raises:
        ValueError: the schedule is not one of constant, linear, cosine, polynomial, inverse_sqrt.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, updates - warmup))
    if name == "constant":
        return 1.0
    if name == "linear":
        return final + (1 - final) * (1 - done)
    if name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    if name == "polynomial":
        return final + (1 - final) * (1 - done) ** 2
    if name == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    raise ValueError(f"lr_scheduler '{name}' is not one of constant, linear, cosine, polynomial, inverse_sqrt")


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, updates: int) -> float:
    """Give every parameter group the learning rate of this step, and return it.

    The rate is a function of the step alone, so there is no scheduler whose state could be lost.
    """
    share = learning_rate_share(
        settings.lr_scheduler,
        step,
        warmup=settings.warmup_updates,
        updates=updates,
        final=settings.lr_final_share,
    )
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * share
    return settings.lr * share
