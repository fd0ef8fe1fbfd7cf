"""Control images and the ControlNets that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stable_cascade.models.controlnet import StableCascadeControlNet, StableCascadeMultiControlNet

from .call import from_array, is_number
from .sampling import Control

PIL_MODES = {1: ("L", "1"), 3: ("RGB",), 4: ("RGBA",)}


@dataclass(frozen=True)
class ControlInput:
    """What one ControlNet is given. Shapes: image (n, c, H, W), for n times `copies` images to draw."""

    image: Tensor
    copies: int
    scale: float
    start: float
    end: float


def as_component(controlnet: Any) -> Any:
    """Several ControlNets as one component of a pipeline; one, or none, as it is."""
    return StableCascadeMultiControlNet(controlnet) if isinstance(controlnet, list | tuple) else controlnet


def read_control(pipeline: Any, images: Any, scale: Any, start: Any, end: Any, *, count: int) -> list[ControlInput]:
    """What a call says about the pipeline's ControlNets, checked; nothing where it has no control image.

    Args:
        images: of one ControlNet one image, a list or a batch; of several a list with that of each.
        scale, start, end: one for all ControlNets, or one for each.
        count: images to draw.

    Raises:
        ValueError: no ControlNet, one of another prior, images of other channels or another number, a list of another
            length, or start and end that leave no part of the run.
    """
    # One entry per ControlNet.
    if images is None:
        return []
    controlnet, width = pipeline.controlnet, pipeline.prior.config.block_out_channels[0]
    if controlnet is None:
        raise ValueError("control_image needs a controlnet, and this pipeline has none; load it with controlnet=…")
    several = isinstance(controlnet, StableCascadeMultiControlNet)
    nets: list[Any] = list(controlnet.nets) if several else [controlnet]
    if several and (not isinstance(images, list | tuple) or len(images) != len(nets)):
        given = f"{len(images)} entries" if isinstance(images, list | tuple) else "no list"
        raise ValueError(f"control_image has {given} for {len(nets)} ControlNets; give a list with one entry for each")
    per_net = images if several else [images]
    # Scale and interval for each.
    scales = _for_each(scale, len(nets), "controlnet_conditioning_scale")
    starts, ends = (_for_each(value, len(nets), f"control_guidance_{name}")
                    for name, value in (("start", start), ("end", end)))  # fmt: skip
    # Each must fit the prior, and its images the call.
    inputs = []
    for number, net in enumerate(nets):
        name = f"control_image {number}" if several else "control_image"
        if net.config.projection_channels != width:
            made_for = net.config.projection_channels
            raise ValueError(
                f"controlnet is for a prior {made_for} wide, this one is {width} wide; load one trained for it"
            )
        if not 0 <= starts[number] < ends[number] <= 1:
            pair = f"control_guidance_start {starts[number]:g} and control_guidance_end {ends[number]:g}"
            raise ValueError(f"{pair} need 0 <= start < end <= 1; 0 and 1 are the whole run")
        image = _control_images(per_net[number], net, name)
        if not len(image) or count % len(image):
            raise ValueError(f"{name} has {len(image)} rows for {count} images; give 1, or one per prompt or image")
        inputs.append(ControlInput(image, count // len(image), scales[number], starts[number], ends[number]))
    return inputs


def run_control(
    controlnet: Any, inputs: Sequence[ControlInput], seen: tuple[int, int], size: tuple[int, int], device: torch.device
) -> list[Control]:
    """Each ControlNet's residuals, scaled, a row for each image to draw.

    Args:
        seen: sides at which a strided ControlNet has seen control images in training; others are resized to it.
        size: of the grid on which residuals of different sizes meet.
    """
    if not inputs:
        return []
    several = isinstance(controlnet, StableCascadeMultiControlNet)
    nets = list(controlnet.nets) if several else [controlnet]
    images = [_as_seen(one.image.to(device), net, seen) for one, net in zip(inputs, nets, strict=True)]
    maps = controlnet(images) if several else [controlnet(images[0])]
    found = {tuple(one.shape[-2:]) for residuals in maps for one in residuals if one is not None}
    grid = None if len(found) == 1 else size
    return [
        Control([None if row is None else _scaled(row, one, grid) for row in residuals], one.start, one.end)
        for one, residuals in zip(inputs, maps, strict=True)
    ]


def _as_seen(image: Tensor, net: StableCascadeControlNet, seen: tuple[int, int]) -> Tensor:
    """The control image at its size in training; a ControlNet that keeps the size of its input gets it as it is."""
    if net.config.bottleneck != "effnet" or tuple(image.shape[-2:]) == seen:
        return image
    return F.interpolate(image, size=seen, mode="bilinear", antialias=True, align_corners=False)


def _scaled(residual: Tensor, one: ControlInput, grid: tuple[int, int] | None) -> Tensor:
    """One row per image, on a grid where the residuals of several ControlNets meet, resized as the prior would."""
    if grid is not None:
        residual = F.interpolate(residual.float(), size=grid, mode="bilinear", align_corners=True)
    return one.scale * residual.repeat_interleave(one.copies, dim=0)


def _for_each(value: Any, count: int, name: str) -> list[float]:
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} ControlNets; give one number, or one for each")
    for one in values:
        if not is_number(one):
            raise ValueError(f"{name} {one!r} is no finite number; 1 is as trained")
    return [float(one) for one in values]


def _control_images(images: Any, net: StableCascadeControlNet, name: str) -> Tensor:
    """Shapes: -> (n, c, H, W) float32."""
    channels = net.config.in_channels
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        images = list(images)
    images = list(images) if isinstance(images, list | tuple) else [images]
    if not images:
        raise ValueError(f"{name} is empty; give at least one image")
    read = [_control_image(image, channels, name) for image in images]
    sizes = {tuple(image.shape[-2:]) for image in read}
    if len(sizes) > 1:
        raise ValueError(f"{name} has different sizes {sorted(sizes)}; make them one size")
    batch = torch.stack(read)
    if not batch.numel() or not batch.isfinite().all():
        raise ValueError(f"{name} has no pixels, or values that are not finite; look at what the filter made")
    return batch


def _control_image(image: Any, channels: int, name: str) -> Tensor:
    """Shapes: -> (c, H, W) float32."""
    # Files and arrays as tensors; their channels must be those of the ControlNet.
    if isinstance(image, Image.Image):
        if image.mode not in PIL_MODES.get(channels, ()):
            modes = " or ".join(PIL_MODES.get(channels, ("a tensor",)))
            found = len(image.getbands())
            raise ValueError(
                f"{name} has {found} channels (PIL mode {image.mode}), the ControlNet takes {channels}: {modes}; "
                "give what the filter of its training makes"
            )
        image = np.asarray(image.convert("L") if image.mode == "1" else image)
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.dtype.kind in "buf":
        image = from_array(image if image.ndim == 3 else image[..., None])
    # Tensors with or without a channel axis.
    if not isinstance(image, Tensor) or image.ndim not in (2, 3) or image.is_complex():
        what = f"{type(image).__name__} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"{name} holds {what}; give PIL images, arrays (H, W, c) or tensors (c, H, W)")
    image = image[None] if image.ndim == 2 else image
    if len(image) != channels:
        raise ValueError(
            f"{name} has {len(image)} channels, the ControlNet takes {channels}; "
            "give what the filter of its training makes"
        )
    return image.float()
