"""Layers of which one matrix product is all, computed on images with channels last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_plain, saturate, to_channels_first, to_channels_last


def pointwise(conv: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product over the last axis.

    Shapes: (B, H, W, C) -> (B, H, W, C').
    """
    if is_plain(conv, nn.Conv2d):
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    return to_channels_last(conv(to_channels_first(x)))


def halve(conv: Any, x: Tensor) -> Tensor:
    """A 2x2 convolution of stride 2 as a matrix product over the pixels of each square.

    torch's convolution would first bring the weights, which are the larger factor, into the order of the image.

    Shapes: (B, H, W, C) -> (B, H / 2, W / 2, C'), rounded down.
    """
    if not is_plain(conv, nn.Conv2d):
        return to_channels_last(conv(to_channels_first(x)))
    height, width = x.shape[1] // 2, x.shape[2] // 2
    squares = x[:, : 2 * height, : 2 * width].unflatten(2, (width, 2)).unflatten(1, (height, 2))
    return F.linear(squares.permute(0, 1, 3, 5, 2, 4).flatten(3), conv.weight.flatten(1), conv.bias)


def double(conv: Any, x: Tensor) -> Tensor:
    """A transposed 2x2 convolution of stride 2 as a matrix product that makes the square of each pixel.

    Shapes: (B, H, W, C) -> (B, 2 H, 2 W, C').
    """
    if not is_plain(conv, nn.ConvTranspose2d):
        return to_channels_last(conv(to_channels_first(x)))
    bias = None if conv.bias is None else conv.bias.repeat_interleave(4)
    squares = F.linear(x, conv.weight.flatten(1).t(), bias).unflatten(3, (-1, 2, 2))
    return squares.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


def project_wide(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`; of a float16 layer the float32 result, 64 times as large as float16 could hold.

    The factor is a power of two, so that nothing is rounded by it.
    """
    if not is_plain(layer, nn.Linear) or layer.weight.dtype is not torch.float16:
        return saturate(layer(x))
    product = F.linear(x * 2.0**-6, layer.weight).float() * 2.0**6
    return product if layer.bias is None else product + layer.bias.float()
