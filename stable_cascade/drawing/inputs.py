"""The input images of a drawing: read, checked, and brought to the size that is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from stable_cascade.controls import InpaintFilter, filter_names, make_filter, view_control
from stable_cascade.disk import local_path
from stable_cascade.files.controlnet import read_description, read_shapes
from stable_cascade.files.headers import file_type, read_header
from stable_cascade.files.json_files import read_json
from stable_cascade.pipelines.call import to_images, to_pixels
from stable_cascade.pipelines.source import outpaint
from stable_cascade.wording import brief, quoted

from .files import controlnet_folder, in_mode, is_hub_name, read_image
from .request import LARGEST_SIDE, SMALLEST_SIDE, STRENGTHS, ControlChoice, Drawing, InputFile

_FROM_IMAGE = ("img2img", "inpaint", "reconstruct")
_WITH_REFERENCES = ("variation", "img2img", "inpaint", "control")


@dataclass(frozen=True)
class InputImages:
    """Input images in memory; None or empty where the drawing's files are meant.

    `mask_image` is white where to repaint. `control_images` has one entry per ControlNet of the drawing, a photo for
    its filter (or what its filter made, where the choice says `filtered`; a tensor (c, h, w) is always that), or None
    for the choice's own file.
    """

    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    images: tuple[Image.Image, ...] = ()
    control_images: tuple[Any, ...] = ()

    def names(self) -> tuple[str, ...]:
        """What is in memory, as `files.with_sums` names it."""
        controls = [f"control_images[{place}]" for place, one in enumerate(self.control_images) if one is not None]
        single = [name for name in ("image", "mask_image") if getattr(self, name) is not None]
        return (*single, *(["images"] if self.images else []), *controls)


@dataclass(frozen=True)
class Inputs:
    """A drawing's images, all of them in memory, and its ControlNets as their files describe them.

    A control image that is None is `image`, on its canvas where it is outpainted.
    """

    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    images: tuple[Image.Image, ...] = ()
    control_images: tuple[Any, ...] = ()
    controls: tuple[ControlSource, ...] = ()


def check_task(drawing: Drawing, in_memory: InputImages) -> None:
    """Passes when a task has what it needs and nothing that it would ignore.

    Raises:
        ValueError: naming what is missing or in vain.
    """
    # What the task needs.
    task = drawing.task
    image = drawing.image is not None or in_memory.image is not None
    mask = drawing.mask_image is not None or in_memory.mask_image is not None
    references = max(len(drawing.images), len(in_memory.images))
    if task in _FROM_IMAGE and not image:
        raise ValueError(f"task {task} needs an image and none is known; give image")
    if task == "inpaint" and not mask and drawing.outpaint is None:
        raise ValueError("task inpaint needs a mask, white where to repaint; give mask_image, or outpaint")
    if task == "inpaint" and mask and drawing.outpaint is not None:
        raise ValueError("mask_image and outpaint are both given; outpaint makes its own mask, give one of them")
    if task == "variation" and not references:
        raise ValueError("task variation needs reference images; give images")
    if task == "control" and not drawing.controlnets:
        raise ValueError("task control needs a ControlNet; give controlnets")
    # What it would ignore.
    in_vain = {
        "image": image and task not in _FROM_IMAGE,
        "mask_image": mask and task != "inpaint",
        "outpaint": drawing.outpaint is not None and task != "inpaint",
        "strength": drawing.strength is not None and task not in STRENGTHS,
        "images": references > 0 and task not in _WITH_REFERENCES,
        "image_weights": drawing.image_weights is not None and not references,
        "controlnets": bool(drawing.controlnets) and task not in ("control", "img2img", "inpaint", "variation"),
    }
    for name, given in in_vain.items():
        if given:
            raise ValueError(f"task {task} takes no {name}; leave it away or choose another task")
    # Lists that go together.
    if drawing.image_weights is not None and len(drawing.image_weights) != references:
        raise ValueError(f"image_weights has {len(drawing.image_weights)} entries for {references} reference images")
    if len(in_memory.control_images) > len(drawing.controlnets):
        raise ValueError(
            f"control_images has {len(in_memory.control_images)} images for {len(drawing.controlnets)} ControlNets"
        )


def read_inputs(drawing: Drawing, in_memory: InputImages) -> Inputs:
    """Every input image, decoded, and every ControlNet's description.

    Raises:
        ValueError: an image is missing, damaged or too large, or does not fit its ControlNet.
    """
    # Image, mask and references.
    image, mask = _read(drawing.image, in_memory.image), _read(drawing.mask_image, in_memory.mask_image, "L", "black")
    if image is not None and mask is not None and mask.size != image.size:
        raise ValueError(
            f"mask_image is {mask.width} x {mask.height} and image {image.width} x {image.height}; "
            "make a mask of the image's size"
        )
    images = [in_mode(one) for one in in_memory.images] or [read_image(file.path) for file in drawing.images]
    # Each ControlNet looks at its own image, or at the drawing's.
    own_controls = (*in_memory.control_images, *[None] * len(drawing.controlnets))
    controls, shown = [], []
    for choice, given in zip(drawing.controlnets, own_controls, strict=False):
        source = control_source(choice)
        mode = None if choice.filtered else "RGB"
        own = given if isinstance(given, Tensor) else _read(choice.image, given, mode)
        seen = image if own is None and not choice.filtered else own
        if seen is None:
            raise ValueError(f"controlnet {quoted(choice.path)} has no image to look at; give it one")
        check_control(choice, source, seen)
        controls.append(source)
        shown.append(own)
    return Inputs(image, mask, tuple(images), tuple(shown), tuple(controls))


def sized(drawing: Drawing, inputs: Inputs, side: int) -> Drawing:
    """The drawing with height and width, and its task's strength.

    Where no size is given it is the input image's, in multiples of 8, shrunk to the area that the model was trained
    on; without an input image a square of `side`. With one side given the other follows from the image's shape.

    Raises:
        ValueError: what is to be outpainted leaves no room for the image.
    """
    # Without the margins that are added around the image.
    left, top, right, bottom = drawing.outpaint or (0, 0, 0, 0)
    controlled = next((one for one in inputs.control_images if isinstance(one, Image.Image)), None)
    image = inputs.image if inputs.image is not None else controlled
    if (left + right) % 8 or (top + bottom) % 8:
        raise ValueError(
            f"outpaint {left},{top},{right},{bottom}: left + right and top + bottom must be multiples of 8"
        )
    height = None if drawing.height is None else drawing.height - top - bottom
    width = None if drawing.width is None else drawing.width - left - right
    if min(height or SMALLEST_SIDE, width or SMALLEST_SIDE) < 8:
        raise ValueError(
            f"outpaint {left},{top},{right},{bottom} leaves nothing of an image of {drawing.width} x "
            f"{drawing.height}; draw a larger one"
        )
    # A side that is not given follows from the image's shape.
    if image is None:
        height, width = height or side, width or side
    else:
        height, width = _fitting(image.size, height, width, side)
    strength = STRENGTHS.get(drawing.task) if drawing.strength is None else drawing.strength
    return replace(drawing, height=height + top + bottom, width=width + left + right, strength=strength)


def fitted(drawing: Drawing, inputs: Inputs, control_size: tuple[int, int]) -> Inputs:
    """The images at the size that is drawn: cut at the middle where their shape differs, then resized.

    What is outpainted is put on its canvas, with the mask of what is new. ControlNets look at (height, width)
    `control_size`; what is inpainted is hidden from them as well.
    """
    assert drawing.height is not None
    assert drawing.width is not None
    left, top, right, bottom = drawing.outpaint or (0, 0, 0, 0)
    size = (drawing.width - left - right, drawing.height - top - bottom)
    image, mask = _fit(inputs.image, size), _fit(inputs.mask_image, size)
    if drawing.outpaint is not None:
        image, mask = outpaint(image, *drawing.outpaint)
    controls = [_fit(image if one is None else one, control_size[::-1]) for one in inputs.control_images]
    return replace(inputs, image=image, mask_image=mask, control_images=tuple(controls))


def _read(
    file: InputFile | None, given: Image.Image | None, mode: str | None = "RGB", paper: str = "white"
) -> Image.Image | None:
    if given is not None:
        return in_mode(given, mode, paper)
    return None if file is None else read_image(file.path, mode=mode, paper=paper)


def _fit(image: Any, size: Sequence[int]) -> Any:
    """The image cut at the middle to the shape of `size` and resized; a few pixels too many are only cut off."""
    if not isinstance(image, Image.Image) or image.size == tuple(size):
        return image
    over = [own - wanted for own, wanted in zip(image.size, size, strict=True)]
    if all(0 <= pixels < 8 for pixels in over):
        left, top = over[0] // 2, over[1] // 2
        return image.crop((left, top, left + size[0], top + size[1]))
    # Four channels are a control image, an image and a mask: Pillow would take the mask for transparency.
    method = Image.Resampling.NEAREST if image.mode == "RGBA" else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (size[0], size[1]), method)


def _fitting(size: Sequence[int], height: int | None, width: int | None, side: int) -> tuple[int, int]:
    """Height and width for an image of this size, in multiples of 8."""
    wide, high = size
    if height is not None and width is not None:
        return height, width
    if height is not None:
        scale = height / high
    elif width is not None:
        scale = width / wide
    else:
        scale = max(min(1.0, side / math.sqrt(wide * high)), SMALLEST_SIDE / min(wide, high))
        if scale == 1:
            return high // 8 * 8, wide // 8 * 8
    return height or _side(high * scale), width or _side(wide * scale)


def _side(pixels: float) -> int:
    return min(max(SMALLEST_SIDE, round(pixels / 8) * 8), LARGEST_SIDE)


# Images whose channels are a control image's; other numbers of channels are no image.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ControlSource:
    """A ControlNet before it is loaded: where it is, its control image's channels, and its filter.

    `channels` and `filter` are None where the files do not say.
    """

    place: Path
    channels: int | None
    filter: str | None
    params: Mapping[str, Any]


def control_source(choice: ControlChoice) -> ControlSource:
    """What a ControlNet's files say, without their weights; a name on the Hub is downloaded.

    Raises:
        ValueError: they are no ControlNet's, or name a filter that is not one of `controls.filter_names()`.
    """
    place = _local(choice.path)
    if place.is_dir():
        place = controlnet_folder(place)
    elif file_type(place) == "safetensors":
        read_header(place)
    known = read_description(place)
    name, params = choice.filter or known.get("filter"), known.get("filter_params") or {}
    if choice.filter is not None and choice.filter != known.get("filter"):
        params = {}
    if name is not None:
        _check_known(choice.path, name, params)
    return ControlSource(place, _channels(place, known), name, params)


def check_control(choice: ControlChoice, source: ControlSource, image: Any) -> None:
    """Passes when the ControlNet can be shown this image.

    Raises:
        ValueError: nothing says which filter makes its control image, or a control image has other channels.
    """
    # A photo needs a filter.
    if isinstance(image, Tensor):
        return
    if not choice.filtered:
        if source.filter is None:
            raise ValueError(
                f"controlnet {quoted(choice.path)} does not say which filter made its control images; name it with "
                "--filter, or give a control image with --filtered"
            )
        return
    # A control image needs the channels of the network; grey may be stored as colour.
    found = {"L": 1, "1": 1, "RGB": 3, "RGBA": 4}.get(image.mode, 3)
    wanted = source.channels if source.channels is not None else found
    if wanted not in _MODES:
        raise ValueError(
            f"controlnet {quoted(choice.path)} takes control images of {wanted} channels, which no image file has; "
            "give a photo without --filtered"
        )
    if found != wanted and not (wanted == 1 and found == 3 and _is_grey(image)):
        raise ValueError(
            f"control image for {quoted(choice.path)} has {found} channels, its ControlNet takes {wanted}; "
            "give a photo without --filtered, or a control image that its filter made"
        )


def make_control_image(
    choice: ControlChoice,
    source: ControlSource,
    image: Any,
    *,
    mask: Image.Image | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The control image of an image that has the size of what is drawn.

    Args:
        mask: white where to repaint; an inpainting filter hides that area instead of one it chooses.
        encode: pixels in [0, 1] to semantic latents, for filters that encode.

    Shapes: -> (1, c, h, w) float32.

    Raises:
        ValueError: the filter refuses the image or lacks a package.
    """
    if isinstance(image, Tensor):
        return image[None] if image.ndim == 3 else image
    if choice.filtered:
        mode = _MODES[source.channels] if source.channels is not None else image.mode
        return _tensor(image.convert(mode))
    assert source.filter is not None
    control_filter = make_filter(source.filter, source.params, encode=encode)
    pixels = to_pixels(image)
    if isinstance(control_filter, InpaintFilter) and mask is not None:
        mask = mask.convert("L").resize(image.size)
        return control_filter(pixels, masks=_tensor(mask))
    return control_filter(pixels, None)


