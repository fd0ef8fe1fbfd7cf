r"""Weights in prompts: `(words:1.3)`, `(words)` for 1.1, brackets in brackets, `\(` for a bracket that is text."""

from __future__ import annotations

import math
import re

from stable_cascade.wording import quoted

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
