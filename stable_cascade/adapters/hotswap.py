"""Another LoRA in place of a loaded one: the same layers and tensors, new values, so that nothing compiles anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.files.lora import Part
from stable_cascade.wording import quoted

from .layers import carrying
from .onetrainer_layers import MAGNITUDE


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
    layers = dict(carrying(model, adapter_name))
    if not layers:
        used = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ValueError(
            f"hotswap: adapter_name '{adapter_name}' is not loaded ({used}); load it without hotswap first"
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"hotswap: adapter '{adapter_name}' is fused into the weights; call unfuse_lora first")
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

    ranks, alphas = {}, {}
    for name, layer in carrying(model, adapter_name):
        down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        room = len(down)
        _fill(down, part.tensors.get(f"{name}.lora_A.weight"), 0)
        _fill(up, part.tensors.get(f"{name}.lora_B.weight"), 1)
        scale = part.scales.get(name, 1.0)
        ranks[name], alphas[name] = room, scale * room
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = room, scale * room
        layer.use_rslora[adapter_name] = False
        _set_scaling(layer, adapter_name, weight * scale)
        if f"{name}.lora_magnitude_vector" in part.tensors:
            magnitude = layer.lora_magnitude_vector[adapter_name].weight
            magnitude.copy_(part.tensors[f"{name}.lora_magnitude_vector"].reshape(magnitude.shape))
        if f"{name}.dora_scale" in part.tensors:
            getattr(layer, MAGNITUDE)[adapter_name].copy_(part.tensors[f"{name}.dora_scale"].reshape(-1))
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
    found = set()
    for layer in layers.values():
        found |= {"DoRA"} if adapter_name in layer.lora_magnitude_vector else set()
        found |= {"DoRA of the inputs"} if adapter_name in getattr(layer, MAGNITUDE, {}) else set()
        found |= {"biases"} if layer.lora_bias.get(adapter_name) else set()
    return found


def _part_kinds(part: Part) -> set[str]:
    ends = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA of the inputs", "lora_B.bias": "biases"}
    return {kind for end, kind in ends.items() if any(key.endswith(f".{end}") for key in part.tensors)}
