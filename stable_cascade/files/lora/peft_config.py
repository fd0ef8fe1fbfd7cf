"""The `adapter_config.json` that PEFT writes beside `adapter_model.safetensors`: what it means, or its refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_cascade.files.json_files import read_json
from stable_cascade.wording import brief, quoted

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
    if not isinstance(config.get("r"), int) or config.get("lora_alpha") is None:
        raise ValueError(f"{quoted(path)} names no r or no lora_alpha, so the strength is unknown; get the file again")
    noted = config.get("auto_mapping") or {}
    network = noted.get("base_model_class") if isinstance(noted, dict) else None
    return _COMPONENTS.get(str(network)), {key: config[key] for key in _SCALE if config.get(key) is not None}


def _means_something(value: Any) -> bool:
    """Whether a value is other than what PEFT writes for "not asked for"."""
    return value not in (None, False, "", 0) and value != {} and value != []
