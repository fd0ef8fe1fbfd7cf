"""One component's update under our names, and what its layers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor

from .metadata import alpha_of, rank_of

TENSORS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "dora_scale")
"""What a layer may have, in PEFT's words; the last is a magnitude as all others write it."""


@dataclass(frozen=True)
class Part:
    """One component's update under our names: PEFT's tensors, and by what each layer's update is multiplied.

    Attributes:
        tensors: `<layer>.lora_A.weight`, `.lora_B.weight`; with DoRA `.lora_magnitude_vector`, or `.dora_scale` where
            the magnitude is that of the inputs, which PEFT does not know.
        alphas: layer -> alpha; the update is multiplied by alpha / rank.
        config: LoraConfig values that came with the file, empty where none did; the alphas count where they differ.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers that are updated."""
        return [key.removesuffix(".lora_A.weight") for key in self.tensors if key.endswith(".lora_A.weight")]

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank."""
        return {layer: len(self.tensors[f"{layer}.lora_A.weight"]) for layer in self.layers}

    @property
    def keeps_config(self) -> bool:
        """Whether the LoraConfig that came with the file means the same ranks and alphas."""
        had = self.config
        return bool(had.get("lora_alpha")) and all(
            (rank_of(layer, had), alpha_of(layer, rank, had)) == (rank, self.alphas[layer])
            for layer, rank in self.ranks.items()
        )

    @property
    def scales(self) -> dict[str, float]:
        """Layer -> what its update is multiplied by."""
        return {layer: self.alphas[layer] / rank for layer, rank in self.ranks.items()}


def is_depthwise(shape: Size) -> bool:
    """Whether a layer of this weight shape is a convolution of each channel alone."""
    return len(shape) == 4 and shape[1] == 1 and shape[0] > 1


def layers_of(part: Mapping[str, Any]) -> list[str]:
    """The layers that have a first factor."""
    return list(dict.fromkeys(key.removesuffix(".lora_A.weight") for key in part if key.endswith(".lora_A.weight")))
