"""Which network a set of names and shapes is, in whose names, and of which released size: data, and its reading."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from stable_cascade.wording import brief

Shapes = Mapping[str, tuple[int, ...]]

# The first that is there decides; `projections` before `mapper`, since both lie on the same backbone.
_SIGNS = (
    ("prior", ("clip_txt_mapper.weight", "embedding.1.weight")),
    ("decoder", ("effnet_mapper.0.weight", "embedding.1.weight")),
    ("vqgan", ("vquantizer.codebook.weight", "in_block.1.weight")),
    ("vqgan", ("vquantizer.embedding.weight", "in_block.1.weight")),
    ("controlnet", ("projections.0.0.weight",)),
    ("semantic_encoder", ("backbone.0.0.weight", "mapper.0.weight")),
    ("previewer", ("blocks.0.weight", "blocks.24.weight")),
    ("text_encoder", ("text_model.embeddings.token_embedding.weight",)),
    ("text_encoder", ("token_embedding.weight", "ln_final.weight")),
    ("image_encoder", ("vision_model.embeddings.patch_embedding.weight",)),
    ("image_encoder", ("visual.conv1.weight", "visual.ln_pre.weight")),
    ("image_encoder", ("conv1.weight", "ln_pre.weight", "class_embedding")),
)

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "prior": {
        "3.6B": (2048, 8, 2048, 24),
        "1B": (1536, 4, 1536, 12),
        "embedded": (128, 2, 128, 4),
    },
    "decoder": {
        "3B": (320, 2, 640, 6, 1280, 28, 1280, 6),
        "700M": (320, 2, 576, 4, 1152, 14, 1152, 4),
        "embedded": (96, 2, 160, 4),
    },
    "vqgan": {"released": (384, 8192, 15), "embedded": (96, 1024, 7)},
    "semantic_encoder": {"released": (1280, 8), "embedded": (192, 6)},
    "previewer": {"released": (512,), "embedded": (128,)},
    "controlnet": {
        "canny": (1, 8, 2048),
        "inpainting": (4, 8, 2048),
        "super_resolution": (16, 8, 2048),
        "identity": (512, 64, 2048),
        "embedded": (1, 4, 128),
    },
    "text_encoder": {"ViT-bigG/14": (1280, 32), "ViT-L/14": (768, 12), "embedded": (128, 3)},
    "image_encoder": {"ViT-L/14": (1024, 24), "embedded": (128, 3)},
}
"""`measures` of every known size; a test holds them against the presets."""

FOREIGN = (
    (r"^(model\.diffusion_model\.)?input_blocks\.", "a Stable Diffusion or SDXL checkpoint"),
    (r"^(first_stage_model|cond_stage_model|conditioner)\.", "a Stable Diffusion or SDXL checkpoint"),
    (r"^(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.", "a UNet of Stable Diffusion or SDXL"),
    (r"^(encoder|decoder)\.(mid|down|up|conv_in|down_blocks|mid_block)\b", "a VAE of Stable Diffusion or SDXL"),
    (r"(^|\.)(double_blocks|joint_blocks|single_blocks|transformer_blocks)\.", "a diffusion transformer (SD3, Flux)"),
    (r"^(model\.layers|transformer\.h|encoder\.block)\.\d+\.", "a language model"),
)
"""Names of what people take for a file of this cascade -> what it is."""


def component_of(names: Iterable[str]) -> str | None:
    """The network whose names these are, the original's or ours, without any prefix; None for none."""
    known = names if isinstance(names, Mapping | set | frozenset) else set(names)
    return next((component for component, signs in _SIGNS if all(sign in known for sign in signs)), None)


def naming_of(names: Iterable[str], component: str) -> str:
    """Whose names a network has: `original`, `diffusers`, `comfyui` (its own saves), `transformers` or `openclip`.

    Networks that have the same names everywhere are `original`.
    """
    names = list(names)
    # CLIP and Stage A are known by a prefix, the others by how attention is split.
    if component in ("text_encoder", "image_encoder"):
        prefix = ("text_model.", "vision_model.")
        return "transformers" if any(name.startswith(prefix) for name in names) else "openclip"
    if component == "vqgan":
        return "diffusers" if any(name.startswith("vquantizer.embedding.") for name in names) else "original"
    for part, naming in (
        (".attention.attn.in_proj_", "original"),
        (".attention.attn.to_q.", "comfyui"),
        (".attention.to_q.", "diffusers"),
    ):
        if any(part in name for name in names):
            return naming
    if component == "decoder" and any(name.startswith("clip_txt_pooled_mapper.") for name in names):
        return "diffusers"
    return "original"


