"""LoRA files from one tool's format to another's, by the layers' names of the released networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from stable_cascade.disk import local_path
from stable_cascade.files import lora as files
from stable_cascade.files.loading import built_on_meta, on_meta
from stable_cascade.files.presets import PRESETS, clip_preset, preset
from stable_cascade.wording import brief, quoted

from .injection import component_of, layer_shapes
from .load import read_with_tokens
from .tokens import original_deltas, restart_rows

Layers = Mapping[str, Mapping[str, Size]]

_TEXT_ENCODERS = {"3.6B": "ViT-bigG/14", "embedded": "embedded"}
"""The text encoder that each size of the prior reads."""


def convert_lora(
    source: str | PathLike[str] | Mapping[str, Tensor],
    target: str | PathLike[str],
    format: str,
    *,
    base: Any = None,
    module_filters: Sequence[str] | None = None,
    train_tokens: Sequence[Sequence[str | None]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> files.Report:
    """Writes a LoRA of any known format, with its learned tokens, in another tool's format; no network is loaded.

    Args:
        source: a file, a folder, a Hub name or a state dict.
        target: a `.safetensors` file, or, for `peft`, a folder.
        format: one of `files.lora.FORMATS`.
        base: the network it was trained for, where it is neither a released one nor the embedded one, or where tokens
            go from or to the original's format: a pipeline, its folder, a network, or a preset's name.
        module_filters, train_tokens: of the training, where the original's format does not store them.
        metadata: more entries for the header.

    Raises:
        ValueError: the file cannot be read or fits no known network, or the format cannot hold what is in it.
    """
    format = files.format_name(format)
    lora = read_with_tokens(source)  # type: ignore[arg-type]
    lora = _tokens_for(lora, format, base, train_tokens)
    layers = _layers(lora, base, module_filters, by_file=format != "original")
    return files.convert(lora, target, format, layers=layers, module_filters=module_filters, metadata=metadata)


def peft_state_dict(lora: files.LoraFile) -> dict[str, Tensor]:
    """A LoRA under PEFT's keys with their component's prefix, and each layer's `.alpha` where a scale is not 1."""
    layers = _layers(lora, None, None, by_file=True)
    result: dict[str, Tensor] = {}
    for component in lora.parts:
        part = lora.part(component, layers[component])
        tensors = dict(part.tensors)
        if any(scale != 1 for scale in part.scales.values()):
            tensors |= {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in part.alphas.items()}
        result |= files.join_components({component: tensors})
    return result


def preset_layers(component: str, version: str) -> dict[str, Size]:
    """Weight shape of every layer of a released network, or the embedded one, that an adapter may go to."""
    if component == "text_encoder":
        config = clip_preset("text_encoder", _TEXT_ENCODERS.get(version, _TEXT_ENCODERS["3.6B"]))
        return files.clip_layers(config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])
    return _built(component, version)


@cache
def _built(component: str, version: str) -> dict[str, Size]:
    from stable_cascade.models.decoder import StableCascadeDecoder
    from stable_cascade.models.prior import StableCascadePrior

    network = {"prior": StableCascadePrior, "decoder": StableCascadeDecoder}[component]
    return layer_shapes(on_meta(network, preset(component, version)))


def _layers(lora: files.LoraFile, base: Any, filters: Sequence[str] | None, *, by_file: bool) -> dict[str, Any]:
    """Component -> the layers of the network that each part is for.

    Args:
        by_file: whether names with dots may speak for themselves where no known network has them.
    """
    if base is not None:
        given = _layers_of(base)
        missing = next((component for component in lora.parts if component not in given), None)
        if missing is not None:
            raise ValueError(
                f"{quoted(lora.name)} has a part for the {missing}, which base lacks; give a whole pipeline"
            )
        return dict(given)
    return {component: _fitting(lora, component, filters, by_file) for component in lora.parts}


def _fitting(lora: files.LoraFile, component: str, filters: Sequence[str] | None, by_file: bool) -> Mapping[str, Size]:
    """The layers of the known network that a part fits."""
    versions = list(_TEXT_ENCODERS) if component == "text_encoder" else list(PRESETS[component])
    problems = []
    for version in versions:
        layers = preset_layers(component, version)
        try:
            lora.part(component, layers, filters)
        except ValueError as problem:
            problems.append(f"{version}: {problem}".replace(quoted(lora.name), "it"))
        else:
            return layers
    if by_file and lora.format != "original":
        try:
            return lora.own_shapes(component)
        except ValueError:
            pass  # flattened names: the networks' own reasons say more
    raise ValueError(
        f"{quoted(lora.name)} fits no {component} of a known size; give base, the network it was trained for "
        f"({problems[0]})"
    )


