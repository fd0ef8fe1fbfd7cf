"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stable_cascade.config import OptimizerSettings

FULL_RATE = "full_lr"
"""A parameter group's learning rate after the warm-up, where groups have rates of their own."""


def build_optimizer(
    settings: OptimizerSettings, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, or over groups of them.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.adam_betas,
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    check_optimizer(settings)
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    # The fused kernel is several times faster on the CPU than the default loop over tensors.
    return torch.optim.AdamW(parameters, fused=True, **options)


def check_optimizer(settings: OptimizerSettings) -> None:
    """Passes when the optimizer's package is there; it is not imported, which takes seconds.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    if settings.optimizer == "adamw_8bit" and not is_installed("bitsandbytes"):
        raise ValueError("optimizer adamw_8bit needs bitsandbytes; pip install bitsandbytes, or set optimizer: adamw")


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without doing so."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its place in sys.modules says None
        return False


def parameter_groups(named: Mapping[str, nn.Parameter], learning_rate: Callable[[str], float] | None) -> list[Any]:
    """The parameters as one group per learning rate, in the order of their names; plain parameters without rates.

    Raises:
        ValueError: a rate is negative or not finite.
    """
    if learning_rate is None:
        return list(named.values())
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        rate = float(learning_rate(name))
        if not 0 <= rate < math.inf:
            raise ValueError(f"learning rate {rate} of '{name}' is not a finite number from 0; correct the rates")
        groups.setdefault(rate, []).append(parameter)
    return [{"params": group, "lr": rate, FULL_RATE: rate} for rate, group in groups.items()]


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
    """Give every parameter group the learning rate of this step; returns that of groups without a rate of their own.

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
        group["lr"] = group.get(FULL_RATE, settings.lr) * share
    return settings.lr * share
