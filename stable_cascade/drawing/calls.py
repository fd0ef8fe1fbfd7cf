"""From a drawing to the arguments of the pipeline's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from stable_cascade.pipelines.knobs import KNOBS

from .inputs import Inputs
from .request import Drawing

OnStep = Callable[[str, int, int, "Image.Image | None"], None]
"""(stage `prior` or `decoder`, step from 1, steps, a rough image of Stage C where there is a previewer)."""


def sampling_arguments(drawing: Drawing) -> dict[str, Any]:
    """Size, steps and guidance."""
    names = (
        "height", "width", "prior_num_inference_steps", "prior_guidance_scale", "num_inference_steps",
        "decoder_guidance_scale", "preview", *KNOBS,
    )  # fmt: skip
    return {name: getattr(drawing, name) for name in names}


def text_arguments(pipeline: Any, drawing: Drawing) -> dict[str, Any]:
    """The prompts, or with weights in them their embeddings."""
    negative = drawing.negative_prompt or None
    if not drawing.weighted:
        return {"prompt": drawing.prompt, "negative_prompt": negative}
    names = ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds", "negative_prompt_embeds_pooled")
    embeds = pipeline.encode_prompt(prompt=drawing.prompt, negative_prompt=negative, weighted=True)
    return dict(zip(names, embeds, strict=True))


def image_arguments(drawing: Drawing, inputs: Inputs) -> dict[str, Any]:
    """The image to start from, its mask, and reference images."""
    arguments: dict[str, Any] = {}
    if inputs.images:
        weights = drawing.image_weights
        arguments |= {"images": list(inputs.images), "image_weights": None if weights is None else list(weights)}
    if inputs.image is not None:
        strength = 0.0 if drawing.task == "reconstruct" else drawing.strength
        arguments |= {"image": inputs.image, "strength": strength}
    if inputs.mask_image is not None:
        arguments["mask_image"] = inputs.mask_image
    return arguments


@contextmanager
def own_sampler(pipeline: Any, drawing: Drawing) -> Iterator[None]:
    """The drawing's sampler in both stages and its shift in Stage C, for the length of one call."""
    from stable_cascade import StableCascadeScheduler

    changes: dict[str, dict[str, Any]] = {"prior_scheduler": {}, "scheduler": {}}
    for one in changes.values():
        one |= {} if drawing.sampler is None else {"sampler": drawing.sampler}
    if drawing.shift is not None:
        changes["prior_scheduler"]["shift"] = drawing.shift
    before = {name: getattr(pipeline, name) for name in changes}
    try:
        for name, settings in changes.items():
            if settings:
                setattr(pipeline, name, StableCascadeScheduler.from_config(before[name].config, **settings))
        yield
    finally:
        for name, scheduler in before.items():
            setattr(pipeline, name, scheduler)


def callbacks(on_step: OnStep | None, previews: bool, drawing: Drawing) -> dict[str, Any]:
    """The pipeline's two callbacks that tell `on_step`."""
    if on_step is None:
        return {}
    share = 0.0 if drawing.task == "reconstruct" else 1.0 if drawing.strength is None else drawing.strength
    prior_steps = max(1, round(share * drawing.prior_num_inference_steps))

    def prior(pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        rough = None
        if previews and pipeline.previewer is not None:
            rough = pipeline.preview_images(tensors["clean"][:1])[0]
        on_step("prior", step + 1, prior_steps, rough)
        return {}

    def decoder(_pipeline: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        on_step("decoder", step + 1, drawing.num_inference_steps, None)
        return {}

    return {
        "prior_callback_on_step_end": prior,
        "prior_callback_on_step_end_tensor_inputs": ["clean"],
        "callback_on_step_end": decoder,
    }
