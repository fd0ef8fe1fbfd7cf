"""What a step of a training adds up: the weight of noise levels, and the loss of Stage C's trainings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.data import Batch, SampleIndex, SampleStream
from stable_cascade.diffusion import weighting
from stable_cascade.models.clip import TextEmbedder
from stable_cascade.objectives.denoising import EmbedText, chosen, prior_loss
from stable_cascade.transfer import to_device

from .cache import Cache, fill_cache
from .data import batches, shown
from .networks import frozen, frozen_text, image_embedder


@dataclass(frozen=True)
class Weighting:
    """The loss weight of a config and what the loop needs to keep it up to date."""

    weight: Callable[[Tensor], Tensor]
    stateful: dict[str, Any]
    after_step: Callable[[Tensor, Tensor], None] | None


def loss_weight(config: Any) -> Weighting:
    """The loss weight by noise level that a config chooses."""
    # Adaptive: follows the loss, and so is part of the run's state.
    if config.loss_weight == "adaptive":
        adaptive = weighting.AdaptiveLossWeight()
        return Weighting(adaptive, {"adaptive_loss_weight": adaptive}, adaptive.update)

    # Functions of log_snr. Weights are published for the error of the noise, or for that of the clean sample; the
    # factor carries them over to what this network predicts.
    def on_clean(weight: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda log_snr: weight(log_snr) * weighting.prediction_factor(log_snr, config.prediction_type)

    def on_noise(weight: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return on_clean(lambda log_snr: weight(log_snr) * log_snr.exp())

    choices: dict[str, Callable[[Tensor], Tensor]] = {
        "p2": weighting.p2_weight,
        "min_snr": lambda log_snr: weighting.min_snr_weight(log_snr, config.min_snr_gamma, config.prediction_type),
        "debiased": on_noise(weighting.debiased_weight),
        "sech": on_noise(weighting.sech_weight),
        "sigmoid": on_noise(weighting.sigmoid_weight),
        "truncated_snr": on_clean(weighting.truncated_snr_weight),
        "constant": torch.ones_like,
    }
    return Weighting(choices[config.loss_weight], {}, None)


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
        # Clean latents and conditions, without gradients.
        with torch.no_grad():
            clean = inputs.encode(batch)
            clip_img = inputs.embed_image(batch)
            image = control(batch) if control is not None else None
        # The loss per sample, weighted by noise level, mask and sample.
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


@dataclass(frozen=True)
class Inputs:
    """What Stage C's trainings are fed with.

    Args:
        batches: start step -> this process's micro-batches from there on.
        encode: batch -> clean semantic latents (B, 16, h, w).
        embed_image: batch -> image embeddings (B, 1, D), zero for the samples that go without, or None.
        text: captions -> hidden states (B, L, D) and pooled text (B, 1, P).
        images: batches with their pixels, whatever `batches` leaves out; for previews.
    """

    batches: Callable[[int], Iterator[Batch]]
    encode: Callable[[Batch], Tensor]
    embed_image: Callable[[Batch], Tensor | None]
    text: EmbedText
    images: Callable[[int], Iterator[Batch]]


def prior_inputs(
    config: Any, accelerator: Any, index: SampleIndex | SampleStream, text: TextEmbedder | None = None
) -> Inputs:
    """The inputs as the config says; `text` is a text encoder that trains, absent: the config's own, frozen."""
    if config.cache:
        return _cached_inputs(config, accelerator, index, text)
    device = accelerator.device
    encoder = frozen(config, "semantic_encoder", device)
    embed = image_embedder(config, device)
    stream = batches(config, index, accelerator, factor=encoder.stride)
    return Inputs(
        batches=stream,
        encode=lambda batch: encoder(shown(batch, device)).float(),
        embed_image=lambda batch: embed(shown(batch, device), batch.seeds),
        text=text or frozen_text(config, device),
        images=stream,
    )


def _cached_inputs(
    config: Any, accelerator: Any, index: SampleIndex | SampleStream, text: TextEmbedder | None = None
) -> Inputs:
    """As `prior_inputs`, from the cache, which is filled first where something is missing.

    A ControlNet makes its control images from pixels, so there the batches keep them.
    """
    # Fill the cache; the batches come without the samples that were broken then.
    device = accelerator.device
    cache = fill_cache(config, accelerator, index, texts=text is None)
    stream = functools.partial(batches, config, index, accelerator, factor=cache.stride, known_broken=cache.broken)
    images = stream()
    needs_pixels = hasattr(config, "controlnet_filter")

    # Read latents and embeddings where the live inputs compute them.
    def embed_image(batch: Batch) -> Tensor | None:
        if "images" not in cache.stores:
            return None
        kept = chosen(batch.seeds, "image embedding", config.image_embedding_share)
        return to_device(cache.crops("images", batch) * kept[:, None, None], device)

    def embed_text(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = cache.embed_text(captions)
        return to_device(hidden, device), to_device(pooled, device)

    return Inputs(
        batches=images if needs_pixels else _with_masks(cache, stream(decode=False)),
        encode=lambda batch: to_device(cache.crops("latents", batch), device),
        embed_image=embed_image,
        text=text or embed_text,
        images=images,
    )


def _with_masks(cache: Cache, stream: Callable[[int], Iterator[Batch]]) -> Callable[[int], Iterator[Batch]]:
    """The batches with their masks, at the latents' size, where the loss uses masks."""
    if "masks" not in cache.stores:
        return stream
    return lambda start: (replace(batch, masks=cache.crops("masks", batch)) for batch in stream(start))
