"""The original release's LoRA files: weights by number, q, k and v as one, rows to add to the token embedding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stable_cascade.wording import quoted

from .keys import POSITIONAL, Shapes
from .parts import Factors, Joined, Part, Report, by_rank, flattened

# The original registers its modules in these orders; its LoRA files number the weights by them and name nothing.
_TOP_ORDER = (
    "effnet_mapper", "pixels_mapper", "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding",
    "down_blocks", "down_downscalers", "down_repeat_mappers", "up_blocks", "up_upscalers", "up_repeat_mappers", "clf",
)  # fmt: skip
_BLOCK_ORDER = (
    "depthwise", "channelwise", "mapper", "mapper_sca", "mapper_crp", "attention.to_out", "attention.to_q",
    "attention.to_k", "attention.to_v", "kv_mapper",
)  # fmt: skip

# What a positional file may hold when nobody says which filters it was trained with, most likely first.
_LIKELY_FILTERS = (
    (".attn",),
    (".attn", ".kv_mapper"),
    (".attn", ".channelwise"),
    (".attn", ".kv_mapper", ".channelwise"),
    (".channelwise",),
    (".kv_mapper",),
    ("_blocks",),
)


def original_weight(name: str) -> str:
    """The original's parameter behind one of our layers: q, k and v are rows of one weight there."""
    name, fused = re.subn(r"\.attention\.to_[qkv]$", ".attention.attn.in_proj_weight", name)
    if fused:
        return name
    return re.sub(r"\.attention\.to_out\.0$", ".attention.attn.out_proj", name) + ".weight"


def matching_modules(names: Iterable[str], filters: Sequence[str]) -> list[str]:
    """The layers whose name, ours or the original's, contains one of the filters."""
    return [name for name in names if any(word in f"{name} {original_weight(name)}" for word in filters)]


def filter_words(names: Iterable[str]) -> list[str]:
    """Every `.part` that a filter can match, for suggestions."""
    parts = {part for name in names for part in (*name.split("."), *original_weight(name).split(".")[:-1])}
    return sorted(f".{part}" for part in parts if not part.isdigit())


def positional_order(name: str) -> tuple[Any, ...]:
    """Sort key that puts our layers in the order in which the original numbers its LoRA weights."""
    parts = name.split(".")
    top = _TOP_ORDER.index(parts[0]) if parts[0] in _TOP_ORDER else len(_TOP_ORDER)
    numbers = [int(part) for part in parts if part.isdigit()]
    path = ".".join(part for part in parts[1:] if not part.isdigit())
    place = _BLOCK_ORDER.index(path) if path in _BLOCK_ORDER else -1
    return (top, *numbers[:2], place, *numbers[2:])


def positional_targets(names: Iterable[str], filters: Sequence[str]) -> list[list[str]]:
    """Our layers behind `weights.0`, `weights.1`, … of an original file; q, k and v share one entry."""
    groups: dict[str, list[str]] = {}
    for name in sorted(matching_modules(names, filters), key=positional_order):
        groups.setdefault(original_weight(name), []).append(name)
    return list(groups.values())


def exact_filters(names: Iterable[str], chosen: Iterable[str], given: Sequence[str] | None = None) -> list[str]:
    """Module filters that choose just these layers of a network, by the weights that the original numbers.

    Args:
        names: every layer of the network.
        chosen: the layers of the LoRA.
        given: filters to check instead of finding some.

    Raises:
        ValueError: no filters do, or the given ones choose others.
    """
    names, chosen = list(names), list(chosen)
    wanted = {original_weight(name) for name in chosen}

    def weights(words: Sequence[str]) -> set[str]:
        return {original_weight(name) for name in matching_modules(names, words)}

    # Filters that were given must choose just these layers.
    if given is not None:
        odd = sorted(weights(given) ^ wanted)
        if odd:
            has = "has" if odd[0] in wanted else "lacks"
            raise ValueError(f"{has} '{odd[0]}', unlike the layers that module_filters {list(given)} choose")
        return list(given)
    # Otherwise try the usual ones, then search for a set of words.
    for likely in _LIKELY_FILTERS:
        if weights(likely) == wanted:
            return list(likely)
    found = _cover(wanted, {word: weights([word]) for word in _words(chosen)})
    if found is None:
        raise ValueError(
            f"updates {len(chosen)} layers that no module_filters choose alone, and the original's format numbers all "
            "layers of its filters; train it with other filters, or write another format"
        )
    return found


def _words(names: Iterable[str]) -> list[str]:
    """Filters worth trying: the parts of the names of layers."""
    parts = {
        f".{part}" if place else part
        for name in names
        for spelling in (name, original_weight(name).removesuffix(".weight"))
        for place, part in enumerate(spelling.split("."))
        if not part.isdigit()
    }
    return sorted(parts, key=lambda word: (len(word), word))


def _cover(wanted: set[str], choices: Mapping[str, set[str]]) -> list[str] | None:
    """Few words that together choose what is wanted and nothing else; None where there are none."""
    left, found = set(wanted), []
    fitting = {word: chosen for word, chosen in choices.items() if chosen <= wanted}
    while left:
        best = max(fitting, key=lambda word: len(fitting[word] & left), default=None)
        if best is None or not fitting[best] & left:
            return None
        found.append(best)
        left -= fitting[best]
    return found


