"""Samplers: how one step moves a sample towards clean, from what the network predicts there.

A sampler is a function of a `Step`; `SAMPLERS` is the table that the scheduler, the commands, the page and `Drawing`
read. It is made for one network call per step: samplers of higher order use the step before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


SHORTEST = 1e-6
"""Half of a difference in log_snr that counts as a step."""


@dataclass(frozen=True)
class Step:
    """One step of a sampling run: a sample is scale * clean + deviation * noise, before and after it.

    Shapes: sample, and the predicted clean and noise, (B, ...); scale, deviation and log_snr, now and next, are one
    number per sample or one for all, with as many axes.
    """

    sample: Tensor
    clean: Tensor
    noise: Tensor
    scale: Tensor
    deviation: Tensor
    log_snr: Tensor
    scale_next: Tensor
    deviation_next: Tensor
    log_snr_next: Tensor
    draw: Callable[[], Tensor]
    """Standard normal noise like the sample."""
    fresh_share: float | Tensor = 1.0
    """Factor of the fresh noise: 0 in a last step that adds none."""
    eta: float = 0.0
    before: tuple[Tensor, Tensor] | None = None
    """The clean prediction and the log_snr of the step before; None in the first one."""


def ddpm(step: Step) -> Tensor:
    """The posterior of the step, its noise included. Shapes: -> (B, ...). Source: Ho et al. 2020, eq. 7."""
    return _partly_fresh(step, _posterior_deviation(step))


def ddim(step: Step) -> Tensor:
    """The predicted noise again, of which `eta` is fresh; 0 is deterministic, 1 is DDPM.

    Shapes: -> (B, ...).

    Source: Song et al. 2020 (DDIM), eq. 12 and 16.
    """
    if step.eta == 0:
        return step.scale_next * step.clean + step.deviation_next * step.noise
    return _partly_fresh(step, step.eta * _posterior_deviation(step))


def lcm(step: Step) -> Tensor:
    """The clean prediction with wholly fresh noise. Shapes: -> (B, ...). Source: Luo et al. 2023, algorithm 3."""
    return _partly_fresh(step, step.deviation_next)


def dpmpp_2m(step: Step) -> Tensor:
    """DPM-Solver++(2M): the exact solution for a clean prediction that changes linearly in log_snr; deterministic.

    The change is that since the step before. The first step, which has none, is DDIM's, and so is one that does not
    come after the step before (a time asked for twice).

    Shapes: -> (B, ...).

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2, whose lambda is log_snr / 2.
    """
    clean, length = step.clean, (step.log_snr_next - step.log_snr) / 2
    if step.before is not None:
        clean_before, log_snr_before = step.before
        length_before = (step.log_snr - log_snr_before) / 2
        share = length / (2 * length_before.clamp(min=SHORTEST)) * (length_before > SHORTEST)
        clean = clean + share * (clean - clean_before)
    return step.deviation_next / step.deviation * step.sample - step.scale_next * (-length).expm1() * clean


def _posterior_deviation(step: Step) -> Tensor:
    shrunk = (1 - (step.scale / step.scale_next).square()).clamp(min=0).sqrt()
    return step.deviation_next / step.deviation * shrunk


def _partly_fresh(step: Step, fresh: Tensor) -> Tensor:
    """The clean prediction, the predicted noise and fresh noise of this deviation, of the next step's together."""
    kept = (step.deviation_next.square() - fresh.square()).clamp(min=0).sqrt()
    return step.scale_next * step.clean + kept * step.noise + fresh * step.fresh_share * step.draw()


@dataclass(frozen=True)
class Sampler:
    """A sampler that can be chosen by its name, and what people read about it."""

    move: Callable[[Step], Tensor]
    title: str
    about: str


SAMPLERS = {
    "ddpm": Sampler(ddpm, "DDPM", "fresh noise in every step, as released"),
    "ddim": Sampler(ddim, "DDIM", "no fresh noise: the same noise always gives the same image"),
    "dpmpp_2m": Sampler(dpmpp_2m, "DPM++ 2M", "second order, no fresh noise: closer than ddim with few steps"),
    "lcm": Sampler(lcm, "LCM", "wholly fresh noise in every step: good with few steps"),
}
