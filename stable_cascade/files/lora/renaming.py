"""From a file's names and shapes to those of a network's layers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor

from stable_cascade.wording import quoted

from .metadata import alpha_of
from .names import Shapes, spelled
from .part import TENSORS, Part, is_depthwise, layers_of


def renamed(
    part: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
    *,
    shapes: Shapes,
    component: str,
    by_config: bool,
) -> Part:
    """A component under our names and in our layers' shapes.

    Args:
        by_config: whether the config tells the alphas that `alphas` does not; else they are the ranks.

    Raises:
        ValueError: the network lacks a layer, has it in another shape, or two names mean the same layer.
    """
    table = spelled(shapes)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer in layers_of(part):
        names = table.get(layer)
        if names is None:
            nearest = difflib.get_close_matches(layer, list(shapes)[:2000], n=1, cutoff=0) if len(layer) < 200 else []
            hint = f"; nearest: '{nearest[0]}'" if nearest else ""
            raise ValueError(f"updates {quoted(layer, 80)}, which this {component} lacks{hint}")
        own = {what: part[f"{layer}.{what}"] for what in TENSORS if f"{layer}.{what}" in part}
        rank = len(own["lora_A.weight"])
        for number, name in enumerate(names):
            if name in scales:
                raise ValueError(f"updates '{name}' twice, once as {quoted(layer, 80)}")
            values = own if len(names) == 1 else _third(own, number, layer)
            _fits(name, values, shapes[name], component)
            tensors |= {f"{name}.{what}": value for what, value in _shaped(values, shapes[name]).items()}
            scales[name] = alpha_of(name, rank, config) if by_config else alphas.get(layer, rank)
    return Part(tensors, scales, dict(config))


def _third(own: Mapping[str, Tensor], number: int, layer: str) -> dict[str, Tensor]:
    """The rows of q, k or v of an update of all three, which share the first factor."""
    if "dora_scale" in own and own["dora_scale"].shape[0] == 1:
        raise ValueError(f"has one magnitude of the inputs for q, k and v, {quoted(layer, 80)}, which does not split")
    joined = {what: value for what, value in own.items() if what != "lora_A.weight"}
    rows = {what: value.chunk(3)[number] for what, value in joined.items() if len(value) % 3 == 0}
    if len(rows) < len(joined):
        raise ValueError(f"has rows of {quoted(layer, 80)} that do not divide into q, k and v")
    return {"lora_A.weight": own["lora_A.weight"], **rows}


def _fits(name: str, own: Mapping[str, Tensor], shape: Size, component: str) -> None:
    """Passes when the factors are of the layer's shape, or of a depthwise convolution's as OneTrainer has it."""
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    inputs, outputs = math.prod(down.shape[1:]), math.prod((len(up), *up.shape[2:]))
    if (outputs, inputs) == (shape[0], math.prod(shape[1:])):
        return
    if is_depthwise(shape) and tuple(down.shape[1:]) == (shape[0], *shape[2:]) and outputs == 1:
        return
    raise ValueError(
        f"updates '{name}' as {outputs}x{inputs}, this {component} has {shape[0]}x{math.prod(shape[1:])} there"
    )


def _shaped(own: Mapping[str, Tensor], shape: Size) -> dict[str, Tensor]:
    """The tensors in the layer's number of axes, magnitudes as PEFT has them, the inputs' as OneTrainer."""
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    inner = tuple(down.shape[1:]) if math.prod(down.shape[1:]) != math.prod(shape[1:]) else tuple(shape[1:])
    ones = (1,) * (len(shape) - 2)
    values = {
        "lora_A.weight": down.reshape(len(down), *inner).contiguous(),
        "lora_B.weight": up.reshape(len(up), len(down), *ones).contiguous(),
    }
    if "lora_B.bias" in own:
        values["lora_B.bias"] = own["lora_B.bias"].contiguous()
    for what in ("lora_magnitude_vector", "dora_scale"):
        if what in own:
            values |= _magnitude(own[what], shape, what == "dora_scale")
    return values


def _magnitude(value: Tensor, shape: Size, by_name: bool) -> dict[str, Tensor]:
    """A DoRA magnitude: of the outputs (PEFT's) or of the inputs, told by its shape.

    `dora_scale` is (O, 1, …) or (1, I, …); PEFT's vector is (O,), and (1, O, 1, 1) for a convolution.
    """
    outputs = (1, shape[0], *[1] * (len(shape) - 2)) if len(shape) > 2 else (shape[0],)
    of_inputs = by_name and value.ndim > 1 and value.shape[0] == 1 and shape[0] > 1
    if of_inputs and value.numel() == shape[1]:
        return {"dora_scale": value.reshape(1, shape[1], *[1] * (len(shape) - 2)).contiguous()}
    if not of_inputs and value.numel() == shape[0]:
        return {"lora_magnitude_vector": value.reshape(outputs).contiguous()}
    raise ValueError(f"has a DoRA magnitude of {list(value.shape)} for a layer of {shape[0]}x{shape[1]}")