def _layers_of(base: Any) -> dict[str, Mapping[str, Size]]:
    """Component -> layers of a pipeline, a network, a folder with either, or a preset's name."""
    if isinstance(base, torch.nn.Module):
        return {component_of(base): layer_shapes(base)}
    if not isinstance(base, str | PathLike):
        models = {component: getattr(base, component, None) for component in files.COMPONENTS}
        return {component: layer_shapes(model) for component, model in models.items() if model is not None}
    folder = local_path(base)
    if folder.is_dir():
        return _layers_of_folder(folder)
    found = {component: preset_layers(component, str(base)) for component in PRESETS if str(base) in PRESETS[component]
             and component in files.COMPONENTS}  # fmt: skip
    if not found:
        raise ValueError(f"base {quoted(base)} is no folder and no preset; presets: {', '.join(PRESETS['prior'])}")
    return {**found, "text_encoder": preset_layers("text_encoder", str(base))}


def _layers_of_folder(folder: Path) -> dict[str, Mapping[str, Size]]:
    """Component -> layers by the config.json of each, without reading a weight."""
    from stable_cascade.files.json_files import read_config
    from stable_cascade.models.decoder import StableCascadeDecoder
    from stable_cascade.models.prior import StableCascadePrior

    # The diffusion networks, built without memory.
    found: dict[str, Mapping[str, Size]] = {}
    for component, network in (("prior", StableCascadePrior), ("decoder", StableCascadeDecoder)):
        config = folder / component / "config.json"
        if config.is_file():
            try:
                found[component] = layer_shapes(built_on_meta(network, read_config(config), component))
            except ValueError as error:
                raise ValueError(f"base {quoted(config)}: {brief(error, 200)}") from error
    # The text encoder, by its three sizes.
    text = folder / "text_encoder" / "config.json"
    if text.is_file():
        given = [read_config(text).get(key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")]
        sizes = [size for size in given if isinstance(size, int) and 0 < size < 100_000]
        if len(sizes) < len(given):
            raise ValueError(
                f"base {quoted(text)} has the sizes {brief(given, 60)}; layers, width and inner width are needed"
            )
        found["text_encoder"] = files.clip_layers(*sizes)
    if not found:
        raise ValueError(f"base {quoted(folder)} has neither prior/config.json nor text_encoder/config.json")
    return found


def _tokens_for(
    lora: files.LoraFile, format: str, base: Any, train_tokens: Sequence[Sequence[str | None]] | None
) -> files.LoraFile:
    """The LoRA with its tokens as the format has them: rows by name, or differences by id for the original's."""
    # Tokens that are not new ones have no place in most formats.
    own = next((name for name in lora.tokens if name.endswith("</w>")), None)
    if own is not None and format in ("onetrainer", "onetrainer_diffusers", "kohya", "comfyui"):
        raise ValueError(
            f"{quoted(lora.name)} changes the vocabulary's own token {quoted(own, 60)}, which {format} has no place "
            "for; write peft or original"
        )
    # Only the original stores differences, so only from or to it anything changes.
    to_original, has_deltas = format == "original", bool(lora.token_deltas)
    if to_original == has_deltas or not (lora.tokens or has_deltas):
        return lora
    if base is None:
        raise ValueError(
            f"{quoted(lora.name)} has learned tokens, which the original stores as differences to the text encoder's "
            "rows; give base, the pipeline it was trained for, and train_tokens"
        )
    # Both ways need the rows of the base.
    tokenizer, text_encoder = _text_parts(base)
    if has_deltas:
        return files.with_tokens(lora, restart_rows(tokenizer, text_encoder, lora.token_deltas, train_tokens))
    several = next((name for name, rows in lora.tokens.items() if len(rows) > 1), None)
    if several is not None:
        raise ValueError(
            f"{quoted(lora.name)} has several rows for the token {quoted(several, 60)}; the original has one"
        )
    rows = {name: row[0] for name, row in lora.tokens.items()}
    return files.with_deltas(lora, original_deltas(tokenizer, text_encoder, rows, train_tokens))


def _text_parts(base: Any) -> tuple[Any, Any]:
    """Tokenizer and text encoder of a pipeline or its folder.

    Raises:
        ValueError: there are none.
    """
    tokenizer, text_encoder = getattr(base, "tokenizer", None), getattr(base, "text_encoder", None)
    if isinstance(base, str | PathLike) and (local_path(base) / "text_encoder").is_dir():
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(local_path(base) / "tokenizer")
        text_encoder = CLIPTextModelWithProjection.from_pretrained(local_path(base) / "text_encoder")
    if tokenizer is None or text_encoder is None:
        raise ValueError(f"base {quoted(base, 60)} has no tokenizer and text_encoder; give a pipeline or its folder")
    return tokenizer, text_encoder
