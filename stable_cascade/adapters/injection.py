"""The adapters in a network: which layers carry one, putting one in, taking it out, exchanging its weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.components import NETWORKS
from stable_cascade.files.lora import Part
from stable_cascade.wording import quoted

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

    from .peft_layers import OneTrainerConv2d, QuantizedLoraLinear

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


def make_room(model: Any, adapter_name: str) -> None:
    """Does what `enable_lora_hotswap` asked for, once: ranks filled up with zeros, scales as tensors."""
    asked = getattr(model, "_prepare_lora_hotswap_kwargs", None)
    if asked is not None:
        from peft.utils.hotswap import prepare_model_for_compiled_hotswap

        prepare_model_for_compiled_hotswap(model, config=model.peft_config[adapter_name], **asked)
        model._prepare_lora_hotswap_kwargs = None


def check_swap(model: Any, part: Part, adapter_name: str, name: str) -> None:
    """Passes when an update can take a loaded adapter's place; it changes nothing.

    The adapter may have more layers, which become zero, and higher ranks, which are filled up with zeros.

    Raises:
        ValueError: there is no such adapter, it is fused, or has too few layers, too low a rank, or other magnitudes.
    """
    # The adapter is there and not fused.
    layers = dict(carrying(model, adapter_name))
    if not layers:
        used = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ValueError(
            f"hotswap: adapter_name '{adapter_name}' is not loaded ({used}); load it without hotswap first"
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"hotswap: adapter '{adapter_name}' is fused into the weights; call unfuse_lora first")
    # It has every layer, with room for the rank.
    for layer, rank in part.ranks.items():
        if layer not in layers:
            raise ValueError(f"hotswap: {quoted(name)} updates '{layer}', which adapter '{adapter_name}' does not; "
                             "load it under another adapter_name")  # fmt: skip
        room = len(layers[layer].lora_A[adapter_name].weight)
        if rank > room:
            raise ValueError(
                f"hotswap: {quoted(name)} has rank {rank} in '{layer}', adapter '{adapter_name}' room for {room}; "
                f"call enable_lora_hotswap(target_rank={max(part.ranks.values())}) before loading the first one"
            )
    # Magnitudes and biases are either in both or in none.
    kinds = [sorted(own) for own in (_kinds(layers, adapter_name), _part_kinds(part))]
    if kinds[0] != kinds[1] or (kinds[0] and len(layers) != len(part.ranks)):
        said = [" and ".join(kind) or "no DoRA" for kind in kinds]
        raise ValueError(
            f"hotswap: adapter '{adapter_name}' has {said[0]} in {len(layers)} layers, {quoted(name)} {said[1]} in "
            f"{len(part.ranks)}; load it under another adapter_name"
        )


@torch.no_grad()
def swap(model: Any, part: Part, adapter_name: str, weight: float = 1.0) -> None:
    """Puts an update's values into a loaded adapter, after `check_swap`."""
    from peft import LoraConfig

    from stable_cascade.files.lora.metadata import config_of

    from .peft_layers import MAGNITUDE

    ranks, alphas = {}, {}
    for name, layer in carrying(model, adapter_name):
        # Fill both factors and set the scale; ranks that are left over stay zero.
        down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        room = len(down)
        _fill(down, part.tensors.get(f"{name}.lora_A.weight"), 0)
        _fill(up, part.tensors.get(f"{name}.lora_B.weight"), 1)
        scale = part.scales.get(name, 1.0)
        ranks[name], alphas[name] = room, scale * room
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = room, scale * room
        layer.use_rslora[adapter_name] = False
        _set_scaling(layer, adapter_name, weight * scale)
        # Magnitudes of a DoRA.
        if f"{name}.lora_magnitude_vector" in part.tensors:
            magnitude = layer.lora_magnitude_vector[adapter_name].weight
            magnitude.copy_(part.tensors[f"{name}.lora_magnitude_vector"].reshape(magnitude.shape))
        if f"{name}.dora_scale" in part.tensors:
            getattr(layer, MAGNITUDE)[adapter_name].copy_(part.tensors[f"{name}.dora_scale"].reshape(-1))
    # PEFT's config says what is in place now.
    use_dora = any(key.endswith(".lora_magnitude_vector") for key in part.tensors)
    model.peft_config[adapter_name] = LoraConfig(**config_of(ranks, alphas, use_dora=use_dora))


def _fill(target: nn.Parameter, value: Tensor | None, axis: int) -> None:
    """Copies a factor into a tensor with room for its rank along `axis`; the rest is zero."""
    target.zero_()
    if value is not None:
        target.narrow(axis, 0, value.shape[axis]).copy_(value.reshape(*value.shape, *[1] * (target.ndim - value.ndim)))


def _set_scaling(layer: Any, adapter_name: str, value: float) -> None:
    """Sets a scale; one that is a tensor, for compiled networks, stays the same tensor."""
    if isinstance(layer.scaling[adapter_name], Tensor):
        layer.scaling[adapter_name].fill_(value)
    else:
        layer.scaling[adapter_name] = value


def _kinds(layers: dict[str, Any], adapter_name: str) -> set[str]:
    from .peft_layers import MAGNITUDE

    found = set()
    for layer in layers.values():
        found |= {"DoRA"} if adapter_name in layer.lora_magnitude_vector else set()
        found |= {"DoRA of the inputs"} if adapter_name in getattr(layer, MAGNITUDE, {}) else set()
        found |= {"biases"} if layer.lora_bias.get(adapter_name) else set()
    return found


def _part_kinds(part: Part) -> set[str]:
    ends = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA of the inputs", "lora_B.bias": "biases"}
    return {kind for end, kind in ends.items() if any(key.endswith(f".{end}") for key in part.tensors)}
