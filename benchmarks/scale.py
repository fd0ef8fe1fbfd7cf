"""What is measured at which size: scaled-down networks on a CPU, the released ones on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stable_cascade.files.presets import PRESETS

from .proxies import DECODER, PRIOR


@dataclass(frozen=True)
class Scale:
    """Sizes, types and how often a row is repeated."""

    name: str
    device: str
    dtype: torch.dtype
    prior: dict[str, Any]
    decoder: dict[str, Any]
    semantic: int
    vq: int
    rounds: int
    slow: dict[str, int]
    """The rounds of the rows that take longer than the others."""


CPU = Scale("117M prior, 100M decoder", "cpu", torch.float32, PRIOR, DECODER, 24, 64, 7, {"drawing": 2, "training": 3})
GPU = Scale(
    "released", "cuda", torch.bfloat16, PRESETS["prior"]["3.6B"], PRESETS["decoder"]["3B"], 24, 256, 15,
    {"drawing": 5, "training": 9},
)  # fmt: skip
QUICK = Scale("117M prior, quick", "cpu", torch.float32, PRIOR, DECODER, 12, 32, 2, {"drawing": 1, "training": 1})
"""A look at whether every row runs; its figures mean little."""
