"""What a file or folder is: a network, a checkpoint of several, a LoRA, learned tokens, a pipeline, a training.

Told by names, shapes and metadata alone; no tensor is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stable_cascade.components import COMPONENTS
from stable_cascade.wording import brief, quoted

from .headers import TensorInfo
from .signatures import naming_of, prior_of_width, size_of, what_else
from .weight_names import NETWORK, is_checkpoint, split_checkpoint

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_LISTED = 12


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA updates. `width` is that of the blocks of the prior it was trained for, `size` that prior."""

    ranks: dict[int, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    width: int | None = None
    size: str | None = None
    dora: bool = False
    tokens: int = 0


@dataclass(frozen=True)
class Description:
    """What a file or folder is.

    `kind`: network, checkpoint (several networks in one file), lora, tokens, pipeline, training, folder, shard.
    `parameters` counts trained values: running statistics are left out. `training` is the config that was recorded.
    """

    name: str
    kind: str
    component: str | None = None
    size: str | None = None
    format: str | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    parts: tuple[Description, ...] = ()
    lora: LoraFacts | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def short(self) -> str:
        """What it is, as the end of "this is …"."""
        # What holds tensors says of what; a container names its parts.
        if self.kind == "network":
            size = f", {self.size}" if self.size else ""
            return f"the {COMPONENTS[str(self.component)].title}{size}, {self.format} names"
        if self.kind == "checkpoint":
            return f"a ComfyUI checkpoint of {', '.join(str(part.component) for part in self.parts)}"
        if self.kind == "lora":
            return f"a LoRA in {self.format} format, {_lora_words(self.lora)}"
        if self.kind == "pipeline":
            return f"a pipeline folder of {', '.join(part.name for part in self.parts)}"
        names = {
            "tokens": "learned tokens",
            "training": "a training's folder",
            "shard": "a shard of training data",
            "folder": f"a folder with {', '.join(part.name for part in self.parts)}",
        }
        return names[self.kind]

    def as_dict(self) -> dict[str, Any]:
        """Everything that is known, for JSON; what is empty is left out."""
        values: dict[str, Any] = {}
        for key, value in vars(self).items():
            if key == "parts":
                value = [part.as_dict() for part in self.parts]
            elif key == "lora" and self.lora is not None:
                value = vars(self.lora) | {"components": list(self.lora.components)}
            if value not in (None, {}, [], (), ""):
                values[key] = list(value) if isinstance(value, tuple) else value
        return values

    def lines(self, indent: str = "") -> list[str]:
        """Everything that is known, in words."""
        found = [f"{indent}{brief(self.name)}: {self.short()}"]
        inner = indent + "  "
        if self.tensors:
            found.append(f"{inner}{_amount(self)}")
        if self.lora is not None:
            found.append(f"{inner}targets: {_counted(self.lora.targets)}")
        for title, table in (("metadata", self.metadata), ("training", self.training)):
            if table:
                found.append(f"{inner}{title}:")
                shown = [(brief(key, 60), brief(_set_values(value), 100)) for key, value in _first(table)]
                found += [f"{inner}  {key}: {value}" for key, value in shown]
        found += [f"{inner}note: {note}" for note in self.notes]
        for part in self.parts:
            found += part.lines(inner)
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())


def counted(description: Description, tensors: Mapping[str, TensorInfo], *, size: int | None = None) -> Description:
    """The description with its tensors counted; `size` is the file's, the sum of the tensors' without."""
    from .headers import DTYPES

    bits = dict(DTYPES.values())
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    trained = [info for name, info in tensors.items() if not name.endswith(_STATISTICS)]
    return replace(
        description,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        tensors=len(tensors),
        parameters=sum(info.elements for info in trained),
        bytes=sum(info.elements * bits.get(info.dtype, 0) // 8 for info in tensors.values()) if size is None else size,
    )


def _amount(found: Description) -> str:
    types = next(iter(found.dtypes)) if len(found.dtypes) == 1 else _counted(found.dtypes)
    return f"{found.parameters:,} parameters in {found.tensors:,} tensors, {types}, {_size(found.bytes)}"


def _size(count: int) -> str:
    for unit, divisor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return f"{count} bytes"


def _lora_words(lora: LoraFacts | None) -> str:
    if lora is None:
        return "of unknown rank"
    ranks = sorted(lora.ranks)
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "tokens alone"
    trained = f", for a prior of width {lora.width}" if lora.width else ""
    trained = f", for the prior {lora.size}" if lora.size else trained
    return f"{rank}{' (DoRA)' if lora.dora else ''}, of {' and '.join(lora.components) or 'nothing'}{trained}"


def _set_values(value: Any) -> Any:
    """A JSON object of a header without the entries that are not set, as `key=value`; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        entries = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return ", ".join(f"{key}={brief(one, 60)}" for key, one in entries.items() if one not in (None, {}, [], False, ""))


def _counted(table: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} x {brief(key, 60)}" for key, count in _first(table)) or "none"


def _first(table: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The first entries, and how many more there are."""
    entries = list(table.items())
    more = len(entries) - _LISTED
    if more <= 1:
        return entries
    rest: Any = sum(count for _, count in entries[_LISTED:]) if isinstance(entries[0][1], int) else "not shown"
    return [*entries[:_LISTED], (f"{more} more", rest)]


KNOWN = "networks of Stable Cascade (original, diffusers, ComfyUI), LoRA files, learned tokens, pipelines, trainings"
_SINGLE_TOKENS = frozenset({
    "emb_params", "clip_g", "clip_g_out", "clip_l", "embeddings.embeddings", "embeddings.indices",
})  # fmt: skip
_TOKEN_METADATA = 64


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
    from .lora.keys import detect

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
    # Count by the first factor of every layer: its rows are the rank, its columns the width.
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
