"""Loss weights as functions of log_snr, and the two objects that adapt to the loss.

A weight belongs to what the network predicts: the same emphasis on the clean sample needs another factor for an
epsilon network than for a v network. `prediction_factor` converts. All functions keep dtype and shape. To weigh a
model whose images are shifted by k, pass `shift_log_snr(log_snr, 1 / k)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stable_cascade.diffusion.process import PREDICTION_TYPES, scales


def p2_weight(log_snr: Tensor, *, k: float = 1.0, gamma: float = 1.0, s: float = 1.0) -> Tensor:
    """P2 weight for an epsilon network, (k + SNR^s)^-gamma: the weight of the released models, (1 + SNR)^-1.

    Shapes: (B,) -> (B,).

    Raises:
        ValueError: `k` is negative.

    Source: Choi et al. 2022, eq. 8 (s = 1).
    """
    if k < 0:
        raise ValueError(f"k {k}: must not be negative; the paper uses 1")
    return (k + torch.exp(s * log_snr)) ** -gamma


def truncated_snr_weight(log_snr: Tensor, *, lowest: float = 1.0) -> Tensor:
    """SNR, at least `lowest`, for a network that predicts the clean sample.

    Shapes: (B,) -> (B,).

    Source: Salimans and Ho 2022, section 4.
    """
    return torch.exp(log_snr).clamp(min=lowest)


def clipped_snr_weight(log_snr: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma): what the original calls MinSNR. Right for a network that predicts the clean sample only.

    Shapes: (B,) -> (B,).
    """
    return torch.exp(log_snr).clamp(max=gamma)


def min_snr_weight(
    log_snr: Tensor, gamma: float = 5.0, prediction_type: str = "epsilon", *, scaler: str = "vp"
) -> Tensor:
    """Min-SNR weight for this prediction type: min(SNR, gamma) on the clean sample's error.

    epsilon: min(SNR, gamma) / SNR; sample: min(SNR, gamma); v (vp): min(SNR, gamma) / (SNR + 1). The original applies
    min(SNR, gamma) to every prediction, which for epsilon weighs the clean end 1e4 times too much; that one is
    `clipped_snr_weight`.

    Shapes: (B,) -> (B,).

    Raises:
        ValueError: unknown prediction type; `gamma` not positive.

    Source: Hang et al. 2023 (Min-SNR), section 3.4.
    """
    if not gamma > 0:
        raise ValueError(f"gamma {gamma}: must be positive; the paper uses 5")
    return clipped_snr_weight(log_snr, gamma=gamma) * prediction_factor(log_snr, prediction_type, scaler)


