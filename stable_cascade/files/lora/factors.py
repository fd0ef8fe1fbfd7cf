"""Arithmetic on the two factors of an update: a scale put into the second, several updates as one, and the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    given = [part for part in parts if part is not None]
    first = given[0]
    shared = all(part.down.dtype == first.down.dtype and torch.equal(part.down, first.down) for part in given)
    least = len(first.down) if shared else sum(len(part.down) for part in given)
    rank = least
    ups, error = _ups(given, rank)
    if error and all(part.up.dtype in HALF for part in given):
        rank = next((more for more in range(least, 2 * least + 1) if _is_exact(given, more)), least)
        ups, error = _ups(given, rank)
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
