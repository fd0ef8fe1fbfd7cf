"""A frozen base in few bits: what it costs in error, what it saves in bytes, and that adapters train beside it."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from stable_cascade import StableCascadePrior
from stable_cascade.adapters import add_lora, load_lora, quantize, quantized_bytes, remove_lora, save_lora
from stable_cascade.adapters.quantized import QuantizedLinear, quantizable
from stable_cascade.embedded import embedded_path
from tests.test_lora import inputs, predict, randomise
from tests.tiny_cascade import tiny_parts, tiny_prior
from tests.trainer_runs import settings, tensors, train, trainer_main, write_cascade, write_config, write_images

NF4 = pytest.param("nf4", marks=pytest.mark.slow)  # bitsandbytes alone takes seconds to import
FORMS = ["int8", "int4", NF4]
LAYER_ERROR = {"int8": 0.01, "int4": 0.09, "nf4": 0.1}
OUTPUT_ERROR = {"int8": 0.01, "int4": 0.08, "nf4": 0.08}
BYTES = {"int8": 1.02, "int4": 0.5625, "nf4": 0.5625}


def needed(form: str) -> None:
    if form == "nf4":
        pytest.importorskip("bitsandbytes")


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 320)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(320, 256, generator=generator))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
def test_a_layers_error_and_bytes(linear, form):
    needed(form)
    layer = QuantizedLinear(linear, form)
    assert 0 < error(layer.dequantize(), linear.weight) < LAYER_ERROR[form]
    stored = sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")
    assert (linear.weight.numel(), stored) == quantized_bytes(nn.Sequential(linear), form)
    assert stored / linear.weight.numel() <= BYTES[form]
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), F.linear(x, layer.dequantize(), linear.bias), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_input_and_nothing_is_kept_for_them(linear, form):
    needed(form)
    layer = QuantizedLinear(linear, form)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda t: t):
        output = layer(x)
    assert not kept
    output.backward(torch.ones_like(output))
    assert torch.allclose(x.grad, torch.ones_like(output) @ layer.dequantize(), atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_extreme_weights(form):
    """Rows of zeros, of one value, tiny and large ones come back finite and near."""
    linear = nn.Linear(128, 4, bias=False).requires_grad_(False)
    rows = [
        torch.zeros(128),
        torch.full((128,), 0.3),
        torch.linspace(-1e-5, 1e-5, 128),
        torch.linspace(-100, 100, 128),
    ]
    linear.weight.copy_(torch.stack(rows))
    values = QuantizedLinear(linear, form).dequantize()
    assert torch.equal(values[0], rows[0])
    for row, value in zip(rows[1:], values[1:], strict=True):
        assert error(value, row) < 0.05, row[:2]


def test_it_computes_in_the_types_of_its_inputs(linear):
    layer = QuantizedLinear(linear.to(torch.bfloat16), "int8")
    assert layer.dequantize().dtype == torch.bfloat16
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    assert layer(x).dtype == torch.float32
    assert layer(x.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.requires_grad_()).dtype == torch.bfloat16
        layer(x).float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_the_embedded_priors_error(form):
    """As measured: 0.5 % in eight bits, 6.5 % in four, with the modulations left as they are."""
    needed(form)
    prior = StableCascadePrior.from_pretrained(Path(embedded_path()) / "prior").eval().requires_grad_(False)
    widths, generator = prior.config, torch.Generator().manual_seed(0)
    values = {
        "sample": torch.randn(4, 16, 4, 4, generator=generator), "timestep_ratio": torch.linspace(0.05, 0.95, 4),
        "clip_text_pooled": torch.randn(4, 1, widths.clip_text_pooled_in_channels, generator=generator),
        "clip_text": torch.randn(4, 8, widths.clip_text_in_channels, generator=generator),
        "clip_img": torch.zeros(4, 1, widths.clip_image_in_channels),
    }  # fmt: skip
    reference = prior(**values).sample
    weights, _ = quantized_bytes(prior, form)
    assert weights / sum(parameter.numel() for parameter in prior.parameters()) > 0.7
    names = quantize(prior, form)
    assert not any("mapper" in name and "kv_mapper" not in name for name in names)
    assert 0 < error(prior(**values).sample, reference) < OUTPUT_ERROR[form]


def test_the_original_weights_are_let_go():
    prior = tiny_prior()
    alive = [weakref.ref(layer.weight) for layer in quantizable(prior).values()]
    names = quantize(prior, "int8")
    assert len(names) == len(alive) > 10
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_learn_beside_it(tmp_path, form, use_dora):
    needed(form)
    prior = tiny_prior()
    quantize(prior, form)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    start = predict(prior)
    add_lora(prior, module_filters=[".attn", "channelwise"], rank=2, use_dora=use_dora)
    assert torch.allclose(predict(prior), start, atol=1e-5)
    trained = {name: value for name, value in prior.named_parameters() if value.requires_grad}
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in trained.items())
    wanted = start.detach() + torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
    optimizer, losses = torch.optim.Adam(trained.values(), lr=0.05), []
    for _ in range(12):
        loss = (predict(prior) - wanted).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in prior.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())

    save_lora(tmp_path, prior=prior)  # a plain file: it acts on a whole network as on a quantised one
    other = tiny_prior()
    quantize(other, form)
    load_lora(other, tmp_path)
    assert torch.allclose(predict(other), predict(prior), atol=1e-6)
    whole = tiny_prior()
    load_lora(whole, tmp_path)
    assert error(predict(whole), predict(prior)) < 0.2
    remove_lora(other)
    assert torch.equal(predict(other), start)


def test_gradient_checkpointing_beside_bfloat16_changes_nothing():
    prior = tiny_prior().to(torch.bfloat16)
    quantize(prior, "int4")
    add_lora(prior, module_filters=[".attn", "channelwise"], rank=2)
    randomise(prior)
    gradients = []
    for on in (False, True):
        prior.enable_gradient_checkpointing() if on else prior.disable_gradient_checkpointing()
        prior.train()
        prior.zero_grad()
        torch.manual_seed(0)
        prior(**inputs(torch.bfloat16)).sample.float().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in prior.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(value.abs().max() > 0 for value in gradients[0].values())


def test_refusals(monkeypatch):
    prior = tiny_prior()
    with pytest.raises(ValueError, match="'int3' is none of int8, int4, nf4"):
        quantize(prior, "int3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="nf4 needs bitsandbytes; pip install bitsandbytes") as caught:
        quantize(prior, "nf4")
    assert "\n" not in str(caught.value)
    quantize(prior, "int8")
    add_lora(prior, module_filters=[".attn"], rank=2)
    with pytest.raises(ValueError, match="comes before adapters"):
        quantize(prior, "int8")
    randomise(prior)
    before = predict(prior)
    with pytest.raises(ValueError, match="cannot be merged into int8 weights"):
        prior.fuse_lora()
    assert torch.equal(predict(prior), before)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"))
    write_images(folder / "images.tar")
    return folder


def test_a_training_on_it_resumes_to_the_same_bits(tmp_path, cascade, capsys):
    changes = {"quantization": "int8", "gradient_checkpointing": True, "lora_dropout": 0.1, "num_preview_images": 0}
    config = write_config(tmp_path / "check.yaml", settings("lora", tmp_path, cascade, **changes))
    trainer_main("lora")(["--config", str(config), "--check"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("quantization")]
    assert "weights of the frozen prior as int8" in line
    whole = train("lora", tmp_path, cascade, **changes)
    train("lora", tmp_path, cascade, experiment_id="parts", updates=3, **changes)
    parts = train("lora", tmp_path, cascade, experiment_id="parts", **changes)
    first, second = tensors(whole), tensors(parts)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    saved = load_file(whole.parent / "step-00000006/weights.safetensors")
    assert all(".lora_" in name or name.endswith(".rows") for name in saved)


def test_it_learns_nearly_what_a_training_on_the_whole_base_learns(tmp_path, cascade):
    changes = {"num_preview_images": 0, "max_grad_norm": None, "lr": 1e-2}
    whole = train("lora", tmp_path, cascade, **changes)
    few = train("lora", tmp_path, cascade, experiment_id="few", quantization="int8", **changes)
    first, second = (
        torch.cat([value.flatten() for _, value in sorted(tensors(each).items())]) for each in (few, whole)
    )
    assert 0 < error(first, second) < 0.1


# --- other ways to save memory


def nested_tensors(value) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in nested_tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.slow
def test_eight_bit_adamw_trains_and_resumes(tmp_path, cascade):
    """At a rank so high that some states are large enough to be stored in eight bits."""
    pytest.importorskip("bitsandbytes")
    changes = {"optimizer": "adamw_8bit", "num_preview_images": 0, "rank": 300, "updates": 4, "token_lr": 1e-2}
    whole = train("lora", tmp_path, cascade, **changes)
    state = torch.load(whole.parent / "step-00000004/optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert {torch.uint8, torch.float32} <= {value.dtype for value in nested_tensors(state)}
    train("lora", tmp_path, cascade, experiment_id="parts", **changes | {"updates": 2})
    parts = tensors(train("lora", tmp_path, cascade, experiment_id="parts", **changes))
    assert all(torch.equal(value, parts[name]) for name, value in tensors(whole).items())
    plain = tensors(train("lora", tmp_path, cascade, experiment_id="plain", **changes | {"optimizer": "adamw"}))
    assert all((value - plain[name]).abs().max() < 0.01 for name, value in tensors(whole).items())


@pytest.mark.parametrize("changes", [{"optimizer": "adamw_8bit"}, {"quantization": "nf4"}])
def test_a_missing_package_ends_a_training_before_any_weight_is_read(tmp_path, cascade, monkeypatch, changes):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install bitsandbytes, or set") as caught:
        train("lora", tmp_path, cascade, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_networks_whose_weights_visit_the_device_compute_the_same():
    """What `offload` does on CUDA, with the processor as the device: the weights are away between two calls."""
    from accelerate import cpu_offload

    from stable_cascade.models.clip import encode_prompts

    parts = tiny_parts()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def serve() -> list[torch.Tensor]:
        latents = parts["semantic_encoder"](pixels)
        hidden, pooled, _ = encode_prompts(parts["text_encoder"], parts["tokenizer"], ["a dog", ""], "cpu")
        return [latents, hidden, pooled, parts["previewer"](latents), parts["vqgan"].encode(pixels).latents]

    with torch.no_grad():
        before = serve()
        for name in ("semantic_encoder", "text_encoder", "previewer", "vqgan"):
            parts[name] = cpu_offload(parts[name], torch.device("cpu"))
            assert {parameter.device.type for parameter in parts[name].parameters()} == {"meta"}
        for first, second in zip(before, serve(), strict=True):
            assert torch.allclose(first, second, atol=1e-6)
