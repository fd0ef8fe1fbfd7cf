"""The forward process and what a network predicts about it: noised = a clean + b noise, a and b functions of log_snr.

Every function takes float32 or float64 and keeps the dtype. `log_snr` has one value per sample, (B,), or is a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALERS = ("vp", "lerp")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")

Limits = tuple[float, float, float, float]


def expand(x: Tensor, like: Tensor) -> Tensor:
    """`x` with trailing axes of size one, so that it multiplies `like` sample by sample.

    Shapes: (B,) and (B, ...) -> (B, 1, ...).
    """
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def scales(log_snr: Tensor, scaler: str = "vp", *, limits: Limits | None = None) -> tuple[Tensor, Tensor]:
    """The factors (a, b) of the clean sample and of the noise, a^2 / b^2 = exp(log_snr).

    "vp" keeps the variance (a^2 + b^2 = 1), "lerp" the sum (a + b = 1). `limits` from `stretch_limits` stretches both
    to reach 0 and 1 at the ends of a schedule. b comes from log_snr directly: sqrt(1 - a^2), as the original has it,
    loses digits near the clean end. At log_snr = 0 the original's "lerp" is off by 1.6e-4 (it guards a division by
    zero); this is exact.

    Shapes: (B,) -> (B,), (B,).

    Raises:
        ValueError: unknown scaler.

    Source: Kingma et al. 2021, eq. 1 (vp); Liu et al. 2022, eq. 1 (lerp).
    """
    if scaler == "vp":
        a, b = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    elif scaler == "lerp":
        a, b = torch.sigmoid(0.5 * log_snr), torch.sigmoid(-0.5 * log_snr)
    else:
        raise ValueError(f"scaler {scaler!r}: must be one of {', '.join(SCALERS)}")
    if limits is None:
        return a, b
    a_low, a_high, b_low, b_high = limits
    return (a - a_low) / (a_high - a_low), (b - b_low) / (b_high - b_low)


def stretch_limits(
    log_snr_range: tuple[float, float], scaler: str = "vp", *, to_noise: bool = True, to_clean: bool = True
) -> Limits:
    """Limits for `scales` that make a schedule end in pure noise (`to_noise`) and begin with no noise (`to_clean`).

    `log_snr_range` is the schedule's (value at t = 1, value at t = 0).

    Source: Lin et al. 2023 (common diffusion noise schedules are flawed), algorithm 1, extended to both ends.
    """
    a, b = scales(torch.tensor(log_snr_range, dtype=torch.float64), scaler)
    a_low, b_high = (float(a[0]), float(b[0])) if to_noise else (0.0, 1.0)
    a_high, b_low = (float(a[1]), float(b[1])) if to_clean else (1.0, 0.0)
    return a_low, a_high, b_low, b_high


def add_noise(
    clean: Tensor, noise: Tensor, log_snr: Tensor, scaler: str = "vp", *, limits: Limits | None = None
) -> Tensor:
    """The noised sample a clean + b noise.

    Shapes: (B, ...), (B, ...), (B,) -> (B, ...).

    Source: Ho et al. 2020 (DDPM), eq. 4.
    """
    a, b = _factors(log_snr, clean, scaler, limits)
    return a * clean + b * noise


def target(prediction_type: str, clean: Tensor, noise: Tensor, log_snr: Tensor, scaler: str = "vp") -> Tensor:
    """What the network is trained to return: noise, clean, a noise - b clean, or noise - clean.

    Shapes: (B, ...), (B, ...), (B,) -> (B, ...).

    Raises:
        ValueError: unknown prediction type.

    Source: Ho et al. 2020, eq. 14 (epsilon); Salimans and Ho 2022, appendix D (v); Liu et al. 2022, eq. 1 (flow).
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type == "flow":
        return noise - clean
    a, b = _factors(log_snr, clean, scaler)
    return a * noise - b * clean


def to_clean(prediction_type: str, prediction: Tensor, noised: Tensor, log_snr: Tensor, scaler: str = "vp") -> Tensor:
    """The clean sample that a prediction implies.

    Exact for every prediction type with every scaler. The original's inverse of the flow target holds for "lerp"
    alone: with "vp" it forgets to divide by a + b.

    Shapes: (B, ...), (B, ...), (B,) -> (B, ...).

    Raises:
        ValueError: unknown prediction type.
    """
    _check(prediction_type)
    if prediction_type == "sample":
        return prediction
    a, b = _factors(log_snr, noised, scaler)
    if prediction_type == "epsilon":
        return (noised - b * prediction) / a
    if prediction_type == "flow":
        return (noised - b * prediction) / (a + b)
    return (a * noised - b * prediction) / (a * a + b * b)


def to_noise(prediction_type: str, prediction: Tensor, noised: Tensor, log_snr: Tensor, scaler: str = "vp") -> Tensor:
    """The noise that a prediction implies.

    Shapes: (B, ...), (B, ...), (B,) -> (B, ...).

    Raises:
        ValueError: unknown prediction type.
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return prediction
    a, b = _factors(log_snr, noised, scaler)
    if prediction_type == "sample":
        return (noised - a * prediction) / b
    if prediction_type == "flow":
        return (noised + a * prediction) / (a + b)
    return (b * noised + a * prediction) / (a * a + b * b)


def _factors(log_snr: Tensor, like: Tensor, scaler: str, limits: Limits | None = None) -> tuple[Tensor, Tensor]:
    a, b = scales(log_snr, scaler, limits=limits)
    return expand(a, like), expand(b, like)


def _check(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r}: must be one of {', '.join(PREDICTION_TYPES)}")