def measures(shapes: Shapes, component: str) -> tuple[int, ...] | None:
    """The few numbers that tell the sizes of a component apart; None where a weight is missing that they come from.

    Prior, decoder: width and number of blocks of each level. VQGAN: width, codebook, parts of its decoder. Image
    encoder: width of its features, stages. Previewer: width. ControlNet: input channels, projections, their width.
    CLIP: width, layers.
    """
    try:
        return _MEASURES[component](shapes)
    except (KeyError, IndexError, StopIteration):
        return None


def size_of(shapes: Shapes, component: str) -> str | None:
    """The released (or embedded) size with these measures, None for a size of one's own."""
    found = measures(shapes, component)
    return next((size for size, known in SIZES[component].items() if known == found), None)


def prior_of_width(width: int) -> str | None:
    """The size of the prior with blocks of this width."""
    return next((size for size, known in SIZES["prior"].items() if known[0] == width), None)


def what_else(names: Iterable[str]) -> str:
    """What names are that belong to nothing of this cascade, in words that end a sentence."""
    names = list(names)
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return what
    return f"nothing that is known here (its first key is '{brief(names[0], 80)}')" if names else "empty"


def _unet(shapes: Shapes) -> tuple[int, ...]:
    levels: dict[int, int] = Counter()
    widths: dict[int, int] = {}
    for name, shape in shapes.items():
        found = re.fullmatch(r"down_blocks\.(\d{1,3})\.\d{1,5}\.depthwise\.weight", name)
        if found:
            levels[int(found[1])] += 1
            widths[int(found[1])] = shape[0]
    return tuple(number for level in sorted(levels) for number in (widths[level], levels[level]))


def _vqgan(shapes: Shapes) -> tuple[int, ...]:
    codebook = shapes.get("vquantizer.codebook.weight") or shapes["vquantizer.embedding.weight"]
    return shapes["up_blocks.0.0.weight"][0], codebook[0], _count(shapes, r"up_blocks\.(\d+)\.")


def _semantic_encoder(shapes: Shapes) -> tuple[int, ...]:
    return shapes["mapper.0.weight"][1], _count(shapes, r"backbone\.(\d+)\.")


def _previewer(shapes: Shapes) -> tuple[int, ...]:
    return (shapes["blocks.0.weight"][0],)


def _controlnet(shapes: Shapes) -> tuple[int, ...]:
    first = shapes.get("backbone.0.0.weight") or shapes["backbone.0.weight"]
    return first[1], _count(shapes, r"projections\.(\d+)\."), shapes["projections.0.2.weight"][0]


def _clip_text(shapes: Shapes) -> tuple[int, ...]:
    table = shapes.get("text_model.embeddings.token_embedding.weight") or shapes["token_embedding.weight"]
    return table[1], _count(shapes, r"(?:text_model\.encoder\.layers|transformer\.resblocks)\.(\d+)\.")


def _clip_vision(shapes: Shapes) -> tuple[int, ...]:
    names = ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight", "conv1.weight")
    patches = next(shapes[name] for name in names if name in shapes)
    layers = r"(?:vision_model\.encoder\.layers|(?:visual\.)?transformer\.resblocks)\.(\d+)\."
    return patches[0], _count(shapes, layers)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the names have at a place."""
    return len({found[1] for found in map(re.compile(pattern).match, shapes) if found})


_MEASURES = {
    "prior": _unet,
    "decoder": _unet,
    "vqgan": _vqgan,
    "semantic_encoder": _semantic_encoder,
    "previewer": _previewer,
    "controlnet": _controlnet,
    "text_encoder": _clip_text,
    "image_encoder": _clip_vision,
}
