"""What a LoRA file updates, told by the names and shapes in its header, whichever tool wrote it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from .descriptions import LoraFacts
from .headers import TensorInfo
from .signatures import prior_of_width

_DOWN = re.compile(r"(?:^|(?<=.)\.)(?:lora_A(?:\.[^.]+)?\.weight|lora_A|lora_down(?:\.weight)?|lora\.down\.weight)$")
_ANY = re.compile(r"(?:^|[._])(?:lora_[A-Za-z]|lora\.(?:up|down)|hada_w|lokr_w|oft_|dora_scale|lycoris_)")
_TOKEN = re.compile(r"^bundle_emb\.(.+)\.clip_g$")
_KINDS = re.compile(
    r"(to_q|to_k|to_v|to_out|out_proj|in_proj|kv_mapper|mapper_sca|mapper_crp|clip_txt_pooled_mapper|clip_txt_mapper"
    r"|clip_img_mapper|clip_mapper|effnet_mapper|pixels_mapper|channelwise|depthwise|q_proj|k_proj|v_proj|fc1|fc2"
    r"|text_projection|clf|mapper)"
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "out_proj", "in_proj", "positional")
_TEXT = ("lora_te", "lora_prior_te", "text_encoder.", "te1.", "clip_g.")


def is_lora(names: Iterable[str]) -> bool:
    """Whether names are those of a LoRA, of a kind that is read here or not."""
    return any(_ANY.search(name) for name in names)


def lora_facts(tensors: Mapping[str, TensorInfo]) -> LoraFacts:
    """Ranks, targets and the prior's width, from the header of a LoRA file."""
    ranks: Counter[int] = Counter()
    targets: Counter[str] = Counter()
    components: dict[str, None] = {}
    widths: Counter[int] = Counter()
    for name, info in tensors.items():
        down = _DOWN.search(name)
        if not down or len(info.shape) < 2:
            continue
        module = name[: down.start()]
        component = _component(module)
        kind = _kind(module)
        ranks[info.shape[0]] += 1
        components[component] = None
        targets[kind if component == "prior" else f"{component} {kind}"] += 1
        if component == "prior" and kind in _ATTENTION:
            widths[info.shape[1]] += 1
    width = widths.most_common(1)[0][0] if widths else None
    return LoraFacts(
        ranks=dict(sorted(ranks.items())),
        targets=dict(targets.most_common()),
        components=tuple(components),
        width=width,
        size=None if width is None else prior_of_width(width),
        dora=any(name.endswith(".dora_scale") or ".lora_magnitude_vector" in name for name in tensors),
        tokens=_tokens(tensors),
    )


def _component(module: str) -> str:
    if module.startswith(_TEXT) or "text_model" in module:
        return "text_encoder"
    return "decoder" if module.startswith(("decoder.", "lora_decoder")) else "prior"


def _kind(module: str) -> str:
    """The kind of layer that a module's name, dotted or flat, ends in."""
    if re.fullmatch(r"weights\.\d+", module):
        return "positional"
    found = _KINDS.findall(module.replace(".", "_"))
    if found:
        return found[-1]
    words = [word for word in re.split(r"[._]", module) if word and not word.isdigit()]
    return words[-1] if words else module


def _tokens(tensors: Mapping[str, TensorInfo]) -> int:
    if "embeddings.indices" in tensors:
        shape = tensors["embeddings.indices"].shape
        return shape[0] if shape else 0
    return sum(bool(_TOKEN.match(name)) for name in tensors)
