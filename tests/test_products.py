"""Layers written as matrix products against torch's own: values, gradients, and when the layer itself is called."""

import pytest
import torch
from torch import nn

from stable_cascade.models.products import double, halve, pointwise


def image(height=6, width=8, channels=5, dtype=torch.float64):
    return torch.randn(2, height, width, channels, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])  # odd sides: the last row or column is left out
@pytest.mark.parametrize(("work", "layer"), [
    (pointwise, lambda bias: nn.Conv2d(5, 7, 1, bias=bias)),
    (halve, lambda bias: nn.Conv2d(5, 7, 2, stride=2, bias=bias)),
    (double, lambda bias: nn.ConvTranspose2d(5, 7, 2, stride=2, bias=bias)),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_layer(work, layer, size, bias):
    conv, x = layer(bias).double(), image(*size)
    found = []
    for function in (lambda leaf: work(conv, leaf), lambda leaf: conv(leaf.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        wanted = [leaf, *conv.parameters()]
        found.append([output, *torch.autograd.grad(output.sin().sum(), wanted)])
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("work", "layer"), [
    (pointwise, nn.Conv2d(5, 5, 1)), (halve, nn.Conv2d(5, 5, 2, stride=2)),
    (double, nn.ConvTranspose2d(5, 5, 2, stride=2)),
])  # fmt: skip
def test_a_hooked_layer_is_called(work, layer):
    layer.register_forward_hook(lambda module, given, output: output + 1)
    expected = layer(image(dtype=torch.float32).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(work(layer, image(dtype=torch.float32)), expected)
