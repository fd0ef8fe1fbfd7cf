"""From the widgets' values to a drawing and back; everything is checked, because a browser can send anything."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from stable_cascade.drawing import ControlChoice, Drawing, InputFile, InputImages, LoraChoice
from stable_cascade.drawing.files import sha256_of
from stable_cascade.wording import brief, quoted

from .form import AUTOMATIC, LORAS, NONE, OWN_FILTER, REFERENCES, Form, chosen, name_of
from .uploads import drawn_mask

MOST_IMAGES = 16
LARGEST_RANDOM_SEED = 2**32
_PROMPTED = ("generate", "variation", "img2img", "inpaint", "control")
_SHARED = (
    "prior_num_inference_steps", "prior_guidance_scale", "num_inference_steps", "decoder_guidance_scale",
    "guidance_method", "guidance_rescale", "cache_interval", "negative_prompt", "weighted", "seed", "preview",
)  # fmt: skip
ReadImage = Callable[..., Image.Image]
"""(path, mode="RGB") -> image; mode None keeps its transparency."""


@dataclass(frozen=True)
class Wish:
    """What was asked for: a drawing, its images in memory, and how many."""

    drawing: Drawing
    images: InputImages
    count: int


@dataclass(frozen=True)
class Known:
    """What can be chosen: names and paths, and how an upload is read."""

    read: ReadImage
    loras: Mapping[str, Path] = field(default_factory=dict)
    controlnets: Mapping[str, Path] = field(default_factory=dict)
    filters: tuple[str, ...] = ()


def wish(form: Form, known: Known, make: Callable[..., Drawing] = Drawing) -> Wish:
    """The drawing that the widgets ask for.

    Args:
        make: settings -> drawing, with the model's own, which the page lets nobody change.

    Raises:
        ValueError: a value that means nothing, or an input that is missing, in one line.
    """
    # What every task has.
    task = form.task
    values: dict[str, Any] = {"task": task, "seed": whole("seed", form.seed)}
    values["prompt"] = "" if task == "reconstruct" else text("prompt", form.prompt)
    values["num_inference_steps"] = whole("steps of Stage B", form.num_inference_steps)
    values["decoder_guidance_scale"] = number("guidance of Stage B", form.decoder_guidance_scale)
    values["guidance_method"] = form.guidance_method
    values["guidance_rescale"] = number("guidance rescale", form.guidance_rescale)
    values["cache_interval"] = whole("cache interval", form.cache_interval)
    values |= {side: whole(side, getattr(form, side) or 0) or None for side in ("width", "height")}
    if task in _PROMPTED:
        values |= _sampling(form)
    # The inputs of this one, and the LoRAs.
    more, images = _INPUTS.get(task, _no_inputs)(form, known)
    count = whole("number of images", form.count)
    if not 1 <= count <= MOST_IMAGES:
        raise ValueError(f"number of images {count} is not a whole number from 1 to {MOST_IMAGES}")
    values["loras"] = () if task == "reconstruct" else loras(form, known)
    return Wish(make(**(values | more)), images, 1 if task == "reconstruct" else count)


def _sampling(form: Form) -> dict[str, Any]:
    """The settings of Stage C, which a reconstruction does not run."""
    return {
        "negative_prompt": text("negative prompt", form.negative_prompt),
        "weighted": bool(form.weighted),
        "prior_num_inference_steps": whole("steps of Stage C", form.prior_num_inference_steps),
        "prior_guidance_scale": number("guidance of Stage C", form.prior_guidance_scale),
        "guidance_interval": (number("guidance from", form.guidance_start), number("guidance to", form.guidance_end)),
        "sampler": None if form.sampler in (None, AUTOMATIC) else form.sampler,
        "shift": number("shift", form.shift or 0) or None,
        "preview": bool(form.preview),
    }


def loras(form: Form, known: Known) -> tuple[LoraChoice, ...]:
    """The chosen LoRAs and their weights."""
    names, weights = form.numbered("lora", LORAS), form.numbered("lora_weight", LORAS)
    paths = [chosen("LoRA", name, known.loras) for name in names]
    found = [
        LoraChoice(str(path), number(f"weight of LoRA {name}", weight))
        for path, name, weight in zip(paths, names, weights, strict=True)
        if path is not None
    ]
    return tuple(found)


def _no_inputs(form: Form, known: Known) -> tuple[dict[str, Any], InputImages]:
    return {}, InputImages()


def _image_to_image(form: Form, known: Known) -> tuple[dict[str, Any], InputImages]:
    image, file = upload("image-to-image", form.image, known)
    return {"strength": number("strength", form.strength), "image": file}, InputImages(image=image)


def _variation(form: Form, known: Known) -> tuple[dict[str, Any], InputImages]:
    paths, weights = form.numbered("reference", REFERENCES), form.numbered("reference_weight", REFERENCES)
    given = [(path, weight) for path, weight in zip(paths, weights, strict=True) if path]
    shown = [upload("variation", path, known) for path, _ in given or [(None, None)]]
    values = {
        "image_weights": tuple(number("weight of a reference image", weight) for _, weight in given),
        "images": tuple(file for _, file in shown),
    }
    return values, InputImages(images=tuple(image for image, _ in shown))


def _inpaint(form: Form, known: Known) -> tuple[dict[str, Any], InputImages]:
    image, mask = drawn_mask(form.edited, known.read)
    return {"strength": number("strength", form.inpaint_strength)}, InputImages(image=image, mask_image=mask)


def _control(form: Form, known: Known) -> tuple[dict[str, Any], InputImages]:
    path = chosen("ControlNet", form.controlnet, known.controlnets)
    if path is None:
        raise ValueError("control needs a ControlNet; choose one, or start the page with --controlnet FOLDER")
    image, file = upload("control", form.control_image, known)
    choice = ControlChoice(
        str(path),
        image=file,
        scale=number("control scale", form.control_scale),
        start=number("control from", form.control_start),
        end=number("control to", form.control_end),
        filtered=bool(form.control_filtered),
        filter=filter_name(form, known),
    )
    return {"controlnets": (choice,)}, InputImages(control_images=(image,))


def filter_name(form: Form, known: Known) -> str | None:
    """The chosen filter; None for the ControlNet's own.

    Raises:
        ValueError: one that is not offered. Any other name could name a class of any module.
    """
    name = form.control_filter
    if name in (None, "", OWN_FILTER):
        return None
    if name not in known.filters:
        raise ValueError(f"control filter {quoted(name)} is not one of {', '.join(known.filters)}")
    return name


def _reconstruction(form: Form, known: Known) -> tuple[dict[str, Any], InputImages]:
    image, file = upload("reconstruction", form.reconstructed, known)
    return {"image": file}, InputImages(image=image)


_INPUTS = {
    "img2img": _image_to_image,
    "variation": _variation,
    "inpaint": _inpaint,
    "control": _control,
    "reconstruct": _reconstruction,
}


def upload(task: str, path: Any, known: Known) -> tuple[Image.Image, InputFile]:
    """The uploaded image, and the name and sum by which a file of the same content can be recognised.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not path:
        raise ValueError(f"{task} needs an image; upload one")
    image = known.read(path)
    return image, InputFile(Path(path).name, sha256_of([Path(path)]))


