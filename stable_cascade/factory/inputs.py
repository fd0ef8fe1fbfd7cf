"""What Stage C's trainings are fed with: latents and embeddings, computed when needed or read from the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stable_cascade.data import Batch, SampleIndex, SampleStream
from stable_cascade.models.clip import TextEmbedder
from stable_cascade.objectives.denoising import chosen
from stable_cascade.objectives.prior import EmbedText
from stable_cascade.transfer import to_device

from .cache import Cache, fill_cache
from .clip import frozen_text, image_embedder
from .data import batches, shown
from .networks import frozen


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
