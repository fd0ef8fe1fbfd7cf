"""Names and layouts of LoRA files, as data: which tool writes which keys, and what they mean on our networks.

Inside the package a LoRA is always PEFT's state dict, `<module>.lora_A.weight` and `<module>.lora_B.weight`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COMPONENTS = ("prior", "decoder", "text_encoder")
METADATA_KEY = "lora_adapter_metadata"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"

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


def layout(state_dict: Mapping[str, Tensor]) -> str:
    """Which tool's key format this is: `peft` or `original`.

    Raises:
        ValueError: neither.
    """
    if any(re.match(r"weights\.\d+\.lora_(up|down)$", key) for key in state_dict):
        return "original"
    if any(".lora_A." in key for key in state_dict):
        return "peft"
    first = next(iter(state_dict), "nothing at all")
    raise ValueError(f"LoRA key '{first}' is of no known format; expected '….lora_A.weight' or 'weights.0.lora_down'")


def split_components(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries by component, without its prefix; entries without a prefix belong to the prior."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        component, key = (head, rest) if head in COMPONENTS else ("prior", key)
        parts.setdefault(component, {})[key] = value
    return parts


def join_components(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The reverse of `split_components`."""
    return {f"{component}.{key}": value for component, values in parts.items() for key, value in values.items()}


def read_metadata(header: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """LoraConfig values by component from a safetensors header, empty when there are none."""
    text = (header or {}).get(METADATA_KEY)
    return split_components(json.loads(text)) if text else {}


def write_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A safetensors header with the LoraConfig values of each component, in diffusers' layout."""
    values = {
        component: {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        for component, config in configs.items()
    }
    return {"format": "pt", METADATA_KEY: json.dumps(join_components(values), indent=2, sort_keys=True)}


def from_original_lora(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    module_filters: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """PEFT's state dict of an original file; its scale is 1 / rank, so lora_alpha is 1.

    The fused q, k, v update is split: the three share `lora_down`, and each takes its rows of `lora_up`.

    Args:
        shapes: weight shape of every linear and convolution layer of the network.
        module_filters: the filters of the training; the file does not store them, the likely ones are tried.

    Raises:
        ValueError: the weights do not fit the layers in number or shape.
    """
    pairs = _positional_pairs(state_dict)
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
        raise ValueError(f"original LoRA with {len(pairs)} weights does not fit: {problems[0]}{hint}")
    result = {}
    for (down, up), names in zip(pairs, targets, strict=True):
        for name, rows in zip(names, up.chunk(len(names)), strict=True):
            result[f"{name}.lora_A.weight"] = _over_taps(down, shapes[name])
            result[f"{name}.lora_B.weight"] = rows.reshape(*rows.shape, *[1] * (len(shapes[name]) - 2)).contiguous()
    return result


def original_tokens(state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Token id -> what an original file adds to that row of the token embedding."""
    if "embeddings.indices" not in state_dict:
        return {}
    return dict(zip(state_dict["embeddings.indices"].tolist(), state_dict["embeddings.embeddings"], strict=True))


def _positional_pairs(state_dict: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    count = sum(key.startswith("weights.") for key in state_dict) // 2
    try:
        return [(state_dict[f"weights.{i}.lora_down"], state_dict[f"weights.{i}.lora_up"]) for i in range(count)]
    except KeyError as missing:
        raise ValueError(f"original LoRA lacks {missing}; its weights must be numbered without gaps") from None


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
