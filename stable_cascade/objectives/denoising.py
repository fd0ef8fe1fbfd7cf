"""The loss that Stage C, its ControlNet and Stage B share: draw a time, add noise, predict, compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stable_cascade.diffusion.noise import gaussian_noise, pyramid_noise, sample_generators, training_times
from stable_cascade.diffusion.process import add_noise, target
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t

LossTerms = dict[str, Tensor]
"""`loss` (weighted), `unweighted` and `log_snr`, each of shape (B,)."""


def draw_log_snr(seeds: Tensor, *, shift: float = 1.0) -> Tensor:
    """The noise level of each sample, a function of its seed alone.

    Shapes: (B,) -> (B,), float32.
    """
    return cosine_log_snr(training_times(sample_generators(seeds, "time")), shift=shift)


def draw_noise(seeds: Tensor, shape: tuple[int, ...], *, offset: float = 0.0, pyramid: bool = False) -> Tensor:
    """Gaussian noise of `shape` per sample, with an optional offset per channel or the pyramid of Stage B.

    Shapes: (B,) -> (B, *shape), float32 on the CPU.
    """
    generators = sample_generators(seeds, "noise")
    if pyramid:
        return pyramid_noise(shape, generators)
    return gaussian_noise(shape, generators, offset=offset)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    noise: Tensor,
    log_snr: Tensor,
    *,
    weight: Callable[[Tensor], Tensor],
    prediction_type: str = "epsilon",
    mask: Tensor | None = None,
) -> LossTerms:
    """Squared error of the prediction, averaged per sample and weighted by noise level.

    Shapes: clean, noise (B, C, H, W); log_snr (B,); mask (B, 1, H, W) -> three tensors (B,).

    Args:
        predict: (noised latents, timestep ratio) -> prediction.
        weight: log_snr (B,) -> weight (B,).
        mask: weights of the places of a sample in its average; absent: all count alike.
    """
    noised = add_noise(clean, noise, log_snr)
    prediction = predict(noised, cosine_t(log_snr))
    wanted = target(prediction_type, clean, noise, log_snr)
    error = (prediction.float() - wanted.float()).square()
    if mask is not None:
        error = error * (mask / mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-6))
    unweighted = error.flatten(1).mean(1)
    return {"loss": unweighted * weight(log_snr), "unweighted": unweighted.detach(), "log_snr": log_snr}


def chosen(seeds: Tensor, stream: str, share: float) -> Tensor:
    """Which samples an event of probability `share` happens to, a function of seed and stream name.

    Shapes: (B,) -> (B,) bool on the CPU.
    """
    draws = [torch.rand((), generator=generator) for generator in sample_generators(seeds, stream)]
    return torch.stack(draws) < share