def text(name: str, value: Any) -> str:
    """`value`, if it is text (None is the empty one)."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} {brief(value)} is not text")
    return value or ""


def number(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is no finite number, or an empty field.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or isinstance(value, bool):
        raise ValueError(f"{name} {_shown(value)} is not a number; type one, such as 1 or 0.5")
    return found


def whole(name: str, value: Any) -> int:
    """`value` as an int.

    Raises:
        ValueError: it is no whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):  # a float would round a seed above 2 ** 53
        return value
    found = number(name, value)
    if found != int(found):
        raise ValueError(f"{name} {_shown(value)} is not a whole number")
    return int(found)


def _shown(value: Any) -> str:
    return "is empty and" if value in (None, "") else repr(brief(value, 40))


def random_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(LARGEST_RANDOM_SEED)


def settings_of(drawing: Drawing, known: Known) -> tuple[dict[str, Any], list[str]]:
    """The widgets' values that ask for this drawing again, and what could not be restored.

    Input images are not among the values: a file that says where they lay is not to be trusted.
    """
    # Settings that have one widget.
    values = {name: getattr(drawing, name) for name in _SHARED}
    values |= {
        "task": drawing.task,
        "prompt": drawing.prompt,
        "width": drawing.width or 0,
        "height": drawing.height or 0,
        "new_seed": False,
        "count": 1,
        "guidance_start": drawing.guidance_interval[0],
        "guidance_end": drawing.guidance_interval[1],
        "sampler": drawing.sampler or AUTOMATIC,
        "shift": drawing.shift or 0,
    }
    # Settings that depend on the task, and files that must be there again.
    if drawing.strength is not None:
        values["inpaint_strength" if drawing.task == "inpaint" else "strength"] = drawing.strength
    for place, weight in enumerate((drawing.image_weights or ())[:REFERENCES], start=1):
        values[f"reference_weight_{place}"] = weight
    lora_values, missing = _loras_back(drawing, known)
    control_values, more = _control_back(drawing, known)
    if drawing.guide_prior is not None:
        more = [*more, f"guide_prior {Path(drawing.guide_prior).name} is no setting of this page"]
    return values | lora_values | control_values, missing + more


def _loras_back(drawing: Drawing, known: Known) -> tuple[dict[str, Any], list[str]]:
    names = [(name_of(lora.path, known.loras), lora) for lora in drawing.loras]
    missing = [f"LoRA {Path(lora.path).name} is not in --lora-dir" for name, lora in names if name is None]
    found = [(name, lora.weight) for name, lora in names if name is not None]
    missing += [f"LoRA {name} has no place left" for name, _ in found[LORAS:]]
    found = [*found[:LORAS], *[(NONE, 1.0)] * LORAS][:LORAS]
    values: dict[str, Any] = {f"lora_{place}": name for place, (name, _) in enumerate(found, start=1)}
    return values | {f"lora_weight_{place}": weight for place, (_, weight) in enumerate(found, start=1)}, missing


def _control_back(drawing: Drawing, known: Known) -> tuple[dict[str, Any], list[str]]:
    if not drawing.controlnets:
        return {}, []
    choice = drawing.controlnets[0]
    name = name_of(choice.path, known.controlnets)
    missing = [] if name else [f"ControlNet {Path(choice.path).name} is not among --controlnet"]
    missing += [f"ControlNet {Path(other.path).name} has no place left" for other in drawing.controlnets[1:]]
    values = {
        "controlnet": name or NONE,
        "control_filter": choice.filter if choice.filter in known.filters else OWN_FILTER,
        "control_filtered": choice.filtered,
        "control_scale": choice.scale,
        "control_start": choice.start,
        "control_end": choice.end,
    }
    return values, missing


def described(drawing: Drawing) -> str:
    """One line under an image: what tells it from its neighbours."""
    words = brief(drawing.prompt, 60) or {"reconstruct": "reconstruction"}.get(drawing.task, "no words")
    return f"{words} · seed {drawing.seed}"
