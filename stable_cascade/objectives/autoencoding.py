"""Images in, the same images out: the losses of it, and the image encoder with its previewer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.diffusion.noise import gaussian_noise, sample_generators
from stable_cascade.transfer import to_device


def edge_loss(rebuilt: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical pixel steps: sharp edges stay sharp.

    Shapes: (B, C, H, W), (B, C, H, W) -> (B,).
    """
    difference = rebuilt - pixels
    across = (difference[..., 1:] - difference[..., :-1]).abs().flatten(1).mean(1)
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


def reconstruction_loss(rebuilt: Tensor, pixels: Tensor, *, square: float = 1.0, edges: float = 0.5) -> Tensor:
    """L1 + `square` * L2 + `edges` * edge loss, per image.

    Shapes: (B, C, H, W), (B, C, H, W) -> (B,).
    """
    difference = rebuilt.float() - pixels
    absolute = difference.abs().flatten(1).mean(1)
    squared = difference.square().flatten(1).mean(1)
    return absolute + square * squared + edges * edge_loss(rebuilt.float(), pixels)


class EncoderWithPreviewer(nn.Module):
    """The image encoder and the previewer as one autoencoder with noise between them."""

    def __init__(self, semantic_encoder: Any, previewer: Any):
        super().__init__()
        self.semantic_encoder = semantic_encoder
        self.previewer = previewer

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The images that the previewer draws from the noised semantic latents.

        Shapes: pixels (B, 3, H, W), noise (B, 16, h, w) -> (B, 3, 8h, 8w).
        """
        latents = self.semantic_encoder(pixels)
        return self.previewer(latents + noise.to(latents))


def semantic_encoder_loss(
    model: nn.Module, pixels: Tensor, seeds: Tensor, *, stride: int, latent_noise: float = 0.15
) -> dict[str, Tensor]:
    """One step of the image encoder: the previewer must rebuild the image from noised latents.

    The noise makes nearby latents mean nearby images, which Stage C's own errors need.

    Shapes: pixels (B, 3, H, W) in [0, 1], seeds (B,) -> `loss` (B,).
    """
    height, width = pixels.shape[-2] // stride, pixels.shape[-1] // stride
    noise = latent_noise * gaussian_noise((16, height, width), sample_generators(seeds, "latent"))
    rebuilt = model(pixels, to_device(noise, pixels.device))
    wanted = pixels if rebuilt.shape == pixels.shape else F.interpolate(pixels, size=rebuilt.shape[-2:], mode="area")
    return {"loss": reconstruction_loss(rebuilt, wanted, square=2.0, edges=0.3)}
