"""Control images of a drawing: what each ControlNet's own filter makes of the image it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stable_cascade.controls import InpaintFilter, filter_names, make_filter, view_control
from stable_cascade.disk import local_path
from stable_cascade.files.controlnet import read_description, read_shapes
from stable_cascade.files.headers import file_type, read_header
from stable_cascade.files.json_files import read_json
from stable_cascade.pipelines.outputs import to_images, to_pixels
from stable_cascade.wording import brief, quoted

from .files import controlnet_folder, is_hub_name
from .request import ControlChoice

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
        ValueError: nothing says how a control image is made of it, or a control image has other channels.
    """
    if isinstance(image, Tensor):
        return
    if not choice.filtered:
        if source.filter is None:
            raise ValueError(
                f"controlnet {quoted(choice.path)} does not say which filter made its control images; name it with "
                "--filter, or give a control image with --filtered"
            )
        return
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
    from stable_cascade.pipelines.hub import hub_folder

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
