"""Convolutions written as matrix products against torch's own: values, gradients, and inside hooks and adapters."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from stable_cascade.models.layers import DoublingConv2d, TiledConv2d
from tests.test_lora import inputs
from tests.tiny_cascade import tiny_prior

LAYERS = {
    "pixels": (lambda: TiledConv2d(5, 7, 1), lambda: nn.Conv2d(5, 7, 1)),
    "squares": (lambda: TiledConv2d(5, 7, 2, stride=2), lambda: nn.Conv2d(5, 7, 2, stride=2)),
    "overlapping": (lambda: TiledConv2d(5, 7, 3, padding=1), lambda: nn.Conv2d(5, 7, 3, padding=1)),
    "doubling": (lambda: DoublingConv2d(5, 7), lambda: nn.ConvTranspose2d(5, 7, 2, stride=2)),
}


def image(height=6, width=8, channels=5, dtype=torch.float64):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def pair(kind):
    own, theirs = (make().double() for make in LAYERS[kind])
    theirs.load_state_dict(own.state_dict())
    return own, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])  # odd sides: the last row or column is left out
@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_those_of_torchs_layer(kind, size, bias):
    layers, found = pair(kind), []
    for layer in layers:
        if not bias:
            layer.bias = None
        leaf = image(*size).requires_grad_()
        output = layer(leaf)
        found.append([output, *torch.autograd.grad(output.sin().sum(), [leaf, *layer.parameters()])])
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_offloaded_layers_compute_the_same_bit_for_bit(kind):
    from accelerate import cpu_offload

    own, _ = pair(kind)
    expected = own(image())
    cpu_offload(own, torch.device("cpu"))
    assert next(own.parameters()).device.type == "meta"
    assert torch.equal(own(image()), expected)


@pytest.mark.parametrize("kind", ["pixels", "squares"])
def test_adapters_add_what_they_add_to_torchs_layer(kind):
    outputs = []
    for layer in pair(kind):
        network = inject_adapter_in_model(
            LoraConfig(target_modules=["0"], init_lora_weights=False), nn.Sequential(layer)
        ).double()
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        outputs.append(network(image()))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_is_computed_by_the_kernel_that_was_chosen(backend):
    network, given = tiny_prior(), inputs()
    expected = network(**given).sample
    network.set_attention_backend(backend)
    with torch.profiler.profile() as profile:
        sample = network(**given).sample
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
    flash = any("flash" in event.key for event in profile.key_averages())
    assert flash is (backend != "_native_math")
    network.reset_attention_backend()
    assert torch.equal(network(**given).sample, expected)


@pytest.mark.parametrize(("backend", "said"), [
    ("sage", "'sage' is not one of torch's own: native, "), ("flash", "is not one of torch's own"),
    ("_native_efficient", "'_native_efficient' does not run on cpu in float32; native always does"),
])  # fmt: skip
def test_a_kernel_that_cannot_run_is_refused(backend, said):
    with pytest.raises(ValueError, match=said):
        tiny_prior().set_attention_backend(backend)
