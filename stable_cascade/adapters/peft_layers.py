"""PEFT's layers for what others' LoRA files have, OneTrainer's DoRA, and for LoRA beside quantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

MAGNITUDE = "lora_input_magnitude"


class OneTrainerConv2d(Conv2d):
    """PEFT's layer on a convolution; on a grouped one an update that all groups share, as OneTrainer has it.

    Its first factor reads all channels, its second gives one channel for each group's place: for a depthwise
    convolution one channel that is added to every other. No weight of the convolution is like that, so it cannot be
    merged.
    """

    def __init__(
        self, base_layer: Any, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        if base_layer.groups == 1:
            super().__init__(base_layer, adapter_name, config=config, r=r, lora_alpha=lora_alpha, **kwargs)
            return
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter, self._kernel_dim, self.conv_fn = adapter_name, 4, nn.functional.conv2d
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Adds an adapter's factors, or PEFT's where the convolution has one group."""
        base: Any = self.get_base_layer()
        # PEFT's own way, but for grouped convolutions.
        if base.groups == 1:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        if config.lora_bias:
            raise ValueError(f"a convolution with {base.groups} groups takes no bias of a LoRA; leave it out")
        # The first factor reads all channels, the second writes one group.
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A[adapter_name] = nn.Conv2d(
            base.in_channels, r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
        )
        self.lora_B[adapter_name] = nn.Conv2d(r, base.out_channels // base.groups, 1, bias=False)
        self.lora_bias[adapter_name] = False
        self.use_dora[adapter_name] = config.use_dora
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = OutputMagnitude(base.out_channels)
            self.lora_variant[adapter_name] = OutputDora()
        # Scale and start as PEFT has them.
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        nn.init.zeros_(self.lora_B[adapter_name].weight)  # type: ignore[arg-type]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Any:
        """What an adapter adds to the weight; for a grouped one as OneTrainer's DoRA adds it."""
        base: Any = self.get_base_layer()
        if base.groups == 1:
            return super().get_delta_weight(adapter)
        factors: Any = (self.lora_B[adapter], self.lora_A[adapter])
        up, down = (factor.weight for factor in factors)
        return (up.flatten(1) @ down.flatten(1)).view(base.weight.shape) * self.scaling[adapter]


class OutputMagnitude(nn.Module):
    """The trained lengths of a grouped convolution's outputs, under the name that PEFT gives them."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, outputs, 1, 1))


class OutputDora(LoraVariant):
    """DoRA over the outputs of a grouped convolution: W' = diag(m / |rows|) (W + s B A)."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output with the adapter, from its output without."""
        base = module.get_base_layer()
        whole = base.weight.float() + module.get_delta_weight(active_adapter).float()
        lengths = whole.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        magnitude = module.lora_magnitude_vector[active_adapter].weight.float().reshape(-1)
        change = whole * (magnitude / lengths).reshape(-1, 1, 1, 1) - base.weight.float()
        return result + base._conv_forward(module.lora_dropout[active_adapter](x), change.to(x.dtype), None)


class InputDora(LoraVariant):
    """DoRA whose magnitudes are those of the inputs: the updated weight's columns get the trained lengths.

    W' = (W + s B A) diag(m / |columns|), so that the layer sees its input times m / |columns|.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output with the adapter, from its output without."""
        base = module.get_base_layer()
        factor = InputDora._factor(module, active_adapter, base.weight).to(x.dtype)
        x = module.lora_dropout[active_adapter](x)
        if getattr(base, "groups", 1) > 1:  # its one magnitude is that of the whole weight, to which B A is added
            whole = base.weight.float() + module.get_delta_weight(active_adapter).float()
            change = (whole * factor.float().reshape(1, -1, 1, 1) - base.weight.float()).to(x.dtype)
            return result + base._conv_forward(x, change, None)
        # A linear layer has its inputs in the last axis, a convolution in the second.
        shape = (1, -1, 1, 1) if module.get_base_layer().weight.ndim == 4 else (-1,)
        own = x * factor.reshape(shape)
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](own)) * module.scaling[active_adapter]
        return result + _without_bias(module.get_base_layer(), own - x) + update

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapter in it; other adapters may be in it already."""
        with module._unmerged_base_weight(safe_merge=True) as base:
            factor = InputDora._factor(module, active_adapter, base)
            whole = base.float() + module.get_delta_weight(active_adapter).float()
            change = whole * factor.reshape(1, -1, *[1] * (whole.ndim - 2)) - base.float()
        module._cache_store(f"{active_adapter}-change", change)
        return (orig_weight.float() + change).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merges in place."""
        orig_weight.data = InputDora.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter, but for rounding; whoever fuses keeps the one of before."""
        return (orig_weight.float() - module._cache_pop(f"{active_adapter}-change")).to(orig_weight.dtype)

    @staticmethod
    def _factor(module: Any, adapter: str, weight: Tensor) -> Tensor:
        """Trained length over present length of every column. Shapes: weight (O, I, …) -> (I,)."""
        whole = weight.float() + module.get_delta_weight(adapter).float()
        lengths = whole.transpose(0, 1).flatten(1).norm(dim=1)
        magnitude = getattr(module, MAGNITUDE)[adapter].float().reshape(-1)
        return magnitude / lengths.clamp_min(torch.finfo(torch.float32).tiny)


def check_fusable(layers: Sequence[Any], adapter_names: Sequence[str] | None) -> None:
    """Passes when every adapter has a form that goes into its layer's weight.

    Raises:
        ValueError: one updates a depthwise convolution in OneTrainer's way.
    """
    for layer in layers:
        grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
        name = next((name for name in adapter_names or layer.active_adapters if name in layer.r), None)
        if grouped and name is not None:
            raise ValueError(
                f"adapter '{name}' updates depthwise convolutions as OneTrainer does, one channel for all of them, "
                "which no such weight can hold; use it without fusing"
            )


def add_input_magnitude(layer: Any, adapter_name: str, magnitude: Tensor) -> None:
    """Turns an adapter on a layer into a DoRA over the inputs. Shapes: magnitude (I) in any arrangement of axes."""
    if not hasattr(layer, MAGNITUDE):
        setattr(layer, MAGNITUDE, nn.ParameterDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, MAGNITUDE)
    values = magnitude.detach().reshape(-1).to(layer.lora_A[adapter_name].weight.device, torch.float32)
    getattr(layer, MAGNITUDE)[adapter_name] = nn.Parameter(values, requires_grad=False)
    layer.lora_variant[adapter_name] = InputDora()


def _without_bias(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer's weight makes of an input."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x.to(layer.weight.dtype), layer.weight, None)
    return nn.functional.linear(x.to(layer.weight.dtype), layer.weight)  # type: ignore[arg-type]


class QuantizedLoraLinear(Linear):
    """LoRA or DoRA beside a `QuantizedLinear`. It cannot be merged: rounding to few bits would lose the update."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"an adapter cannot be merged into {self.get_base_layer().form} weights; load the LoRA file into the "
            "network without quantization and fuse it there"
        )
