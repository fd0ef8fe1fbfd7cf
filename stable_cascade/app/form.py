"""Everything that can be set on the page, in the order in which the widgets' values arrive."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from stable_cascade.drawing.request import STRENGTHS, ControlChoice, Drawing, LoraChoice

from .choices import NONE

REFERENCES = 3
LORAS = 4
OWN_FILTER = "the ControlNet's own"
AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Form:
    """The values of the widgets, as the browser sends them: nothing of it is checked yet.

    What nobody changes is as in a new `Drawing`. Pictures are paths of uploaded files, or None. A side or shift of 0
    is left to the picture or the model.
    """

    task: Any = Drawing.task
    prompt: Any = Drawing.prompt
    negative_prompt: Any = Drawing.negative_prompt
    weighted: Any = Drawing.weighted
    width: Any = 0
    height: Any = 0
    seed: Any = Drawing.seed
    new_seed: Any = True
    count: Any = 1
    prior_num_inference_steps: Any = Drawing.prior_num_inference_steps
    prior_guidance_scale: Any = Drawing.prior_guidance_scale
    num_inference_steps: Any = Drawing.num_inference_steps
    decoder_guidance_scale: Any = Drawing.decoder_guidance_scale
    guidance_method: Any = Drawing.guidance_method
    guidance_rescale: Any = Drawing.guidance_rescale
    cache_interval: Any = Drawing.cache_interval
    guidance_start: Any = Drawing.guidance_interval[0]
    guidance_end: Any = Drawing.guidance_interval[1]
    sampler: Any = AUTOMATIC
    shift: Any = 0
    preview: Any = Drawing.preview
    image: Any = None
    strength: Any = STRENGTHS["img2img"]
    reference_1: Any = None
    reference_2: Any = None
    reference_3: Any = None
    reference_weight_1: Any = 1.0
    reference_weight_2: Any = 1.0
    reference_weight_3: Any = 1.0
    edited: Any = None
    inpaint_strength: Any = STRENGTHS["inpaint"]
    controlnet: Any = NONE
    control_image: Any = None
    control_filter: Any = OWN_FILTER
    control_filtered: Any = ControlChoice.filtered
    control_scale: Any = ControlChoice.scale
    control_start: Any = ControlChoice.start
    control_end: Any = ControlChoice.end
    lora_1: Any = NONE
    lora_2: Any = NONE
    lora_3: Any = NONE
    lora_4: Any = NONE
    lora_weight_1: Any = LoraChoice.weight
    lora_weight_2: Any = LoraChoice.weight
    lora_weight_3: Any = LoraChoice.weight
    lora_weight_4: Any = LoraChoice.weight
    reconstructed: Any = None

    def numbered(self, name: str, count: int) -> list[Any]:
        """The values of `name_1` to `name_<count>`."""
        return [getattr(self, f"{name}_{number}") for number in range(1, count + 1)]


FIELDS = tuple(field.name for field in fields(Form))


def read_form(values: Any) -> Form:
    """The form of values that come in the order of `FIELDS`."""
    return Form(**dict(zip(FIELDS, values, strict=True)))
