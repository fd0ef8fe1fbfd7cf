"""Guidance: a prediction moved away from a worse one. `GUIDANCES` is the table of the ways to do it.

The worse prediction is that without the conditions (classifier-free guidance) or that of a worse network
(autoguidance); a method sees only the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Guided:
    """What a method of guidance knows of its run.

    `to_clean` and `from_clean` turn a prediction at this step into the clean sample it implies and back; `memory`
    lasts from step to step.
    """

    scale: float
    rescale: float
    to_clean: Callable[[Tensor], Tensor]
    from_clean: Callable[[Tensor], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor, *, rescale: float = 0.7) -> Tensor:
    """The guided prediction, unconditional + scale (conditional - unconditional), its spread pulled back by `rescale`.

    With `rescale` = 1 each sample has the standard deviation of its conditional prediction, with 0 nothing is
    rescaled. The deviation is taken per sample; the original takes one over the batch, so that an image depends on
    its neighbours there. Half precision is computed in float32 and returned as it came.

    Shapes: (B, ...), (B, ...), scalar or (B,) -> (B, ...).

    Source: Ho and Salimans 2022, eq. 6; Lin et al. 2023 (common diffusion noise schedules are flawed), eq. 15 and 16.
    """
    from .process import expand  # here: the commands read the table below, and wait for no torch

    dtype = conditional.dtype
    if dtype.itemsize < 4:
        conditional, unconditional = conditional.float(), unconditional.float()
    weight = scale if isinstance(scale, int | float) or not scale.ndim else expand(scale.to(conditional), conditional)
    guided = unconditional + weight * (conditional - unconditional)
    if rescale:
        guided = rescale * guided * (_deviation(conditional) / _deviation(guided)) + (1 - rescale) * guided
    return guided.to(dtype)


MOMENTUM = -0.5
"""How much of the differences before acts against the new one (APG's beta)."""
LARGEST_DIFFERENCE = 0.06
"""Root mean square to which a difference of clean predictions is bounded: APG's 15 for the latents of SDXL."""


def project(better: Tensor, worse: Tensor, run: Guided) -> Tensor:
    """Adaptive projected guidance: strong guidance without burnt colours.

    Of the difference of the clean predictions, slowed by the differences before and bounded in length, only what is
    orthogonal to the better prediction is added: what is parallel to it makes contrast.

    Shapes: (B, ...), (B, ...) -> (B, ...).

    Source: Sadat et al. 2024 (APG), algorithm 1, with eta 0.
    """
    clean, clean_worse = run.to_clean(better), run.to_clean(worse)
    # The difference, with negative momentum.
    difference = clean - clean_worse + MOMENTUM * run.memory.get("difference", 0.0)
    run.memory["difference"] = difference
    # Bounded per sample.
    axes = tuple(range(1, clean.ndim))
    length = difference.square().mean(axes, keepdim=True).sqrt().clamp(min=2.0**-126)
    difference = difference * (LARGEST_DIFFERENCE / length).clamp(max=1)
    # Without its part along the better prediction.
    along = (difference * clean).sum(axes, keepdim=True) / clean.square().sum(axes, keepdim=True).clamp(min=2.0**-126)
    return run.from_clean(clean + (run.scale - 1) * (difference - along * clean))


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation per sample, never zero: an untrained network predicts zeros and must not give NaN."""
    import torch

    from .process import expand

    return expand(x.flatten(1).std(dim=1), x).clamp(min=torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class Method:
    """A method of guidance that can be chosen by its name, and what people read about it."""

    combine: Callable[[Tensor, Tensor, Guided], Tensor]
    """(better prediction, worse prediction, run) -> guided prediction, each (B, ...) float32."""
    title: str
    about: str


GUIDANCES = {
    "cfg": Method(
        lambda better, worse, run: guide(better, worse, run.scale, rescale=run.rescale),
        "CFG", "plain classifier-free guidance, as released",
    ),
    "apg": Method(project, "APG", "projected, for strong guidance without burnt colours; leaves rescale out"),
}  # fmt: skip
