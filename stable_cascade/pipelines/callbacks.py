"""diffusers' step callbacks over the sampling loop's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .sampling import OnStep, Settings

CALLBACK_TENSORS = ["latents", "clean"]


def step_callback(
    pipeline: Any, settings: Settings, callback: Callable[..., Any] | None, names: Sequence[str], prefix: str = ""
) -> OnStep:
    """`callback(pipeline, step, time, tensors)` as the loop calls it; what it returns replaces the tensors.

    `latents` are the noised latents, `clean` what the step takes the result to be, fit for previews. A callback that
    sets `pipeline._guidance_scale` changes the guidance of the steps that follow, one that sets `pipeline._interrupt`
    ends the stage.

    Raises:
        ValueError: a name that is not among the tensors.
    """
    unknown = [name for name in names if name not in CALLBACK_TENSORS]
    if unknown:
        allowed = ", ".join(CALLBACK_TENSORS)
        raise ValueError(f"{prefix}callback_on_step_end_tensor_inputs '{unknown[0]}' is not one of {allowed}")

    def on_step(step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if step == 0:
            pipeline._guidance_scale, pipeline._interrupt = settings.guidance_scale, False
            pipeline._num_timesteps = settings.num_inference_steps
        if callback is None:
            return {}
        shown = {name: tensors[name] for name in names}
        changed = callback(pipeline, step, time, shown) or {}
        return {**changed, "guidance_scale": pipeline._guidance_scale, "interrupt": pipeline._interrupt}

    return on_step
