"""LoRA while drawing: several with weights per stage, one in place of another, fused and unfused, refused."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from peft import OFTConfig
from safetensors.torch import load_file, save_file
from torch import nn

from stable_cascade import StableCascadePipeline, StableCascadePriorPipeline, StableCascadeScheduler
from stable_cascade.adapters import add_lora, load_lora, lora_ranks, lora_state_dict, read_lora, remove_lora, save_lora
from stable_cascade.adapters.injection import lora_scales_of, tuner_layers
from tests.lora_files import PRIOR_LAYERS, TEXT_LAYERS, WRITTEN, merged_by_hand, updates_for
from tests.test_formats_lora import FLAT, pair
from tests.test_lora import randomise
from tests.tiny_cascade import MULTIPLE, tiny_decoder, tiny_parts, tiny_prior

Q = "down_blocks.0.2.attention.to_q"


@cache
def _parts() -> dict:
    return tiny_parts()


def pipeline() -> StableCascadePipeline:
    """A tiny cascade; only what adapters and tokens change is its own."""
    own = {name: copy.deepcopy(_parts()[name]) for name in ("prior", "decoder", "text_encoder", "tokenizer")}
    return StableCascadePipeline(**{**_parts(), **own}, resolution_multiple=MULTIPLE)


def predict(pipe) -> dict[str, torch.Tensor]:
    """What each network of a pipeline makes of fixed inputs; a loaded one is run with its adapters."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        prior = pipe.prior(sample=noise(1, 16, 3, 4), timestep_ratio=torch.tensor([0.5]),
                           clip_text_pooled=noise(1, 1, 32), clip_text=noise(1, 5, 32), clip_img=noise(1, 1, 24)
                           ).sample  # fmt: skip
        decoder = pipe.decoder(sample=noise(1, 4, 8, 8), timestep_ratio=torch.tensor([0.5]),
                               clip_text_pooled=noise(1, 1, 32), effnet=noise(1, 16, 2, 2)).sample  # fmt: skip
        text = pipe.text_encoder(torch.tensor([[3, 5, 7]])).text_embeds
    return {"prior": prior, "decoder": decoder, "text_encoder": text}


def whole_lora(folder, *, rank=2, seed=3, filters=(".attn",), dora=False, parts=("prior", "decoder", "text_encoder")):
    """A LoRA file with a part for each network, all its factors random."""
    own, tensors = pipeline(), {}
    words = {"prior": list(filters), "decoder": list(filters), "text_encoder": ["q_proj", "fc1"]}
    for component in parts:
        model = getattr(own, component)
        add_lora(model, module_filters=words[component], rank=rank, use_dora=dora)
        randomise(model, seed=seed)
        tensors |= {f"{component}.{key}": value for key, value in lora_state_dict(model).items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def by_hand(tmp_path, tool="onetrainer", **what):
    """A file of another tool for the tiny prior and text encoder, and its updates."""
    own = pipeline()
    prior = updates_for(own.prior, what.pop("layers", PRIOR_LAYERS), **what)
    text = updates_for(own.text_encoder, TEXT_LAYERS, **what)
    tensors, header = WRITTEN[tool][0](prior, text)
    path = tmp_path / f"{tool}.safetensors"
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, header)
    return path, {"prior": prior, "text_encoder": text}


def apart(one, other) -> dict[str, bool]:
    return {name: bool((one[name] - other[name]).abs().max() > 1e-4) for name in one}


# --- several, with weights, per stage


def test_a_file_of_another_tool_loads_into_the_pipeline_with_its_text_encoder_part(tmp_path):
    path, updates = by_hand(tmp_path)
    pipe = pipeline()
    expected = predict(pipe)
    for component, own in updates.items():
        setattr(pipe, component, merged_by_hand(getattr(pipe, component), own))
    expected |= {name: predict(pipe)[name] for name in updates}
    loaded = pipeline()
    loaded.load_lora_weights(path)
    found = predict(loaded)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    assert loaded.get_list_adapters() == {"prior": ["default_0"], "text_encoder": ["default_0"]}


def test_weights_for_each_stage(tmp_path):
    pipe = pipeline()
    plain = predict(pipe)
    pipe.load_lora_weights(whole_lora(tmp_path / "one"), adapter_name="one")
    full = predict(pipe)
    assert apart(full, plain) == {"prior": True, "decoder": True, "text_encoder": True}
    pipe.set_adapters("one", {"prior": 1.0, "decoder": 0.0, "text_encoder": 0.0})
    only = predict(pipe)
    assert torch.equal(only["prior"], full["prior"])
    assert apart(only, plain) == {"prior": True, "decoder": False, "text_encoder": False}
    pipe.set_adapters("one", {"prior": 0.0, "decoder": 1.0, "text_encoder": 0.0})
    assert torch.equal(predict(pipe)["decoder"], full["decoder"])
    with pytest.raises(ValueError, match="set_adapters: 'vqgan' is none of prior, decoder, text_encoder"):
        pipe.set_adapters("one", {"vqgan": 1.0})


