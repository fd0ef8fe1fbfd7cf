"""How the tools spell a layer's name, as data, and the way back to ours.

Flattened names are never taken apart: `down_blocks_0_2_attention_attn_to_q` is looked up among the spellings of every
layer that the network has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Size

Shapes = Mapping[str, Size]

# Ours -> what others write in its place. The first of each row is ComfyUI's and kohya's, the second OneTrainer's.
_ATTENTION = {
    ".attention.to_q": (".attention.attn.to_q", ".attention.attn.in_proj.0"),
    ".attention.to_k": (".attention.attn.to_k", ".attention.attn.in_proj.1"),
    ".attention.to_v": (".attention.attn.to_v", ".attention.attn.in_proj.2"),
    # kohya wrote `attn.to_out` before 2024-02-25.
    ".attention.to_out.0": (".attention.attn.out_proj", ".attention.attn.to_out", ".attention.to_out"),
}
_JOINED = (".attention.attn.in_proj", ".attention.attn.in_proj_weight")
JOINED_PARTS = (".attention.to_q", ".attention.to_k", ".attention.to_v")
"""Ends of our layers that are rows of one weight in the original, in their order."""


def spellings(name: str) -> list[str]:
    """Every way in which a tool writes a layer's name with dots, ours first."""
    for ours, others in _ATTENTION.items():
        if name.endswith(ours):
            return [name, *(name.removesuffix(ours) + other for other in others)]
    return [name]


def comfyui_name(name: str) -> str:
    """ComfyUI's and kohya's name of our layer."""
    return spellings(name)[1] if len(spellings(name)) > 1 else name


def flat(name: str) -> str:
    """A name with its dots turned into underscores."""
    return name.replace(".", "_")


def joined_name(name: str) -> str | None:
    """The layer of which this one is a third in the original: the block's name before `.attention`, else None."""
    part = next((part for part in JOINED_PARTS if name.endswith(part)), None)
    return None if part is None else name.removesuffix(part)


def spelled(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Spelling, with dots or flattened -> our layer, or our three where the spelling means q, k and v joined."""
    names = set(layers)
    table: dict[str, tuple[str, ...]] = {}
    for name in names:
        for spelling in spellings(name):
            table[spelling] = table[flat(spelling)] = (name,)
        block = joined_name(name)
        if block is not None and all(block + part in names for part in JOINED_PARTS):
            for ending in _JOINED:
                three = tuple(block + part for part in JOINED_PARTS)
                table[block + ending] = table[flat(block + ending)] = three
    return table


def ours(name: str) -> tuple[str, ...]:
    """Our layer, or our three, behind a name with dots, told by its end alone."""
    block = re.sub(r"\.attention\.attn\.in_proj(_weight)?$", "", name)
    if block != name:
        return tuple(block + part for part in JOINED_PARTS)
    for end, others in _ATTENTION.items():
        other = next((other for other in others if name.endswith(other)), None)
        if other is not None:
            return (name.removesuffix(other) + end,)
    return (name,)


def clip_layers(count: int, width: int, inner: int) -> dict[str, Size]:
    """Weight shapes of the layers of CLIP's text encoder that adapters go to."""
    sizes = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    layers = {
        f"text_model.encoder.layers.{number}.{part}": Size(size)
        for number in range(count)
        for part, size in sizes.items()
    }
    return {**layers, "text_projection": Size((width, width))}
