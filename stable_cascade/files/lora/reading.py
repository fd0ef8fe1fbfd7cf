"""Reading LoRA files of any tool: what every key holds, and whether the tensors fit each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.files.tensor_files import read_weights
from stable_cascade.wording import brief, quoted

from .file import LoraFile
from .keys import POSITIONAL, TOKENS, detect, place
from .metadata import METADATA_KEY, read_metadata, sound
from .original import original_tokens
from .part import TENSORS, layers_of
from .peft_config import ADAPTER_NAMES, CONFIG_NAME, read_peft_config


def read(source: str | PathLike[str] | Mapping[str, Tensor]) -> LoraFile:
    """A LoRA file, or a state dict with its keys, of any format of `FORMATS` and `READ_ONLY`.

    Raises:
        ValueError: it cannot be read, is of no known format, or its tensors do not fit each other.
    """
    header: dict[str, str] = {}
    if isinstance(source, Mapping):
        name, tensors = "state dict", dict(source)
    else:
        name = str(source)
        tensors, header = read_weights(source)
    try:
        lora = _parsed(name, tensors, header)
    except ValueError as problem:
        raise ValueError(f"LoRA {quoted(name)} {problem}") from None
    return lora if isinstance(source, Mapping) else _with_config(lora, local_path(source))


def _with_config(lora: LoraFile, path: Path) -> LoraFile:
    """The LoRA with the config that PEFT has written beside it; a file that tells its own scale keeps that."""
    told = lora.metadata or any(lora.alphas.values()) or lora.format != "peft"
    if told or path.name not in ADAPTER_NAMES or not (path.parent / CONFIG_NAME).is_file():
        return lora
    component, config = read_peft_config(path.parent)
    wrong = next((key for key, value in config.items() if not sound(key, value)), None)
    if wrong is not None:
        raise ValueError(f"{quoted(path.parent / CONFIG_NAME)} has {quoted(config[wrong], 60)} as {wrong}; mend it")
    if config.get("use_dora") and not any("magnitude" in key for part in lora.parts.values() for key in part):
        raise ValueError(f"{quoted(path)} has no DoRA magnitudes, and its {CONFIG_NAME} says use_dora; get it again")
    # PEFT's own keys name no component: the config may note the network's class.
    unnamed = list(lora.parts) == ["prior"]
    parts = {component: lora.parts["prior"]} if component and unnamed else lora.parts
    return replace(lora, parts=parts, metadata=dict.fromkeys(parts, config), bare=unnamed and component is None)


def _parsed(name: str, tensors: dict[str, Tensor], header: dict[str, str]) -> LoraFile:
    wrong = next((key for key in tensors if not isinstance(key, str) or not isinstance(tensors[key], Tensor)), None)
    if wrong is not None:
        raise ValueError(f"has {quoted(wrong)}, which is no tensor")
    broken = next((key for key, value in tensors.items() if not _finite(value)), None)
    if broken is not None:
        raise ValueError(
            f"has values in {quoted(broken, 80)} that are not finite: its training diverged; train it again"
        )
    format = detect(tensors, header)
    metadata = read_metadata(header)
    kept = {key: value for key, value in header.items() if key not in (METADATA_KEY, "format")}
    if format == "original":
        weights = {key: value for key, value in tensors.items() if POSITIONAL.fullmatch(key)}
        _all_known(tensors, [*weights, "embeddings.indices", "embeddings.embeddings"])
        return LoraFile(name, format, {"prior": weights}, metadata, token_deltas=original_tokens(tensors), header=kept)
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for key, value in tensors.items():
        if TOKENS.fullmatch(key):
            continue
        found = place(key)
        if found is None:
            raise ValueError(f"has the key {quoted(key, 80)}, which belongs to no layer of a LoRA")
        if found.what == "alpha":
            target: dict[str, Any] = alphas.setdefault(found.component, {})
            _put(target, found.layer, _alpha(key, value), key)
        else:
            _put(parts.setdefault(found.component, {}), f"{found.layer}.{found.what}", value, key)
    for component in {*parts, *alphas}:
        _check(parts.get(component, {}), alphas.get(component, {}))
    tokens, outputs = _tokens(tensors)
    return LoraFile(name, format, parts, metadata, alphas, {}, tokens, outputs, kept)


def _finite(value: Tensor) -> bool:
    """Whether no value is infinite or not a number; of integers none is."""
    if not value.is_floating_point():
        return True
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())


def _put(values: dict[str, Any], name: str, value: Any, key: str) -> None:
    if name in values:
        raise ValueError(f"has two tensors for {quoted(name, 80)}, one of them {quoted(key, 80)}")
    values[name] = value


def _all_known(tensors: Mapping[str, Tensor], known: Sequence[str]) -> None:
    odd = next(iter(tensors.keys() - set(known)), None)
    if odd is not None:
        raise ValueError(f"has the key {quoted(odd, 80)} among numbered weights, unlike the original's files")


def _alpha(key: str, value: Tensor) -> float:
    """An alpha as a number. Shapes: () or (1,)."""
    number = float(value.item()) if value.numel() == 1 and not value.is_complex() else math.nan
    if not math.isfinite(number) or not number:
        what = brief(number) if value.numel() == 1 else f"of shape {list(value.shape)}"
        raise ValueError(f"has {quoted(key, 80)} {what}; one finite number other than 0 is needed")
    return number


def _check(part: Mapping[str, Tensor], alphas: Mapping[str, float]) -> None:
    """Passes when every layer has both factors of one rank, and nothing lies about without them."""
    layers = set(layers_of(part))
    for key, value in part.items():
        what = next(what for what in TENSORS if key.endswith(f".{what}") or key == what)
        layer = key.removesuffix(what).removesuffix(".")
        if layer not in layers:
            raise ValueError(f"has {quoted(key, 80)} and lacks its first factor (lora_A or lora_down)")
        if f"{layer}.lora_B.weight" not in part:
            raise ValueError(f"has {quoted(f'{layer}.lora_A.weight', 80)} and lacks its lora_B (lora_up)")
        if not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(f"has {quoted(key, 80)} as {value.dtype}, and floating-point values are needed")
    odd = next(iter(alphas.keys() - layers), None)
    if odd is not None:
        raise ValueError(f"has an alpha for {quoted(odd, 80)} but no factors")
    for layer in layers:
        down, up = part[f"{layer}.lora_A.weight"], part[f"{layer}.lora_B.weight"]
        if min(down.ndim, up.ndim) < 2 or max(down.ndim, up.ndim) > 4 or len(down) != up.shape[1] or not len(down):
            raise ValueError(
                f"has factors of {list(down.shape)} and {list(up.shape)} for {quoted(layer, 80)}; (rank, inputs) and "
                "(outputs, rank) are needed"
            )


def _tokens(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of the bundled tokens, input and output ones. Shapes: (n, D) per token."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for key, value in tensors.items():
        match = TOKENS.fullmatch(key)
        if match:
            if value.ndim not in (1, 2) or not value.numel() or not value.is_floating_point():
                raise ValueError(f"has {quoted(key, 80)} of shape {list(value.shape)}; rows of a token are needed")
            found[bool(match[2])][match[1]] = value if value.ndim == 2 else value[None]
    return found
