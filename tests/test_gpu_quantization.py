"""A quantised base on a CUDA device: the same values as on the processor, and the memory that the bytes promise."""

from __future__ import annotations

import pytest
import torch

from stable_cascade.adapters import add_lora, quantize, quantized_bytes
from stable_cascade.adapters.quantized import QuantizedLinear
from tests.test_lora import inputs, randomise
from tests.tiny_cascade import tiny_prior

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FORMS = ["int8", "int4", "nf4"]


def needed(form: str) -> None:
    if form == "nf4":
        pytest.importorskip("bitsandbytes")


def on_cuda(dtype: torch.dtype) -> dict:
    return {name: value.cuda() for name, value in inputs(dtype).items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_device_computes_what_the_processor_computes(form):
    needed(form)
    here, there = tiny_prior(), tiny_prior()
    quantize(here, form)
    quantize(there, form, "cuda")
    there.to("cuda")
    reference = here(**inputs()).sample
    assert (there(**on_cuda(torch.float32)).sample.cpu() - reference).norm() / reference.norm() < 0.01


@pytest.mark.parametrize("form", FORMS)
def test_adapters_get_gradients_beside_bfloat16(form):
    needed(form)
    prior = tiny_prior().to(torch.bfloat16)
    quantize(prior, form, "cuda")
    prior.to("cuda").train()
    add_lora(prior, module_filters=[".attn", "channelwise"], rank=2, use_dora=True)
    randomise_on_device(prior)
    prior.enable_gradient_checkpointing()
    prior(**on_cuda(torch.bfloat16)).sample.float().square().mean().backward()
    trained = [value for value in prior.parameters() if value.requires_grad]
    assert all(value.grad is not None and value.grad.isfinite().all() for value in trained)


def randomise_on_device(prior) -> None:
    device = next(prior.parameters()).device
    randomise(prior.to("cpu"))
    prior.to(device)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_what_the_bytes_say(form):
    """Also at the peak of the quantisation, but for one layer and its copies in float32."""
    needed(form)
    layers = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(8)]).to(torch.bfloat16)
    weights, size = quantized_bytes(layers, form)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize(layers, form, "cuda")
    assert all(isinstance(layer, QuantizedLinear) for layer in layers)
    assert abs(torch.cuda.memory_allocated() - before - size) < 0.02 * size + 2**20
    assert torch.cuda.max_memory_allocated() - before < size + 20 * weights // len(layers)
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    held = torch.cuda.memory_allocated()
    output = layers(x)
    assert torch.cuda.memory_allocated() - held < 2**20
    output.sum().backward()
