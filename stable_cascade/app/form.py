"""Everything that can be set on the page, in the order in which the widgets' values arrive."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .choices import NONE

REFERENCES = 3
LORAS = 4
OWN_FILTER = "the ControlNet's own"
AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Form:
    """The values of the widgets, as the browser sends them: nothing of it is checked yet.

    Pictures are paths of uploaded files, or None. A side or shift of 0 is left to the picture or the model.
    """

    task: Any = "generate"
    prompt: Any = ""
    negative_prompt: Any = ""
    weighted: Any = False
    width: Any = 0
    height: Any = 0
    seed: Any = 0
    new_seed: Any = True
    count: Any = 1
    prior_num_inference_steps: Any = 20
    prior_guidance_scale: Any = 4.0
    num_inference_steps: Any = 10
    decoder_guidance_scale: Any = 1.1
    guidance_rescale: Any = 0.7
    guidance_start: Any = 0.0
    guidance_end: Any = 1.0
    sampler: Any = AUTOMATIC
    shift: Any = 0
    preview: Any = False
    image: Any = None
    strength: Any = 0.6
    reference_1: Any = None
    reference_2: Any = None
    reference_3: Any = None
    reference_weight_1: Any = 1.0
    reference_weight_2: Any = 1.0
    reference_weight_3: Any = 1.0
    edited: Any = None
    inpaint_strength: Any = 1.0
    controlnet: Any = NONE
    control_image: Any = None
    control_filter: Any = OWN_FILTER
    control_filtered: Any = False
    control_scale: Any = 1.0
    control_start: Any = 0.0
    control_end: Any = 1.0
    lora_1: Any = NONE
    lora_2: Any = NONE
    lora_3: Any = NONE
    lora_4: Any = NONE
    lora_weight_1: Any = 1.0
    lora_weight_2: Any = 1.0
    lora_weight_3: Any = 1.0
    lora_weight_4: Any = 1.0
    reconstructed: Any = None

    def numbered(self, name: str, count: int) -> list[Any]:
        """The values of `name_1` to `name_<count>`."""
        return [getattr(self, f"{name}_{number}") for number in range(1, count + 1)]


FIELDS = tuple(field.name for field in fields(Form))


def read_form(values: Any) -> Form:
    """The form of values that come in the order of `FIELDS`."""
    return Form(**dict(zip(FIELDS, values, strict=True)))
