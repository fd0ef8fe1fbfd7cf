"""Products in float8: close to plain ones, nothing renamed, nothing of a frozen base computed or kept in vain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stable_cascade.adapters import add_lora, lora_state_dict
from stable_cascade.config import LoraConfig, load_config
from stable_cascade.training import float8
from tests.tiny_cascade import tiny_prior
from tests.trainer_runs import settings, write_config

CLOSE = 0.08
"""Relative error of a layer's output and gradients: three bits round by up to 1/16, two (gradients) by up to 1/8, and
sums of many such errors are smaller."""
WIDE = {"block_out_channels": [64, 64], "conditioning_dim": 64, "dropout": 0.0}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def layers(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    stack = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return stack


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()


def in_float8(model: nn.Module, smallest: int = 64) -> nn.Module:
    float8.convert_to_float8(model, float8.float8_layers(model, smallest), emulate=True)
    return model


def test_values_and_their_rounding():
    """Values of the original scale come back; each is off by at most a sixteenth, as three bits of mantissa are."""
    x = torch.tensor([[448.0, -1.0, 0.5, 3.3, 100.0, 0.0]])
    rounded, scale = float8.to_float8(1e-3 * x, torch.float8_e4m3fn)
    assert scale.item() == pytest.approx(1e-3, rel=1e-6)
    restored = rounded.float() * scale
    assert torch.allclose(restored[0, [0, 1, 2, 5]], 1e-3 * x[0, [0, 1, 2, 5]], rtol=1e-6)
    assert ((restored - 1e-3 * x).abs() <= 1e-3 * x.abs() / 16 + 1e-9).all()
    zeros, _ = float8.to_float8(torch.zeros(2, 2), torch.float8_e5m2)
    assert (zeros.float() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_layers_are_close_to_plain_ones(dtype):
    plain, rounded = layers().to(dtype).requires_grad_(False), layers().to(dtype).requires_grad_(False)
    names = list(rounded.state_dict())
    in_float8(rounded)
    assert all(isinstance(rounded[place], float8.FrozenFloat8Linear) for place in (0, 2))
    assert list(rounded.state_dict()) == names
    assert torch.equal(rounded[0].weight, plain[0].weight)
    x, y = rows(dtype), rows(dtype)
    expected, actual = plain(x), rounded(y)
    assert actual.dtype == dtype
    assert 0 < relative(actual, expected) < CLOSE
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert 0 < relative(y.grad, x.grad) < 2 * CLOSE
    cosine = torch.nn.functional.cosine_similarity(x.grad.flatten().float(), y.grad.flatten().float(), dim=0)
    assert cosine > 0.99


def test_frozen_layers_keep_no_input_for_the_backward_pass():
    """What torchao's own layer would keep, and multiply for a gradient that nobody wants."""
    kept = []
    layer = in_float8(nn.Sequential(nn.Linear(64, 64).requires_grad_(False)))
    x = rows()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(x)
    assert all(value.dtype == torch.float8_e4m3fn or value.numel() == 1 for value in kept)


def test_layers_that_train_are_close_to_plain_ones():
    pytest.importorskip("torchao", reason="float8 layers that train are torchao's; pip install torchao")
    plain, rounded = layers(), in_float8(layers())
    assert [type(rounded[place]).__name__ for place in (0, 2)] == ["Float8Linear"] * 2
    assert list(rounded.state_dict()) == list(plain.state_dict())
    x, y = rows(), rows()
    expected, actual = plain(x), rounded(y)
    assert 0 < relative(actual, expected) < CLOSE
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert relative(y.grad, x.grad) < 2 * CLOSE
    for own, reference in zip(rounded.parameters(), plain.parameters(), strict=True):
        assert own.dtype == torch.float32
        assert relative(own.grad, reference.grad) < 2 * CLOSE


