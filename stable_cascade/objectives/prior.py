"""Stage C: predict the noise in semantic latents from text and, sometimes, a picture's embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.models.text import encode_prompts
from stable_cascade.objectives.denoising import LossTerms, chosen, denoising_loss, draw_log_snr, draw_noise


class ConditionedPrior(nn.Module):
    """The prior with the text encoder in front of it, as one module to wrap, train and shard.

    The text encoder runs without gradients unless something in it trains (learned tokens, adapters).
    """

    def __init__(self, prior: nn.Module, text_encoder: nn.Module, tokenizer: Any):
        super().__init__()
        self.prior = prior
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.text_trains = any(parameter.requires_grad for parameter in text_encoder.parameters())

    def forward(
        self, noised: Tensor, timestep_ratio: Tensor, captions: Sequence[str], clip_img: Tensor | None
    ) -> Tensor:
        """The prior's prediction.

        Shapes: noised (B, 16, h, w), timestep_ratio (B,), B captions, clip_img (B, 1, D) -> (B, 16, h, w).
        """
        with torch.set_grad_enabled(self.text_trains and torch.is_grad_enabled()):
            text, pooled, _ = encode_prompts(self.text_encoder, self.tokenizer, list(captions), noised.device)
        return self.prior(
            noised, timestep_ratio, clip_text_pooled=pooled, clip_text=text, clip_img=clip_img, return_dict=False
        )[0]


def prior_loss(
    model: nn.Module,
    pixels: Tensor,
    captions: Sequence[str],
    seeds: Tensor,
    *,
    encode: Callable[[Tensor], Tensor],
    embed_image: Callable[[Tensor, Tensor], Tensor | None],
    weight: Callable[[Tensor], Tensor],
    prediction_type: str = "epsilon",
    offset_noise: float = 0.0,
    caption_dropout: float = 0.05,
    shift: float = 1.0,
) -> LossTerms:
    """One step of text-to-image training, with or without adapters.

    Shapes: pixels (B, 3, H, W) in [0, 1] -> loss terms (B,).

    Args:
        model: a `ConditionedPrior`, perhaps wrapped for distributed training.
        encode: pixels -> semantic latents (B, 16, h, w).
        embed_image: (pixels, seeds) -> image embeddings (B, 1, D), zero for the samples that go without.
    """
    with torch.no_grad():
        clean = encode(pixels).float()
        clip_img = embed_image(pixels, seeds)
    noise = draw_noise(seeds, tuple(clean.shape[1:]), offset=offset_noise).to(clean.device)
    log_snr = draw_log_snr(seeds, shift=shift).to(clean.device)
    shown = drop_captions(captions, seeds, caption_dropout)
    return denoising_loss(
        lambda noised, ratio: model(noised, ratio, shown, clip_img),
        clean,
        noise,
        log_snr,
        weight=weight,
        prediction_type=prediction_type,
    )


def drop_captions(captions: Sequence[str], seeds: Tensor, share: float) -> list[str]:
    """The captions, a random `share` of them empty: what classifier-free guidance needs."""
    dropped = chosen(seeds, "caption", share).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
