"""LoRA files of any known format, read and put into a network; a misfit is refused before anything changes."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.formats import lora as files

from .layers import component_of, inject, layer_shapes, tuner_layers
from .tokens import EMBEDS_NAME

logger = logging.getLogger(__name__)


def load_lora(
    model: Any,
    path: str | Path | Mapping[str, Tensor],
    adapter_name: str = "default",
    weight: float = 1.0,
    *,
    module_filters: Sequence[str] | None = None,
) -> list[str]:
    """Names of the layers that a LoRA file, folder or state dict updates in this network; it is active afterwards.

    Args:
        weight: how strongly the update acts, 0 for not at all.
        module_filters: of the training, for the original's files only, which do not store them.

    Raises:
        ValueError: the file is of no known format, was trained for a network of another size, or has nothing for
            this one.
    """
    lora = read_lora(path)
    component = component_of(model)
    return load_part(model, lora, component, adapter_name, weight, module_filters=module_filters)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: tensors by component, LoraConfig values by component, and what was read, for errors."""

    name: str
    layout: str
    parts: dict[str, dict[str, Tensor]]
    metadata: dict[str, dict[str, Any]]
    token_deltas: dict[int, Tensor]


def read_lora(path: str | Path | Mapping[str, Tensor]) -> LoraFile:
    """The contents of a LoRA file, of a folder with one, or of a state dict."""
    if isinstance(path, Mapping):
        name, state_dict, header = "state dict", dict(path), None
    else:
        file = lora_path(path)
        name, (state_dict, header) = str(file), _read(file)
    layout = files.layout(state_dict)
    if layout == "original":
        weights = {key: value for key, value in state_dict.items() if key.startswith("weights.")}
        return LoraFile(name, layout, {"prior": weights}, {}, files.original_tokens(state_dict))
    return LoraFile(name, layout, files.split_components(state_dict), files.read_metadata(header), {})


def load_part(
    model: Any,
    lora: LoraFile,
    component: str,
    adapter_name: str = "default",
    weight: float = 1.0,
    *,
    module_filters: Sequence[str] | None = None,
) -> list[str]:
    """Puts one component's part of a read LoRA into its network; the names of the updated layers."""
    from peft import set_peft_model_state_dict

    if component not in lora.parts:
        raise ValueError(f"'{lora.name}' has nothing for the {component}; it has {', '.join(sorted(lora.parts))}")
    state_dict, metadata = lora.parts[component], lora.metadata.get(component, {})
    shapes = layer_shapes(model)
    if lora.layout == "original":
        _same_width(lora.name, component, state_dict["weights.0.lora_down"].shape[1], shapes)
        state_dict = files.from_original_lora(state_dict, shapes, module_filters)
        metadata = {"lora_alpha": 1}
    _fits(lora.name, component, state_dict, shapes)
    config = _config_of(state_dict, metadata)
    inject(model, config, adapter_name)
    result: Any = set_peft_model_state_dict(model, state_dict, adapter_name)
    if result.unexpected_keys:
        raise ValueError(f"'{lora.name}' has keys that no layer takes: {result.unexpected_keys[0]}")
    for layer in tuner_layers(model):
        layer.set_scale(adapter_name, weight)
    return sorted({key.partition(".lora_A.")[0] for key in state_dict if ".lora_A." in key})


