"""ComfyUI's checkpoints: several networks in one file, told apart by prefixes, taken apart and put together.

Stage C's holds the prior, the CLIP text encoder, the cascade's image encoder and previewer as a "VAE", and CLIP's
image encoder; Stage B's the decoder, the text encoder and Stage A.

Source: ComfyUI, comfy/supported_models.py (Stable_Cascade_C, Stable_Cascade_B), comfy/sd.py (VAE).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stable_cascade.components import WITH_WEIGHTS

from . import clip
from .networks import KEY_MAPS, from_original, to_original
from .signatures import component_of

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
    if not is_checkpoint(state_dict):
        component = component_of(state_dict)
        if component is None:
            return Split({}, dict(state_dict))
        return Split({component: dict(state_dict)})
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
    if component in clip.COMPONENTS:
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
