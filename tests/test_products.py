"""Products by oneDNN against torch's own: values, gradients, and when they are not used."""

import pytest
import torch
import torch.nn.functional as F

from stable_cascade.models import products
from stable_cascade.models.products import linear
from tests.tiny_cascade import tiny_decoder, tiny_parts, tiny_prior

pytestmark = pytest.mark.skipif(products.ONEDNN is None, reason="torch here has no oneDNN beside MKL")


def always(monkeypatch):
    monkeypatch.setattr(products, "LEAST", 0)


def inputs(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 7, 40), (1, 40)])
def test_values_and_gradients_are_those_of_torch(monkeypatch, shape, bias):
    always(monkeypatch)
    found = []
    for function in (linear, F.linear):
        leaves = [inputs(shape), inputs((24, 40), 1), *([inputs((24,), 2)] if bias else [])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = function(*leaves)
        output.mul(inputs(output.shape, 3)).sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for own, plain in zip(*found, strict=True):
        assert own.shape == plain.shape
        assert torch.allclose(own, plain, rtol=1e-5, atol=1e-5)


def test_any_layout_in_memory(monkeypatch):
    always(monkeypatch)
    image, weight, output_grad = inputs((2, 40, 6, 5)), inputs((24, 40), 1), inputs((2, 24, 6, 5), 2)
    found = []
    for function in (linear, F.linear):
        leaf = image.clone().requires_grad_()
        output = function(leaf.permute(0, 2, 3, 1), weight)
        output.backward(output_grad.permute(0, 2, 3, 1))
        found.append((output.detach(), leaf.grad))
    for own, plain in zip(*found, strict=True):
        assert torch.allclose(own, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(monkeypatch, wanted):
    always(monkeypatch)
    leaves = [
        one.requires_grad_(asked) for one, asked in zip((inputs((3, 40)), inputs((24, 40))), wanted, strict=True)
    ]
    output = linear(*leaves)
    kept = [saved is not None for saved in output.grad_fn.saved_tensors]
    assert kept == [wanted[1], wanted[0]]
    output.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@pytest.mark.parametrize("build", [tiny_prior, tiny_decoder])
def test_networks_are_the_same(monkeypatch, build):
    network = build(dropout=0.0).requires_grad_(True)
    given = {"sample": inputs((2, network.config.in_channels, 8, 12)), "timestep_ratio": torch.tensor([0.3, 0.8]),
             "clip_text_pooled": inputs((2, 1, network.config.clip_text_pooled_in_channels))}  # fmt: skip
    found = []
    for least in (0, 2**60):
        monkeypatch.setattr(products, "LEAST", least)
        network.zero_grad()
        output = network(**given).sample
        output.square().mean().backward()
        found.append([output.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for own, plain in zip(*found, strict=True):
        assert torch.allclose(own, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max() + 1))


def test_a_graph_has_the_same_product(monkeypatch):
    """Compiled without code generation: only whether the graph is right is asked here."""
    always(monkeypatch)
    leaves = [inputs((2, 5, 40)).requires_grad_(), inputs((24, 40), 1).requires_grad_(), inputs((24,), 2)]
    compiled = torch.compile(linear, backend="aot_eager", dynamic=True, fullgraph=True)
    for function in (compiled, F.linear):
        output = function(*leaves)
        gradients = torch.autograd.grad(output.square().sum(), leaves[:2])
        if function is compiled:
            found = [output, *gradients]
    for own, plain in zip(found, [output, *gradients], strict=True):
        assert own.shape == plain.shape
        assert torch.allclose(own, plain, rtol=1e-5, atol=1e-4)


def test_stage_a_is_the_same(monkeypatch):
    vqgan, latents = tiny_parts()["vqgan"], inputs((1, 4, 6, 9))
    with torch.no_grad():
        plain = vqgan.decode(latents).sample
        always(monkeypatch)
        assert torch.allclose(vqgan.decode(latents).sample, plain, rtol=1e-5, atol=1e-5)


def test_other_types_and_autocast_stay_with_torch(monkeypatch):
    always(monkeypatch)
    x, weight = inputs((3, 40)), inputs((24, 40))
    assert linear(x.bfloat16(), weight.bfloat16()).dtype is torch.bfloat16
    assert linear(x.double(), weight.double()).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype is torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"


def test_small_products_stay_with_torch(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", None)
    assert linear(inputs((3, 40)), inputs((24, 40))).shape == (3, 24)
    monkeypatch.undo()
    monkeypatch.setattr(products, "_product", None)  # a call would fail
    assert linear(inputs((3, 40)), inputs((24, 40))).shape == (3, 24)
