"""Stage B: predict the noise in Stage A latents from the semantic latents of a randomly shrunk image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.diffusion.noise import gaussian_noise, sample_generators
from stable_cascade.objectives.denoising import LossTerms, chosen, denoising_loss, draw_log_snr, draw_noise
from stable_cascade.objectives.prior import drop_captions
from stable_cascade.transfer import to_device


def decoder_loss(
    model: nn.Module,
    pixels: Tensor,
    captions: Sequence[str],
    seeds: Tensor,
    step_seed: int,
    *,
    encode_vq: Callable[[Tensor], Tensor],
    encode_semantic: Callable[[Tensor], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    weight: Callable[[Tensor], Tensor],
    stride: int = 32,
    prediction_type: str = "epsilon",
    pyramid: bool = True,
    shift: float = 1.0,
    caption_dropout: float = 0.05,
    effnet_dropout: float = 0.1,
    effnet_min_scale: float = 0.5,
    effnet_interpolation: str = "nearest",
    effnet_noise: float = 0.0,
) -> LossTerms:
    """One step of image reconstruction training.

    Shapes: pixels (B, 3, H, W) in [0, 1] -> loss terms (B,).

    Args:
        model: the decoder, perhaps wrapped for distributed training.
        step_seed: a function of (seed, step), the same for every part of a global batch.
        encode_vq: pixels -> scaled Stage A latents (B, 4, H/4, W/4).
        encode_semantic: pixels -> semantic latents (B, 16, h, w).
        embed_text: captions -> pooled text (B, 1, D).
        stride: the image encoder's total stride; the shrunk image's sides are multiples of it.
        effnet_noise: largest strength of the noise on the semantic latents, drawn per sample; it teaches Stage B to
            forgive what Stage C gets wrong.
    """
    # Target and conditions: the semantic latents of a shrunk copy, noised and sometimes left out; the pooled text.
    with torch.no_grad():
        clean = encode_vq(pixels).float()
        small = shrink(pixels, step_seed, stride=stride, smallest=effnet_min_scale, interpolation=effnet_interpolation)
        effnet = encode_semantic(small).float()
        effnet = effnet + to_device(semantic_noise(seeds, tuple(effnet.shape[1:]), effnet_noise), effnet.device)
        kept = to_device(~chosen(seeds, "effnet", effnet_dropout), effnet.device)
        effnet = effnet * kept[:, None, None, None]
        pooled = embed_text(drop_captions(captions, seeds, caption_dropout))
    # The noise, and one prediction of it.
    noise = to_device(draw_noise(seeds, tuple(clean.shape[1:]), pyramid=pyramid), clean.device)
    log_snr = to_device(draw_log_snr(seeds, shift=shift), clean.device)
    return denoising_loss(
        lambda noised, ratio: model(noised, ratio, clip_text_pooled=pooled, effnet=effnet, return_dict=False)[0],
        clean,
        noise,
        log_snr,
        weight=weight,
        prediction_type=prediction_type,
    )


def semantic_noise(seeds: Tensor, shape: tuple[int, ...], strength: float) -> Tensor:
    """Gaussian noise whose strength is drawn uniformly from [0, `strength`] per sample.

    Shapes: (B,) -> (B, *shape), or (1,) * (1 + len(shape)) zeros when `strength` is 0.
    """
    if not strength:
        return torch.zeros([1] * (1 + len(shape)))
    generators = sample_generators(seeds, "semantic noise")
    scales = torch.stack([torch.rand((), generator=generator) for generator in generators])
    return strength * scales.view(-1, *[1] * len(shape)) * gaussian_noise(shape, generators)


def shrink(pixels: Tensor, step_seed: int, *, stride: int, smallest: float, interpolation: str = "nearest") -> Tensor:
    """The images at a random smaller size, sides rounded down to multiples of `stride`.

    One scale serves the whole global batch, as in the original, so that its parts can be computed anywhere. The
    original resizes with `nearest`; `bilinear` (antialiased) shows the encoder what it sees at inference.

    Shapes: (B, 3, H, W) -> (B, 3, H', W'), smallest * H <= H' + stride, H' <= H.
    """
    draw = torch.rand((), generator=sample_generators([step_seed], "shrink")[0]).item()
    scale = smallest + (1 - smallest) * draw
    height, width = (max(stride, int(side * scale) // stride * stride) for side in pixels.shape[-2:])
    if interpolation == "nearest":
        return F.interpolate(pixels, size=(height, width), mode="nearest")
    return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True).clamp(0, 1)
