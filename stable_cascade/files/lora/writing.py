"""LoRA files for every tool: keys, values and header of a format, from parts under our names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .factors import scaled
from .metadata import METADATA_KEY, config_of, join_components, write_metadata
from .names import comfyui_name, flat
from .part import Part, is_depthwise
from .report import Report

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
    if "lora_B.bias" in kinds and format != "peft":
        raise ValueError(f"has biases (lora_bias), which no {format} file can hold; write peft instead")
    if "dora_scale" in kinds and format in ("peft", "original"):
        raise ValueError(
            f"is a DoRA with the magnitudes of the inputs, OneTrainer's default, which no {format} file can hold; "
            "write onetrainer, onetrainer_diffusers, kohya or comfyui"
        )
    if "lora_magnitude_vector" in kinds and format == "original":
        raise ValueError("is a DoRA, which no original file can hold; write another format")
    if kinds & {"dora_scale", "lora_magnitude_vector"}:
        if format == "kohya":
            report.note("kohya's stable-cascade branch reads no DoRA; ComfyUI and OneTrainer do.")
        if "lora_magnitude_vector" in kinds and format != "peft":
            report.note("ComfyUI divides by the norm of the base weights, not of the updated ones: a DoRA draws a "
                        "little differently there.")  # fmt: skip
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
