"""Writing the original's LoRA files: every layer of the filters, numbered; q, k and v as one update of rank 3r."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .factors import Factors, Joined, by_rank, flattened
from .names import Shapes
from .original import exact_filters, original_weight, positional_targets
from .part import Part
from .report import Report


def as_original(
    part: Part, shapes: Shapes, module_filters: Sequence[str] | None, report: Report
) -> tuple[dict[str, Tensor], list[str]]:
    """The numbered weights of an original file, and the filters whose layers they are.

    The original multiplies an update by 1 / rank, so alpha is put into `lora_up`. Split q, k and v become one update:
    of their own rank where they share `lora_down`, else block-diagonal, of their ranks' sum.

    Raises:
        ValueError: the layers are not those of any filters, or an update is none of the original's.
    """
    filters = exact_filters(shapes, part.layers, module_filters)
    tensors: dict[str, Tensor] = {}
    for number, names in enumerate(positional_targets(shapes, filters)):
        parts = [_factors(part, name) if f"{name}.lora_A.weight" in part.tensors else None for name in names]
        whole = by_rank(parts, [shapes[name][0] for name in names])
        tensors[f"weights.{number}.lora_down"] = whole.down.contiguous()
        tensors[f"weights.{number}.lora_up"] = whole.up.contiguous()
        _record(report, names, parts, whole)
    return tensors, filters


def original_token_tensors(deltas: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """`embeddings.indices` and `embeddings.embeddings`, what to add to which rows of the token embedding."""
    if not deltas:
        return {}
    ids = sorted(deltas)
    return {
        "embeddings.indices": torch.tensor(ids, dtype=torch.int64),
        "embeddings.embeddings": torch.stack([deltas[token] for token in ids]),
    }


def _factors(part: Part, name: str) -> Factors:
    down, up = part.tensors[f"{name}.lora_A.weight"], part.tensors[f"{name}.lora_B.weight"]
    if down.ndim > 2 and torch.equal(down, down[..., :1, :1].expand_as(down)):
        down = down[..., :1, :1]  # the original gives every tap of a convolution the same update
    matrices = flattened(down, up)
    if matrices is None:
        raise ValueError(
            f"updates '{name}' differently at each tap of its convolution, which no original file can hold; write "
            "another format"
        )
    return Factors(*matrices, part.alphas[name])


def _record(report: Report, names: Sequence[str], parts: Sequence[Factors | None], whole: Joined) -> None:
    """Says how the updates of one weight became one."""
    given = [one for one in parts if one is not None]
    rank, ranks = len(whole.down), [len(one.down) for one in given]
    padded = (
        f", padded to {rank} so that nothing is rounded" if rank > (ranks[0] if whole.shared else sum(ranks)) else ""
    )
    if not whole.shared:
        report.lower("exact")
        report.note(
            f"Split q, k and v became one update each, exactly, through rank {' + '.join(map(str, ranks))}{padded}."
        )
    elif padded:
        report.lower("exact")
        report.note(f"Alpha was put into lora_up, of rank {ranks[0]}{padded}.")
    elif any(one.alpha != 1 for one in given):
        report.lower("exact")
        report.note("Alpha was put into lora_up, as the original's is always 1.")
    if len(given) < len(names):
        absent = sorted({name.rpartition("_")[2] for name, one in zip(names, parts, strict=True) if one is None})
        report.note(f"The LoRA has no {', '.join(absent)} in {original_weight(names[0])}; its rows there are zeros.")
    if whole.error:
        dtype = whole.up.dtype
        report.lower("exact" if dtype in (torch.float32, torch.float64) else "rounded", whole.error)
        report.note(f"lora_up was rounded once to {str(dtype).removeprefix('torch.')}.")
