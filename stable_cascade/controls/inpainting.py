"""An image with an area left white as control image: for inpainting and outpainting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .arguments import (
    checked_pixels,
    checked_probability,
    checked_range,
    draw_chance,
    draw_uniform,
    needed_module,
    per_sample,
)
from .kernels import gaussian_blur, resized

DEFAULT_THRESHOLD = (0.04, 0.4)


class InpaintFilter:
    """The image, white where it has to be painted, and the mask of that area as fourth channel.

    Masks in training: the salient part of the image, strokes, or boxes. With probability `p_outpaint` the rest is
    masked instead (of the salient part or a box; strokes are never inverted). The original knows salient parts alone:
    `p_saliency=1`. Without a generator, and without masks of your own: the salient part at the middle threshold, or
    with `p_saliency=0` a box in the middle. Where nothing or everything would be masked, a box is taken instead.

    Args:
        threshold: [low, high], the range of the saliency threshold. Low thresholds mask more.
        p_outpaint: how often the mask is inverted.
        thresold: the same as `threshold`, as published configs spell it.
        p_saliency: how often a salient part is masked; needs OpenCV with its contrib modules.
        p_strokes: how often strokes are; what remains to 1 are boxes.

    Raises:
        ValueError: `threshold` and `thresold` are both given; a probability is not in [0, 1], or both exceed 1.
    """

    channels = 4

    def __init__(
        self,
        threshold: Sequence[float] | None = None,
        p_outpaint: float = 0.4,
        *,
        thresold: Sequence[float] | None = None,
        p_saliency: float = 0.5,
        p_strokes: float = 0.25,
    ) -> None:
        if threshold is not None and thresold is not None:
            raise ValueError("threshold and thresold are the same parameter; give one")
        given = threshold if threshold is not None else thresold
        self.threshold = checked_range("threshold", DEFAULT_THRESHOLD if given is None else given)
        self.p_outpaint = checked_probability("p_outpaint", p_outpaint)
        self.p_saliency = checked_probability("p_saliency", p_saliency)
        self.p_strokes = checked_probability("p_strokes", p_strokes)
        if self.p_saliency + self.p_strokes > 1 + 1e-9:
            raise ValueError(
                f"p_saliency {self.p_saliency:g} and p_strokes {self.p_strokes:g} add up to more than 1; lower one"
            )

    def __call__(
        self,
        pixels: Tensor,
        generators: Sequence[Generator] | None = None,
        *,
        masks: Tensor | None = None,
        outpaint: bool | None = None,
    ) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, 4, H, W) in [0, 1].

        Args:
            pixels: the images.
            generators: one per sample; None draws nothing.
            masks: (B, 1, H, W), or one for all, 1 (above 1/2) where to paint: your own instead of drawn ones.
            outpaint: True inverts the mask, False does not; None leaves it to `p_outpaint`, or masks as they are.

        Raises:
            ValueError: `masks` does not fit `pixels`.
        """
        if masks is None:
            pairs = per_sample(pixels, generators)
            chosen = torch.stack([self._mask(image, generator, outpaint) for image, generator in pairs])
        else:
            chosen = _own_masks(masks, pixels)
            chosen = 1 - chosen if outpaint else chosen
        chosen = chosen.to(pixels.device)
        return torch.cat([torch.where(chosen > 0.5, 1.0, pixels.detach().float()), chosen], dim=1)

    def _mask(self, image: Tensor, generator: Generator | None, outpaint: bool | None) -> Tensor:
        drawn = draw_chance(self.p_outpaint, generator)
        inverted = drawn if outpaint is None else outpaint
        kind = self._kind(inverted, generator)
        threshold = draw_uniform(*self.threshold, generator)
        height, width = image.shape[-2:]
        if kind == "saliency":
            mask = salient_mask(image, threshold)
        elif kind == "strokes":
            mask = stroke_mask(height, width, generator)
        else:
            mask = box_mask(height, width, generator)
        if not 0.01 < float(mask.mean()) < 0.99:  # an even image has no salient part
            mask = box_mask(height, width, generator)
        return 1 - mask if inverted else mask

    def _kind(self, inverted: bool, generator: Generator | None) -> str:
        """Which mask is drawn; among those that can be inverted the shares are in proportion."""
        if generator is None:
            return "saliency" if self.p_saliency else "box"
        strokes = 0.0 if inverted else self.p_strokes
        place = draw_uniform(0, 1 - self.p_strokes + strokes, generator)
        if place < self.p_saliency:
            return "saliency"
        return "strokes" if place < self.p_saliency + strokes else "box"


def _own_masks(masks: Tensor, pixels: Tensor) -> Tensor:
    """The masks as 0 and 1, one per image."""
    checked_pixels(pixels)
    batch, _, height, width = pixels.shape
    if masks.ndim != 4 or masks.shape[0] not in (1, batch) or masks.shape[1:] != (1, height, width):
        raise ValueError(
            f"masks has shape {tuple(masks.shape)}; expected ({batch}, 1, {height}, {width}), or one mask for all"
        )
    return (masks.detach().float() > 0.5).float().expand(batch, 1, height, width)


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
