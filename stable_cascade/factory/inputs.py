"""What Stage C's trainings are fed with, whoever makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_cascade.data import Batch
from stable_cascade.data.images import in_unit_range
from stable_cascade.models.clip import TextEmbedder
from stable_cascade.objectives.prior import EmbedText

from .clip import text_encoder
from .networks import on_demand


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


def shown(batch: Batch, device: torch.device) -> Tensor:
    """The batch's pixels on the device.

    They travel as stored, bytes mostly, while the host goes on, and become floats there.

    Shapes: -> (B, 3, H, W) float32 in [0, 1].
    """
    assert batch.pixels is not None
    return in_unit_range(batch.pixels.to(device, non_blocking=True))


def frozen_text(config: Any, device: torch.device) -> EmbedText:
    """The config's text encoder as a function without gradients."""
    tokenizer, encoder = text_encoder(config, dtype=getattr(torch, config.dtype))
    embedder = TextEmbedder(on_demand(config, encoder, device), tokenizer)

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = embedder(captions, device)
        return hidden, pooled

    return embed