def prediction_factor(log_snr: Tensor, prediction_type: str, scaler: str = "vp") -> Tensor:
    """The squared error of the clean sample per squared error of the prediction.

    1 for "sample", 1 / SNR for "epsilon", 1 / (SNR + 1) for "v_prediction" (vp), 1 / (1 + sqrt(SNR))^2 for "flow".

    Shapes: (B,) -> (B,).

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "sample":
        return torch.ones_like(log_snr)
    if prediction_type == "epsilon":
        return torch.exp(-log_snr)
    a, b = scales(log_snr, scaler)
    if prediction_type == "flow":
        return (b / (a + b)).square()
    if prediction_type == "v_prediction":
        return (b / (a * a + b * b)).square()
    raise ValueError(f"prediction_type {prediction_type!r}: must be one of {', '.join(PREDICTION_TYPES)}")


def sech_weight(log_snr: Tensor, *, divisor: float = 2.0) -> Tensor:
    """1 / cosh(log_snr / divisor), one at log_snr = 0.

    Shapes: (B,) -> (B,).

    Source: Kingma and Gao 2023, table 1 (the weight implied by EDM-like and flow losses, divisor 2).
    """
    return 1 / torch.cosh(log_snr / divisor)


def debiased_weight(log_snr: Tensor) -> Tensor:
    """1 / sqrt(SNR) for an epsilon network.

    Shapes: (B,) -> (B,).

    Source: Yu et al. 2023 (debias the training of diffusion models), eq. 9.
    """
    return torch.exp(-0.5 * log_snr)


def sigmoid_weight(log_snr: Tensor, *, scale: float = 1.0) -> Tensor:
    """sigmoid(scale * log_snr), which grows towards the clean end (Kingma and Gao 2023 have the opposite sign).

    Shapes: (B,) -> (B,).
    """
    return torch.sigmoid(scale * log_snr)


class AdaptiveLossWeight:
    """Weights each log_snr by one over the running loss found there, so that every noise level counts alike.

    The running losses live in `buckets` cells of log_snr, all beginning at 1. Nothing here waits for the device.
    """

    def __init__(
        self,
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        buckets: int = 300,
        weight_range: tuple[float, float] = (1e-7, 1e7),
    ) -> None:
        if buckets < 2:
            raise ValueError(f"buckets {buckets}: must be at least 2")
        self.log_snr_range = log_snr_range
        self.weight_range = weight_range
        self.edges = torch.linspace(*log_snr_range, buckets - 1)
        self.bucket_losses = torch.ones(buckets)

    def __call__(self, log_snr: Tensor) -> Tensor:
        """One over the running loss at `log_snr`, clamped to `weight_range`.

        Shapes: (B,) -> (B,).
        """
        self._follow(log_snr.device)
        losses = self.bucket_losses[self._index(log_snr)]
        return (1 / losses).clamp(*self.weight_range).to(log_snr.dtype)

    def update(self, log_snr: Tensor, loss: Tensor, *, beta: float = 0.99) -> None:
        """Moves the running losses by each sample's unweighted `loss`; see `bucket_average` for several in one bucket.

        Pass what all processes gathered, so that each of them keeps the same state. The original lets the last sample
        of a bucket win, on each process for itself.

        Shapes: (B,), (B,).
        """
        self._follow(log_snr.device)
        self.bucket_losses = bucket_average(self.bucket_losses, self._index(log_snr), loss.detach(), beta=beta)

    def state_dict(self) -> dict[str, Tensor]:
        """The running losses, on the CPU."""
        return {"bucket_losses": self.bucket_losses.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: another number of buckets.
        """
        self.bucket_losses = _checked_state(state, "bucket_losses", self.bucket_losses)

    def _index(self, log_snr: Tensor) -> Tensor:
        return torch.searchsorted(self.edges, log_snr.detach().to(self.edges.dtype).contiguous())

    def _follow(self, device: torch.device) -> None:
        if self.bucket_losses.device != device:
            self.bucket_losses, self.edges = self.bucket_losses.to(device), self.edges.to(device)


def bucket_average(values: Tensor, index: Tensor, samples: Tensor, *, beta: float = 0.99) -> Tensor:
    """Running averages after n samples fell into a bucket: beta^n value + (1 - beta^n) mean(samples).

    That is n steps of `value = beta value + (1 - beta) mean`, so that every sample counts and their order does not:
    the sums run over the samples sorted by bucket and value, which makes the result the same to the last bit for any
    order of the batch and any number of processes.

    Shapes: (buckets,), (B,) integers, (B,) -> (buckets,).
    """
    samples, order = samples.to(values.dtype).sort()
    index, order = index[order].sort(stable=True)
    samples = samples[order]
    member = index[:, None] == torch.arange(len(values), device=values.device)
    count = member.sum(0)
    mean = torch.where(member, samples[:, None], 0).sum(0) / count.clamp(min=1)
    keep = beta ** count.to(values.dtype)
    return torch.where(count > 0, keep * values + (1 - keep) * mean, values)


def _checked_state(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    if key not in state:
        raise ValueError(f"state has no {key!r}, only {sorted(state)}; was it saved by another object?")
    value = state[key]
    if value.shape != like.shape:
        raise ValueError(f"{key} has {value.numel()} buckets, this object {like.numel()}; create it with that number")
    return value.detach().to(like, copy=True)
