"""Networks as LoRA sees them: which layers there are, and adding an adapter to some of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from stable_cascade.components import NETWORKS

from .quantized import QuantizedLinear
from .tokens import LearnedTokens


def layer_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Weight shape of every linear and convolution layer, by its name without adapters."""
    layers = {}
    for name, module in model.named_modules():
        if ".lora_" in name:
            continue
        if isinstance(module, QuantizedLinear):
            layers[name.removesuffix(".base_layer")] = torch.Size((module.out_features, module.in_features))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            layers[name.removesuffix(".base_layer")] = module.weight.shape
    return layers


def lora_ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Rank of every layer that carries the adapter, by the layer's name."""
    return {name: layer.r[adapter_name] for name, layer in carrying(model, adapter_name)}


def lora_scales_of(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """What the update of every layer that carries the adapter is multiplied by, by the layer's name."""
    return {name: layer.scaling[adapter_name] for name, layer in carrying(model, adapter_name)}


def carrying(model: nn.Module, adapter_name: str) -> list[tuple[str, Any]]:
    """(name, layer) of every layer that carries the adapter."""
    wanted = {id(layer) for layer in tuner_layers(model) if adapter_name in layer.r}
    return [(name, module) for name, module in model.named_modules() if id(module) in wanted]


def component_of(model: nn.Module) -> str:
    """The name that LoRA files give this network: `prior`, `decoder` or `text_encoder`."""
    names = {part.cls: name for name, part in NETWORKS.items()}
    return names.get(type(model).__name__, "text_encoder" if hasattr(model, "text_model") else "prior")


def tuner_layers(model: nn.Module) -> list[Any]:
    """Every layer of a network that carries adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def inject(model: Any, config: Any, adapter_name: str) -> None:
    """Adds the adapter's layers in float32, leaves learned token rows trainable and the global RNG untouched."""
    from peft import inject_adapter_in_model

    from .onetrainer_layers import OneTrainerConv2d
    from .quantized_lora import QuantizedLoraLinear

    if adapter_name in getattr(model, "peft_config", {}):
        used = ", ".join(model.peft_config)
        raise ValueError(f"adapter_name '{adapter_name}' is in use ({used}); choose another or delete it first")
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear, nn.Conv2d: OneTrainerConv2d})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        warnings.filterwarnings("ignore", "Unsupported layer type .*QuantizedLinear")  # registered above
        inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True
    for layer in tuner_layers(model):
        layer.set_adapter(adapter_name)
        for name, parameter in layer.named_parameters():
            if "lora_" in name and adapter_name in name.split("."):
                parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, LearnedTokens):
            module.rows.requires_grad_(True)


def take_out(model: Any, adapter_name: str) -> None:
    """Removes one adapter, and the layers that carry no other; the network without adapters is what it was before."""
    for name, layer in carrying(model, adapter_name):
        layer.delete_adapter(adapter_name)
        if not layer.r:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    getattr(model, "peft_config", {}).pop(adapter_name, None)
    if not getattr(model, "peft_config", True):
        del model.peft_config
        model._hf_peft_config_loaded = False
