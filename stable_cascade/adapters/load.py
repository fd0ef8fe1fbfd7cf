"""A LoRA file into a network: read it (from a path, a folder or the Hub), fit it to the network, inject it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.files import lora as files
from stable_cascade.files.lora import LoraFile as LoraFile
from stable_cascade.files.lora import Part
from stable_cascade.files.lora.metadata import config_of
from stable_cascade.files.presets import PRESETS, clip_preset
from stable_cascade.hub import hub_file
from stable_cascade.wording import brief, quoted

from .injection import component_of, inject, layer_shapes, make_room, take_out, tuner_layers
from .tokens import EMBEDS_NAME, read_learned_embeds, rows_beside

Source = str | os.PathLike | Mapping[str, Tensor]


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
        path: of any format in `files.lora.FORMATS` and `files.lora.READ_ONLY`, recognised by its keys.
        weight: how strongly the update acts, 0 for not at all.
        module_filters: of the training, for the original's files only, which do not store them.

    Raises:
        ValueError: the file is of no known format, was trained for a network of another size, or has nothing for
            this one.
    """
    component = component_of(model)
    lora = placed(read_lora(path), {component: model})
    return load_part(model, lora, component, adapter_name, weight, module_filters=module_filters)


def read_lora(path: str | Path | Mapping[str, Tensor]) -> LoraFile:
    """The contents of a LoRA file, of a folder with one, or of a state dict."""
    return files.read(path if isinstance(path, Mapping) else lora_path(path))


def placed(lora: LoraFile, networks: Mapping[str, Any]) -> LoraFile:
    """The LoRA, given to the one of these networks that it fits where nothing in it says which it is for.

    Args:
        networks: component -> network.

    Raises:
        ValueError: it fits several.
    """
    if not lora.bare:
        return lora
    shapes = lora.own_shapes("prior").items()
    fitting = [component for component, network in networks.items() if shapes <= layer_shapes(network).items()]
    if len(fitting) > 1:
        raise ValueError(
            f"{quoted(lora.name)} fits the {' and the '.join(fitting)} alike, and {files.CONFIG_NAME} does not say "
            "which was trained; load it with load_lora into the one that is meant"
        )
    if not fitting:  # the prior's refusal names both sizes
        return lora
    return replace(
        lora, parts={fitting[0]: lora.parts["prior"]}, metadata={fitting[0]: lora.metadata["prior"]}, bare=False
    )


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
    # Fit.
    part = fitting_part(model, lora, component, module_filters)
    if adapter_name not in getattr(model, "peft_config", {}):
        config = lora_config(part)
    else:
        raise ValueError(
            f"adapter_name '{adapter_name}' is in use ({', '.join(model.peft_config)}); choose another, delete it "
            "first, or give hotswap=True"
        )
    # Inject; a failure leaves the network as it was.
    try:
        inject(model, config, adapter_name)
        fill(model, part, adapter_name)
    except (RuntimeError, ValueError) as problem:
        take_out(model, adapter_name)
        raise ValueError(f"{quoted(lora.name)} does not go into this {component}: {brief(problem, 300)}") from None
    # Set the weight, and room for later exchanges where it was asked for.
    for layer in tuner_layers(model):
        layer.set_scale(adapter_name, weight)
    make_room(model, adapter_name)
    return sorted(part.layers)


def fill(model: Any, part: Part, adapter_name: str) -> None:
    """Puts an update's values into an adapter that is there.

    Raises:
        ValueError: there is a value that no layer takes.
    """
    from peft import set_peft_model_state_dict

    from .peft_layers import add_input_magnitude

    values = {key: value for key, value in part.tensors.items() if not key.endswith(".dora_scale")}
    result: Any = set_peft_model_state_dict(model, values, adapter_name)
    if result.unexpected_keys:
        raise ValueError(f"no layer takes {result.unexpected_keys[0]}")
    for key in part.tensors.keys() - values.keys():
        layer = model.get_submodule(key.removesuffix(".dora_scale"))
        add_input_magnitude(layer, adapter_name, part.tensors[key])


