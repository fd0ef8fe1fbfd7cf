"""The inputs of Stage C's trainings, live or from the cache, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.data import Batch, SampleIndex, SampleStream
from stable_cascade.models.clip import TextEmbedder
from stable_cascade.objectives.prior import prior_loss
from stable_cascade.transfer import to_device

from .cache import cached_inputs
from .clip import image_embedder
from .data import batches
from .inputs import Inputs, frozen_text, shown
from .networks import frozen


def prior_inputs(
    config: Any, accelerator: Any, index: SampleIndex | SampleStream, text: TextEmbedder | None = None
) -> Inputs:
    """The inputs as the config says; `text` is a text encoder that trains, absent: the config's own, frozen."""
    if config.cache:
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
        return {**terms, "loss": terms["loss"] * to_device(batch.weights, clean.device)}

    return loss_fn


def place_weights(masks: Tensor | None, latents: Tensor, unmasked: float) -> Tensor | None:
    """Weights of the latents' places: 1 where the mask is white, `unmasked` where it is black.

    Shapes: masks (B, 1, H, W) in [0, 1], latents (B, C, h, w) -> (B, 1, h, w).
    """
    if masks is None:
        return None
    seen = F.interpolate(to_device(masks, latents.device), size=latents.shape[-2:], mode="area")
    return unmasked + (1 - unmasked) * seen
