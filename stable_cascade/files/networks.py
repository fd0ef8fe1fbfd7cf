"""Names of the networks' weights: the original release's and ours, as data.

Every other name is the same in both. Nothing is computed: rows are split and joined, so that round trips are bitwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyMap:
    """How the names of one component differ.

    `renamed` pairs a part of the original name with ours. `split` pairs the end of the original name of a joined
    matrix with the ends of the names of its equal row groups, in order. `read` pairs further names, which other tools
    write, with ours; nothing is ever written so.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    split: tuple[tuple[str, tuple[str, ...]], ...] = ()
    read: tuple[tuple[str, str], ...] = ()


ATTENTION_SPLIT = tuple(
    (f"attention.attn.in_proj_{leaf}", tuple(f"attention.to_{part}.{leaf}" for part in "qkv"))
    for leaf in ("weight", "bias")
)
ATTENTION_RENAMED = (("attention.attn.out_proj.", "attention.to_out.0."),)
# ComfyUI splits the joined matrix when it loads a file, and saves it split.
COMFYUI_SPLIT = tuple((f"attention.attn.to_{part}.", f"attention.to_{part}.") for part in "qkv")

KEY_MAPS: dict[str, KeyMap] = {
    "prior": KeyMap(ATTENTION_RENAMED, ATTENTION_SPLIT, COMFYUI_SPLIT),
    "decoder": KeyMap(
        (*ATTENTION_RENAMED, ("clip_mapper.", "clip_txt_pooled_mapper.")), ATTENTION_SPLIT, COMFYUI_SPLIT
    ),
    "vqgan": KeyMap((("vquantizer.codebook.", "vquantizer.embedding."),)),
    "semantic_encoder": KeyMap(),
    "previewer": KeyMap(),
    "controlnet": KeyMap(),
}


def key_map(component: str) -> KeyMap:
    """The key map of a component.

    Raises:
        ValueError: there is no such component.
    """
    if component not in KEY_MAPS:
        nearest = difflib.get_close_matches(component, KEY_MAPS, n=1, cutoff=0.0)[0]
        raise ValueError(f"component {component!r} is none of {', '.join(KEY_MAPS)}; nearest: {nearest!r}")
    return KEY_MAPS[component]


def from_original(state_dict: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The weights under our names; names that are ours already stay.

    Row groups of a joined matrix are views of it.

    Raises:
        ValueError: there is no such component, or the rows of a joined matrix do not divide into equal groups.
    """
    keys = key_map(component)
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        joined = next((rule for rule in keys.split if name.endswith(rule[0])), None)
        if joined is None:
            _put(converted, _renamed(name, (*keys.renamed, *keys.read)), value, name)
            continue
        ending, parts = joined
        rows = value.shape[0] if value.ndim else 0
        if not rows or rows % len(parts):
            raise ValueError(f"{name} has {rows} rows, which {len(parts)} groups do not divide; is it a {component}?")
        for part, group in zip(parts, value.chunk(len(parts)), strict=True):
            _put(converted, name.removesuffix(ending) + part, group, name)
    return converted


def _put(converted: dict[str, Tensor], name: str, value: Tensor, origin: str) -> None:
    """Adds a weight; two names of one thing in a file would let the order decide.

    Raises:
        ValueError: the name is taken.
    """
    if name in converted:
        raise ValueError(f"{origin} means {name}, which the file has under another name too; remove one of them")
    converted[name] = value


def to_original(state_dict: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The weights under the original's names; names that are the original's already stay.

    Raises:
        ValueError: there is no such component, or a part of a joined matrix is missing.
    """
    keys = key_map(component)
    reverse = tuple((ours, original) for original, ours in keys.renamed)
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        joined = next(((rule, part) for rule in keys.split for part in rule[1] if name.endswith(part)), None)
        if joined is None:
            converted[_renamed(name, reverse)] = value
            continue
        (ending, parts), part = joined
        stem = name.removesuffix(part)
        if stem + ending not in converted:
            converted[stem + ending] = _join(state_dict, [stem + part for part in parts])
    return converted


def _join(state_dict: Mapping[str, Tensor], names: list[str]) -> Tensor:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"{missing[0]} is missing: the original keeps it in one matrix with {names[0]}")
    return torch.cat([state_dict[name] for name in names])


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
        if f".{old}" in name:
            return name.replace(f".{old}", f".{new}", 1)
    return name
