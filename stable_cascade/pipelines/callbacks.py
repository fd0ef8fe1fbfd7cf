"""diffusers' step callbacks over the sampling loop's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .sampling import OnStep

CALLBACK_TENSORS = ["latents", "clean"]


def step_callback(
    pipeline: Any, callback: Callable[..., Any] | None, names: Sequence[str], prefix: str = ""
) -> OnStep | None:
    """`callback(pipeline, step, time, tensors)` as the loop calls it; what it returns replaces the tensors.

    `latents` are the noised latents, `clean` what the step takes the result to be, fit for previews.

    Raises:
        ValueError: a name that is not among the tensors.
    """
    unknown = [name for name in names if name not in CALLBACK_TENSORS]
    if unknown:
        allowed = ", ".join(CALLBACK_TENSORS)
        raise ValueError(f"{prefix}callback_on_step_end_tensor_inputs '{unknown[0]}' is not one of {allowed}")
    if callback is None:
        return None

    def on_step(step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shown = {name: tensors[name] for name in names}
        return callback(pipeline, step, time, shown) or {}

    return on_step
