"""diffusers' tests of models and of LoRA on our prior and decoder; `run_diffusers_tests` runs it inside a checkout."""

from __future__ import annotations

from typing import Any

import torch

from stable_cascade import StableCascadeDecoder, StableCascadePrior
from tests.models.testing_utils import (  # diffusers' `tests`, not ours
    AttentionTesterMixin,
    BaseModelTesterConfig,
    LoraTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.models.testing_utils.lora import LoraHotSwappingForModelTesterMixin
from tests.testing_utils import torch_device

RESIDUAL, TIMESTEP, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


def _as_trained(network: type[Any]) -> None:
    """Weights that are not zero anywhere: a network that begins anew predicts nothing, and no test would see more."""
    begin = network.reset_parameters

    def reset_parameters(self: Any) -> None:
        begin(self)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))

    network.reset_parameters = reset_parameters


for _network in (StableCascadePrior, StableCascadeDecoder):
    _as_trained(_network)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch_device)


class PriorConfig(BaseModelTesterConfig):
    model_class = StableCascadePrior
    main_input_name = "sample"
    output_shape = (16, 8, 8)
    different_shapes_for_compilation = ((4, 4), (8, 8))

    def get_init_dict(self) -> dict[str, Any]:
        return {
            "conditioning_dim": 32, "block_out_channels": [32, 32], "num_attention_heads": [4, 4],
            "down_num_layers_per_block": [1, 1], "up_num_layers_per_block": [1, 1], "clip_text_in_channels": 32,
            "clip_text_pooled_in_channels": 32, "clip_image_in_channels": 24, "dropout": 0.0,
        }  # fmt: skip

    def get_dummy_inputs(self, height: int = 8, width: int = 8) -> dict[str, Any]:
        return {
            "sample": _random(2, 16, height, width), "timestep_ratio": torch.tensor([0.3, 0.8], device=torch_device),
            "clip_text_pooled": _random(2, 1, 32), "clip_text": _random(2, 7, 32), "clip_img": _random(2, 1, 24),
        }  # fmt: skip


class DecoderConfig(BaseModelTesterConfig):
    model_class = StableCascadeDecoder
    main_input_name = "sample"
    output_shape = (4, 16, 16)
    different_shapes_for_compilation = ((8, 8), (16, 16))

    def get_init_dict(self) -> dict[str, Any]:
        return {
            "conditioning_dim": 32, "block_out_channels": [16, 32], "num_attention_heads": [0, 4],
            "down_num_layers_per_block": [1, 1], "up_num_layers_per_block": [1, 1],
            "down_blocks_repeat_mappers": [1, 1], "up_blocks_repeat_mappers": [2, 1],
            "clip_text_pooled_in_channels": 32, "dropout": 0.0,
            "block_types_per_layer": [[RESIDUAL, TIMESTEP], [RESIDUAL, TIMESTEP, ATTENTION]],
        }  # fmt: skip

    def get_dummy_inputs(self, height: int = 16, width: int = 16) -> dict[str, Any]:
        return {
            "sample": _random(2, 4, height, width), "timestep_ratio": torch.tensor([0.3, 0.8], device=torch_device),
            "clip_text_pooled": _random(2, 1, 32), "effnet": _random(2, 16, 4, 4),
        }  # fmt: skip


class TestPrior(PriorConfig, ModelTesterMixin): ...


class TestPriorTraining(PriorConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied({"StableCascadePrior"})


class TestPriorMemory(PriorConfig, MemoryTesterMixin): ...


class TestPriorAttention(PriorConfig, AttentionTesterMixin): ...


class TestPriorLora(PriorConfig, LoraTesterMixin): ...


class TestPriorHotSwap(PriorConfig, LoraHotSwappingForModelTesterMixin): ...


class TestPriorCompiled(PriorConfig, TorchCompileTesterMixin): ...


class TestDecoder(DecoderConfig, ModelTesterMixin): ...


class TestDecoderTraining(DecoderConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied({"StableCascadeDecoder"})


class TestDecoderMemory(DecoderConfig, MemoryTesterMixin): ...


class TestDecoderAttention(DecoderConfig, AttentionTesterMixin): ...


class TestDecoderLora(DecoderConfig, LoraTesterMixin): ...


class TestDecoderHotSwap(DecoderConfig, LoraHotSwappingForModelTesterMixin): ...


class TestDecoderCompiled(DecoderConfig, TorchCompileTesterMixin): ...
