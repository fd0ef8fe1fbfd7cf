"""An image with an area left white as control image: for inpainting and outpainting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .arguments import checked_pixels, checked_probability, checked_range, draw_chance, draw_uniform, per_sample
from .masks import box_mask, salient_mask, stroke_mask

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
