"""What Stage C's trainings are fed with, live or from the cache, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.data import Batch, SampleIndex, SampleStream
from stable_cascade.models.text import TextEmbedder
from stable_cascade.objectives.prior import EmbedText, prior_loss

from .clip import image_embedder, text_encoder
from .data import batches
from .networks import frozen, on_demand


@dataclass(frozen=True)
class Inputs:
    """What Stage C's trainings are fed with.

    Args:
        batches: start step -> this process's micro-batches from there on.
        encode: batch -> clean semantic latents (B, 16, h, w).
        embed_image: batch -> image embeddings (B, 1, D), zero for the samples that go without, or None.
        text: captions -> hidden states (B, L, D) and pooled text (B, 1, P).
        pictures: batches with their pixels, whatever `batches` leaves out; for previews.
    """

    batches: Callable[[int], Iterator[Batch]]
    encode: Callable[[Batch], Tensor]
    embed_image: Callable[[Batch], Tensor | None]
    text: EmbedText
    pictures: Callable[[int], Iterator[Batch]]


def prior_inputs(
    config: Any, accelerator: Any, index: SampleIndex | SampleStream, text: TextEmbedder | None = None
) -> Inputs:
    """The inputs as the config says; `text` is a text encoder that trains, absent: the config's own, frozen."""
    if config.cache:
        from .cache import cached_inputs

        return cached_inputs(config, accelerator, index, text)
    device = accelerator.device
    encoder = frozen(config, "semantic_encoder", device)
    embed = image_embedder(config, device)
    stream = batches(config, index, accelerator, factor=encoder.stride)
    return Inputs(
        batches=stream,
        encode=lambda batch: encoder(shown(batch, device)).float(),
        embed_image=lambda batch: embed(shown(batch, device), batch.seeds),
        text=text or frozen_text(config, device),
        pictures=stream,
    )


def shown(batch: Batch, device: torch.device) -> Tensor:
    """The batch's pixels on the device."""
    assert batch.pixels is not None
    return batch.pixels.to(device, non_blocking=True)


def frozen_text(config: Any, device: torch.device) -> EmbedText:
    """The config's text encoder as a function without gradients."""
    tokenizer, encoder = text_encoder(config, dtype=getattr(torch, config.dtype))
    embedder = TextEmbedder(on_demand(config, encoder, device), tokenizer)

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = embedder(captions, device)
        return hidden, pooled

    return embed


def prior_loss_fn(
    config: Any,
    inputs: Inputs,
    weight: Callable[[Tensor], Tensor],
    control: Callable[[Batch], Tensor] | None = None,
) -> Callable[[Any, Batch], Any]:
    """(model, batch) -> loss terms, for every training of Stage C.

    Args:
        weight: log_snr (B,) -> weight of a noise level (B,).
        control: batch -> control images (B, c, H, W).
    """

    def loss_fn(model: Any, batch: Batch) -> Any:
        with torch.no_grad():
            clean = inputs.encode(batch)
            clip_img = inputs.embed_image(batch)
            image = control(batch) if control is not None else None
        terms = prior_loss(
            model,
            clean,
            batch.captions,
            batch.seeds,
            weight=weight,
            clip_img=clip_img,
            control=image,
            mask=place_weights(batch.masks, clean, config.unmasked_weight),
            prediction_type=config.prediction_type,
            offset_noise=config.offset_noise,
            caption_dropout=config.caption_dropout,
            shift=config.shift,
        )
        if batch.weights is None:
            return terms
        return {**terms, "loss": terms["loss"] * batch.weights.to(clean.device)}

    return loss_fn


def place_weights(masks: Tensor | None, latents: Tensor, unmasked: float) -> Tensor | None:
    """Weights of the latents' places: 1 where the mask is white, `unmasked` where it is black.

    Shapes: masks (B, 1, H, W) in [0, 1], latents (B, C, h, w) -> (B, 1, h, w).
    """
    if masks is None:
        return None
    seen = F.interpolate(masks.to(latents.device), size=latents.shape[-2:], mode="area")
    return unmasked + (1 - unmasked) * seen
