"""Stage A: images in, the same images out, through codes and past them, watched by a discriminator.

Generator and discriminator are trained by one loss. The generator is judged by the discriminator's detached weights,
the discriminator sees detached images: no parameter gets a gradient from the other's term, so one backward pass and
one optimizer do what two of each would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stable_cascade.diffusion.noise import gaussian_noise, sample_generators
from stable_cascade.transfer import to_device

IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class Rebuilt:
    """What one pass of the training gives.

    Shapes: images (B, 3, H, W); latents (B, C, h, w), detached; indices (B, h, w) int64; the losses (B,). What
        belongs to quantiser or discriminator is None where they take no part.
    """

    images: Tensor
    latents: Tensor
    indices: Tensor | None = None
    codebook: Tensor | None = None
    commitment: Tensor | None = None
    fooling: Tensor | None = None
    judging: Tensor | None = None


class AdversarialAutoencoder(nn.Module):
    """Stage A and its discriminator as one module that trains.

    Stage A's latents are normalised by the statistics that its batch norm holds, in training too: as a batch norm they
    would depend on how a batch is split over processes and accumulation steps. `prepare_new` measures them once.
    """

    def __init__(self, vqgan: Any, discriminator: nn.Module | None = None, *, quantize: bool = True):
        super().__init__()
        self.vqgan, self.discriminator, self.quantize = vqgan, discriminator, quantize
        vqgan.vquantizer.requires_grad_(quantize)

    def train(self, mode: bool = True) -> AdversarialAutoencoder:
        """As ever, but the statistics of the latents stay."""
        super().train(mode)
        _latent_norm(self.vqgan).eval()
        return self

    def forward(self, pixels: Tensor, as_codes: Tensor, adversarial: bool = False) -> Rebuilt:
        """The images rebuilt and the losses of quantiser and discriminator.

        Shapes: pixels (B, 3, H, W) in [0, 1]; as_codes (B,) bool, which samples the decoder sees quantised.
        """
        latents = self.vqgan.encode(pixels).latents
        found: dict[str, Tensor] = {}
        given = latents
        if self.quantize:
            indices = self.vqgan.vquantizer.indices(latents)
            codes = self.vqgan.vquantizer.lookup(indices).to(latents.dtype)
            straight = latents + (codes - latents).detach()
            given = torch.where(to_device(as_codes, latents.device)[:, None, None, None], straight, latents)
            codebook, commitment = _distance(codes, latents.detach()), _distance(latents, codes.detach())
            found = {"indices": indices, "codebook": codebook, "commitment": commitment}
        images = self.vqgan.decode(given).sample
        if adversarial and self.discriminator is not None:
            found["fooling"] = self._fooling(images)
            found["judging"] = hinge_loss(self.discriminator(pixels), self.discriminator(images.detach()))
        return Rebuilt(images, latents.detach(), **found)

    def _fooling(self, images: Tensor) -> Tensor:
        """The generator's term: minus the score, by a discriminator that gets no gradient from it."""
        assert self.discriminator is not None
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return -functional_call(self.discriminator, frozen, (images,)).float().flatten(1).mean(1)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference per sample."""
    return (one.float() - other.float()).square().flatten(1).mean(1)


def hinge_loss(real: Tensor, rebuilt: Tensor) -> Tensor:
    """(max(0, 1 - score of real) + max(0, 1 + score of rebuilt)) / 2, averaged over the patches of each image.

    Shapes: (B, 1, h, w) twice -> (B,).

    Source: Lim and Ye 2017, *Geometric GAN*; the half is that of Esser et al. 2021's code.
    """
    return 0.5 * (F.relu(1 - real.float()) + F.relu(1 + rebuilt.float())).flatten(1).mean(1)


def vqgan_loss(
    rebuilt: Rebuilt,
    pixels: Tensor,
    *,
    codebook_weight: float = 1.0,
    commitment_weight: float = 0.25,
    adversarial_weight: float = 0.0,
) -> dict[str, Tensor]:
    """One step of Stage A: reconstruction, codebook, commitment, both adversarial terms.

    The adversarial weight is a constant. Esser et al. 2021, eq. 7, divide the norms of two gradients of a batch, which
    the parts of a batch on several processes do not know.

    Shapes: pixels (B, 3, H, W) in [0, 1] -> `loss`, `reconstruction` (B,).

    Source: van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq. 4 to 6, without the perceptual loss.
    """
    reconstruction = reconstruction_loss(rebuilt.images, pixels)
    loss = reconstruction
    if rebuilt.codebook is not None and rebuilt.commitment is not None:
        loss = loss + codebook_weight * rebuilt.codebook + commitment_weight * rebuilt.commitment
    if rebuilt.fooling is not None and rebuilt.judging is not None:
        loss = loss + adversarial_weight * rebuilt.fooling + rebuilt.judging
    return {"loss": loss, "reconstruction": reconstruction.detach()}


@torch.no_grad()
def prepare_new(vqgan: Any, pixels: Tensor, *, seed: int) -> None:
    """Make a newly initialised Stage A fit to train, in place.

    Its residual blocks get gains (at the original's zeros their insides get no gradient for thousands of steps), its
    latents the statistics of these images, its codebook latents of these images.

    Shapes: pixels (N, 3, H, W) in [0, 1].
    """
    for block in vqgan.modules():
        if hasattr(block, "gammas"):
            block.gammas[2], block.gammas[5] = 1.0, 0.5
    norm = _latent_norm(vqgan)
    norm.reset_running_stats()
    norm.eval()
    raw = _flat_latents(vqgan, pixels)
    norm.running_mean.copy_(raw.mean(0))
    norm.running_var.copy_(raw.var(0).clamp_min(norm.eps))
    norm.num_batches_tracked.fill_(1)
    table = vqgan.vquantizer.embedding.weight
    rows = _flat_latents(vqgan, pixels)
    (generator,) = sample_generators([seed], "codebook")
    table.copy_(rows[torch.randint(len(rows), (len(table),), generator=generator).to(rows.device)])


def _latent_norm(vqgan: Any) -> Any:
    """The last layer of the encoder, an `nn.BatchNorm2d`."""
    return vqgan.down_blocks[-1][-1]


def _flat_latents(vqgan: Any, pixels: Tensor) -> Tensor:
    """The latents of images as rows.

    Shapes: (N, 3, H, W) -> (N h w, C).
    """
    parts = [vqgan.encode(part).latents for part in pixels.split(IMAGES_AT_ONCE)]
    return torch.cat(parts).float().permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def latent_scale(vqgan: Any, pixels: Tensor) -> float:
    """The standard deviation of Stage A's latents, `scale_factor` of a newly trained Stage A.

    Shapes: (N, 3, H, W) in [0, 1] -> one number.
    """
    return _flat_latents(vqgan, pixels).std().item()


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, for values in [0, 1].

    Shapes: (B, 3, H, W) twice -> (B,).
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-12).log10()


def perplexity(counts: Tensor) -> float:
    """How many equally frequent codes would be as mixed as these: e to the entropy of their shares.

    Shapes: (codes,) -> one number from 1 to the number of codes.
    """
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


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
