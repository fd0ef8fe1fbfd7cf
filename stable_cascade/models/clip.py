r"""Prompts and images for CLIP's encoders.

Trainings cut a caption to CLIP's length, as the original does (`encode_prompts`). Pipelines cut nothing: a prompt of
any length becomes windows that are encoded one by one and joined (`prompt_windows`, `encode_windows`), and may weight
its words: `(words:1.3)`, `(words)` for 1.1, brackets in brackets, `\(` for a bracket that is text (`read_weights`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.transfer import to_device
from stable_cascade.wording import quoted

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(pixels: Tensor, size: int) -> Tensor:
    """Short side resized to `size` (bicubic, antialiased), centre crop, CLIP's normalisation.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 3, size, size).

    Source: Radford et al. 2021, the released preprocessing.
    """
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(pixels.float(), size=resized, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


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


WEIGHT_OF_BRACKETS = 1.1
LARGEST_WEIGHT = 10.0
DEEPEST = 20
SHOWN = 60
"""Characters of a prompt in a message."""

Piece = tuple[str, float]
"""Text with its weight."""

_TOKEN = re.compile(r"\\(?P<escaped>[()\\:])|:(?P<weight>[^()\\:]*)\)|(?P<bracket>[()])|(?P<text>[^()\\:]+|[\\:])")


def read_weights(prompt: str) -> list[Piece]:
    """The prompt's text in pieces with their weights, without the marks; weights of brackets in brackets multiply.

    Neighbours of one weight are one piece, so that a prompt with the weight 1 everywhere is its plain text.

    Raises:
        ValueError: a bracket without its partner, a weight that is no number from 0 to 10, or brackets too deep.
    """
    pieces: list[Piece] = []
    open_at: list[int] = []
    # An opening bracket remembers the piece it begins at; a closing one multiplies all pieces since then.
    for match in _TOKEN.finditer(prompt):
        closes = match["bracket"] == ")" or match["weight"] is not None
        if match["bracket"] == "(":
            open_at.append(len(pieces))
            if len(open_at) > DEEPEST:
                raise ValueError(f"{_named(prompt)} has brackets more than {DEEPEST} deep; write (words:1.3)")
        elif closes and not open_at:
            raise ValueError(f"{_named(prompt)} has a ')' without its '('; write \\) for the character")
        elif closes:
            weight = WEIGHT_OF_BRACKETS if match["weight"] is None else _number(match["weight"], prompt)
            start = open_at.pop()
            pieces[start:] = [(text, _bounded(old * weight, prompt)) for text, old in pieces[start:]]
        else:
            pieces.append((match["escaped"] or match["text"], 1.0))
    if open_at:
        raise ValueError(f"{_named(prompt)} has a '(' without its ')'; write \\( for the character")
    return _joined(pieces)


def _number(text: str, prompt: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= LARGEST_WEIGHT:
        raise ValueError(
            f"{_named(prompt)} has the weight {quoted(text, SHOWN)}, which is no number from 0 to "
            f"{LARGEST_WEIGHT:g}; write (words:1.3), or \\: for the character"
        )
    return weight


def _bounded(weight: float, prompt: str) -> float:
    if weight > LARGEST_WEIGHT:
        raise ValueError(f"{_named(prompt)} has weights that multiply to {weight:g}; at most {LARGEST_WEIGHT:g}")
    return weight


def _named(prompt: str) -> str:
    return f"prompt {quoted(prompt, SHOWN)}"


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


MOST_WINDOWS = 20

Window = list[tuple[int, float]]
"""Token ids with their weights, without the start and end tokens."""


@dataclass(frozen=True)
class EncodedPrompts:
    """The text encoder's output for several prompts.

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