def test_several_add_up(tmp_path):
    """Updates of a last layer, whose sum is plain to see in the output."""
    pipe = pipeline()
    plain = predict(pipe)["prior"]
    for name, seed in (("one", 3), ("two", 4)):
        folder = whole_lora(tmp_path / name, seed=seed, filters=["clf"], parts=["prior"])
        pipe.load_lora_weights(folder, adapter_name=name)
    alone = {}
    for name in ("one", "two"):
        pipe.set_adapters(name)
        alone[name] = predict(pipe)["prior"] - plain
    pipe.set_adapters(["one", "two"], [1.0, -0.5])
    assert torch.allclose(predict(pipe)["prior"] - plain, alone["one"] - 0.5 * alone["two"], atol=1e-5)
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters()["prior"] == ["one"]
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe)["prior"], plain)


def test_the_two_stage_pipelines_take_their_part(tmp_path):
    folder = whole_lora(tmp_path / "one")
    parts = tiny_parts()
    prior = StableCascadePriorPipeline(
        parts["tokenizer"], parts["text_encoder"], parts["prior"], StableCascadeScheduler()
    )
    prior.load_lora_weights(folder)
    assert set(prior.get_list_adapters()) == {"prior", "text_encoder"}
    only_b = whole_lora(tmp_path / "b", parts=["decoder"])
    with pytest.raises(ValueError, match="has decoder; this StableCascadePriorPipeline has none of them"):
        prior.load_lora_weights(only_b)


# --- one in place of another


def modules(pipe) -> list[int]:
    """Every module and parameter of a pipeline's networks, by identity."""
    models = [pipe.prior, pipe.decoder, pipe.text_encoder]
    return [id(one) for model in models for one in (*model.modules(), *model.parameters())]


def drawn_with(folder, **options):
    pipe = pipeline()
    pipe.load_lora_weights(folder, **options)
    return predict(pipe)


@pytest.mark.parametrize("dora", [False, True])
def test_hotswap_changes_values_and_nothing_else(tmp_path, dora):
    one, two = (whole_lora(tmp_path / str(seed), seed=seed, dora=dora) for seed in (3, 4))
    pipe = pipeline()
    pipe.load_lora_weights(one, adapter_name="mine")
    before = modules(pipe)
    pipe.load_lora_weights(two, adapter_name="mine", hotswap=True, weight=0.5)
    assert modules(pipe) == before
    expected = drawn_with(two, weight=0.5)
    assert all(torch.equal(value, expected[name]) for name, value in predict(pipe).items())
    pipe.load_lora_weights(one, adapter_name="mine", hotswap=True)
    expected = drawn_with(one)
    assert all(torch.equal(value, expected[name]) for name, value in predict(pipe).items())


def test_hotswap_of_another_rank_alpha_and_tool(tmp_path):
    """Lower ranks are filled up with zeros; layers that the new one lacks become nothing."""
    pipe = pipeline()
    pipe.load_lora_weights(whole_lora(tmp_path / "wide", rank=8, filters=[".attn", "kv_mapper"]), adapter_name="mine")
    attention = [name for name in PRIOR_LAYERS if ".attention." in name]
    path, _ = by_hand(tmp_path, "kohya", layers=attention)
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if "lora_te_" not in key}, path)
    pipe.load_lora_weights(path, adapter_name="mine", hotswap=True)
    expected = drawn_with(path)
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in predict(pipe).items())
    assert set(lora_ranks(pipe.prior, "mine").values()) == {8}
    state = lora_state_dict(pipe.prior, "mine")
    again = tiny_prior()
    save_lora(tmp_path / "saved", prior=pipe.prior, adapter_name="mine")
    load_lora(again, tmp_path / "saved")
    assert lora_scales_of(again) == lora_scales_of(pipe.prior, "mine")
    assert any(not value.any() for value in state.values())


