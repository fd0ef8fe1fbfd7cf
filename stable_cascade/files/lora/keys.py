"""LoRA files' names of layers: what each tool calls them, how a file's format is known, and our names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Size

from stable_cascade.wording import quoted

COMPONENTS = ("prior", "decoder", "text_encoder")

FORMATS = {
    "peft": "PEFT and diffusers: `prior.<layer>.lora_A.weight`, alphas in the header",
    "original": "the original release: `weights.0.lora_down`, numbered, q, k and v in one",
    "kohya": "kohya's stable-cascade branch: `lora_unet_<layer>.lora_down.weight`, `.alpha`",
    "onetrainer": "OneTrainer, its legacy format, which ComfyUI reads: `lora_prior_unet_<layer>.lora_down.weight`",
    "onetrainer_diffusers": "OneTrainer, its diffusers format: `prior.<layer>.lora_A.weight`, alpha in the values",
    "comfyui": "ComfyUI: `diffusion_model.<layer>.lora_up.weight`, `.alpha`",
}
"""What is read and written."""

READ_ONLY = {
    "onetrainer_kohya": "OneTrainer, its kohya format: `lora_unet_…_attn_in_proj_0`, which kohya does not know",
    "onetrainer_original": "OneTrainer, its original format: `….attn.in_proj.0.lora_A.weight`; not the original's",
    "onetrainer_comfyui": "OneTrainer, its ComfyUI format: `diffusion_model.….attn.in_proj.0.lora_A.weight`",
    "onetrainer_internal": "OneTrainer, its backups: `prior.<layer>.lora_down.weight`, `.alpha`",
    "lycoris": "LyCORIS, algorithm LoRA: `lycoris_<layer>.lora_down.weight`",
}
"""What is read as well."""

ALIASES = {"diffusers": "peft", "onetrainer_legacy": "onetrainer", "comfy": "comfyui"}

ENDINGS = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_A.default.weight": "lora_A.weight",
    ".lora_B.default.weight": "lora_B.weight",
    ".lora_down.weight": "lora_A.weight",
    ".lora_up.weight": "lora_B.weight",
    "_lora.down.weight": "lora_A.weight",
    "_lora.up.weight": "lora_B.weight",
    ".lora_linear_layer.down.weight": "lora_A.weight",
    ".lora_linear_layer.up.weight": "lora_B.weight",
    ".lora.down.weight": "lora_A.weight",
    ".lora.up.weight": "lora_B.weight",
    ".lora_A": "lora_A.weight",
    ".lora_B": "lora_B.weight",
    ".lora_B.bias": "lora_B.bias",
    ".lora_B.default.bias": "lora_B.bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}
"""End of a key -> what it holds, in PEFT's words. The first factor is PEFT's A and everybody's `lora_down`."""

FLAT_PREFIXES = {
    "lora_prior_unet_": "prior",
    "lora_unet_": "prior",
    "lycoris_": "prior",
    "lora_prior_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
}
"""Prefixes before a layer's name with its dots turned into underscores, longer ones first."""

DOTTED_PREFIXES = {
    "diffusion_model.": "prior",
    "text_encoders.clip_g.transformer.": "text_encoder",
    "prior.": "prior",
    "decoder.": "decoder",
    "text_encoder.": "text_encoder",
}
WRAPPER = "base_model.model."  # a whole PeftModel saves its layers under it

TOKENS = re.compile(r"bundle_emb\.(.+)\.clip_g(_out)?", re.DOTALL)
POSITIONAL = re.compile(r"weights\.([0-9]{1,6})\.lora_(up|down)")

# Adapters that are not LoRA, by a part of their keys.
_OTHER_ADAPTERS = (
    (re.compile(r"\.lokr_"), "a LoKr adapter (LyCORIS)"),
    (re.compile(r"\.hada_"), "a LoHa adapter (LyCORIS)"),
    (re.compile(r"\.(b?oft_|oft_R)"), "an OFT adapter"),
    (re.compile(r"\.[ab][12]\.weight$"), "a GLoRA adapter (LyCORIS)"),
    (re.compile(r"\.lora_mid\."), "a LoCon adapter with Tucker decomposition (LyCORIS)"),
    (re.compile(r"\.reshape_weight$"), "a LoRA that widens its layers (ComfyUI)"),
    (re.compile(r"\.(diff|diff_b|set_weight|w_norm|b_norm)$"), "a file of weight differences"),
)