def control_view(control: Tensor) -> Image.Image:
    """A control image as people see it."""
    return to_images(view_control(control), "pil")[0]


def load_controlnet(choice: ControlChoice, source: ControlSource, dtype: torch.dtype) -> Any:
    """The network.

    Raises:
        ValueError: the files are no ControlNet's.
    """
    from stable_cascade import StableCascadeControlNet

    try:
        if source.place.is_file():
            return StableCascadeControlNet.from_single_file(source.place, torch_dtype=dtype).eval()
        return StableCascadeControlNet.from_pretrained(source.place, torch_dtype=dtype).eval()
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(f"controlnet {quoted(choice.path)} cannot be loaded: {brief(error)}") from None


def _local(path: str) -> Path:
    if not is_hub_name(path):
        return local_path(path)
    from stable_cascade.pipelines.layout import hub_folder

    return hub_folder(path, (), None, {}, ("*.json", "*.safetensors"))


def _channels(place: Path, known: Mapping[str, Any]) -> int | None:
    config = read_json(place / "config.json") if place.is_dir() else known.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(
            f"controlnet {quoted(place)}: its description has a config that is no object; export it again"
        )
    channels = config.get("in_channels")
    if channels is None and place.suffix == ".safetensors":
        stem = [
            shape for name, shape in read_shapes(place).items() if name.startswith("backbone.") and len(shape) == 4
        ]
        channels = stem[0][1] if stem else None
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise ValueError(f"controlnet {quoted(place)}: in_channels is {brief(repr(channels), 40)}; expected a number")
    return channels


def _check_known(path: str, name: Any, params: Any) -> None:
    """Only filters that are installed: a file from anywhere must not name code to import."""
    names = filter_names()
    if name not in names:
        raise ValueError(
            f"controlnet {quoted(path)} wants the filter {brief(repr(name), 60)}, which is not one of "
            f"{', '.join(names)}; make the control image yourself and give it with --filtered"
        )
    if not isinstance(params, Mapping) or _names_code(params):
        raise ValueError(
            f"controlnet {quoted(path)}: its filter_params name code to import, which a file may not; make the "
            "control image yourself and give it with --filtered"
        )


def _names_code(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_names_code(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(_names_code(one) for one in value)
    return isinstance(value, str) and ":" in value


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (channel.tobytes() for channel in image.convert("RGB").split())
    return red == green == blue


def _tensor(image: Image.Image) -> Tensor:
    """Shapes: -> (1, bands, H, W) float32 in [0, 1]."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    width, height = image.size
    return levels.view(1, height, width, -1).permute(0, 3, 1, 2).float() / 255
