"""Captions to the three tensors that every stage is conditioned on, cut to CLIP's length as trainings cut them.

Pipelines cut nothing: `prompt_windows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.transfer import to_device


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Any:
    """Token ids and attention mask, padded and cut to the tokenizer's length.

    Shapes: B captions -> `input_ids` and `attention_mask`, each (B, model_max_length).
    """
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def encode_prompts(
    text_encoder: Any,
    tokenizer: Any,
    captions: Sequence[str],
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, pooled projection and attention mask of the captions; gradients flow through the text encoder.

    The hidden states are those before CLIP's final norm (`hidden_states[-1]`), as the networks were trained with.

    Shapes: B captions -> (B, L, D), (B, 1, P), (B, L).
    """
    tokens = tokenize(tokenizer, captions)
    device = device if device is not None else text_encoder.device
    mask = to_device(tokens.attention_mask, device)
    output = text_encoder(to_device(tokens.input_ids, device), attention_mask=mask, output_hidden_states=True)
    return output.hidden_states[-1], output.text_embeds.unsqueeze(1), mask


class TextEmbedder(nn.Module):
    """The text encoder with its tokenizer, as one module: what a network in training is conditioned on."""

    def __init__(self, text_encoder: nn.Module, tokenizer: Any):
        super().__init__()
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    def forward(self, captions: Sequence[str], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states and pooled projection of the captions.

        Shapes: B captions -> (B, L, D), (B, 1, P).
        """
        hidden, pooled, _ = encode_prompts(self.text_encoder, self.tokenizer, captions, device)
        return hidden, pooled