def from_original_lora(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    module_filters: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """PEFT's state dict of an original file; its scale is 1 / rank, so lora_alpha is 1.

    The fused q, k, v update is split: the three share `lora_down`, and each takes its rows of `lora_up`.

    Args:
        shapes: weight shape of every linear and convolution layer of the network.
        module_filters: the filters of the training; where the file does not store them, the likely ones are tried.

    Raises:
        ValueError: the weights do not fit the layers in number or shape.
    """
    # The file has no names: find the filters whose layers have these shapes.
    pairs = positional_pairs(state_dict)
    choices = [tuple(module_filters)] if module_filters else list(_LIKELY_FILTERS)
    problems = []
    for filters in choices:
        targets = positional_targets(shapes, filters)
        problem = _misfit(pairs, targets, shapes)
        if problem is None:
            break
        problems.append(problem)
    else:
        hint = "" if module_filters else "; pass the training's module_filters"
        raise ValueError(f"is an original LoRA with {len(pairs)} weights and does not fit: {problems[0]}{hint}")
    # Give each pair its layer's name; a joined matrix becomes q, k and v.
    result = {}
    for (down, up), names in zip(pairs, targets, strict=True):
        for name, rows in zip(names, up.chunk(len(names)), strict=True):
            result[f"{name}.lora_A.weight"] = _over_taps(down, shapes[name])
            result[f"{name}.lora_B.weight"] = rows.reshape(*rows.shape, *[1] * (len(shapes[name]) - 2)).contiguous()
    return result


def original_tokens(state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Token id -> what an original file adds to that row of the token embedding.

    Raises:
        ValueError: ids and rows do not fit each other.
    """
    if "embeddings.indices" not in state_dict and "embeddings.embeddings" not in state_dict:
        return {}
    ids, rows = state_dict.get("embeddings.indices"), state_dict.get("embeddings.embeddings")
    if ids is None or rows is None:
        raise ValueError("has one of embeddings.indices and embeddings.embeddings without the other")
    sound = ids.ndim == 1 and not ids.is_floating_point() and rows.ndim == 2 and len(rows) == len(ids)
    if not sound or not rows.is_floating_point() or bool((ids.long() < 0).any()):
        raise ValueError(
            f"has embeddings.indices {list(ids.shape)} and embeddings.embeddings {list(rows.shape)}; one token id for "
            "each row is needed"
        )
    return dict(zip(ids.tolist(), rows, strict=True))


def positional_pairs(state_dict: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(lora_down, lora_up) of `weights.0`, `weights.1`, …

    Raises:
        ValueError: one is missing, or the two of a pair do not fit each other.
    """
    numbers = {int(found[1]) for found in map(POSITIONAL.fullmatch, state_dict) if found}
    pairs = []
    # Numbers without gaps, two factors each, of one rank.
    for number in range(len(numbers)):
        down, up = (state_dict.get(f"weights.{number}.lora_{part}") for part in ("down", "up"))
        if down is None or up is None:
            part = "down" if down is None else "up"
            raise ValueError(f"lacks 'weights.{number}.lora_{part}'; its weights must be numbered without gaps")
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not len(down):
            raise ValueError(
                f"has weights.{number} with lora_down {list(down.shape)} and lora_up {list(up.shape)}; "
                "(rank, inputs) and (outputs, rank) are needed"
            )
        if not (down.is_floating_point() and up.is_floating_point()):
            raise ValueError(f"has weights.{number} as {quoted(down.dtype)}, and floating-point values are needed")
        pairs.append((down, up))
    return pairs


def _misfit(
    pairs: list[tuple[Tensor, Tensor]], targets: list[list[str]], shapes: Mapping[str, torch.Size]
) -> str | None:
    """Why these weights do not belong to these layers, or None when they do."""
    if len(pairs) != len(targets):
        return f"the network has {len(targets)} matching weights"
    for number, ((down, up), names) in enumerate(zip(pairs, targets, strict=True)):
        rows, columns = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        if (up.shape[0], down.shape[1]) != (rows, columns):
            place = original_weight(names[0])
            return f"weights.{number} is {up.shape[0]}x{down.shape[1]}, {place} is {rows}x{columns}"
    return None


def _over_taps(down: Tensor, shape: torch.Size) -> Tensor:
    """`lora_down` as PEFT's first factor; a convolution gets the same values at every tap, as the original does."""
    taps = shape[2:]
    return down.reshape(*down.shape, *[1] * len(taps)).expand(*down.shape, *taps).contiguous()


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
    # How the scale, and q, k and v, were put into one pair.
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
    # What was filled up, and what was rounded.
    if len(given) < len(names):
        absent = sorted({name.rpartition("_")[2] for name, one in zip(names, parts, strict=True) if one is None})
        report.note(f"The LoRA has no {', '.join(absent)} in {original_weight(names[0])}; its rows there are zeros.")
    if whole.error:
        dtype = whole.up.dtype
        report.lower("exact" if dtype in (torch.float32, torch.float64) else "rounded", whole.error)
        report.note(f"lora_up was rounded once to {str(dtype).removeprefix('torch.')}.")