def test_lora_on_a_base_in_float8():
    """Adapters get nearly the gradients that they get on the plain base, and are saved under the same names."""
    sample = {
        "sample": (2, 16, 4, 4), "clip_text_pooled": (2, 1, 32), "clip_text": (2, 5, 32), "clip_img": (2, 1, 24)
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randn(shape, generator=generator) for name, shape in sample.items()}
    given["timestep_ratio"] = torch.tensor([0.3, 0.8])
    gradients, predictions, saved = [], [], []
    for rounded in (False, True):
        prior = tiny_prior(**WIDE).to(torch.bfloat16)
        add_lora(prior, module_filters=[".attn"], rank=2)
        if rounded:
            names = float8.float8_layers(prior, 64)
            assert any(name.endswith("to_q.base_layer") for name in names)
            assert not any("lora_" in name or name.startswith("clip_") for name in names)
            float8.convert_to_float8(prior, names)
            assert not prior.get_submodule(names[0]).weight.requires_grad
        for name, parameter in prior.named_parameters():
            if ".lora_B." in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        prior.train()
        predicted = prior(**{name: value.to(torch.bfloat16) for name, value in given.items()}).sample.float()
        predicted.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in prior.parameters() if p.requires_grad]))
        predictions.append(predicted.detach())
        saved.append(lora_state_dict(prior))
    assert saved[0].keys() == saved[1].keys()
    assert 0 < relative(predictions[1], predictions[0]) < CLOSE
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    assert 0.9 < gradients[1].norm() / gradients[0].norm() < 1.1


def test_embedded_prior_predicts_nearly_the_same():
    """A trained network, all of whose layers from 64 up are in float8: 4 % off, where bfloat16 is 0.8 % off."""
    from stable_cascade import StableCascadePrior
    from stable_cascade.embedded import embedded_path

    prior = StableCascadePrior.from_pretrained(embedded_path(), subfolder="prior").requires_grad_(False)
    sizes = [prior.config[f"clip_{name}_in_channels"] for name in ("text", "text_pooled")]
    generator = torch.Generator().manual_seed(1)
    noised, text, pooled = (
        torch.randn(2, *shape, generator=generator) for shape in ((16, 8, 8), (12, sizes[0]), (1, sizes[1]))
    )
    given = {"timestep_ratio": torch.tensor([0.3, 0.8]), "clip_text": text, "clip_text_pooled": pooled}
    with torch.no_grad():
        expected = prior(noised, **given).sample
        names = float8.float8_layers(prior, 64)
        assert len(names) > 100
        float8.convert_to_float8(prior, names)
        assert 0.01 < relative(prior(noised, **given).sample, expected) < CLOSE


def test_only_large_layers_whose_sides_fit():
    model = nn.ModuleDict({
        "large": nn.Linear(128, 64), "small": nn.Linear(32, 128), "odd": nn.Linear(72, 120),
        "clip_txt_mapper": nn.Linear(128, 64), "text_encoder": nn.Sequential(nn.Linear(64, 64)),
    })  # fmt: skip
    assert float8.float8_layers(model, 64) == ["large"]
    assert float8.float8_layers(model) == []


def test_refusals_of_the_machine(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(float8, "is_installed", lambda package: False)
    with pytest.raises(ValueError, match=r"^float8 needs torchao; pip install"):
        float8.check_float8(cpu)
    monkeypatch.setattr(float8, "is_installed", lambda package: True)
    with pytest.raises(ValueError, match=r"capability 8\.9, not cpu; .*dtype: bfloat16") as error:
        float8.check_float8(cpu)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"capability 8\.9, which A100 is not; .*dtype: bfloat16"):
        float8.check_float8(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8.check_float8(cuda)
    accelerator = SimpleNamespace(device=cuda, mixed_precision="no")
    with pytest.raises(ValueError, match="no linear layer has 1024 inputs"):
        float8.prepare_float8(layers(), accelerator)
    monkeypatch.setattr(float8, "float8_layers", lambda model: ["0"])
    with pytest.raises(ValueError, match="trains with mixed_precision no; launch with"):
        float8.prepare_float8(layers(), accelerator)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float32"}, "needs dtype: bfloat16, not float32"),
        ({"dtype": "float16"}, "needs dtype: bfloat16, not float16"),
        ({"dtype": "bfloat16", "quantization": "int8"}, "quantization: int8 takes away"),
        ({"dtype": "bfloat16", "use_fsdp": True}, "not for sharded runs"),
    ],
)
def test_refusals_of_the_config(tmp_path, changes, words):
    values = settings("lora", tmp_path, tmp_path, float8=True, **changes)
    with pytest.raises(ValueError, match=words):
        load_config(LoraConfig, [f"--config={write_config(tmp_path / 'c.yaml', values)}"])