def fitting_part(model: Any, lora: LoraFile, component: str, module_filters: Sequence[str] | None = None) -> Part:
    """A component's update under the names of this network.

    Raises:
        ValueError: it does not fit, naming both sizes where it was trained for another; or PEFT cannot run it.
    """
    shapes = layer_shapes(model)
    try:
        part = lora.part(component, shapes, module_filters)
    except ValueError:
        if component in lora.parts:
            _same_width(lora, component, shapes)
        raise
    _runs(lora.name, part, shapes)
    return part


def lora_path(path: str | Path, weight_name: str | None = None) -> Path:
    """The LoRA file meant by a file or folder name.

    Raises:
        ValueError: there is none, or several and no `weight_name`.
    """
    path = local_path(path)
    # In a folder: diffusers' name, PEFT's names, or the only file.
    if path.is_dir() and weight_name is None:
        if (path / files.WEIGHT_NAME).exists():
            return path / files.WEIGHT_NAME
        adapter = next((path / name for name in files.ADAPTER_NAMES if (path / name).is_file()), None)
        if adapter is not None:
            return adapter
        found = sorted(file for file in path.glob("*.safetensors") if file.name != EMBEDS_NAME)
        if len(found) == 1:
            return found[0]
        names = ", ".join(file.name for file in found) or "no .safetensors file"
        raise ValueError(f"'{path}' has {names}; name the LoRA with weight_name")
    file = path / weight_name if path.is_dir() and weight_name else path
    if not file.exists():
        raise ValueError(f"LoRA '{file}' does not exist; give a .safetensors file or a folder with one")
    return file


def lora_config(part: Part) -> Any:
    """The LoraConfig of an update: what came with the file where it says the same, else from ranks and alphas."""
    from peft import LoraConfig

    use_dora = any(".lora_magnitude_vector" in key for key in part.tensors)
    values = config_of(part.ranks, part.alphas, use_dora=use_dora)
    if part.keeps_config:
        kept = ("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout")
        values |= {key: part.config[key] for key in kept if part.config.get(key) is not None}
    if any(key.endswith(".lora_B.bias") for key in part.tensors):
        values["lora_bias"] = True
    return LoraConfig(**values)


def _runs(name: str, part: Part, shapes: Mapping[str, torch.Size]) -> None:
    """Passes when PEFT can run an update as it is.

    Raises:
        ValueError: it cannot.
    """
    magnitudes = {key.rpartition(".")[0] for key in part.tensors if key.endswith(".lora_magnitude_vector")}
    without = next((layer for layer in part.layers if layer not in magnitudes), None)
    if magnitudes and without is not None:
        raise ValueError(
            f"{quoted(name)} has no DoRA magnitude for '{without}' and has some for others; PEFT needs all"
        )
    broadcast = next((layer for layer in part.layers if _is_broadcast(part, layer, shapes[layer])), None)
    if broadcast is not None:
        raise ValueError(
            f"{quoted(name)} updates the depthwise convolution '{broadcast}' as the original does, one value for all "
            "taps of a channel, which PEFT has no form for; merge it in the original and load the network"
        )


def _is_broadcast(part: Part, layer: str, shape: torch.Size) -> bool:
    """Whether an update of a depthwise convolution is one of each channel's own; OneTrainer's is one for all."""
    return files.is_depthwise(shape) and len(part.tensors[f"{layer}.lora_B.weight"]) == shape[0]


def trained_width(lora: LoraFile, component: str) -> int | None:
    """The width of the network that a LoRA was trained for: what most of its layers take."""
    downs = (value for key, value in lora.parts[component].items() if key.endswith((".lora_A.weight", ".lora_down")))
    inputs = Counter(down.shape[1] for down in downs if down.ndim > 1)
    return inputs.most_common(1)[0][0] if inputs else None


def _same_width(lora: LoraFile, component: str, shapes: Mapping[str, torch.Size]) -> None:
    """Raises, naming both model sizes, when no layer of the network takes the LoRA's width."""
    trained = trained_width(lora, component)
    if trained is None or any(shape[1] == trained for shape in shapes.values()):
        return
    own = Counter(shape[1] for layer, shape in shapes.items() if ".attention." in layer or "attn" in layer)
    width = own.most_common(1)[0][0] if own else "another"
    raise ValueError(
        f"{quoted(lora.name)} was trained for a {component} of width {trained}{_size(component, trained)}; "
        f"this one has width {width}{_size(component, width)}"
    )


