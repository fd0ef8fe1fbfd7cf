"""LoRA: values of the original, one property per test, and every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stable_cascade.adapters import add_lora, load_lora, lora_state_dict, remove_lora, save_lora
from stable_cascade.adapters.injection import layer_shapes
from stable_cascade.files import from_original
from stable_cascade.files import lora as files
from stable_cascade.models import StableCascadePrior
from tests.golden import FOLDER, assert_matches, entry, fill, tensors
from tests.tiny_cascade import tiny_prior

GOLDEN = {
    "conditioning_dim": 64,
    "block_out_channels": [64, 64],
    "num_attention_heads": [4, 4],
    "down_num_layers_per_block": [1, 2],
    "up_num_layers_per_block": [2, 1],
    "clip_text_in_channels": 32,
    "clip_text_pooled_in_channels": 32,
    "clip_image_in_channels": 24,
}


def golden_prior() -> StableCascadePrior:
    prior = StableCascadePrior(**GOLDEN).eval()
    shapes = {key: tuple(value.shape) for key, value in prior.to_original().items()}
    prior.load_state_dict(from_original(fill(shapes, entry("io_lora")["fill"]["stage_c"]), "prior"))
    return prior


def inputs(dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = {"sample": (2, 16, 3, 4), "clip_text_pooled": (2, 1, 32), "clip_text": (2, 5, 32), "clip_img": (2, 1, 24)}
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return values | {"timestep_ratio": torch.tensor([0.3, 0.8])}


def predict(prior) -> torch.Tensor:
    return prior(**inputs(prior.dtype)).sample


def randomise(prior, adapter_name="default", seed=3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if "lora_" in name and adapter_name in name.split("."):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def golden_inputs() -> dict:
    data = tensors("io_lora")
    names = {"x": "sample", "r": "timestep_ratio"}
    keys = ("x", "r", "clip_text", "clip_text_pooled", "clip_img", "sca", "crp")
    return {names.get(key, key): data[f"in.{key}"] for key in keys}


def test_original_file_gives_the_originals_outputs():
    prior = golden_prior()
    targets = load_lora(prior, FOLDER / "ckpt_lora.safetensors")
    assert len(targets) == 4 * 6
    assert_matches("io_lora", "out", prior(**golden_inputs()).sample)
    prior.disable_lora()
    assert_matches("io_lora", "out.disabled", prior(**golden_inputs()).sample)


def test_original_files_gradients():
    """Theirs is one fused q, k, v update: gradients of the shared factor add up, those of the other stack."""
    prior = golden_prior()
    load_lora(prior, FOLDER / "ckpt_lora.safetensors")
    loss = (prior(**golden_inputs()).sample - tensors("io_lora")["in.target"]).square().mean()
    assert_matches("io_lora", "out.loss", loss[None])
    loss.backward()
    attention = prior.down_blocks[0][2].attention
    # The scale 1 / rank is in PEFT's forward as in the original's, so gradients compare as they are.
    assert_matches("io_lora", "grad.weights.0.lora_down", attention.to_out[0].lora_A["default"].weight.grad)
    fused = [layer.lora_B["default"].weight.grad for layer in (attention.to_q, attention.to_k, attention.to_v)]
    assert_matches("io_lora", "grad.weights.1.lora_up", torch.cat(fused))


def test_positional_order_is_the_originals():
    names = list(layer_shapes(golden_prior()))
    weights = [files.original_weight(group[0]) for group in files.positional_targets(names, [".attn"])]
    assert weights == entry("ckpt_lora")["weights_targets"]


def test_original_conv_update_is_the_same_at_every_tap():
    down, up = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(5, 2)
    state_dict = {"weights.0.lora_down": down, "weights.0.lora_up": up}
    result = files.from_original_lora(state_dict, {"embedding.1": torch.Size((5, 3, 3, 3))}, ["embedding"])
    first, second = result["embedding.1.lora_A.weight"], result["embedding.1.lora_B.weight"]
    delta = torch.einsum("or,rikl->oikl", second[..., 0, 0], first)
    assert torch.allclose(delta, (up @ down)[:, :, None, None].expand(5, 3, 3, 3))


@pytest.mark.parametrize("filters", [[".attn"], [".attention"], ["attention.attn"]])
def test_filters_match_our_names_and_the_originals(filters):
    targets = add_lora(tiny_prior(), module_filters=filters, rank=2)
    assert len(targets) == 4 * 4
    assert {name.split("attention.")[1] for name in targets} == {"to_q", "to_k", "to_v", "to_out.0"}


def test_only_the_adapter_trains_and_starts_as_nothing():
    prior = tiny_prior()
    before = predict(prior)
    add_lora(prior, module_filters=[".attn", "channelwise", "embedding", "clf"], rank=3)
    assert torch.equal(predict(prior), before) or torch.allclose(predict(prior), before, atol=1e-6)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in prior.named_parameters())


def test_start_depends_on_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = tiny_prior(), tiny_prior(), tiny_prior()
    add_lora(first, module_filters=[".attn"], rank=2, seed=1)
    torch.manual_seed(9)
    add_lora(second, module_filters=[".attn"], rank=2, seed=1)
    add_lora(other, module_filters=[".attn"], rank=2, seed=2)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (lora_state_dict(model) for model in (first, second, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], three[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_half_precision_base_with_float32_adapters(dtype, use_dora):
    prior = tiny_prior().to(dtype)
    add_lora(prior, module_filters=[".attn", "channelwise", "mapper", "embedding", "clf"], rank=2, use_dora=use_dora)
    randomise(prior)
    assert {p.dtype for p in prior.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in prior.parameters() if not p.requires_grad} == {dtype}
    output = predict(prior)
    assert output.isfinite().all()
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters() if p.requires_grad)


@pytest.mark.parametrize("use_dora", [False, True])
def test_round_trip(tmp_path, use_dora):
    prior = tiny_prior()
    before = predict(prior)
    add_lora(prior, module_filters=[".attn", "clf"], rank=2, lora_alpha=4, use_dora=use_dora)
    randomise(prior)
    after = predict(prior)
    assert (after - before).abs().max() > 1e-3
    save_lora(tmp_path, prior=prior)

    other = tiny_prior()
    load_lora(other, tmp_path)
    assert torch.equal(predict(other), after)
    if not use_dora:
        half = tiny_prior()
        load_lora(half, tmp_path, weight=0.0)
        assert torch.allclose(predict(half), before, atol=1e-6)
    remove_lora(other)
    assert torch.equal(predict(other), before)
    assert set(other.state_dict()) == set(tiny_prior().state_dict())


def test_file_is_in_diffusers_layout(tmp_path):
    prior = tiny_prior()
    add_lora(prior, module_filters=[".attn"], rank=2, lora_alpha=4)
    save_lora(tmp_path, prior=prior)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as handle:
        keys, header = list(handle.keys()), handle.metadata()
    assert "prior.down_blocks.0.2.attention.to_q.lora_A.weight" in keys
    values = json.loads(header["lora_adapter_metadata"])
    assert (values["prior.r"], values["prior.lora_alpha"]) == (2, 4)

    from diffusers.loaders.lora_base import _load_sft_state_dict_metadata  # what diffusers itself reads

    assert _load_sft_state_dict_metadata(tmp_path / "pytorch_lora_weights.safetensors") == values  # fmt: skip

    by_diffusers = tiny_prior()
    by_diffusers.load_lora_adapter(
        tmp_path, prefix="prior", adapter_name="default", weight_name="pytorch_lora_weights.safetensors"
    )
    assert torch.equal(predict(by_diffusers), predict(prior))


def test_ranks_and_alpha_without_metadata():
    prior = tiny_prior()
    add_lora(prior, module_filters=["to_q"], rank=2)
    state_dict = lora_state_dict(prior)
    add_lora(prior, module_filters=["to_v"], rank=5, adapter_name="wide")
    state_dict |= lora_state_dict(prior, "wide")
    other = tiny_prior()
    load_lora(other, state_dict)
    assert {layer.r["default"] for layer in other.modules() if hasattr(layer, "lora_A")} == {2, 5}
    assert {layer.scaling["default"] for layer in other.modules() if hasattr(layer, "lora_A")} == {1.0}


def test_overrides_are_saved_instead_of_the_live_values(tmp_path):
    prior = tiny_prior()
    add_lora(prior, module_filters=[".attn"], rank=2)
    ema = {f"prior.{name}": torch.ones_like(p) for name, p in prior.named_parameters() if p.requires_grad}
    save_lora(tmp_path, prior=prior, overrides=ema)
    other = tiny_prior()
    load_lora(other, tmp_path)
    assert all((value == 1).all() for value in lora_state_dict(other).values())


def test_two_adapters_add_up():
    prior = tiny_prior()
    before = predict(prior)
    for name in ("one", "two"):
        add_lora(prior, module_filters=["clf"], rank=2, adapter_name=name)
        randomise(prior, name, seed=len(name) + ord(name[0]))
    alone = {}
    for name in ("one", "two"):
        prior.set_adapters([name])
        alone[name] = predict(prior) - before
    prior.set_adapters(["one", "two"], [1.0, 0.5])
    assert torch.allclose(predict(prior) - before, alone["one"] + 0.5 * alone["two"], atol=1e-5)


def refusals():
    yield "rank 0 ", lambda prior, _: add_lora(prior, module_filters=[".attn"], rank=0)
    yield "nearest: '.attn'", lambda prior, _: add_lora(prior, module_filters=[".atn"], rank=2)
    yield "'.nothing'", lambda prior, _: add_lora(prior, module_filters=[".attn", ".nothing"], rank=2)
    yield r"module_filters \[\]", lambda prior, _: add_lora(prior, module_filters=[], rank=2)
    yield "depthwise", lambda prior, _: add_lora(prior, module_filters=[".depthwise"], rank=2)
    yield "lora_dropout 1.5", lambda prior, _: add_lora(prior, module_filters=[".attn"], rank=2, lora_dropout=1.5)
    yield "does not exist", lambda prior, path: load_lora(prior, path / "missing.safetensors")
    yield "no known format", lambda prior, _: load_lora(prior, {"something.else": torch.zeros(1)})
    text_only = {f"text_encoder.a.lora_{factor}.weight": torch.zeros(1, 1) for factor in "AB"}
    yield "nothing for the prior", lambda prior, _: load_lora(prior, text_only)
    yield (
        "lacks; nearest",
        lambda prior, _: load_lora(
            prior, {"prior.clg.1.lora_A.weight": torch.zeros(1, 16), "prior.clg.1.lora_B.weight": torch.zeros(16, 1)}
        ),
    )


@pytest.mark.parametrize("message, act", list(refusals()))
def test_refusals_are_one_line(tmp_path, message, act):
    prior = tiny_prior()
    with pytest.raises(ValueError, match=message) as caught:
        act(prior, tmp_path)
    assert "\n" not in str(caught.value)


def test_adapter_name_in_use():
    prior = tiny_prior()
    add_lora(prior, module_filters=[".attn"], rank=2)
    with pytest.raises(ValueError, match="'default' is in use"):
        add_lora(prior, module_filters=[".attn"], rank=2)


@pytest.mark.parametrize("original", [True, False])
def test_a_file_for_another_size_is_named(tmp_path, original):
    """Only the widths matter, so one layer stands for the 1B prior."""
    if original:
        state_dict = {"weights.0.lora_down": torch.zeros(4, 1536), "weights.0.lora_up": torch.zeros(1536, 4)}
    else:
        place = "prior.down_blocks.0.2.attention.to_q"
        state_dict = {f"{place}.lora_A.weight": torch.zeros(4, 1536), f"{place}.lora_B.weight": torch.zeros(1536, 4)}
    save_file(state_dict, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"trained for a prior of width 1536 \(1B\); this one has width 16"):
        load_lora(tiny_prior(), tmp_path / "other.safetensors")


def test_original_file_with_other_filters_asks_for_them():
    state_dict = {"weights.0.lora_down": torch.zeros(4, 16), "weights.0.lora_up": torch.zeros(16, 4)}
    with pytest.raises(ValueError, match="pass the training's module_filters"):
        load_lora(tiny_prior(), state_dict)
    load_lora(tiny_prior(), state_dict, module_filters=["clf"])


def test_gradient_checkpointing_with_adapters():
    prior = tiny_prior()
    add_lora(prior, module_filters=[".attn"], rank=2)
    randomise(prior)
    gradients = []
    for on in (False, True):
        prior.enable_gradient_checkpointing() if on else prior.disable_gradient_checkpointing()
        prior.train()
        prior.zero_grad()
        torch.manual_seed(0)
        predict(prior).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in prior.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
