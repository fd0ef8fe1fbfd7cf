"""The LoraConfigs in a file's header, as PEFT and diffusers lay them out, and the scale of an update by them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from stable_cascade.files.json_files import parse_json, read_json
from stable_cascade.wording import brief, quoted

from .keys import COMPONENTS

METADATA_KEY = "lora_adapter_metadata"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"

# What a pattern of `alpha_pattern` may hold: regular expressions that cannot take long.
_PATTERN = re.compile(r"[\w.^$|()\\*-]*")
_SWITCHES = ("use_rslora", "lora_bias", "use_dora")


def split_components(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries by component, without its prefix; entries without a prefix belong to the prior."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        component, key = (head, rest) if head in COMPONENTS else ("prior", key)
        parts.setdefault(component, {})[key] = value
    return parts


def join_components(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The reverse of `split_components`."""
    return {f"{component}.{key}": value for component, values in parts.items() for key, value in values.items()}


def read_metadata(header: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """LoraConfig values by component from a safetensors header, empty when there are none.

    Raises:
        ValueError: they are no JSON, or a value that matters here is of the wrong kind.
    """
    text = (header or {}).get(METADATA_KEY)
    configs = split_components(parse_json(text, f"header entry {METADATA_KEY}")) if text else {}
    for component, config in configs.items():
        for key, value in config.items():
            if not sound(key, value):
                raise ValueError(
                    f"has {quoted(value, 60)} as the {component}'s {key} in its header; take {METADATA_KEY} out of it"
                )
    return configs


def write_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A safetensors header with the LoraConfig values of each component, in diffusers' layout."""
    values = {
        component: {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        for component, config in configs.items()
    }
    return {"format": "pt", METADATA_KEY: json.dumps(join_components(values), indent=2, sort_keys=True)}


def alpha_of(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """The alpha that a LoraConfig gives a layer, so that alpha / rank multiplies its update; its rank by default."""
    alpha = _by_pattern(layer, config.get("alpha_pattern")) or config.get("lora_alpha") or rank
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def rank_of(layer: str, config: Mapping[str, Any]) -> Any:
    """The rank that a LoraConfig gives a layer, None where it names none."""
    return _by_pattern(layer, config.get("rank_pattern")) or config.get("r")


def _by_pattern(layer: str, patterns: Mapping[str, Any] | None) -> Any:
    """What the first of PEFT's patterns that fits a layer says, None where none does."""
    return next((value for key, value in (patterns or {}).items() if _compiled(key).match(layer)), None)


@lru_cache(maxsize=4096)  # a config may have a pattern for every layer
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def config_of(ranks: Mapping[str, int], alphas: Mapping[str, float], *, use_dora: bool = False) -> dict[str, Any]:
    """LoraConfig values of layers with these ranks and alphas."""
    rank, alpha = common(ranks), common(alphas)
    return {
        "r": rank,
        "lora_alpha": plain(alpha),
        "rank_pattern": grouped({layer: own for layer, own in ranks.items() if own != rank}),
        "alpha_pattern": grouped({layer: plain(own) for layer, own in alphas.items() if own != alpha}),
        "target_modules": sorted(ranks),
        "use_dora": use_dora,
    }


def common(values: Mapping[str, Any]) -> Any:
    """The value that most entries have."""
    return Counter(values.values()).most_common(1)[0][0]


def plain(number: float) -> float:
    """A whole number as int, as PEFT writes it."""
    return int(number) if float(number).is_integer() else float(number)


def grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """A rank or alpha pattern of whole names; layers of one value share a pattern where there are many.

    PEFT tries every pattern on every layer, so that hundreds of them would take minutes.
    """
    if len(values) <= 32:
        return {f"^{name}": value for name, value in values.items()}
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return {f"^({'|'.join(same)})": value for value, same in names.items()}


def sound(key: str, value: Any) -> bool:
    """Whether a value of a LoraConfig is of its kind, for the keys that are used."""
    if key in ("lora_alpha", "r"):
        return value is None or _number(value)
    if key == "lora_dropout":
        return value is None or value == 0 or (_number(value) and 0 < value < 1)
    if key in _SWITCHES:
        return value is None or isinstance(value, bool)
    if key not in ("alpha_pattern", "rank_pattern"):
        return True
    if not isinstance(value, dict):
        return value is None
    return all(_cheap(name) and _number(own) for name, own in value.items())


def _cheap(pattern: str) -> bool:
    """Whether a regular expression is sound and cannot take long, whatever it is tried on."""
    if not _PATTERN.fullmatch(pattern) or pattern.count("*") > 2 or pattern.count("(") > 1 or ")*" in pattern:
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        return False
    return True


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < 1e30


CONFIG_NAME = "adapter_config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

_SCALE = ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "lora_dropout", "use_dora", "lora_bias")
"""What says how the tensors act."""
_SAYS_NOTHING = frozenset({
    *_SCALE, "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core",
    "ensure_weight_tying", "qalora_group_size", "init_lora_weights", "bias", "runtime_config", "eva_config",
})  # fmt: skip
"""Which layers, and how the training began or ran: the tensors themselves show it, or it is looked at on its own."""
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the weights beneath the adapter."""


_COMPONENTS = {
    "StableCascadePrior": "prior",
    "StableCascadeDecoder": "decoder",
    "CLIPTextModelWithProjection": "text_encoder",
}
"""What a network is, whose class PEFT notes."""


def read_peft_config(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The component that was trained, where the config knows, and LoraConfig values that say how the tensors act.

    Raises:
        ValueError: it is no LoRA's, or asks for what the tensors alone cannot give back.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)

    def refused(key: str, remedy: str) -> ValueError:
        return ValueError(f"{quoted(path)} has {brief(key, 60)}: {quoted(config.get(key), 60)}, which {remedy}")

    # Refuse whatever changes more than low-rank updates do.
    if config.get("peft_type", "LORA") != "LORA":
        raise refused("peft_type", "is no LoRA; merge it into the network with PEFT")
    began = config.get("init_lora_weights", True)
    if isinstance(began, str) and began.lower().startswith(_REBASED):
        raise refused("init_lora_weights", "changes the weights beneath; save it in PEFT as a plain LoRA")
    if config.get("bias", "none") not in ("none", None):
        raise refused("bias", "trains biases of the network; merge it into the network with PEFT")
    odd = next((key for key, value in config.items() if key not in _SAYS_NOTHING and _means_something(value)), None)
    if odd is not None:
        raise refused(odd, "is not read here; merge it into the network with PEFT")
    # Rank and alpha are the strength; without them the tensors mean nothing.
    if not isinstance(config.get("r"), int) or config.get("lora_alpha") is None:
        raise ValueError(f"{quoted(path)} names no r or no lora_alpha, so the strength is unknown; get the file again")
    noted = config.get("auto_mapping") or {}
    network = noted.get("base_model_class") if isinstance(noted, dict) else None
    return _COMPONENTS.get(str(network)), {key: config[key] for key in _SCALE if config.get(key) is not None}


def _means_something(value: Any) -> bool:
    """Whether a value is other than what PEFT writes for "not asked for"."""
    return value not in (None, False, "", 0) and value != {} and value != []
