"""Names of CLIP's encoders: OpenCLIP's, ComfyUI's and transformers', which are ours.

Nothing is computed: names change, row groups are split and joined, matrices transposed; round trips are bitwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# OpenCLIP's name -> transformers', without `visual.` and `text_model.` / `vision_model.`.
_TABLES = {
    "text_encoder": (
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("ln_final.weight", "text_model.final_layer_norm.weight"),
        ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ),
    "image_encoder": (
        ("class_embedding", "vision_model.embeddings.class_embedding"),
        ("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("ln_pre.weight", "vision_model.pre_layrnorm.weight"),
        ("ln_pre.bias", "vision_model.pre_layrnorm.bias"),
        ("ln_post.weight", "vision_model.post_layernorm.weight"),
        ("ln_post.bias", "vision_model.post_layernorm.bias"),
    ),
}
_LAYER = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)
_MODEL = {"text_encoder": "text_model", "image_encoder": "vision_model"}
_PROJECTION = {
    "text_encoder": ("text_projection", "text_projection.weight"),
    "image_encoder": ("proj", "visual_projection.weight"),
}
_PARTS = ("q", "k", "v")
_SPLIT = re.compile(r"(?:^|\.)self_attn\.[qkv]_proj\.(weight|bias)$")

CONSTANTS = ("logit_scale", "attn_mask", "position_ids")
"""Ends of names of what OpenCLIP, ComfyUI and old transformers store beside the weights and no encoder here needs."""


def from_any(state_dict: Mapping[str, Tensor], component: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights in transformers' names, from any of the three; and the constants, which have no place there.

    Raises:
        ValueError: the rows of a joined matrix do not divide by three, or the projection is no matrix.
    """
    table = dict(_TABLES[component])
    bare, ours = _PROJECTION[component]
    weights, constants = {}, {}
    # Constants apart; the projection, which OpenCLIP stores transposed; then the tables; then the layers, by number.
    for name, value in state_dict.items():
        short = name.removeprefix("visual.") if component == "image_encoder" else name
        if short.rpartition(".")[2] in CONSTANTS:
            constants[name] = value
        elif short == bare:
            if value.ndim != 2:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; a projection is a matrix")
            weights[ours] = value.t().contiguous()
        elif short in table:
            weights[table[short]] = value
        else:
            weights |= _layer_to_ours(short, value, component)
    return weights, constants


def to_openclip(state_dict: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The weights in OpenCLIP's names, from transformers'.

    Raises:
        ValueError: one of a layer's three projections is missing.
    """
    reverse = {ours: theirs for theirs, ours in _TABLES[component]}
    bare, ours = _PROJECTION[component]
    prefix = "visual." if component == "image_encoder" else ""
    weights: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name == ours:
            weights[prefix + bare] = value.t().contiguous()
            continue
        key = prefix + reverse.get(name, _layer_name(name, component))
        if key not in weights:
            weights[key] = _joined(state_dict, name) if "attn.in_proj_" in key else value
    return weights


def _layer_to_ours(name: str, value: Tensor, component: str) -> dict[str, Tensor]:
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if not found:
        return {name: value}
    stem, rest = f"{_MODEL[component]}.encoder.layers.{found[1]}.", found[2]
    if rest.startswith("attn.in_proj_"):
        leaf = rest.removeprefix("attn.in_proj_")
        if value.ndim == 0 or value.shape[0] % 3:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, which three projections do not divide")
        return {f"{stem}self_attn.{p}_proj.{leaf}": rows for p, rows in zip(_PARTS, value.chunk(3), strict=True)}
    for theirs, ours in _LAYER:
        if rest.startswith(theirs):
            return {stem + ours + rest.removeprefix(theirs): value}
    return {name: value}


def _layer_name(name: str, component: str) -> str:
    """OpenCLIP's name of a layer's weight; that of the three projections is the same."""
    found = re.fullmatch(rf"{_MODEL[component]}\.encoder\.layers\.(\d+)\.(.+)", name)
    if not found:
        return name
    stem, rest = f"transformer.resblocks.{found[1]}.", found[2]
    split = _SPLIT.search(rest)
    if split:
        return f"{stem}attn.in_proj_{split[1]}"
    return next((stem + theirs + rest.removeprefix(ours) for theirs, ours in _LAYER if rest.startswith(ours)), name)


def _joined(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The three projections of a layer, one of which has this name, as one matrix."""
    names = [_SPLIT.sub(rf".self_attn.{part}_proj.\1", name) for part in _PARTS]
    missing = [one for one in names if one not in state]
    if missing:
        raise ValueError(f"{missing[0]} is missing: OpenCLIP keeps it in one matrix with {name}")
    return torch.cat([state[one] for one in names])
