"""The weight of noise levels in the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_cascade.diffusion import weighting


@dataclass(frozen=True)
class Weighting:
    """The loss weight of a config and what the loop needs to keep it up to date."""

    weight: Callable[[Tensor], Tensor]
    stateful: dict[str, Any]
    after_step: Callable[[Tensor, Tensor], None] | None


def loss_weight(config: Any) -> Weighting:
    """The loss weight by noise level: P2 as published, adaptive, min-SNR or none."""
    if config.loss_weight == "adaptive":
        adaptive = weighting.AdaptiveLossWeight()
        return Weighting(adaptive, {"adaptive_loss_weight": adaptive}, adaptive.update)
    choices: dict[str, Callable[[Tensor], Tensor]] = {
        "p2": weighting.p2_weight,
        "min_snr": lambda log_snr: weighting.min_snr_weight(log_snr, config.min_snr_gamma, config.prediction_type),
        "constant": torch.ones_like,
    }
    return Weighting(choices[config.loss_weight], {}, None)