def test_compiled_networks_are_not_compiled_again(tmp_path):
    """Room for rank 4 is made first; then neither rank nor alpha leads to another graph."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(whole_lora(tmp_path / "one", parts=["prior"]), adapter_name="mine")
    dynamo.reset()
    counter = CompileCounter()
    attention = pipe.prior.down_blocks[0][2].attention
    compiled = torch.compile(attention.to_q, backend=counter)
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    outputs = [compiled(x)]
    path, updates = by_hand(tmp_path, "kohya", layers=[Q])
    save_file({key: value for key, value in load_file(path).items() if "lora_te_" not in key}, path)
    pipe.load_lora_weights(path, adapter_name="mine", hotswap=True)
    outputs.append(compiled(x))
    assert counter.frame_count == 1
    plain = tiny_prior()
    expected = merged_by_hand(plain, updates["prior"]).get_submodule(Q)(x)
    assert torch.allclose(outputs[1], expected, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def hotswap_refusals():
    yield "needs the adapter_name of a loaded LoRA, not 'other'", {}, {"adapter_name": "other"}, {}
    yield "needs the adapter_name of a loaded LoRA, not None", {}, {"adapter_name": None}, {}
    yield r"enable_lora_hotswap\(target_rank=4\)", {}, {}, {"rank": 4}
    yield "which adapter 'mine' does not", {}, {}, {"filters": [".attn", "clf"], "parts": ["prior"]}
    yield "no DoRA in", {}, {}, {"dora": True}
    yield "is fused into the weights; call unfuse_lora first", {"fuse": True}, {}, {}


@pytest.mark.parametrize("message, before, options, what", list(hotswap_refusals()))
def test_hotswaps_that_cannot_be_are_refused_and_change_nothing(tmp_path, message, before, options, what):
    pipe = pipeline()
    pipe.load_lora_weights(whole_lora(tmp_path / "one"), adapter_name="mine")
    if before:
        pipe.fuse_lora()
    drawn = predict(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        pipe.load_lora_weights(
            whole_lora(tmp_path / "two", **what), **{"adapter_name": "mine", "hotswap": True, **options}
        )
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, drawn[name]) for name, value in predict(pipe).items())


# --- into the weights and out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tool", ["peft", "onetrainer"])
def test_fusing_is_undone_bit_by_bit(tmp_path, dtype, tool):
    """Several at once, one of them a DoRA (of the inputs, for OneTrainer's)."""
    pipe = pipeline()
    for model in (pipe.prior, pipe.text_encoder):
        model.to(dtype)
    weights = {name: value.clone() for name, value in pipe.prior.state_dict().items()}
    pipe.load_lora_weights(whole_lora(tmp_path / "plain", parts=["prior"]), adapter_name="plain")
    path, _ = by_hand(tmp_path, tool, dora="inputs" if tool == "onetrainer" else "outputs")
    pipe.load_lora_weights(path, adapter_name="dora")
    pipe.set_adapters(["plain", "dora"], [0.7, 1.0])
    pipe.fuse_lora()
    fused = {name: value.clone() for name, value in pipe.prior.state_dict().items()}
    assert pipe.num_fused_loras == 2
    pipe.unfuse_lora()
    changed = 0
    for name, value in pipe.prior.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, weights[name.replace(".base_layer", "")]), name
            changed += not torch.equal(fused[name], value)
    assert changed >= 16


@pytest.mark.parametrize("dora", [None, "outputs", "inputs"])
def test_fused_weights_draw_as_the_adapter(tmp_path, dora):
    path, _ = by_hand(tmp_path, dora=dora)
    pipe = pipeline()
    pipe.load_lora_weights(path)
    expected = predict(pipe)
    pipe.fuse_lora()
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in predict(pipe).items())


def test_what_is_fused_stays_when_the_adapters_are_unloaded(tmp_path):
    """As in diffusers: the network is saved and goes on with the adapter in its weights."""
    pipe = pipeline()
    plain = pipe.prior.get_submodule(Q).weight.clone()
    pipe.load_lora_weights(whole_lora(tmp_path / "plain", parts=["prior"]))
    pipe.fuse_lora()
    fused, drawn = pipe.prior.get_submodule(Q).base_layer.weight.clone(), predict(pipe)
    pipe.unload_lora_weights()
    assert not tuner_layers(pipe.prior)
    assert torch.equal(pipe.prior.get_submodule(Q).weight, fused)
    assert not torch.equal(fused, plain)
    assert all(torch.equal(value, drawn[name]) for name, value in predict(pipe).items())
    assert pipe.num_fused_loras == 0
    pipe.load_lora_weights(whole_lora(tmp_path / "again", parts=["prior"]))
    pipe.fuse_lora()
    pipe.unfuse_lora()
    assert torch.equal(pipe.prior.get_submodule(Q).base_layer.weight, fused)


def test_an_adapter_of_another_kind_is_fused_and_unfused():
    pipe = pipeline()
    pipe.prior.add_adapter(OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]))
    with torch.no_grad():
        for name, parameter in pipe.prior.named_parameters():
            if "oft_R" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    expected, weight = predict(pipe), pipe.prior.get_submodule(Q).base_layer.weight.clone()
    with pytest.raises(
        ValueError, match=r"lora_scale 0[.]5 cannot weaken the adapter 'default', whose kind has no scale"
    ):
        pipe.fuse_lora(["prior"], lora_scale=0.5)
    pipe.fuse_lora(["prior"])
    assert not torch.allclose(pipe.prior.get_submodule(Q).base_layer.weight, weight, atol=1e-2)
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in predict(pipe).items())
    pipe.unfuse_lora(["prior"])
    assert torch.equal(pipe.prior.get_submodule(Q).base_layer.weight, weight)