def _size(component: str, width: Any) -> str:
    """` (1B)` for the released size with this width, nothing for others."""
    if component == "text_encoder":
        known = {"ViT-bigG/14": "ViT-bigG/14, the released one", "embedded": "embedded"}
        sizes = {clip_preset(component, version)["hidden_size"]: title for version, title in known.items()}
        return f" ({sizes[width]})" if width in sizes else ""
    for version, preset in PRESETS.get(component, {}).items():
        if width in preset.get("block_out_channels", ()):
            return f" ({version})"
    return ""


def read_with_tokens(
    source: Source, weight_name: str | None = None, hub: Mapping[str, Any] | None = None
) -> files.LoraFile:
    """A LoRA of any format with its learned tokens, those in the file and those beside it.

    Tokens beside a file are in `learned_embeds.safetensors` of its folder, where it is in diffusers' layout, or one
    each in the folder `<name>_embeddings`.

    Args:
        weight_name: the file in a folder that holds several.
        hub: revision, token, cache_dir and so on, for a Hub name.

    Raises:
        ValueError: there is neither a LoRA nor a token, or one cannot be read.
    """
    file, embeds = _located(source, weight_name, hub or {})
    lora = files.read(file) if file is not None else files.LoraFile(str(source), "peft", {})
    beside = read_learned_embeds(embeds) if embeds is not None else {}
    if isinstance(file, Path):
        beside |= rows_beside(file)
    twice = next((name for name in beside if name in lora.tokens), None)
    if twice is not None:
        raise ValueError(
            f"{quoted(lora.name)} has the token {quoted(twice, 60)}, and so has a file beside it; move one away"
        )
    rows = {name: row if row.ndim == 2 else row[None] for name, row in beside.items()}
    lora = replace(lora, tokens={**lora.tokens, **rows})
    if not (lora.parts or lora.tokens or lora.token_deltas or lora.output_tokens):
        raise ValueError(f"{quoted(lora.name)} has neither a LoRA nor {EMBEDS_NAME}")
    return lora


def _located(
    source: Source, weight_name: str | None, hub: Mapping[str, Any]
) -> tuple[Path | Mapping[str, Tensor] | None, Path | None]:
    """The LoRA (file or state dict) and the learned tokens' file that a name means; None for what is not there."""
    # In memory.
    if isinstance(source, Mapping):
        return source, None
    path = local_path(source)
    # On the Hub: diffusers' file, or PEFT's where its config is there.
    if not path.exists() and str(source).count("/") == 1 and not path.suffix:
        embeds = from_hub(str(source), EMBEDS_NAME, hub, missing_ok=True)
        if weight_name is None and from_hub(str(source), files.CONFIG_NAME, hub, missing_ok=True) is not None:
            safe, pickled = files.ADAPTER_NAMES
            return from_hub(str(source), safe, hub, missing_ok=True) or from_hub(str(source), pickled, hub), embeds
        file = from_hub(str(source), weight_name or files.WEIGHT_NAME, hub, missing_ok=embeds is not None)
        return file, embeds
    # On this disk: a file or folder, with the tokens beside it.
    beside = (path if path.is_dir() else path.parent) / EMBEDS_NAME
    only_tokens = path.is_dir() and beside.exists() and len(list(path.glob("*.safetensors"))) == 1
    if only_tokens or path.name == EMBEDS_NAME:
        return None, beside
    embeds = beside if beside.exists() and (path.is_dir() or path.name == files.WEIGHT_NAME) else None
    return lora_path(path, weight_name), embeds


def from_hub(name: str, file: str, hub: Mapping[str, Any], *, missing_ok: bool = False) -> Any:
    """A file of a Hub repository on this disk; None where it is not there and may be missing.

    Raises:
        ValueError: the repository has no such file.
    """
    try:
        return hub_file(name, file, **hub)
    except FileNotFoundError:
        if missing_ok:
            return None
        raise ValueError(f"'{name}' has no file {file} on the Hub; download the LoRA, or name its file") from None
