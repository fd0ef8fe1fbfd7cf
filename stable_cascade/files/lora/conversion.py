"""From one tool's LoRA file to another's: the network's weights are not needed, its layers' names and shapes are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.files.tensor_files import whole, write_tensors
from stable_cascade.wording import quoted

from .keys import Shapes, comfyui_name, flat, format_name
from .metadata import METADATA_KEY, WEIGHT_NAME, config_of, join_components, write_metadata
from .original import as_original, original_token_tensors
from .parts import Part, Report, is_depthwise, scaled
from .reading import FILTERS_KEY, LoraFile, read

EMBEDS_NAME = "learned_embeds.safetensors"
TOKEN_KEY = "token"
"""Header entry of a token's own file: the token, which its file name may not be able to spell."""


def convert(
    source: str | PathLike[str] | Mapping[str, Tensor] | LoraFile,
    target: str | PathLike[str],
    format: str,
    *,
    layers: Mapping[str, Shapes],
    module_filters: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Report:
    """Writes a LoRA file in another tool's format, in its own dtype, and says how faithful that is.

    Args:
        layers: component -> weight shape of every linear and convolution layer of the network it is for.
        module_filters: of the original's format, from which or to which this goes.
        metadata: more entries for the header.

    Raises:
        ValueError: the file cannot be read or does not fit the network, or the format cannot hold what is in it.
    """
    format = format_name(format)  # before anything is read
    lora = source if isinstance(source, LoraFile) else read(source)
    return write(target, lora, format, layers=layers, module_filters=module_filters, metadata=metadata)


def write(
    target: str | PathLike[str],
    lora: LoraFile,
    format: str,
    *,
    layers: Mapping[str, Shapes],
    module_filters: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Report:
    """Writes a LoRA that was read; see `convert`.

    A target without `.safetensors` is a folder in diffusers' layout for `peft`, and an error for the others. Tokens go
    where the tool looks for them: into the file (OneTrainer, and the original as rows to add), into
    `learned_embeds.safetensors` (a folder), or into a folder `<name>_embeddings` with a file for each.
    """
    # Where it goes.
    format, path = format_name(format), local_path(target)
    if path.suffix != ".safetensors" and format != "peft":
        raise ValueError(f"target {quoted(target)} does not end in .safetensors, as a file in {format} format has to")
    file = path if path.suffix == ".safetensors" else path / WEIGHT_NAME
    report = Report(lora.name, lora.format, str(target), format)
    # Encode everything in memory first: what the format cannot hold ends here.
    try:
        check_tokens(lora, format)
        filters = None if format == "original" else module_filters
        parts = {component: lora.part(component, layers[component], filters) for component in lora.parts}
        check_holds(format, parts, report)
        tensors, header = _encoded(format, parts, lora, layers, module_filters, report)
    except ValueError as problem:
        named = str(problem).startswith(quoted(lora.name))
        raise ValueError(str(problem) if named else f"{quoted(lora.name)} {problem}") from None
    # Write the tensors with their metadata, then tokens that are files of their own.
    report.layers = {component: len(part.layers) for component, part in parts.items()}
    header = {**carried(lora.header, format, parts, report), **header, **(metadata or {})}
    report.tokens = [*lora.tokens, *(f"id {token}" for token in lora.token_deltas)]
    if tensors:
        _save(file, tensors, header, report)
    if lora.tokens and format not in BUNDLED_TOKENS:
        _save_tokens(file, lora.tokens, path.suffix != ".safetensors", report)
    return report


def check_tokens(lora: LoraFile, format: str) -> None:
    """Passes when a format can hold the file's tokens.

    Raises:
        ValueError: it cannot as they are.
    """
    if lora.output_tokens and format not in BUNDLED_TOKENS:
        name = next(iter(lora.output_tokens))
        raise ValueError(
            f"has the output embedding {quoted(name, 60)}, which only OneTrainer knows; write onetrainer or "
            "onetrainer_diffusers"
        )
    if lora.tokens and format == "original":
        raise ValueError(
            "has learned tokens, which the original stores as differences to the base's rows; give base and "
            "train_tokens"
        )
    if lora.token_deltas and format != "original":
        raise ValueError(
            "has learned tokens as differences to the base's rows, and without their names; give base and train_tokens"
        )


def _encoded(
    format: str,
    parts: Mapping[str, Part],
    lora: LoraFile,
    layers: Mapping[str, Shapes],
    module_filters: Sequence[str] | None,
    report: Report,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the new file."""
    if format != "original":
        tensors, header = WRITERS[format](parts, report) if parts else ({}, {})
        if format in BUNDLED_TOKENS:
            tensors |= {f"bundle_emb.{name}.clip_g": rows for name, rows in lora.tokens.items()}
            tensors |= {f"bundle_emb.{name}.clip_g_out": rows for name, rows in lora.output_tokens.items()}
        return tensors, header
    if "prior" not in parts:
        raise ValueError("has nothing for the prior, and the original's files hold nothing else; write another format")
    stored = lora.header.get(FILTERS_KEY, "").split() if lora.format != "original" else []
    tensors, filters = as_original(parts["prior"], layers["prior"], module_filters or stored or None, report)
    return tensors | original_token_tensors(lora.token_deltas), {FILTERS_KEY: " ".join(filters)}


def _save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], report: Report) -> None:
    """Writes a file whole or not at all, so that it may replace its own source.

    Raises:
        ValueError: a folder has its name.
    """
    if path.is_dir():
        raise ValueError(f"target {quoted(path)} is a folder and is not replaced; name another place")
    own = {key: value.clone() for key, value in tensors.items()}  # layers may share one, which safetensors refuses
    with whole(path) as temporary:
        write_tensors(temporary, own, header)
    report.files.append(str(path))


def _save_tokens(file: Path, tokens: Mapping[str, Tensor], is_folder: bool, report: Report) -> None:
    """Rows in files of their own: one for all in diffusers' layout, one each, key `clip_g`, for the others."""
    if is_folder:
        rows = {name: value[0] if len(value) == 1 else value for name, value in tokens.items()}
        return _save(file.parent / EMBEDS_NAME, rows, {"format": "pt"}, report)
    folder = tokens_folder(file)
    for number, (name, value) in enumerate(tokens.items()):
        stem = re.sub(r"[^\w.-]+", "", name) or f"token{number}"
        _save(folder / f"{stem}.safetensors", {"clip_g": value}, {"format": "pt", TOKEN_KEY: name}, report)
    report.note(f"Learned tokens are files of their own, in {folder.name}.")
    return None


def tokens_folder(file: Path) -> Path:
    """The folder beside a LoRA file with its learned tokens, one file each."""
    return file.with_name(f"{file.stem}_embeddings")


def with_tokens(lora: LoraFile, rows: Mapping[str, Tensor]) -> LoraFile:
    """The LoRA with these tokens' rows in place of its own. Shapes: (D,) or (n, D) per token."""
    tokens = {name: row if row.ndim == 2 else row[None] for name, row in rows.items()}
    return replace(lora, tokens=tokens, token_deltas={})


def with_deltas(lora: LoraFile, deltas: Mapping[int, Tensor]) -> LoraFile:
    """The LoRA with its tokens as differences to the base's rows, by id. Shapes: (D,) per token."""
    return replace(lora, tokens={}, token_deltas={token: row.to(torch.float32) for token, row in deltas.items()})


Tensors = dict[str, Tensor]

PREFIXES = {
    "peft": {"prior": "prior.", "decoder": "decoder.", "text_encoder": "text_encoder."},
    "kohya": {"prior": "lora_unet_", "text_encoder": "lora_te_"},
    "onetrainer": {"prior": "lora_prior_unet_", "text_encoder": "lora_prior_te_"},
    "onetrainer_diffusers": {"prior": "prior.", "text_encoder": "text_encoder."},
    "comfyui": {"prior": "diffusion_model.", "text_encoder": "text_encoders.clip_g.transformer."},
    "original": {"prior": "weights."},
}
"""Format -> component -> what its keys begin with; a component that is not there cannot be written."""

BUNDLED_TOKENS = ("onetrainer", "onetrainer_diffusers")
"""Formats that hold learned tokens among the layers."""

# Entries of a header that describe the very file they are in.
_OF_THE_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.date")


def check_holds(format: str, parts: Mapping[str, Part], report: Report) -> None:
    """Passes when a format can hold these parts.

    Raises:
        ValueError: it cannot, naming the first thing that it cannot hold.
    """
    for component, part in parts.items():
        if component not in PREFIXES[format]:
            raise ValueError(f"has a part for the {component}, which no {format} file can hold; write peft instead")
        _check_kinds(format, part, report)


def _check_kinds(format: str, part: Part, report: Report) -> None:
    kinds = {key.removeprefix(layer).removeprefix(".") for layer in part.layers for key in _own(part, layer)}
    # What a format has no place for is refused.
    if "lora_B.bias" in kinds and format != "peft":
        raise ValueError(f"has biases (lora_bias), which no {format} file can hold; write peft instead")
    if "dora_scale" in kinds and format in ("peft", "original"):
        raise ValueError(
            f"is a DoRA with the magnitudes of the inputs, OneTrainer's default, which no {format} file can hold; "
            "write onetrainer, onetrainer_diffusers, kohya or comfyui"
        )
    if "lora_magnitude_vector" in kinds and format == "original":
        raise ValueError("is a DoRA, which no original file can hold; write another format")
    # What other tools compute differently is noted.
    if kinds & {"dora_scale", "lora_magnitude_vector"}:
        if format == "kohya":
            report.note("kohya's stable-cascade branch reads no DoRA; ComfyUI and OneTrainer do.")
        if "lora_magnitude_vector" in kinds and format != "peft":
            report.note("ComfyUI divides by the norm of the base weights, not of the updated ones: a DoRA draws a "
                        "little differently there.")  # fmt: skip
    # OneTrainer's updates of depthwise convolutions have a shape of their own.
    depthwise = next((layer for layer in part.layers if _is_grouped(part, layer)), None)
    if depthwise is not None and format in ("peft", "original"):
        raise ValueError(
            f"updates the depthwise '{depthwise}' in OneTrainer's way, which no {format} file can hold; write "
            "onetrainer, onetrainer_diffusers, kohya or comfyui"
        )


def _own(part: Part, layer: str) -> list[str]:
    ends = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "dora_scale")
    return [f"{layer}.{end}" for end in ends if f"{layer}.{end}" in part.tensors]


def _is_grouped(part: Part, layer: str) -> bool:
    """Whether this is OneTrainer's update of a depthwise convolution: one channel for all of them."""
    down, up = part.tensors[f"{layer}.lora_A.weight"], part.tensors[f"{layer}.lora_B.weight"]
    return down.ndim == 4 and len(up) == 1 and is_depthwise(torch.Size((down.shape[1], 1, *down.shape[2:])))


def as_peft(parts: Mapping[str, Part], report: Report) -> tuple[Tensors, dict[str, str]]:
    """PEFT's keys and LoraConfigs."""
    tensors: Tensors = {}
    configs = {}
    for component, part in parts.items():
        tensors |= join_components({component: part.tensors})
        configs[component] = _config(part)
    return tensors, write_metadata(configs)


def _config(part: Part) -> dict[str, Any]:
    """The LoraConfig that the source had if it says the same, else a new one."""
    use_dora = any("lora_magnitude_vector" in key for key in part.tensors)
    new = config_of(part.ranks, part.alphas, use_dora=use_dora)
    return {**new, **part.config} if part.keeps_config else new


def with_alphas(format: str) -> Callable[[Mapping[str, Part], Report], tuple[Tensors, dict[str, str]]]:
    """The writer of a format with `lora_down`, `lora_up` and `alpha` for each layer."""

    def build(parts: Mapping[str, Part], report: Report) -> tuple[Tensors, dict[str, str]]:
        tensors: Tensors = {}
        for component, part in parts.items():
            for layer in part.layers:
                named = comfyui_name(layer) if component != "text_encoder" else layer
                name = PREFIXES[format][component] + (named if format == "comfyui" else flat(named))
                tensors[f"{name}.lora_down.weight"] = part.tensors[f"{layer}.lora_A.weight"]
                tensors[f"{name}.lora_up.weight"] = part.tensors[f"{layer}.lora_B.weight"]
                tensors[f"{name}.alpha"] = _number(part.alphas[layer])
                tensors |= _dora_scale(name, layer, part)
        return tensors, _kohya_header(parts) if format == "kohya" else {}

    return build


def as_onetrainer_diffusers(parts: Mapping[str, Part], report: Report) -> tuple[Tensors, dict[str, str]]:
    """OneTrainer's diffusers format: alpha / rank is put into the second factor."""
    tensors: Tensors = {}
    for component, part in parts.items():
        for layer in part.layers:
            name = PREFIXES["onetrainer_diffusers"][component] + layer
            up = scaled(part.tensors[f"{layer}.lora_B.weight"], part.scales[layer])
            _record(report, up.value.dtype, up.error, folded=part.scales[layer] != 1)
            tensors[f"{name}.lora_A.weight"] = part.tensors[f"{layer}.lora_A.weight"]
            tensors[f"{name}.lora_B.weight"] = up.value
            if f"{layer}.lora_magnitude_vector" in part.tensors:
                tensors[f"{name}.lora_magnitude_vector.weight"] = part.tensors[f"{layer}.lora_magnitude_vector"]
            if f"{layer}.dora_scale" in part.tensors:
                tensors[f"{name}.dora_scale"] = part.tensors[f"{layer}.dora_scale"]
    return tensors, {}


def _record(report: Report, dtype: torch.dtype, error: float, *, folded: bool) -> None:
    """Says of a scaled factor what that cost."""
    if error:
        report.lower("exact" if error <= 2**-23 and dtype in (torch.float32, torch.float64) else "rounded", error)
        report.note(f"The scale was put into lora_up, which rounds it once to {str(dtype).removeprefix('torch.')}.")
    elif folded:
        report.lower("exact")
        report.note("The scale was put into lora_up, without any rounding.")


def _dora_scale(name: str, layer: str, part: Part) -> Tensors:
    """The magnitude as all but PEFT have it. Shapes: (O, 1, …) of the outputs, (1, I, …) of the inputs."""
    down = part.tensors[f"{layer}.lora_A.weight"]
    if f"{layer}.dora_scale" in part.tensors:
        return {f"{name}.dora_scale": part.tensors[f"{layer}.dora_scale"]}
    magnitude = part.tensors.get(f"{layer}.lora_magnitude_vector")
    if magnitude is None:
        return {}
    return {f"{name}.dora_scale": magnitude.reshape(-1, *[1] * (down.ndim - 1))}


def _number(value: float) -> Tensor:
    """A number as a tensor of the smallest usual type that holds it exactly."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def _kohya_header(parts: Mapping[str, Part]) -> dict[str, str]:
    ranks = {rank for part in parts.values() for rank in part.ranks.values()}
    alphas = {alpha for part in parts.values() for alpha in part.alphas.values()}
    header = {"ss_network_module": "networks.lora"}
    if len(ranks) == len(alphas) == 1:
        header |= {"ss_network_dim": str(*ranks), "ss_network_alpha": str(*alphas)}
    return header


WRITERS: dict[str, Callable[[Mapping[str, Part], Report], tuple[Tensors, dict[str, str]]]] = {
    "peft": as_peft,
    "kohya": with_alphas("kohya"),
    "onetrainer": with_alphas("onetrainer"),
    "onetrainer_diffusers": as_onetrainer_diffusers,
    "comfyui": with_alphas("comfyui"),
}
"""Format -> its writer; the original's needs the network, see `positional`."""


def carried(header: Mapping[str, str], format: str, parts: Mapping[str, Part], report: Report) -> dict[str, str]:
    """What of a source's header goes into the new one: all but what describes the old file.

    LoraConfigs are kept, so that the way back to PEFT finds them; not where the new file would be read with them.
    """
    left = [key for key in header if key in _OF_THE_FILE]
    if left:
        report.note(f"Header entries of the old file itself stay behind: {', '.join(left)}.")
    kept = {key: value for key, value in header.items() if key not in _OF_THE_FILE}
    configs = {component: part.config for component, part in parts.items() if part.config.get("r")}
    if configs and format in ("kohya", "onetrainer", "comfyui", "original"):
        kept[METADATA_KEY] = json.dumps(join_components(configs), sort_keys=True)
    return {"format": "pt", **kept}