def test_what_cannot_be_fused_is_refused_before_anything_is(tmp_path):
    prior = tiny_prior()
    channels = prior.get_submodule("down_blocks.0.0.depthwise").in_channels
    name = "lora_prior_unet_down_blocks_0_0_depthwise"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, channels, 3, 3),
        f"{name}.lora_up.weight": torch.ones(1, 2, 1, 1),
    }
    save_file(tensors | pair(FLAT.replace("lora_unet", "lora_prior_unet")), tmp_path / "x.safetensors")
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "x.safetensors", adapter_name="all")
    drawn = predict(pipe)
    with pytest.raises(ValueError, match="adapter 'all' updates depthwise convolutions as OneTrainer does"):
        pipe.fuse_lora()
    assert all(torch.equal(value, drawn[name]) for name, value in predict(pipe).items())
    assert not any(layer.merged for layer in tuner_layers(pipe.prior))


# --- refused


def test_nothing_is_left_of_a_refused_file(tmp_path):
    """The prior's part fits, the text encoder's does not; and the other way round for its tokens."""
    tensors = pair(f"prior.{Q}", down="lora_A", up="lora_B")
    wrong = pair("text_encoder.text_projection", width=1280, down="lora_A", up="lora_B")
    (tmp_path / "bad").mkdir()
    save_file(tensors | wrong, tmp_path / "bad" / "pytorch_lora_weights.safetensors")
    save_file({"[fox]": torch.ones(32)}, tmp_path / "bad" / "learned_embeds.safetensors")
    pipe = pipeline()
    before, plain = modules(pipe), predict(pipe)
    with pytest.raises(ValueError, match=r"trained for a text_encoder of width 1280 \(ViT-bigG/14"):
        pipe.load_lora_weights(tmp_path / "bad")
    assert modules(pipe) == before
    assert pipe.get_list_adapters() == {}
    assert "[fox]" not in pipe.tokenizer.get_vocab()
    save_file(tensors, tmp_path / "bad" / "pytorch_lora_weights.safetensors")
    save_file({"[fox]": torch.ones(1280)}, tmp_path / "bad" / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="width 1280, this text encoder has 32"):
        pipe.load_lora_weights(tmp_path / "bad")
    assert modules(pipe) == before
    assert all(torch.equal(value, plain[name]) for name, value in predict(pipe).items())


@pytest.mark.parametrize("width, size", [(2048, r" \(3.6B\)"), (1536, r" \(1B\)"), (128, r" \(embedded\)"), (20, "")])
@pytest.mark.parametrize("tool", ["onetrainer", "original", "comfyui"])
def test_the_size_that_a_file_was_trained_for_is_named(tmp_path, tool, width, size):
    names = {"onetrainer": FLAT.replace("lora_unet", "lora_prior_unet"), "comfyui": f"diffusion_model.{Q}"}
    tensors = {f"weights.{i}.lora_{part}": torch.ones(shape) for i, rows in enumerate((width, 3 * width))
               for part, shape in (("down", (2, width)), ("up", (rows, 2)))} if tool == "original" \
        else pair(names[tool], width=width)  # fmt: skip
    save_file(tensors, tmp_path / "other.safetensors")
    message = rf"other.safetensors' was trained for a prior of width {width}{size}; this one has width 16"
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(tiny_prior(), tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


def test_a_deleted_dora_leaves_its_name_free(tmp_path):
    pipe = pipeline()
    plain = predict(pipe)
    dora = whole_lora(tmp_path / "dora", dora=True, parts=["prior"])
    simple = whole_lora(tmp_path / "simple", parts=["prior"])
    pipe.load_lora_weights(simple, adapter_name="keeps the layers")
    pipe.load_lora_weights(dora, adapter_name="mine")
    pipe.delete_adapters("mine")
    pipe.load_lora_weights(simple, adapter_name="mine")
    assert torch.equal(predict(pipe)["prior"], drawn_with(simple)["prior"])
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe)["prior"], plain["prior"])


def test_state_dicts_carry_their_scale(tmp_path):
    path, updates = by_hand(tmp_path, "comfyui")
    state_dict = StableCascadePipeline.lora_state_dict(path)
    assert f"prior.{Q}.lora_A.weight" in state_dict
    prior, other = tiny_prior(), tiny_prior()
    load_lora(prior, state_dict)
    load_lora(other, path)
    assert (
        lora_scales_of(prior) == lora_scales_of(other) == {name: own.scale for name, own in updates["prior"].items()}
    )
    assert read_lora(path).format == "comfyui"
    remove_lora(prior)
    assert not any(isinstance(module, nn.ModuleDict) for module in prior.modules())
    assert isinstance(tiny_decoder(), nn.Module)