@dataclass(frozen=True)
class Place:
    """Where a key belongs: component, layer as the file spells it, whether flattened, and what the tensor is."""

    component: str
    layer: str
    flat: bool
    what: str


def format_name(name: str) -> str:
    """A writable format's own name, from it or its alias.

    Raises:
        ValueError: there is no such format.
    """
    known = ALIASES.get(name, name)
    if known in FORMATS:
        return known
    nearest = difflib.get_close_matches(str(name), [*FORMATS, *ALIASES], n=1, cutoff=0.0)[0]
    raise ValueError(f"LoRA format {quoted(name)} is none of {', '.join(FORMATS)}; nearest: '{nearest}'")


def place(key: str) -> Place | None:
    """What a key means, None for a key that no tool writes for a layer."""
    ending = next((end for end in sorted(ENDINGS, key=len, reverse=True) if key.endswith(end)), None)
    if ending is None:
        return None
    layer = key[: -len(ending)].removeprefix(WRAPPER)
    for prefix, component in FLAT_PREFIXES.items():
        if layer.startswith(prefix):
            return Place(component, layer.removeprefix(prefix), True, ENDINGS[ending])
    for prefix, component in DOTTED_PREFIXES.items():
        if layer.startswith(prefix):
            return Place(component, layer.removeprefix(prefix), False, ENDINGS[ending])
    component = "text_encoder" if layer.startswith("text_model.") or layer == "text_projection" else "prior"
    return Place(component, layer, False, ENDINGS[ending])


def detect(keys: Iterable[str], header: Mapping[str, str] | None = None) -> str:
    """Which tool's format this is: one of `FORMATS` or `READ_ONLY`.

    Args:
        header: the metadata of the file; it alone tells OneTrainer's diffusers format from PEFT's where there is
            neither DoRA nor a token in it.

    Raises:
        ValueError: none of them, or an adapter of another kind than LoRA.
    """
    keys = list(keys)
    if any(POSITIONAL.fullmatch(key) for key in keys):
        return "original"
    _refuse_other_adapters(keys)
    places = [found for found in map(place, keys) if found is not None]
    if not any(found.what.startswith("lora_") for found in places):
        if any(TOKENS.fullmatch(key) for key in keys):
            return "onetrainer"
        raise ValueError(_unknown(keys))
    return _of_names(keys, header or {}) or ("onetrainer_diffusers" if _by_onetrainer(keys, header or {}) else "peft")


def _of_names(keys: list[str], header: Mapping[str, str]) -> str | None:
    """The format that the prefixes and the names of the attention tell, None for PEFT's way of naming."""

    def some(part: str) -> bool:
        return any(part in key for key in keys)

    def begins(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    # The most specific prefix first.
    if begins("lora_prior_unet_", "lora_prior_te_"):
        return "onetrainer"
    if begins("lycoris_"):
        return "lycoris"
    if begins("lora_unet_", "lora_te_", "lora_te1_"):
        return "onetrainer_kohya" if some("_attn_in_proj_0.") else "kohya"
    if begins("diffusion_model.", "text_encoders."):
        return "onetrainer_comfyui" if some(".attn.in_proj.0.") else "comfyui"
    if some(".attn.in_proj.0."):
        return "onetrainer_original"
    if some(".lora_down.") or some(".lora_up."):
        return "onetrainer_internal"
    return None


def _by_onetrainer(keys: list[str], header: Mapping[str, str]) -> bool:
    return "ot_revision" in header or any(key.endswith(".dora_scale") or TOKENS.fullmatch(key) for key in keys)


def _refuse_other_adapters(keys: list[str]) -> None:
    for pattern, what in _OTHER_ADAPTERS:
        found = next((key for key in keys if pattern.search(key)), None)
        if found is not None:
            raise ValueError(
                f"is {what}, by its key {quoted(found, 80)}, and only LoRA and DoRA are read; merge it into the "
                "network with the tool that made it"
            )


def _unknown(keys: list[str]) -> str:
    if keys and set(keys) <= {"clip_g", "clip_g_out", "clip_l", "emb_params"}:
        return "holds a learned token and no LoRA; give it to load_textual_inversion"
    first = f"has the key {quoted(keys[0], 80)}, of no known format" if keys else "is empty"
    return f"{first}; expected '….lora_A.weight', '….lora_down.weight' or 'weights.0.lora_down'"


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
    """Our layer, or our three, behind a name with dots, by its end alone."""
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
