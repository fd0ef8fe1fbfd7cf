"""Filters by name: built in, from an installed package's entry points, or `package.module:Class`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from .arguments import constructed, load_class

ENTRY_POINTS = "stable_cascade.controls"
KEY = "controlnet_filter"

# Name in a config -> module and class.
BUILT_IN = {
    "CannyFilter": ("edges", "CannyFilter"),
    "InpaintFilter": ("inpainting", "InpaintFilter"),
    "IdentityFilter": ("identity", "IdentityFilter"),
    "SREffnetFilter": ("super_resolution", "SREffnetFilter"),
    "SRPixelFilter": ("super_resolution", "SRPixelFilter"),
    "SRFilter": ("super_resolution", "SRPixelFilter"),  # the original's name
    "SoftEdgeFilter": ("edges", "SoftEdgeFilter"),
    "QRFilter": ("qr", "QRFilter"),
    "ControlNetAuxFilter": ("auxiliary", "ControlNetAuxFilter"),
}


class ControlFilter(Protocol):
    """What makes a control image of an image."""

    channels: int

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, channels, h, w) float32 on the same device.

        A sample's result depends on its image and its generator alone; None is deterministic.
        """
        ...


def make_filter(
    name: str, params: Mapping[str, Any] | None = None, *, encode: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """The filter, made with `params`; cheap: packages and weights that it needs are loaded on its first call.

    Args:
        name: one of `filter_names()`, or "package.module:Class".
        params: keyword arguments of its constructor.
        encode: pixels in [0, 1] -> semantic latents, for filters whose constructor has the keyword `encode`.

    Raises:
        ValueError: an unknown name or parameter, a refused value, or a class that is no filter.
    """
    if name == "PidiFilter":  # the original's; its network ships in no package
        raise ValueError(
            f"{KEY} 'PidiFilter' is not built in; use SoftEdgeFilter, or ControlNetAuxFilter with PidiNet"
        )
    found = _entry_points()
    known: dict[str, Any] = {**found, **BUILT_IN}
    place = load_class(KEY, name, known)
    if isinstance(place, EntryPoint):
        place = _from_entry_point(place)
    elif isinstance(place, tuple):
        place = getattr(importlib.import_module(f"{__package__}.{place[0]}"), place[1])
    return _checked(constructed(place, params, f"{KEY}_params", encode=encode), name)


def filter_names() -> list[str]:
    """The names a config can give: the built-in ones, then those of installed packages."""
    return [*BUILT_IN, *sorted(set(_entry_points()) - set(BUILT_IN))]


def check_filter(control_filter: Any, *, size: int = 64, device: torch.device | str = "cpu") -> tuple[int, int]:
    """The size (h, w) of the control image of a grey image: a trial call, before anything expensive starts.

    What the filter needs (packages, an encoder) is loaded by it.

    Raises:
        ValueError: the call fails, or its result is no control image of `channels` channels.
    """
    name = type(control_filter).__name__
    pixels = torch.full((1, 3, size, size), 0.5, device=device)
    try:
        control = control_filter(pixels, None)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{KEY} {name} failed on a grey image: {type(error).__name__}: {error}") from error
    expected = f"(1, {control_filter.channels}, h, w) of floats"
    if not isinstance(control, Tensor) or control.ndim != 4 or not control.is_floating_point():
        seen = f"{tuple(control.shape)} {control.dtype}" if isinstance(control, Tensor) else type(control).__name__
        raise ValueError(f"{KEY} {name} gave {seen}; expected {expected}")
    if control.shape[:2] != (1, control_filter.channels):
        raise ValueError(f"{KEY} {name} gave {tuple(control.shape)}; expected {expected}")
    return int(control.shape[2]), int(control.shape[3])


def _entry_points() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed package; a built-in name stays the built-in filter."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in found and found[entry.name].value != entry.value:
            raise ValueError(
                f"{KEY} {entry.name!r} is registered twice: {found[entry.name].value} and {entry.value}; "
                "uninstall one of the two packages"
            )
        found[entry.name] = entry
    return found


def _from_entry_point(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{KEY} {entry.name!r}: its entry point {entry.value!r} cannot be loaded ({error})"
        ) from error


def _checked(control_filter: Any, name: str) -> Any:
    channels = getattr(control_filter, "channels", None)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"{KEY} {name!r} has channels {channels!r}; set `channels`, the control image's, from 1 up")
    if not callable(control_filter):
        raise ValueError(f"{KEY} {name!r} cannot be called; define __call__(self, pixels, generators=None)")
    return control_filter


MASK_COLOUR = (0.85, 0.2, 0.55)


def view_control(control: Tensor) -> Tensor:
    """An image of any control image.

    One channel is grey, three are RGB. Four are an image and a mask, whose area is tinted. Others, latents and
    vectors of faces, are projected on three colours, grey where they are zero, each image with its own scale.

    Shapes: (B, C, h, w) -> (B, 3, h, w) float32 in [0, 1].

    Raises:
        ValueError: `control` is no batch of control images.
    """
    if control.ndim != 4 or control.shape[1] < 1:
        raise ValueError(f"control has shape {tuple(control.shape)}; expected (batch, channels, height, width)")
    control = control.detach().float()
    channels = control.shape[1]
    if channels == 1:
        return control.clamp(0, 1).expand(-1, 3, -1, -1)
    if channels == 3:
        return control.clamp(0, 1)
    if channels == 4:
        return _tinted(control)
    return _projected(control)


def _tinted(control: Tensor) -> Tensor:
    mask = control[:, 3:].clamp(0, 1)
    colour = torch.tensor(MASK_COLOUR, device=control.device).view(1, 3, 1, 1)
    return (control[:, :3] * (1 - 0.6 * mask) + 0.6 * mask * colour).clamp(0, 1)


def _projected(control: Tensor) -> Tensor:
    """Three waves over the channels, an orthogonal cosine basis; the strongest value is full colour."""
    places = (torch.arange(control.shape[1], device=control.device) + 0.5) * (math.pi / control.shape[1])
    waves = torch.stack([(places * frequency).cos() for frequency in (1, 2, 3)])
    values = torch.einsum("kc,bchw->bkhw", waves, control)
    strongest = values.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-8)
    return 0.5 + 0.5 * values / strongest
