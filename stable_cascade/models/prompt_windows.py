"""Prompts of any length for a text encoder of fixed length: windows, encoded one by one and joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_cascade.wording import quoted

from .prompt_weights import SHOWN, read_weights

MOST_WINDOWS = 20

Window = list[tuple[int, float]]
"""Token ids with their weights, without the start and end tokens."""


@dataclass(frozen=True)
class EncodedPrompts:
    """What the text encoder made of several prompts.

    Shapes: hidden one (windows * L, D) per prompt; pooled (B, 1, P), of each prompt's first window; empty (L, D), the
    hidden states of the empty prompt, where they were asked for or weights needed them.
    """

    hidden: list[Tensor]
    pooled: Tensor
    empty: Tensor | None


def prompt_windows(tokenizer: Any, prompt: str, *, weighted: bool = False) -> list[Window]:
    """The prompt's tokens in windows that CLIP takes, words kept whole; the empty prompt is one empty window.

    Raises:
        ValueError: more than 20 windows, or a mistake in the weights.
    """
    room = tokenizer.model_max_length - 2
    windows: list[Window] = [[]]
    for text, weight in read_weights(prompt) if weighted else [(prompt, 1.0)]:
        for word in _words(tokenizer, text):
            if len(windows[-1]) + len(word) > room and windows[-1]:
                windows.append([])
            # A word longer than a window is the only one that is cut.
            while len(word) > room:
                windows[-1], word = [(token, weight) for token in word[:room]], word[room:]
                windows.append([])
            windows[-1] += [(token, weight) for token in word]
    if len(windows) > MOST_WINDOWS:
        raise ValueError(
            f"prompt {quoted(prompt, SHOWN)} needs {len(windows)} windows of {room} tokens; at most {MOST_WINDOWS}: "
            "shorten it"
        )
    return windows


def _words(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """Token ids, one list per word; a learned token is a word."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    learned = set(tokenizer.get_added_vocab().values())
    word: list[int] = []
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        word.append(token)
        if piece.endswith("</w>") or token in learned:
            yield word
            word = []
    if word:
        yield word


def encode_windows(
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[list[Window]],
    device: torch.device | str | None = None,
    *,
    with_empty: bool = False,
) -> EncodedPrompts:
    """Hidden states of every prompt, window after window, and pooled text of its first window.

    A weight moves a token's hidden state along the line from the empty prompt's at the same place; the pooled text
    stays. Tokens of weight 1 are left as they are, bit by bit.

    Source: ComfyUI weighs and joins in the same way; so does compel for weights above 1.
    """
    windows = [window for prompt in prompts for window in prompt]
    weights = _weights(windows, tokenizer.model_max_length)
    with_empty = with_empty or bool((weights != 1).any())
    device = device if device is not None else text_encoder.device
    ids, mask = _tensors(tokenizer, [*windows, []] if with_empty else windows)
    output = text_encoder(ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
    hidden, empty = output.hidden_states[-1], None
    if with_empty:
        hidden, empty = hidden[:-1], hidden[-1]
        hidden = _weigh(hidden, empty, weights.to(device))
    counts = [len(prompt) for prompt in prompts]
    first = [sum(counts[:i]) for i in range(len(counts))]
    pooled = output.text_embeds[torch.tensor(first, device=output.text_embeds.device)]
    return EncodedPrompts([part.flatten(0, 1) for part in hidden.split(counts)], pooled.unsqueeze(1), empty)


def _tensors(tokenizer: Any, windows: list[Window]) -> tuple[Tensor, Tensor]:
    """Token ids with start, end and padding, and the attention mask, as the tokenizer makes them.

    Shapes: n windows -> (n, model_max_length) twice.
    """
    length = tokenizer.model_max_length
    ids = torch.full((len(windows), length), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        tokens = [tokenizer.bos_token_id, *(token for token, _ in window), tokenizer.eos_token_id]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def _weights(windows: list[Window], length: int) -> Tensor:
    """The tokens' weights, 1 for start, end and padding. Shapes: n windows -> (n, length)."""
    weights = torch.ones(len(windows), length)
    for row, window in enumerate(windows):
        weights[row, 1 : len(window) + 1] = torch.tensor([weight for _, weight in window])
    return weights


def _weigh(hidden: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Shapes: (n, L, D), (L, D), (n, L) -> (n, L, D)."""
    wide, origin, weights = hidden.float(), empty.float(), weights[..., None]
    return torch.where(weights == 1, hidden, (origin + weights * (wide - origin)).to(hidden.dtype))


def attended_tokens(text: Tensor) -> Tensor | None:
    """Which tokens of each row count: those up to the last that is not zero. None where all do.

    Rows of different lengths share a batch by zeros at the end of the shorter ones, and nothing may look at these. A
    row of nothing but zeros is no padding; it says "no text".

    Shapes: (B, L, D) -> (B, L) bool.
    """
    if text.device.type == "meta":
        return None
    said = (text != 0).any(-1)
    attended = said.flip(1).cumsum(1).flip(1) > 0
    attended |= ~said.any(1, keepdim=True)
    return None if bool(attended.all()) else attended
