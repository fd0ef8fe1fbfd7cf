"""The image that a call starts from: its size, which part of it is repainted, and how far it is noised."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .call import SMALLEST_SIDE, check_size, from_array, in_range, is_number, to_images, to_pixels, whole
from .sampling import Settings

STRENGTH = 0.75


@dataclass(frozen=True)
class Source:
    """The size of the images to draw and, where one is given, the image they start from.

    The mask is 1 where the image is repainted and 0 where it is kept; between them the pixels are mixed.

    Shapes: pixels (n, 3, height, width), mask (1 or n, 1, height, width), both in [0, 1].
    """

    height: int
    width: int
    pixels: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0

    def repeated(self, count: int) -> Source:
        """The same with one row per image to draw; `count` is a multiple of n."""
        parts = (self.pixels, self.mask)
        pixels, mask = (None if part is None else part.repeat_interleave(count // len(part), 0) for part in parts)
        return replace(self, pixels=pixels, mask=mask)

    def shortened(self, settings: Settings) -> Settings:
        """The settings of a Stage C that starts from the image, noised to the time `strength`.

        Raises:
            ValueError: the settings have times of their own.
        """
        if self.strength == 1:
            return settings
        if settings.timesteps is not None:
            raise ValueError(f"timesteps and strength {self.strength} are both given; give one of them")
        steps = max(1, round(self.strength * settings.num_inference_steps))
        return replace(settings, num_inference_steps=steps, t_start=self.strength)

    def repainted(self, size: tuple[int, int], cell: tuple[float, float]) -> Tensor:
        """Which latents the white of the mask touches: all those are repainted.

        Shapes: -> (n, 1, *size) bool.

        Args:
            cell: height and width of a latent, in pixels.
        """
        assert self.mask is not None
        white = (self.mask > 0.5).float()
        rows, columns = map(_overlap, size, white.shape[-2:], cell)
        return rows @ white @ columns.T > 0

    def pasted(self, pixels: Tensor) -> Tensor:
        """Drawn images with the kept part of the image over them. Shapes: (n, 3, height, width) -> the same."""
        if self.pixels is None or self.mask is None:
            return pixels
        return torch.lerp(self.pixels.to(pixels), pixels, self.mask.to(pixels))


def read_source(
    image: Any,
    mask_image: Any,
    strength: float | None,
    height: int | None,
    width: int | None,
    *,
    side: int = SMALLEST_SIDE,
    name: str = "image",
) -> Source:
    """What a call says about size and starting image, checked.

    Without `height` and `width` the image decides: cropped around its middle to multiples of 8. With one of them the
    other follows the image's shape. An image of another size is resized until it covers what is asked for, and
    cropped around its middle; the mask goes with it.

    Args:
        strength: by default 1 with a mask and 0.75 without.
        side: of the square drawn where neither size nor image is given.
        name: of `image` in errors.

    Raises:
        ValueError: no such size, strength or image; mask or strength without an image; a mask of another size.
    """
    # Without an image only the size counts.
    height, width = whole(height), whole(width)
    if image is None:
        for other, value in (("mask_image", mask_image), ("strength", strength)):
            if value is not None:
                raise ValueError(f"{other} is given without image; give the image to start from")
        height, width = side if height is None else height, side if width is None else width
        check_size(height, width)
        return Source(height, width)
    # How much of the image stays.
    if strength is None:
        strength = STRENGTH if mask_image is None else 1.0
    if not is_number(strength) or not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is outside [0, 1]; 0 keeps the image, 1 starts from noise alone")
    # Image and mask at the size that is drawn.
    pixels = to_pixels(image, name)
    given = (height, width)
    height, width = image_size((pixels.shape[-2], pixels.shape[-1]), height, width, name)
    mask = None if mask_image is None else to_mask(mask_image, pixels)
    resize = given != (None, None)
    fitted = [None if part is None else fit(part, height, width, resize=resize) for part in (pixels, mask)]
    return Source(height, width, fitted[0], fitted[1], float(strength))


def image_size(sides: tuple[int, int], height: int | None, width: int | None, name: str = "image") -> tuple[int, int]:
    """Height and width to draw for an image: what is asked for, else its own, rounded down to multiples of 8.

    Raises:
        ValueError: an image smaller than 64 pixels and no size, or a size that cannot be drawn.
    """
    if height is None and width is None:
        if min(sides) < SMALLEST_SIDE:
            raise ValueError(
                f"{name} is {sides[0]} x {sides[1]} (height x width); {SMALLEST_SIDE} is the smallest side: "
                "give height and width to enlarge it"
            )
        return sides[0] // 8 * 8, sides[1] // 8 * 8
    if height is None:
        height = _follow(width, sides[0] / sides[1])
    if width is None:
        width = _follow(height, sides[1] / sides[0])
    check_size(height, width)
    return height, width


def fit(pixels: Tensor, height: int, width: int, *, resize: bool) -> Tensor:
    """Images resized, where wanted, until they just cover a size, and cropped to it around their middle.

    Shapes: (n, c, H, W) -> (n, c, height, width).
    """
    sides = pixels.shape[-2:]
    if resize and tuple(sides) != (height, width):
        scale = max(height / sides[0], width / sides[1])
        size = (max(height, round(sides[0] * scale)), max(width, round(sides[1] * scale)))
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def to_mask(masks: Any, pixels: Tensor) -> Tensor:
    """Masks of images: PIL images (grey; what is transparent counts as black), arrays (H, W), tensors (1, H, W).

    Shapes: pixels (n, 3, H, W) -> (1 or n, 1, H, W) in [0, 1].

    Raises:
        ValueError: something else, another size, or neither one mask nor one per image.
    """
    if isinstance(masks, Tensor | np.ndarray) and masks.ndim == 4:
        masks = list(masks)
    if not isinstance(masks, list | tuple):
        masks = [masks]
    read = [_mask(mask) for mask in masks]
    for mask in read:
        if mask.shape[-2:] != pixels.shape[-2:]:
            sizes = [" x ".join(map(str, sides[-2:])) for sides in (mask.shape, pixels.shape)]
            raise ValueError(f"mask_image is {sizes[0]} (height x width), image {sizes[1]}; make them the same size")
    if len(read) not in (1, len(pixels)):
        raise ValueError(f"mask_image has {len(read)} masks for {len(pixels)} images; give one, or one per image")
    return torch.stack(read)


def _mask(mask: Any) -> Tensor:
    """Shapes: -> (1, H, W)."""
    if isinstance(mask, Image.Image):
        if "transparency" in mask.info or mask.mode in ("RGBA", "LA", "PA"):
            mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "buf":
        mask = from_array(mask if mask.ndim == 3 else mask[..., None])
    if isinstance(mask, Tensor) and not mask.is_complex():
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim == 3 and len(mask) == 1:
            return in_range(mask.float(), "mask_image").clamp(0, 1)
    what = f"{type(mask).__name__} {tuple(mask.shape)}" if hasattr(mask, "shape") else type(mask).__name__
    raise ValueError(f"mask_image holds {what}; give PIL images, arrays (H, W) or tensors (1, H, W) in [0, 1]")


def _follow(side: int | None, share: float) -> int:
    """The other side of an image of that shape, a multiple of 8."""
    return max(SMALLEST_SIDE, round(side * share / 8) * 8) if is_number(side) else SMALLEST_SIDE  # type: ignore[operator]


def _overlap(cells: int, side: int, length: float) -> Tensor:
    """1 where a cell and a pixel share any length; the last cell reaches to the end. Shapes: -> (cells, side)."""
    pixel, cell = torch.arange(side)[None], torch.arange(cells, dtype=torch.float64)[:, None]
    ends = torch.where(cell == cells - 1, math.inf, (cell + 1) * length)
    rounding = 1e-6  # of the length, where a cell ends between two pixels
    return ((pixel < ends - rounding) & (pixel + 1 > cell * length + rounding)).float()


def outpaint(
    image: Any, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """The image on a larger canvas, and the mask, white where the canvas is new: `image` and `mask_image` of a call.

    The image's border colours go on into the new area, so that what lies beside them is encoded without an edge.

    Args:
        left, top, right, bottom: pixels to add on each side.

    Raises:
        ValueError: no pixels to add, or sides that do not end at a multiple of 8 from 64 up.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, margin in margins.items():
        if not isinstance(margin, int) or isinstance(margin, bool) or margin < 0:
            raise ValueError(f"{name} {margin!r} is no number of pixels from 0 up")
    if not any(margins.values()):
        raise ValueError("left, top, right and bottom are all 0; say by how many pixels the image grows")
    pixels = np.asarray(to_images(to_pixels(image, "image")[:1], "pil")[0])
    for side, names, length in (("width", "left + right", left + right), ("height", "top + bottom", top + bottom)):
        _check_side(side, pixels.shape[1 if side == "width" else 0], names, length)
    pads = ((top, bottom), (left, right))
    canvas = np.pad(pixels, (*pads, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), pads, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def _check_side(side: str, length: int, names: str, margin: int) -> None:
    total = length + margin
    if total % 8 or total < SMALLEST_SIDE:
        nearest = max(SMALLEST_SIDE, round(total / 8) * 8, -(-length // 8) * 8)
        raise ValueError(
            f"{side} {total} ({length} of the image, {names} {margin}) is no multiple of 8 from {SMALLEST_SIDE} up; "
            f"nearest: {names} = {nearest - length}"
        )
