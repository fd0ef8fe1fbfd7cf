"""What a LoRA file is in memory: the layers of one component, their factors, and the report of a conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor

from .metadata import alpha_of, rank_of

TENSORS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "dora_scale")
"""What a layer may have, in PEFT's words; the last is a magnitude as all others write it."""


@dataclass(frozen=True)
class Part:
    """One component's update under our names: PEFT's tensors, and by what each layer's update is multiplied.

    Attributes:
        tensors: `<layer>.lora_A.weight`, `.lora_B.weight`; with DoRA `.lora_magnitude_vector`, or `.dora_scale` where
            the magnitude is that of the inputs, which PEFT does not know.
        alphas: layer -> alpha; the update is multiplied by alpha / rank.
        config: LoraConfig values that came with the file, empty where none did; the alphas count where they differ.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers that are updated."""
        return [key.removesuffix(".lora_A.weight") for key in self.tensors if key.endswith(".lora_A.weight")]

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank."""
        return {layer: len(self.tensors[f"{layer}.lora_A.weight"]) for layer in self.layers}

    @property
    def keeps_config(self) -> bool:
        """Whether the LoraConfig that came with the file means the same ranks and alphas."""
        had = self.config
        return bool(had.get("lora_alpha")) and all(
            (rank_of(layer, had), alpha_of(layer, rank, had)) == (rank, self.alphas[layer])
            for layer, rank in self.ranks.items()
        )

    @property
    def scales(self) -> dict[str, float]:
        """Layer -> what its update is multiplied by."""
        return {layer: self.alphas[layer] / rank for layer, rank in self.ranks.items()}


def is_depthwise(shape: Size) -> bool:
    """Whether a layer of this weight shape is a convolution of each channel alone."""
    return len(shape) == 4 and shape[1] == 1 and shape[0] > 1


def layers_of(part: Mapping[str, Any]) -> list[str]:
    """The layers that have a first factor."""
    return list(dict.fromkeys(key.removesuffix(".lora_A.weight") for key in part if key.endswith(".lora_A.weight")))


HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Factors:
    """An update `alpha / R * up @ down` of a weight. Shapes: down (R, I), up (O, R)."""

    down: Tensor
    up: Tensor
    alpha: float


@dataclass(frozen=True)
class Scaled:
    """A tensor after a multiplication, and how far at most a value is off by rounding, relative to itself."""

    value: Tensor
    error: float


@dataclass(frozen=True)
class Joined:
    """Several updates as one, `1 / R * up @ down`, the rounding error, and whether they shared their first factor."""

    down: Tensor
    up: Tensor
    error: float
    shared: bool


def scaled(value: Tensor, factor: float) -> Scaled:
    """A tensor times a number, in its own type.

    Shapes: (…) -> (…).

    Raises:
        ValueError: a value is beyond that type.
    """
    if factor == 1:
        return Scaled(value, 0.0)
    exact = value.double() * factor
    result = exact.to(value.dtype)
    if not result.isfinite().all():
        raise ValueError(
            f"has values that times the scale, {factor:g}, are beyond {str(value.dtype).removeprefix('torch.')}; "
            "write a format that keeps alpha, such as kohya"
        )
    gap = ((result.double() - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)).max()
    return Scaled(result, float(gap) if value.numel() else 0.0)


def by_rank(parts: Sequence[Factors | None], rows: Sequence[int]) -> Joined:
    """Several updates of row groups as one whose scale is 1 / rank.

    Where all parts share their first factor the rank stays; otherwise the second factor is block-diagonal, and the
    ranks add up. In half precision, in which most factors would round visibly, the rank is padded with zeros up to one
    that makes the factor a power of two.

    Args:
        parts: the updates, None where a row group has none.
        rows: how many rows each group has.
    """
    # Updates that share their first factor need its rank once; others add up.
    given = [part for part in parts if part is not None]
    first = given[0]
    shared = all(part.down.dtype == first.down.dtype and torch.equal(part.down, first.down) for part in given)
    least = len(first.down) if shared else sum(len(part.down) for part in given)
    rank = least
    ups, error = _ups(given, rank)
    # A scale of alpha / rank that half precision cannot hold may be exact at a larger rank.
    if error and all(part.up.dtype in HALF for part in given):
        rank = next((more for more in range(least, 2 * least + 1) if _is_exact(given, more)), least)
        ups, error = _ups(given, rank)
    # Lay the factors out block by block, zeros between.
    down = first.down.new_zeros(rank, first.down.shape[1])
    up = first.up.new_zeros(sum(rows), rank)
    column, used = 0, iter(ups)
    for place, (part, count) in enumerate(zip(parts, rows, strict=True)):
        if part is None:
            continue
        start = sum(rows[:place])
        down[column : column + len(part.down)] = part.down
        up[start : start + count, column : column + len(part.down)] = next(used)
        column += 0 if shared else len(part.down)
    return Joined(down, up, error, shared)


def _ups(parts: Sequence[Factors], rank: int) -> tuple[list[Tensor], float]:
    """The second factors for an alpha of 1 and that rank, and the largest error."""
    found = [scaled(part.up, part.alpha * rank / len(part.down)) for part in parts]
    return [one.value for one in found], max(one.error for one in found)


def _is_exact(parts: Sequence[Factors], rank: int) -> bool:
    return all(abs(math.frexp(part.alpha * rank / len(part.down))[0]) == 0.5 for part in parts)


def flattened(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """Two factors of a 1x1 convolution, or of a linear layer, as matrices; None for larger kernels.

    Shapes: (R, I, 1, 1), (O, R, 1, 1) -> (R, I), (O, R).
    """
    if any(size != 1 for size in (*down.shape[2:], *up.shape[2:])):
        return None
    return down.reshape(down.shape[:2]), up.reshape(up.shape[:2])


EXACTNESS = ("bitwise", "exact", "rounded")
"""Every factor keeps its bits; factors are put together, or rounded once to float32; rounded to less than float32."""


@dataclass
class Report:
    """What a conversion did. It drops nothing: what a format cannot hold is refused.

    Attributes:
        source, source_format: what was read.
        target, format: what was written.
        layers: component -> number of layers.
        tokens: names of the learned tokens.
        exactness: one of `EXACTNESS`.
        error: how far a factor's value is off at most by rounding, relative to itself.
        notes: what else is worth knowing, one sentence each.
        files: everything that was written.
    """

    source: str
    source_format: str
    target: str
    format: str
    layers: dict[str, int] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    exactness: str = "bitwise"
    error: float = 0.0
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def lower(self, exactness: str, error: float = 0.0) -> None:
        """Records that something is no more faithful than this."""
        self.exactness = max(self.exactness, exactness, key=EXACTNESS.index)
        self.error = max(self.error, error)

    def note(self, sentence: str) -> None:
        """Adds a note once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        parts = [f"{count} layers of the {component}" for component, count in self.layers.items()]
        parts += [f"token {name}" for name in self.tokens]
        rounding = f", values off by at most {self.error:.1e} of themselves" if self.error else ""
        lines = [f"{self.source_format} -> {self.format}: {', '.join(parts)}; {self.exactness}{rounding}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
