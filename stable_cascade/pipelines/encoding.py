"""Prompts to embeddings, rows of different lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.models.clip import attended_tokens, encode_windows, prompt_windows

Embedded = tuple[Tensor, Tensor]
"""Hidden states (B, L, D) and pooled text (B, 1, P)."""


def encode_texts(
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    negatives: Sequence[str],
    device: torch.device,
    *,
    weighted: bool = False,
    windows: Sequence[int] | None = None,
) -> tuple[Embedded | None, Embedded | None]:
    """The embedded prompts and negative prompts, None for an empty list.

    What a prompt becomes depends on nothing but its text. A negative prompt gets windows of the empty prompt until it
    has as many as its prompt, so that guidance compares texts and not lengths.

    Args:
        windows: the prompts' windows, where they come embedded already.
    """
    own = [prompt_windows(tokenizer, prompt, weighted=weighted) for prompt in prompts]
    against = [prompt_windows(tokenizer, prompt, weighted=weighted) for prompt in negatives]
    counts = [len(one) for one in own] if own else list(windows or [1] * len(against))
    missing = [max(0, count - len(one)) for count, one in zip(counts, against, strict=False)]
    encoded = encode_windows(text_encoder, tokenizer, own + against, device, with_empty=any(missing))
    hidden = encoded.hidden
    for place, more in enumerate(missing, start=len(own)):
        if more:
            assert encoded.empty is not None
            hidden[place] = torch.cat([hidden[place], *[encoded.empty] * more])
    parts = slice(None, len(own)), slice(len(own), None)
    first, second = ((stacked(hidden[part]), encoded.pooled[part]) if hidden[part] else None for part in parts)
    return first, second


def window_counts(hidden: Tensor, tokenizer: Any) -> list[int]:
    """How many windows the rows of given embeddings span, zeros at their end left out."""
    attended = attended_tokens(hidden)
    lengths = [hidden.shape[1]] * len(hidden) if attended is None else attended.sum(1).tolist()
    return [-(-length // tokenizer.model_max_length) for length in lengths]


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one batch, zeros after the shorter ones. Shapes: (L_i, D) each -> (B, L, D)."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


def same_length(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches with zeros after the shorter one. Shapes: (B, L, D), (B, M, D) -> twice (B, max(L, M), D)."""
    length = max(one.shape[1], two.shape[1])
    first, second = (part if part.shape[1] == length else F.pad(part, (0, 0, 0, length - part.shape[1]))
                     for part in (one, two))  # fmt: skip
    return first, second
