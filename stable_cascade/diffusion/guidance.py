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
    dtype = conditional.dtype
    if dtype.itemsize < 4:
        conditional, unconditional = conditional.float(), unconditional.float()
    weight: Any = scale
    if not isinstance(scale, int | float) and scale.ndim:
        weight = scale.to(conditional).reshape(-1, *[1] * (conditional.ndim - 1))
    guided = unconditional + weight * (conditional - unconditional)
    if rescale:
        guided = rescale * guided * (_deviation(conditional) / _deviation(guided)) + (1 - rescale) * guided
    return guided.to(dtype)


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation per sample, never zero: an untrained network predicts zeros and must not give NaN."""
    deviation = x.flatten(1).std(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    return deviation.clamp(min=2.0**-126 if x.dtype.itemsize < 8 else 2.0**-1022)


@dataclass(frozen=True)
class Guidance:
    """A method of guidance that can be chosen by its name, and what people read about it."""

    combine: Callable[[Tensor, Tensor, Guided], Tensor]
    """(better prediction, worse prediction, run) -> guided prediction, each (B, ...) float32."""
    title: str
    about: str


GUIDANCES = {
    "cfg": Guidance(
        lambda better, worse, run: guide(better, worse, run.scale, rescale=run.rescale),
        "CFG", "plain classifier-free guidance, as released",
    ),
}  # fmt: skip
