"""Noise schedules: log_snr as a function of t in [0, 1] (0 clean, 1 noise), and the noise condition that networks get.

All functions keep the dtype (float32 or float64) and the shape of their first argument.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

Range = tuple[float, float]


def shift_log_snr(log_snr: Tensor, shift: float, *, limits: Range | None = None) -> Tensor:
    """Moves `log_snr` to where an image with `shift` times the side needs it: log_snr - 2 ln(shift).

    `limits` (lowest, highest) clamps the result. A loss weight "shifted by k" is the weight of `shift_log_snr(log_snr,
    1 / k)`.

    Shapes: any -> the same.

    Raises:
        ValueError: `shift` is not positive.

    Source: Hoogeboom et al. 2023 (simple diffusion), eq. 4.
    """
    if not shift > 0:
        raise ValueError(f"shift {shift}: must be positive; 1 leaves the schedule as it is")
    shifted = log_snr - 2 * math.log(shift)
    return shifted if limits is None else shifted.clamp(*limits)


def warp_times(t: Tensor, power: float) -> Tensor:
    """`t ** power` for a power below 1, `1 - (1 - t) ** power` above it: both move the schedule towards noise.

    Shapes: any, in [0, 1] -> the same.

    Source: the `scaler` of diffusers' DDPMWuerstchenScheduler.
    """
    if power == 1:
        return t
    return 1 - (1 - t) ** power if power > 1 else t**power


def cosine_log_snr(
    t: Tensor,
    *,
    s: float = 0.008,
    clamp: Range | None = (1e-4, 0.9999),
    shift: float = 1.0,
    normalize: bool = False,
    limited: bool = True,
) -> Tensor:
    """log_snr of the cosine schedule, from 9.2102 (t = 0) to -9.2102 (t = 1).

    The variance of the signal, cos^2, is clamped to `clamp`, or squeezed linearly into it with `normalize`. `limited`
    keeps the shifted schedule inside the unshifted range, as the released models were trained and are sampled.

    Shapes: any, in [0, 1] -> the same.

    Source: Nichol and Dhariwal 2021, eq. 17.
    """
    low, high = clamp if clamp is not None else (0.0, 1.0)
    variance = torch.cos((s + t) / (1 + s) * (math.pi / 2)).square() / math.cos(s / (1 + s) * (math.pi / 2)) ** 2
    variance = variance * (high - low) + low if normalize else variance.clamp(low, high)
    log_snr = torch.log(variance / (1 - variance))
    limits = (_logit(low), _logit(high)) if limited and clamp is not None else None
    return shift_log_snr(log_snr, shift, limits=limits)


def cosine_t(log_snr: Tensor, *, s: float = 0.008, shift: float = 1.0, clamp: Range = (0.0, 1.0)) -> Tensor:
    """The time at which the cosine schedule has this `log_snr`: the noise condition that the networks are fed.

    0.9935832 at the schedule's noisiest point, not 1, because the schedule clamps its variance. With the default
    `shift` this is the unshifted time, also for noise drawn from a shifted schedule. The original accepts `clamp` but
    ignores it; here it acts.

    Shapes: any -> the same, in [0, 1].

    Source: inverse of Nichol and Dhariwal 2021, eq. 17.
    """
    variance = torch.sigmoid(log_snr + 2 * math.log(shift))
    angle = torch.acos((variance.sqrt() * math.cos(s / (1 + s) * (math.pi / 2))).clamp(-1, 1))
    return (angle / (math.pi / 2) * (1 + s) - s).clamp(*clamp)


def tangent_log_snr(t: Tensor, *, limits: Range = (-15.0, 15.0), shift: float = 1.0) -> Tensor:
    """log_snr of the cosine schedule without offset, whose ends are bent to reach exactly `limits`.

    Shapes: any, in [0, 1] -> the same.

    Source: Hoogeboom et al. 2023 (simple diffusion), appendix A.
    """
    start, end = math.atan(math.exp(-0.5 * limits[1])), math.atan(math.exp(-0.5 * limits[0]))
    return shift_log_snr(-2 * torch.log(torch.tan(start + t * (end - start))), shift, limits=limits)


def sqrt_log_snr(t: Tensor, *, s: float = 1e-4, clamp: Range = (1e-4, 0.9999), shift: float = 1.0) -> Tensor:
    """log_snr of the square-root schedule: variance 1 - sqrt(t + s).

    Shapes: any, in [0, 1] -> the same.

    Source: Li et al. 2022 (Diffusion-LM), section 4.2.
    """
    limits = (_logit(max(clamp[0], 1 - math.sqrt(1 + s))), _logit(min(clamp[1], 1 - math.sqrt(s))))
    variance = (1 - torch.sqrt(t + s)).clamp(*clamp)
    return shift_log_snr(torch.log(variance / (1 - variance)), shift, limits=limits)


def linear_log_snr(t: Tensor, *, limits: Range = (-10.0, 10.0), shift: float = 1.0) -> Tensor:
    """log_snr falling on a straight line from `limits[1]` at t = 0 to `limits[0]` at t = 1.

    Shapes: any, in [0, 1] -> the same.

    Source: Kingma et al. 2021 (variational diffusion models), section 4.
    """
    return shift_log_snr(limits[1] + t * (limits[0] - limits[1]), shift, limits=limits)


def rectified_flow_log_snr(t: Tensor, *, limits: Range = (-15.0, 15.0), shift: float = 1.0) -> Tensor:
    """log_snr of the straight path (1 - t) clean + t noise: 2 ln((1 - t) / t), clamped to `limits`.

    Shapes: any, in [0, 1] -> the same.

    Source: Liu et al. 2022 (rectified flow), eq. 1.
    """
    return shift_log_snr((2 * torch.log((1 - t) / t)).clamp(*limits), shift, limits=limits)


def edm_log_snr(t: Tensor, *, sigmas: Range = (0.002, 80.0), rho: float = 7.0, shift: float = 1.0) -> Tensor:
    """log_snr of EDM's sampling schedule, from sigma 0.002 at t = 0 to sigma 80 at t = 1.

    Shapes: any, in [0, 1] -> the same.

    Source: Karras et al. 2022 (EDM), eq. 5; log_snr = -2 ln(sigma).
    """
    low, high = (sigma ** (1 / rho) for sigma in sigmas)
    limits = (-2 * math.log(sigmas[1]), -2 * math.log(sigmas[0]))
    return shift_log_snr(-2 * rho * torch.log(low + t * (high - low)), shift, limits=limits)


def stable_diffusion_log_snr(
    t: Tensor, *, betas: Range = (0.00085, 0.012), steps: int = 1000, shift: float = 1.0
) -> Tensor:
    """log_snr of Stable Diffusion's scaled-linear schedule: a table of `steps` + 1 variances, interpolated linearly.

    Shapes: any, in [0, 1] -> the same.

    Source: Rombach et al. 2022, released configuration (betas linear in their square root).
    """
    variances = _scaled_linear_variances(*betas, steps)
    table = variances.to(device=t.device, dtype=t.dtype)
    position = (t * steps).clamp(0, steps)
    below = position.floor().long().clamp(max=steps - 1)
    variance = torch.lerp(table[below], table[below + 1], position - below)
    limits = (_logit(float(variances[-1])), _logit(float(variances[0])))
    return shift_log_snr(torch.log(variance / (1 - variance)), shift, limits=limits)


def rectified_flow_condition(log_snr: Tensor) -> Tensor:
    """Noise condition of the original's rectified-flow setup: the share of the CLEAN sample, 1 - t.

    Shapes: any -> the same, in (0, 1).
    """
    return torch.sigmoid(0.5 * log_snr)


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


@lru_cache(maxsize=8)
def _scaled_linear_variances(first: float, last: float, steps: int) -> Tensor:
    roots = torch.linspace(math.sqrt(first), math.sqrt(last), steps + 1, dtype=torch.float64)
    return torch.cumprod(1 - roots.square(), dim=0)
