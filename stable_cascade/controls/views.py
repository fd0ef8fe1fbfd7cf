"""RGB images of control images, for previews."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
