"""What a file or folder is: a network, a checkpoint of several, a LoRA, learned tokens, a pipeline, a training.

Told by names, shapes and metadata alone; no tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

from .checkpoints import NETWORK, is_checkpoint, split_checkpoint
from .descriptions import Description, counted
from .headers import TensorInfo, file_type, read_header, read_pickled
from .lora_facts import is_lora, lora_facts
from .signatures import naming_of, size_of, what_else

KNOWN = "networks of Stable Cascade (original, diffusers, ComfyUI), LoRA files, learned tokens, pipelines, trainings"
_SINGLE_TOKENS = frozenset({
    "emb_params", "clip_g", "clip_g_out", "clip_l", "embeddings.embeddings", "embeddings.indices",
})  # fmt: skip
_TOKEN_METADATA = 64


def describe(path: str | PathLike[str]) -> Description:
    """What a file or folder is.

    Raises:
        ValueError: there is none, it is damaged, or nothing that is known here; the error names what was found.
    """
    place = local_path(path)
    if place.is_dir():
        from .folders import describe_folder

        return describe_folder(place)
    kind = file_type(place)
    if kind == "tar":
        return Description(place.name, "shard", bytes=place.stat().st_size)
    if kind == "pickle":
        found = describe_tensors(read_pickled(place), place.name, size=place.stat().st_size)
        return replace(found, notes=(*found.notes, "a pickle file: only its tensors are read; .safetensors is safer"))
    header = read_header(place)
    return describe_tensors(header.tensors, place.name, metadata=header.metadata, size=header.size)


def describe_tensors(
    tensors: Mapping[str, TensorInfo],
    name: str,
    *,
    metadata: Mapping[str, str] | None = None,
    size: int | None = None,
) -> Description:
    """What the tensors of one file are.

    Args:
        name: the file's, for the description and for errors.
        size: the file's in bytes; None for the sum of its tensors.

    Raises:
        ValueError: nothing that is known here.
    """
    shown = {key: value for key, value in (metadata or {}).items() if (key, value) != ("format", "pt")}
    if is_lora(tensors):
        found = _lora(tensors, name, metadata or {})
    elif _are_tokens(tensors):
        found = Description(name, "tokens", "text_encoder", format=_token_format(tensors), notes=_token_notes(tensors))
    else:
        found = _networks(tensors, name)
    return replace(counted(found, tensors, size=size), metadata=shown)


def infos_of(state_dict: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Types and shapes of a state dict's tensors."""
    return {
        name: TensorInfo(str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in state_dict.items()
    }


def _lora(tensors: Mapping[str, TensorInfo], name: str, metadata: Mapping[str, str]) -> Description:
    from .lora.keys import detect  # reads networks' files without what LoRA files need

    facts = lora_facts(tensors)
    try:
        layout = detect(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{quoted(name)} {brief(error, 300)}") from None
    notes = []
    if layout == "original":
        notes.append("the original's files do not say which layers they update; module_filters of the training do")
    if facts.tokens:
        notes.append(f"holds {facts.tokens} learned token(s) as well")
    return Description(name, "lora", format=layout, lora=facts, notes=tuple(notes))


def _are_tokens(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether these are rows of a token embedding: one unnamed, or one under each token's name."""
    if not tensors or len(tensors) > 10_000:
        return False
    widths = {info.shape[-1] if info.shape else 0 for name, info in tensors.items() if name != "embeddings.indices"}
    if tensors.keys() <= _SINGLE_TOKENS:
        return True
    plain = all(1 <= len(info.shape) <= 2 for info in tensors.values())
    return plain and len(widths) == 1 and all("." not in name for name in tensors) and min(widths) > 1


def _token_format(tensors: Mapping[str, TensorInfo]) -> str:
    if "embeddings.indices" in tensors:
        return "original"
    if "emb_params" in tensors:
        return "automatic1111"
    return "comfyui" if "clip_g" in tensors else "diffusers"


def _token_notes(tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    if tensors.keys() <= _SINGLE_TOKENS:
        return ("the file does not name its token; give the name when loading it",)
    return (f"tokens: {brief(', '.join(list(tensors)[:_TOKEN_METADATA]), 200)}",)


def _networks(tensors: Mapping[str, TensorInfo], name: str) -> Description:
    """One network, or a checkpoint of several.

    Raises:
        ValueError: neither.
    """
    split = split_checkpoint(tensors)
    if not split.parts:
        raise ValueError(f"{quoted(name)} is {what_else(tensors)}; known are {KNOWN}")
    prefixed = is_checkpoint(tensors)
    parts = tuple(_network(component, part, component) for component, part in split.parts.items())
    first = next(iter(split.left), None)
    others = f"{len(split.left)} tensors belong to none of these, first: {quoted(first, 80)}"
    notes = () if first is None else (others,)
    if len(parts) == 1:
        only = replace(parts[0], name=name, notes=notes)
        comfy = any(key.startswith(NETWORK) for key in tensors) or only.component in ("text_encoder",)
        return replace(only, format="comfyui") if prefixed and comfy else only
    return Description(name, "checkpoint", format="comfyui", parts=parts, notes=notes)


def _network(component: str, part: Mapping[str, TensorInfo], name: str) -> Description:
    shapes = {key: info.shape for key, info in part.items()}
    found = Description(name, "network", component, size_of(shapes, component), naming_of(part, component))
    return counted(found, part)
