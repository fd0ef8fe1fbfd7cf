"""The losses of Stages C and B: draw noise and noise levels, predict, compare; per sample, weighted by noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.diffusion.noise import gaussian_noise, pyramid_noise, sample_generators, training_times
from stable_cascade.diffusion.process import add_noise, target
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t
from stable_cascade.transfer import to_device

LossTerms = dict[str, Tensor]
"""`loss` (weighted), `unweighted` and `log_snr`, each of shape (B,)."""


def draw_log_snr(seeds: Tensor, *, shift: float = 1.0) -> Tensor:
    """The noise level of each sample, a function of its seed alone.

    Shapes: (B,) -> (B,), float32.
    """
    return cosine_log_snr(training_times(sample_generators(seeds, "time")), shift=shift)


def draw_noise(seeds: Tensor, shape: tuple[int, ...], *, offset: float = 0.0, pyramid: bool = False) -> Tensor:
    """Gaussian noise of `shape` per sample, with an optional offset per channel or the pyramid of Stage B.

    Shapes: (B,) -> (B, *shape), float32 on the CPU.
    """
    generators = sample_generators(seeds, "noise")
    if pyramid:
        return pyramid_noise(shape, generators)
    return gaussian_noise(shape, generators, offset=offset)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    noise: Tensor,
    log_snr: Tensor,
    *,
    weight: Callable[[Tensor], Tensor],
    prediction_type: str = "epsilon",
    mask: Tensor | None = None,
) -> LossTerms:
    """Squared error of the prediction, averaged per sample and weighted by noise level.

    Shapes: clean, noise (B, C, H, W); log_snr (B,); mask (B, 1, H, W) -> three tensors (B,).

    Args:
        predict: (noised latents, timestep ratio) -> prediction.
        weight: log_snr (B,) -> weight (B,).
        mask: weights of the places of a sample in its average; absent: all count alike.
    """
    noised = add_noise(clean, noise, log_snr)
    prediction = predict(noised, cosine_t(log_snr))
    wanted = target(prediction_type, clean, noise, log_snr)
    error = (prediction.float() - wanted.float()).square()
    if mask is not None:
        error = error * (mask / mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-6))
    unweighted = error.flatten(1).mean(1)
    return {"loss": unweighted * weight(log_snr), "unweighted": unweighted.detach(), "log_snr": log_snr}


def chosen(seeds: Tensor, stream: str, share: float) -> Tensor:
    """Which samples an event of probability `share` happens to, a function of seed and stream name.

    Shapes: (B,) -> (B,) bool on the CPU.
    """
    draws = [torch.rand((), generator=generator) for generator in sample_generators(seeds, stream)]
    return torch.stack(draws) < share


EmbedText = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B captions -> hidden states (B, L, D) and pooled text (B, 1, P)."""


class ConditionedPrior(nn.Module):
    """The prior with what makes its conditions in front of it, as one module to wrap, train and shard.

    Args:
        prior: Stage C, perhaps with adapters.
        text: captions -> embeddings. A module (`TextEmbedder`) where something in it trains; otherwise a function, so
            that what only serves is neither wrapped, sharded nor saved.
        controlnet: makes residuals for the prior from a control image.
    """

    def __init__(self, prior: nn.Module, text: EmbedText | nn.Module, controlnet: nn.Module | None = None):
        super().__init__()
        self.prior = prior
        self.text = text
        self.controlnet = controlnet

    def train(self, mode: bool = True) -> ConditionedPrior:
        """Training mode, except for parts in which nothing trains: a frozen prior gets no dropout."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(
        self,
        noised: Tensor,
        timestep_ratio: Tensor,
        captions: Sequence[str],
        clip_img: Tensor | None,
        control: Tensor | None = None,
    ) -> Tensor:
        """The prior's prediction.

        Shapes: noised (B, 16, h, w), timestep_ratio (B,), B captions, clip_img (B, 1, D), control (B, c, H, W) ->
        (B, 16, h, w).
        """
        hidden, pooled = self.text(list(captions))
        residuals = self.controlnet(control) if self.controlnet is not None else None
        return self.prior(
            noised, timestep_ratio, clip_text_pooled=pooled, clip_text=hidden, clip_img=clip_img, control=residuals,
            return_dict=False,
        )[0]  # fmt: skip


def prior_loss(
    model: nn.Module,
    clean: Tensor,
    captions: Sequence[str],
    seeds: Tensor,
    *,
    weight: Callable[[Tensor], Tensor],
    clip_img: Tensor | None = None,
    control: Tensor | None = None,
    mask: Tensor | None = None,
    prediction_type: str = "epsilon",
    offset_noise: float = 0.0,
    caption_dropout: float = 0.05,
    shift: float = 1.0,
) -> LossTerms:
    """One step of training Stage C, with or without adapters or a ControlNet.

    Shapes: clean (B, 16, h, w), B captions, seeds (B,) -> loss terms (B,).

    Args:
        model: a `ConditionedPrior`, perhaps wrapped for distributed training.
        clip_img: image embeddings (B, 1, D), zero for the samples that go without.
        control: control images (B, c, H, W).
        mask: weights (B, 1, h, w) of the places of a sample.
    """
    noise = to_device(draw_noise(seeds, tuple(clean.shape[1:]), offset=offset_noise), clean.device)
    log_snr = to_device(draw_log_snr(seeds, shift=shift), clean.device)
    shown = drop_captions(captions, seeds, caption_dropout)
    conditions = (shown, clip_img) if control is None else (shown, clip_img, control)
    return denoising_loss(
        lambda noised, ratio: model(noised, ratio, *conditions),
        clean,
        noise,
        log_snr,
        weight=weight,
        prediction_type=prediction_type,
        mask=mask,
    )


def drop_captions(captions: Sequence[str], seeds: Tensor, share: float) -> list[str]:
    """The captions, a random `share` of them empty: what classifier-free guidance needs."""
    dropped = chosen(seeds, "caption", share).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


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
