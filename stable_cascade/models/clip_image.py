"""Pictures for CLIP's image encoder, from the same [0, 1] tensors that the trainers use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(pixels: Tensor, size: int) -> Tensor:
    """Short side resized to `size` (bicubic, antialiased), centre crop, CLIP's normalisation.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 3, size, size).

    Source: Radford et al. 2021, the released preprocessing.
    """
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(pixels.float(), size=resized, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
