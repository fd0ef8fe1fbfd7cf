"""Names of the networks' weights: the original release's and ours, as data.

Every other name is the same in both. Nothing is computed: rows are split and joined, so that round trips are bitwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stable_cascade.components import CLIP, WITH_WEIGHTS

from . import clip
from .signatures import component_of


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


T = TypeVar("T")
NETWORK = "model.diffusion_model."
STAGES = {
    "prior": ("prior", "text_encoder", "semantic_encoder", "previewer", "image_encoder"),
    "decoder": ("decoder", "text_encoder", "vqgan"),
}
"""Network -> what a whole checkpoint of its stage holds."""

# The first prefix that fits. ComfyUI's own VAE files have the names behind `vae.` alone.
_PREFIXES = (
    ("text_encoder.clip_g.transformer.", "text_encoder"),
    ("text_encoder.clip_g.", "text_encoder"),
    ("clip_l_vision.", "image_encoder"),
    ("vae.encoder.", "semantic_encoder"),
    ("vae.previewer.", "previewer"),
    ("vae.", "vae"),
    ("encoder.backbone.", "semantic_encoder"),
    ("encoder.mapper.", "semantic_encoder"),
    ("encoder.mean", "semantic_encoder"),
    ("encoder.std", "semantic_encoder"),
    ("previewer.blocks.", "previewer"),
)
_KEPT = {"encoder.backbone.": "backbone.", "encoder.mapper.": "mapper.", "encoder.mean": "mean", "encoder.std": "std",
         "previewer.blocks.": "blocks."}  # fmt: skip
_PIXEL_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What ComfyUI stores beside the image encoder; here these are values of its config."""


@dataclass(frozen=True)
class Split(Generic[T]):
    """Entries by component under the names that the component has alone; `left` belongs to none."""

    parts: dict[str, dict[str, T]] = field(default_factory=dict)
    left: dict[str, T] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One network's weights under our names, and the constants of its file that need no place here."""

    weights: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether names have ComfyUI's prefixes."""
    return any(name.startswith((NETWORK, *(prefix for prefix, _ in _PREFIXES))) for name in names)


def split_checkpoint(state_dict: Mapping[str, T]) -> Split[T]:
    """The parts of a ComfyUI file, of one network or several, by component; values may be anything.

    A file without any of the prefixes is one part, if its names are those of a network.
    """
    # A file of one network has no prefixes.
    if not is_checkpoint(state_dict):
        component = component_of(state_dict)
        if component is None:
            return Split({}, dict(state_dict))
        return Split({component: dict(state_dict)})
    # Group by prefix.
    groups: dict[str, dict[str, T]] = {}
    left: dict[str, T] = {}
    for name, value in state_dict.items():
        if name.startswith(NETWORK):
            groups.setdefault("network", {})[name.removeprefix(NETWORK)] = value
            continue
        prefix, component = next((rule for rule in _PREFIXES if name.startswith(rule[0])), ("", ""))
        if component:
            groups.setdefault(component, {})[_KEPT.get(prefix, "") + name.removeprefix(prefix)] = value
        else:
            left[name] = value
    # A group without a name of its own is known by its tensors.
    split: Split[T] = Split({}, left)
    for name, group in groups.items():
        found = component_of(group) if name in ("network", "vae") else name
        if found is None:
            prefix = NETWORK if name == "network" else "vae."
            left.update({prefix + key: value for key, value in group.items()})
        else:
            split.parts[found] = group
    return Split({name: split.parts[name] for name in WITH_WEIGHTS if name in split.parts}, left)


def to_ours(part: Mapping[str, Tensor], component: str) -> Part:
    """A part of a checkpoint, or a whole bare file, under our names.

    Raises:
        ValueError: a joined matrix does not divide, or the pixel statistics beside the image encoder are not its own.
    """
    if component in CLIP:
        return Part(*clip.from_any(part, component))
    weights = from_original(part, component)
    constants = {}
    if component == "semantic_encoder":
        constants = {name: weights.pop(name) for name in _PIXEL_STATISTICS if name in weights}
        for name, value in constants.items():
            if not torch.allclose(value.float().cpu(), torch.tensor(_PIXEL_STATISTICS[name]), atol=4e-3):
                known = _PIXEL_STATISTICS[name]
                raise ValueError(
                    f"the image encoder's pixel {name} is {value.tolist()}, not {known}; it is another one"
                )
    return Part(weights, constants)


def to_bare(weights: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """Our names -> those of the component's own file: the original's, or transformers' for CLIP."""
    return to_original(weights, component) if component in KEY_MAPS else dict(weights)


def merge_checkpoint(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A ComfyUI file of networks under our names: prefixed, as its loaders take it; joined matrices stay joined.

    Raises:
        ValueError: there is neither a prior nor a decoder, or both, or a part that their checkpoints do not have.
    """
    networks = [name for name in STAGES if name in parts]
    if len(networks) != 1:
        have = ", ".join(networks) or "neither"
        raise ValueError(f"a ComfyUI checkpoint holds the prior or the decoder, and here is {have}; name one of them")
    foreign = [name for name in parts if name not in STAGES[networks[0]]]
    if foreign:
        allowed = ", ".join(STAGES[networks[0]])
        raise ValueError(f"a ComfyUI checkpoint of the {networks[0]} has no {foreign[0]}; it holds {allowed}")
    merged: dict[str, Tensor] = {}
    for component, weights in parts.items():
        merged |= _prefixed(component, weights, alone="semantic_encoder" not in parts)
    return merged


def _prefixed(component: str, weights: Mapping[str, Tensor], *, alone: bool) -> dict[str, Tensor]:
    """One component under a checkpoint's names; a previewer `alone` lies where ComfyUI looks for one."""
    bare = to_bare(weights, component)
    if component == "text_encoder":
        # Every version of ComfyUI reads the projection in OpenCLIP's way, the first ones in no other.
        projection = bare.pop("text_projection.weight", None)
        named = {f"text_encoder.clip_g.transformer.{name}": value for name, value in bare.items()}
        if projection is not None:
            named["text_encoder.clip_g.text_projection"] = projection.t().contiguous()
        return named
    prefixes = {
        "semantic_encoder": "vae.encoder.",
        "previewer": "vae." if alone else "vae.previewer.",
        "vqgan": "vae.",
    }
    prefix = prefixes.get(component, "clip_l_vision." if component == "image_encoder" else NETWORK)
    named = {prefix + name: value for name, value in bare.items()}
    if component == "semantic_encoder":
        named |= {prefix + name: torch.tensor(values) for name, values in _PIXEL_STATISTICS.items()}
    return named
