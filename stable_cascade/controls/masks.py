"""Masks for inpainting: what is salient in an image, boxes, and strokes. 1 is what the prior has to paint."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .arguments import draw_uniform, needed_module
from .kernels import gaussian_blur, resized

SALIENCY_SIDE = 240
# The original blurs masks of 768 pixels with 141 taps, whose sigma is 21.5: this share of the shorter side.
SMOOTHING = 0.028


def salient_mask(image: Tensor, threshold: float) -> Tensor:
    """1 where the image is more salient than `threshold`, with a smooth outline.

    Shapes: (3, H, W) in [0, 1] -> (1, H, W) of 0 and 1.

    Source: Montabone & Soto 2010 (fine-grained saliency), as OpenCV computes it, blurred to areas and squared, so
        that thresholds from 0.04 to 0.4 cover from about two thirds of an image down to a tenth. The original
        asks a small network for its saliency.
    """
    height, width = image.shape[-2:]
    mask = (resized(saliency(image), (height, width)) > threshold).float()
    return (gaussian_blur(mask, SMOOTHING * min(height, width)) > 0.5).float()


def saliency(image: Tensor) -> Tensor:
    """How salient each place is; all zeros for an even image.

    Shapes: (3, H, W) -> (1, h, w) in [0, 1], the shorter side 240.

    Raises:
        ValueError: OpenCV is missing, or lacks its saliency module.
    """
    remedy = "pip install 'stable-cascade[controls]', or p_saliency: 0 in controlnet_filter_params, or give masks"
    cv2 = needed_module("cv2", "InpaintFilter", remedy)
    if not hasattr(cv2, "saliency"):
        raise ValueError(f"InpaintFilter needs cv2.saliency, of opencv-contrib-python-headless; {remedy}")
    scale = SALIENCY_SIDE / min(image.shape[-2:])
    size = (round(image.shape[-2] * scale), round(image.shape[-1] * scale))
    small = resized(image, size, antialias=True).clamp(0, 1)
    levels = (small * 255).round().byte().flip(0).permute(1, 2, 0).contiguous().numpy()
    found, values = cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(levels)
    if not found:
        raise RuntimeError("OpenCV found no saliency map")  # not a matter of the image: an even one has zeros
    smooth = gaussian_blur(torch.from_numpy(values).float()[None], SALIENCY_SIDE / 24)
    low, high = float(smooth.min()), float(smooth.max())
    return ((smooth - low) / (high - low)).square() if high - low > 1e-3 else torch.zeros_like(smooth)


def box_mask(height: int, width: int, generator: Generator | None) -> Tensor:
    """1 in a box, each side from 1/4 to 3/4 of the image's; without a generator half of it, in the middle.

    Shapes: -> (1, height, width) of 0 and 1.
    """
    mask = torch.zeros(1, height, width)
    sides = [max(1, round(side * draw_uniform(0.25, 0.75, generator))) for side in (height, width)]
    top = int(draw_uniform(0, height - sides[0] + 1, generator))
    left = int(draw_uniform(0, width - sides[1] + 1, generator))
    mask[:, top : top + sides[0], left : left + sides[1]] = 1
    return mask


def stroke_mask(height: int, width: int, generator: Generator | None) -> Tensor:
    """1 under one to four brush strokes, bent lines 6 to 20 % of the shorter side thick.

    Shapes: -> (1, height, width) of 0 and 1.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    shorter = min(height, width)
    for _ in range(1 + int(draw_uniform(0, 4, generator))):
        thickness = max(1, round(shorter * draw_uniform(0.06, 0.2, generator)))
        points = _bent_line(height, width, generator)
        draw.line(points, fill=1, width=thickness)
        for x, y in points:  # round ends and joints
            radius = thickness / 2
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return torch.from_numpy(np.array(canvas)).float()[None]


def _bent_line(height: int, width: int, generator: Generator | None) -> list[tuple[float, float]]:
    """Three to seven points, each up to a third of the shorter side from the one before."""
    reach = min(height, width) / 3
    x, y = draw_uniform(0, width, generator), draw_uniform(0, height, generator)
    points = [(x, y)]
    for _ in range(2 + int(draw_uniform(0, 5, generator))):
        x = min(max(x + draw_uniform(-reach, reach, generator), 0.0), float(width))
        y = min(max(y + draw_uniform(-reach, reach, generator), 0.0), float(height))
        points.append((x, y))
    return points