def lora_path(path: str | Path, weight_name: str | None = None) -> Path:
    """The LoRA file meant by a file or folder name.

    Raises:
        ValueError: there is none, or several and no `weight_name`.
    """
    path = Path(path)
    if path.is_dir() and weight_name is None:
        if (path / files.WEIGHT_NAME).exists():
            return path / files.WEIGHT_NAME
        found = sorted(file for file in path.glob("*.safetensors") if file.name != EMBEDS_NAME)
        if len(found) == 1:
            return found[0]
        names = ", ".join(file.name for file in found) or "no .safetensors file"
        raise ValueError(f"'{path}' has {names}; name the LoRA with weight_name")
    file = path / weight_name if path.is_dir() and weight_name else path
    if not file.exists():
        raise ValueError(f"LoRA '{file}' does not exist; give a .safetensors file or a folder with one")
    return file


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        logger.warning("'%s' is a pickle file; reading tensors only, convert it to safetensors", file)
        return torch.load(file, map_location="cpu", weights_only=True), None
    try:
        with safe_open(file, "pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata()
    except SafetensorError as problem:
        raise ValueError(f"LoRA '{file}' is not a safetensors file: {problem}") from None


def _config_of(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Any:
    """The LoraConfig of a state dict: ranks from the tensors, the rest from the metadata where there is any."""
    from peft import LoraConfig

    ranks = {key.partition(".lora_A.")[0]: len(value) for key, value in state_dict.items() if ".lora_A." in key}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{name}": value for name, value in ranks.items() if value != rank}
    kept = {key: metadata[key] for key in ("use_rslora", "lora_bias", "lora_dropout") if key in metadata}
    return LoraConfig(
        r=rank,
        lora_alpha=metadata.get("lora_alpha", rank),
        rank_pattern=pattern,
        # A file without metadata is scaled by 1 in every layer, whatever its rank.
        alpha_pattern=metadata.get("alpha_pattern", {} if "lora_alpha" in metadata else pattern),
        use_dora=any(".lora_magnitude_vector" in key for key in state_dict),
        target_modules=sorted(ranks),
        **kept,
    )


def lora_scales(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, float]:
    """How strongly a file's update of each layer acts, alpha / rank, by the layer's name."""
    from peft.utils.other import get_pattern_key

    config, scales = _config_of(state_dict, metadata), {}
    for key, value in state_dict.items():
        name, found, _ = key.partition(".lora_A.")
        if found:
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
            scales[name] = alpha / (len(value) ** 0.5 if config.use_rslora else len(value))
    return scales


def _fits(name: str, component: str, state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raises unless every pair of factors has a layer of its shape."""
    for key, down in state_dict.items():
        layer, found, tail = key.partition(".lora_A.")
        if not found:
            continue
        if layer not in shapes:
            nearest = difflib.get_close_matches(layer, list(shapes), n=1, cutoff=0)
            raise ValueError(f"'{name}' updates '{layer}', which this {component} lacks; nearest: {nearest[0]!r}")
        up = state_dict.get(f"{layer}.lora_B.{tail}")
        if up is None:
            raise ValueError(f"'{name}' has '{key}' but not its lora_B")
        if down.shape[1] != shapes[layer][1] or up.shape[0] != shapes[layer][0]:
            _same_width(name, component, _trained_width(state_dict), shapes)
            raise ValueError(
                f"'{name}' updates '{layer}' as {up.shape[0]}x{down.shape[1]}, "
                f"this {component} has {shapes[layer][0]}x{shapes[layer][1]} there"
            )


def _trained_width(state_dict: Mapping[str, Tensor]) -> int:
    """The width of the network that a LoRA was trained for: what most of its layers take."""
    return Counter(value.shape[1] for key, value in state_dict.items() if ".lora_A." in key).most_common(1)[0][0]


def _same_width(name: str, component: str, trained: int, shapes: Mapping[str, torch.Size]) -> None:
    """Raises, naming both model sizes, when no layer of the network takes the LoRA's width."""
    if any(shape[1] == trained for shape in shapes.values()):
        return
    own = Counter(shape[1] for layer, shape in shapes.items() if ".attention." in layer or "attn" in layer)
    width = own.most_common(1)[0][0] if own else "another"
    raise ValueError(
        f"'{name}' was trained for a {component} of width {trained}{_size(component, trained)}; "
        f"this one has width {width}{_size(component, width)}"
    )


def _size(component: str, width: Any) -> str:
    """` (1B)` for the released size with this width, nothing for others."""
    from stable_cascade.models.presets import PRESETS

    for version, preset in PRESETS.get(component, {}).items():
        if width in preset.get("block_out_channels", ()):
            return f" ({version})"
    return ""
