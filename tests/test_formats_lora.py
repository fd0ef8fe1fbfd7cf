"""LoRA files of every tool: each acts as merging it by hand, is told by its keys, and goes into the other formats."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_cascade import StableCascadePipeline
from stable_cascade.adapters import add_learned_tokens, add_lora, load_lora, lora_state_dict, remove_lora, save_lora
from stable_cascade.adapters.conversion import convert_lora, preset_layers
from stable_cascade.adapters.injection import layer_shapes
from stable_cascade.files import lora as files
from tests.golden import FOLDER, assert_matches
from tests.lora_files import PRIOR_LAYERS, TEXT_LAYERS, WRITTEN, Update, merged_by_hand, updates_for
from tests.test_lora import golden_inputs, golden_prior, randomise
from tests.tiny_cascade import PRIOR, tiny_decoder, tiny_parts, tiny_prior, tiny_text_encoder

Q = "down_blocks.0.2.attention.to_q"


@pytest.fixture(scope="module")
def networks():
    """A prior and a text encoder in float64, as they are."""
    return tiny_prior().double(), tiny_text_encoder().double()


def prior_output(prior) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = {"sample": (2, 16, 3, 4), "clip_text_pooled": (2, 1, 32), "clip_text": (2, 5, 32), "clip_img": (2, 1, 24)}
    values = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    with torch.no_grad():
        return prior(**values, timestep_ratio=torch.tensor([0.3, 0.8])).sample


def text_output(encoder) -> torch.Tensor:
    with torch.no_grad():
        found = encoder(torch.tensor([[3, 5, 7, 9]]))
    return torch.cat([found.last_hidden_state.flatten(), found.text_embeds.flatten()])


OUTPUTS = {"prior": prior_output, "text_encoder": text_output}


def written(path, tool, prior, text) -> tuple[str, str]:
    """The file of a tool, and what its format is to be called."""
    build, name, _ = WRITTEN[tool]
    tensors, header = build(prior, text)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, header)
    return str(path), name


def gap(model, expected, component, path) -> float:
    """How far the network with the LoRA is from the one merged by hand; the network is left as it was."""
    run = OUTPUTS[component]
    before = run(model)
    load_lora(model, path)
    found = run(model)
    remove_lora(model)
    wanted = run(expected)
    assert (wanted - before).abs().max() > 1e-3
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("tool", WRITTEN)
def test_a_file_by_the_tools_rules_acts_as_merged_by_hand(tmp_path, networks, tool):
    prior, encoder = networks
    parts = {"prior": updates_for(prior, PRIOR_LAYERS), "text_encoder": updates_for(encoder, TEXT_LAYERS)}
    if not WRITTEN[tool][2]:
        parts["text_encoder"] = {}
    path, name = written(tmp_path / "lora.safetensors", tool, *parts.values())
    with safe_open(path, "pt") as file:
        assert files.detect(file.keys(), file.metadata()) == name
    assert gap(prior, merged_by_hand(prior, parts["prior"]), "prior", path) < 1e-6
    if parts["text_encoder"]:
        assert gap(encoder, merged_by_hand(encoder, parts["text_encoder"]), "text_encoder", path) < 1e-6


def test_names_are_the_ones_the_tools_write():
    """The rules of tests.lora_files, held against keys copied from the tools."""
    update = {Q: Update(torch.zeros(2, 16), torch.zeros(16, 2), 1.0)}
    keys = {
        "kohya": "lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight",
        "onetrainer": "lora_prior_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight",
        "onetrainer_diffusers": "prior.down_blocks.0.2.attention.to_q.lora_A.weight",
        "onetrainer_kohya": "lora_unet_down_blocks_0_2_attention_attn_in_proj_0.lora_down.weight",
        "onetrainer_original": "down_blocks.0.2.attention.attn.in_proj.0.lora_A.weight",
        "onetrainer_comfyui": "diffusion_model.down_blocks.0.2.attention.attn.in_proj.0.lora_A.weight",
        "onetrainer_internal": "prior.down_blocks.0.2.attention.to_q.lora_down.weight",
        "peft": "prior.down_blocks.0.2.attention.to_q.lora_A.weight",
        "comfyui": "diffusion_model.down_blocks.0.2.attention.attn.to_q.lora_down.weight",
    }
    for tool, key in keys.items():
        assert key in WRITTEN[tool][0](update, {})[0], tool
    text = {"text_model.encoder.layers.0.self_attn.q_proj": update[Q]}
    assert "lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in WRITTEN["onetrainer"][0]({}, text)[0]


# --- DoRA, alpha, depthwise


DORA = [("peft", "outputs"), ("onetrainer", "inputs"), ("onetrainer", "outputs"), ("onetrainer_diffusers", "inputs"),
        ("onetrainer_diffusers", "outputs"), ("kohya", "outputs"), ("comfyui", "inputs")]  # fmt: skip


@pytest.mark.parametrize("tool, dora", DORA)
def test_dora_acts_as_merged_by_hand(tmp_path, networks, tool, dora):
    prior, encoder = networks
    parts = [
        updates_for(model, layers, dora=dora) for model, layers in ((prior, PRIOR_LAYERS), (encoder, TEXT_LAYERS))
    ]
    path, _ = written(tmp_path / "lora.safetensors", tool, *parts)
    assert gap(prior, merged_by_hand(prior, parts[0]), "prior", path) < 1e-6
    assert gap(encoder, merged_by_hand(encoder, parts[1]), "text_encoder", path) < 1e-6
    if dora == "inputs":
        load_lora(prior, path)
        with pytest.raises(ValueError, match="is a DoRA of the inputs, which PEFT's files cannot hold"):
            lora_state_dict(prior)
        remove_lora(prior)


def test_a_file_without_alpha_is_scaled_by_one(tmp_path, networks):
    prior, _ = networks
    updates = updates_for(prior, [Q])
    path, _ = written(tmp_path / "lora.safetensors", "kohya", updates, {})
    tensors = {key: value for key, value in load_file(path).items() if not key.endswith(".alpha")}
    save_file(tensors, path)
    updates[Q].alpha = len(updates[Q].down)
    assert gap(prior, merged_by_hand(prior, updates), "prior", path) < 1e-6


def test_onetrainers_update_of_a_depthwise_convolution(tmp_path, networks):
    """Its second factor has one channel, which is added to all of them; that is what its default filter trains."""
    prior, _ = networks
    name = "down_blocks.0.0.depthwise"
    layer = prior.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, layer.in_channels, 3, 3, generator=generator)
    up = torch.randn(1, 2, 1, 1, generator=generator)
    flat = "lora_prior_unet_down_blocks_0_0_depthwise"
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    x = torch.randn(1, layer.in_channels, 4, 5, generator=generator).double()
    change = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down.double(), padding=1), up.double())
    expected = layer(x) + 0.5 * change.expand(-1, layer.in_channels, -1, -1)
    load_lora(prior, tmp_path / "lora.safetensors")
    assert torch.allclose(prior.get_submodule(name)(x), expected, atol=1e-6)
    remove_lora(prior)
    with pytest.raises(ValueError, match=r"depthwise .* in OneTrainer's way, which no peft file can hold"):
        convert_lora(tmp_path / "lora.safetensors", tmp_path / "peft", "peft", base=prior)


# --- from one format to another


def trained(tmp_path, *, alpha=4, dora=False, text=True, dtype=torch.float32, filters=(".attn",)):
    """A LoRA of ours in PEFT's layout, its factors random, for the tiny prior and text encoder."""
    prior, encoder = tiny_prior(), tiny_text_encoder()
    add_lora(prior, module_filters=list(filters), rank=4, lora_alpha=alpha, use_dora=dora)
    randomise(prior)
    if text:
        add_lora(encoder, module_filters=["q_proj", "fc1"], rank=2, lora_alpha=alpha, use_dora=dora)
        randomise(encoder, seed=4)
    save_lora(tmp_path / "trained", prior=prior, text_encoder=encoder if text else None)
    file = tmp_path / "trained" / files.WEIGHT_NAME
    if dtype != torch.float32:
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file, header)
    return file


def contents(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def deltas(path, base=None) -> dict[str, torch.Tensor]:
    """Every layer's update, `scale * up @ down`, in float64."""
    lora, found = files.read(path), {}
    shapes = {"prior": layer_shapes(tiny_prior()), "text_encoder": layer_shapes(tiny_text_encoder())}
    for component in lora.parts:
        part = lora.part(component, shapes[component])
        for layer in part.layers:
            down, up = (part.tensors[f"{layer}.lora_{factor}.weight"].double().flatten(1) for factor in "AB")
            found[f"{component}.{layer}"] = part.scales[layer] * up @ down
    return found


@pytest.fixture(scope="module")
def base():
    class Parts:
        prior, text_encoder, decoder = tiny_prior(), tiny_text_encoder(), tiny_decoder()

    return Parts()


@pytest.mark.parametrize("alpha, dora", [(4, False), (3.3, True)])
@pytest.mark.parametrize("format", ["kohya", "onetrainer", "comfyui", "onetrainer_diffusers"])
def test_there_and_back(tmp_path, base, format, alpha, dora):
    """Bit by bit where alphas are kept; where alpha goes into the values, bit by bit for powers of two."""
    source = trained(tmp_path, alpha=alpha, dora=dora)
    there = convert_lora(source, tmp_path / "there.safetensors", format, base=base)
    assert there.format == format
    assert there.layers == {"prior": 16, "text_encoder": 4}
    back = convert_lora(tmp_path / "there.safetensors", tmp_path / "back", "peft", base=base)
    assert back.exactness == "bitwise"
    before, header = contents(source)
    after, header_after = contents(tmp_path / "back" / files.WEIGHT_NAME)
    assert set(before) == set(after)
    if format == "onetrainer_diffusers":
        assert there.exactness == "exact"
        assert bool(there.error) == (alpha != 4)
        expected, found = deltas(source), deltas(tmp_path / "back" / files.WEIGHT_NAME)
        assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in expected.items())
        return
    assert there.exactness == "bitwise"
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert json.loads(header["lora_adapter_metadata"]) == json.loads(header_after["lora_adapter_metadata"])


def test_files_go_from_tool_to_tool(tmp_path, networks):
    """Once around all of them: what comes out still acts as the update by hand."""
    prior, encoder = networks
    parts = updates_for(prior, PRIOR_LAYERS), updates_for(encoder, TEXT_LAYERS)
    path, _ = written(tmp_path / "0.safetensors", "onetrainer", *parts)

    class Base:
        pass

    Base.prior, Base.text_encoder = prior, encoder
    for number, format in enumerate(["comfyui", "peft", "kohya", "onetrainer_diffusers", "onetrainer"]):
        report = convert_lora(path, tmp_path / f"{number + 1}.safetensors", format, base=Base)
        path = tmp_path / f"{number + 1}.safetensors"
        assert report.files == [str(path)]
        assert files.detect(*contents(path)) in (format, "peft")
    assert gap(prior, merged_by_hand(prior, parts[0]), "prior", path) < 1e-6
    assert gap(encoder, merged_by_hand(encoder, parts[1]), "text_encoder", path) < 1e-6


def golden_weights(tmp_path):
    """The golden original without its token rows, which need a text encoder to mean something."""
    weights, _ = contents(FOLDER / "ckpt_lora.safetensors")
    path = tmp_path / "golden.safetensors"
    save_file({key: value for key, value in weights.items() if key.startswith("weights.")}, path)
    return path


@pytest.mark.parametrize("format", ["peft", "kohya", "onetrainer_diffusers", "original"])
def test_the_golden_original_in_every_format(tmp_path, format):
    prior = golden_prior()
    report = convert_lora(golden_weights(tmp_path), tmp_path / "x.safetensors", format, base=prior)
    assert report.layers == {"prior": 24}
    load_lora(prior, tmp_path / "x.safetensors")
    assert_matches("io_lora", "out", prior(**golden_inputs()).sample)


def test_the_golden_original_comes_back_bit_by_bit(tmp_path):
    prior = golden_prior()
    original = golden_weights(tmp_path)
    weights = load_file(original)
    for format in ("peft", "kohya", "onetrainer", "comfyui"):
        convert_lora(original, tmp_path / f"{format}.safetensors", format, base=prior)
        report = convert_lora(
            tmp_path / f"{format}.safetensors", tmp_path / "again.safetensors", "original", base=prior
        )
        assert report.exactness == "bitwise"
        again, header = contents(tmp_path / "again.safetensors")
        assert set(again) == set(weights)
        assert all(torch.equal(value, again[key]) for key, value in weights.items())
        assert header["module_filters"] == ".attn"


# --- to the original's format


@pytest.mark.parametrize("alpha", [1, 4, 3.3])
def test_split_q_k_v_become_one_update_of_rank_3r(tmp_path, base, alpha):
    source = trained(tmp_path, alpha=alpha, text=False)
    report = convert_lora(source, tmp_path / "original.safetensors", "original", base=base)
    assert report.exactness == "exact"
    assert "Split q, k and v became one update each, exactly, through rank 4 + 4 + 4." in report.notes
    tensors, header = contents(tmp_path / "original.safetensors")
    assert header["module_filters"] == ".attn"
    assert tensors["weights.0.lora_down"].shape == (4, 16)  # attn.out_proj
    assert tensors["weights.1.lora_down"].shape == (12, 16)
    assert tensors["weights.1.lora_up"].shape == (48, 12)
    expected, found = deltas(source), deltas(tmp_path / "original.safetensors")
    assert set(expected) == set(found)
    assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in expected.items())
    # By the original's own rule: the weight of row group q is up @ down / rank.
    q = (tensors["weights.1.lora_up"].double() @ tensors["weights.1.lora_down"].double())[:16] / 12
    assert torch.allclose(q, expected[f"prior.{Q}"], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_loses_nothing(tmp_path, base, dtype):
    """12 is no power of two and would round visibly; the rank is padded to 16."""
    source = trained(tmp_path, text=False, dtype=dtype)
    report = convert_lora(source, tmp_path / "original.safetensors", "original", base=base)
    assert (report.exactness, report.error) == ("exact", 0.0)
    tensors, _ = contents(tmp_path / "original.safetensors")
    assert {value.dtype for value in tensors.values()} == {dtype}
    assert tensors["weights.1.lora_down"].shape == (16, 16)
    expected, found = deltas(source), deltas(tmp_path / "original.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for format in ("kohya", "onetrainer", "comfyui"):
        convert_lora(source, tmp_path / "x.safetensors", format, base=base)
        values = [value for key, value in contents(tmp_path / "x.safetensors")[0].items() if not key.endswith("alpha")]
        assert {value.dtype for value in values} == {dtype}


def test_what_a_format_rounds_is_said(tmp_path, base):
    source = trained(tmp_path, alpha=3.3, text=False, dtype=torch.bfloat16)
    report = convert_lora(source, tmp_path / "x.safetensors", "onetrainer_diffusers", base=base)
    assert report.exactness == "rounded"
    assert 1e-3 < report.error < 4e-3
    assert "bfloat16" in str(report)


def test_a_scale_that_does_not_fit_into_the_values_is_refused(tmp_path, base):
    source = trained(tmp_path, alpha=64, text=False, dtype=torch.float16)
    tensors, header = contents(source)
    save_file({key: value * 1e5 if "lora_B" in key else value for key, value in tensors.items()}, source, header)
    with pytest.raises(ValueError, match="times the scale, 16, are beyond float16; write a format that keeps alpha"):
        convert_lora(source, tmp_path / "x.safetensors", "onetrainer_diffusers", base=base)


def test_filters_are_found_and_kept(tmp_path, base):
    source = trained(tmp_path, text=False, filters=["up_blocks.0.2.attention", "clip_txt_mapper", "kv_mapper"])
    with pytest.raises(ValueError, match="no module_filters choose alone"):
        convert_lora(source, tmp_path / "x.safetensors", "original", base=base)
    source = trained(tmp_path, text=False, filters=["clf", "kv_mapper"])
    convert_lora(source, tmp_path / "x.safetensors", "original", base=base)
    _, header = contents(tmp_path / "x.safetensors")
    assert set(header["module_filters"].split()) == {"clf", ".kv_mapper"}
    other = tiny_prior()
    assert len(load_lora(other, tmp_path / "x.safetensors")) == 5
    with pytest.raises(ValueError, match=r"unlike the layers that module_filters \['.attn'\] choose"):
        convert_lora(source, tmp_path / "y.safetensors", "original", base=base, module_filters=[".attn"])


def test_part_of_q_k_v_leaves_zero_rows(tmp_path, base):
    prior = tiny_prior()
    add_lora(prior, module_filters=[".attn"], module_excludes=["to_k"], rank=4)
    randomise(prior)
    save_lora(tmp_path, prior=prior)
    report = convert_lora(tmp_path, tmp_path / "x.safetensors", "original", base=base)
    assert any("no k in down_blocks.0.2.attention.attn.in_proj_weight" in note for note in report.notes)
    expected, found = deltas(tmp_path / files.WEIGHT_NAME), deltas(tmp_path / "x.safetensors")
    assert all(
        torch.allclose(found[name], expected.get(name, torch.zeros(16, 16).double()), atol=1e-9) for name in found
    )


# --- which network


@pytest.mark.parametrize("version, width", [("1B", 1536), ("3.6B", 2048)])
def test_released_sizes_are_told_by_the_file(tmp_path, version, width):
    """Flattened names and their network's width are enough; no weight is read."""
    tensors = {}
    for name in ("down_blocks_0_2_attention_attn_to_q", "up_blocks_1_5_attention_attn_out_proj"):
        start = f"lora_prior_unet_{name}"
        tensors |= {f"{start}.lora_down.weight": torch.ones(1, width), f"{start}.lora_up.weight": torch.ones(width, 1)}
    start = "lora_prior_te_text_model_encoder_layers_31_mlp_fc1"
    tensors |= {f"{start}.lora_down.weight": torch.ones(1, 1280), f"{start}.lora_up.weight": torch.ones(5120, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    convert_lora(tmp_path / "x.safetensors", tmp_path / "peft", "peft")
    keys = set(contents(tmp_path / "peft" / files.WEIGHT_NAME)[0])
    assert "prior.up_blocks.1.5.attention.to_out.0.lora_A.weight" in keys
    assert "text_encoder.text_model.encoder.layers.31.mlp.fc1.lora_B.weight" in keys
    assert preset_layers("prior", version)["down_blocks.0.2.attention.to_q"] == (width, width)


def test_networks_of_no_known_size_need_base_only_for_flat_names(tmp_path):
    source = trained(tmp_path)
    report = convert_lora(source, tmp_path / "x.safetensors", "comfyui")
    assert report.layers == {"prior": 16, "text_encoder": 4}
    assert all(torch.equal(value, deltas(source)[name]) for name, value in deltas(tmp_path / "x.safetensors").items())
    convert_lora(source, tmp_path / "flat.safetensors", "kohya")
    with pytest.raises(ValueError, match="of a known size; give base") as caught:
        convert_lora(tmp_path / "flat.safetensors", tmp_path / "y", "peft")
    assert "\n" not in str(caught.value)


# --- learned tokens


def with_tokens(folder):
    parts = tiny_parts()
    add_learned_tokens(parts["tokenizer"], parts["text_encoder"], [["[fox]", "^dog</w>"]])
    add_lora(parts["prior"], module_filters=[".attn"], rank=2)
    randomise(parts["prior"])
    row = parts["text_encoder"].get_input_embeddings().rows
    with torch.no_grad():
        row.add_(torch.randn(row.shape, generator=torch.Generator().manual_seed(0)))
    save_lora(folder, prior=parts["prior"], text_encoder=parts["text_encoder"])
    return row.detach().clone()[0]


def row_in(pipeline, token):
    index = pipeline.tokenizer.get_vocab()[token]
    return pipeline.text_encoder.get_input_embeddings().weight[index]


@pytest.mark.parametrize("format", ["kohya", "onetrainer", "onetrainer_diffusers", "comfyui", "original"])
def test_tokens_go_where_each_tool_has_them(tmp_path, format):
    row = with_tokens(tmp_path / "mine")
    base = StableCascadePipeline(**tiny_parts())
    entries = [["[fox]", "^dog</w>"]]
    target = tmp_path / "x.safetensors"
    report = convert_lora(tmp_path / "mine", target, format, base=base, train_tokens=entries)
    keys = set(contents(target)[0])
    if format == "original":
        assert contents(target)[0]["embeddings.indices"].tolist() == [len(base.tokenizer)]
        start = row_in(base, "dog</w>")
        assert torch.allclose(contents(target)[0]["embeddings.embeddings"][0], row - start, atol=1e-6)
    elif format.startswith("onetrainer"):
        assert torch.equal(contents(target)[0]["bundle_emb.[fox].clip_g"], row[None])
    else:
        own = tmp_path / "x_embeddings" / "fox.safetensors"
        assert report.files == [str(target), str(own)]
        assert torch.equal(load_file(own)["clip_g"], row[None])
        assert not any("emb" in key for key in keys if "embedding" not in key)

    pipeline = StableCascadePipeline(**tiny_parts())
    pipeline.load_lora_weights(target, train_tokens=entries if format == "original" else None)
    assert torch.allclose(row_in(pipeline, "[fox]"), row, atol=1e-6)

    convert_lora(target, tmp_path / "again", "peft", base=base, train_tokens=entries)
    again = load_file(tmp_path / "again" / "learned_embeds.safetensors")["[fox]"]
    assert torch.allclose(again, row, atol=1e-6)
    assert format == "original" or torch.equal(again, row)


def test_onetrainers_tokens_that_act_elsewhere_are_refused_but_kept(tmp_path):
    tensors = WRITTEN["onetrainer"][0](updates_for(tiny_prior(), [Q]), {})[0]
    rows = {"bundle_emb.<fox>.clip_g": torch.zeros(3, 32), "bundle_emb.<owl>.clip_g_out": torch.zeros(1, 32)}
    save_file(tensors | rows, tmp_path / "x.safetensors")
    pipeline = StableCascadePipeline(**tiny_parts())
    with pytest.raises(ValueError, match="output embedding '<owl>'"):
        pipeline.load_lora_weights(tmp_path / "x.safetensors")
    assert pipeline.get_list_adapters() == {}
    convert_lora(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "onetrainer_diffusers", base=tiny_prior())
    assert rows.keys() <= contents(tmp_path / "y.safetensors")[0].keys()
    with pytest.raises(ValueError, match="output embedding '<owl>', which only OneTrainer knows"):
        convert_lora(tmp_path / "x.safetensors", tmp_path / "z.safetensors", "comfyui", base=tiny_prior())
    del rows["bundle_emb.<owl>.clip_g_out"]
    save_file(tensors | rows, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="3 rows for the token '<fox>'"):
        pipeline.load_lora_weights(tmp_path / "x.safetensors")


# --- refusals


def pair(name, width=16, rank=2, down="lora_down", up="lora_up"):
    return {f"{name}.{down}.weight": torch.ones(rank, width), f"{name}.{up}.weight": torch.ones(width, rank)}


FLAT = "lora_unet_down_blocks_0_2_attention_attn_to_q"
UNREADABLE = {
    "is a LoKr adapter": {f"{FLAT}.lokr_w1": torch.ones(2, 2), f"{FLAT}.lokr_w2": torch.ones(8, 8)},
    "is a LoHa adapter": {f"{FLAT}.hada_w1_a": torch.ones(2, 2)},
    "is an OFT adapter": {f"{FLAT}.oft_R.weight": torch.ones(2, 2)},
    "is a GLoRA adapter": {f"{FLAT}.a1.weight": torch.ones(2, 2)},
    "Tucker": pair(FLAT) | {f"{FLAT}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
    "weight differences": {f"{FLAT}.diff": torch.ones(16, 16)},
    "give it to load_textual_inversion": {"clip_g": torch.ones(1, 32)},
    "lacks; nearest": pair("lora_unet_down_blocks_0_2_attention_attn_to_x"),
    "alpha' that are not finite": pair(FLAT) | {f"{FLAT}.alpha": torch.tensor(float("nan"))},
    "alpha' 0.0; one finite": pair(FLAT) | {f"{FLAT}.alpha": torch.tensor(0.0)},
    "alpha' of shape": pair(FLAT) | {f"{FLAT}.alpha": torch.ones(3)},
    "has an alpha for": pair(FLAT) | {"lora_unet_clf_1.alpha": torch.tensor(1.0)},
    "lacks its lora_B": {f"{FLAT}.lora_down.weight": torch.ones(2, 16)},
    "lacks its first factor": pair(FLAT) | {"lora_unet_clf_1.dora_scale": torch.ones(16, 1)},
    "has factors of": {f"{FLAT}.lora_down.weight": torch.ones(2, 16), f"{FLAT}.lora_up.weight": torch.ones(16, 3)},
    "floating-point values": {key: value.to(torch.int8) for key, value in pair(FLAT).items()},
    "has two tensors": pair(FLAT) | pair("lora_prior_unet_down_blocks_0_2_attention_attn_to_q"),
    "twice": pair(FLAT) | pair("lora_unet_down_blocks_0_2_attention_attn_in_proj_0"),
    "belongs to no layer": pair(FLAT) | {"something.else": torch.ones(1)},
    "DoRA magnitude of": pair(FLAT) | {f"{FLAT}.dora_scale": torch.ones(5, 1)},
    "PEFT needs all": pair(FLAT) | pair("lora_unet_clf_1") | {f"{FLAT}.dora_scale": torch.ones(16, 1)},
    "do not divide into q, k and v": pair("diffusion_model.down_blocks.0.2.attention.attn.in_proj"),
    "numbered without gaps": {"weights.0.lora_up": torch.ones(16, 2), "weights.2.lora_down": torch.ones(2, 16)},
    "among numbered weights": {"weights.0.lora_up": torch.ones(16, 2), "x": torch.ones(1)},
    "as the original does, one value for all taps": {
        f"weights.{i}.lora_{part}": torch.ones(*shape)
        for i in range(4) for part, shape in (("up", (16, 2)), ("down", (2, 1)))
    },
}  # fmt: skip


@pytest.mark.parametrize("message", UNREADABLE)
def test_what_is_no_lora_or_does_not_fit_is_refused_in_one_line(tmp_path, networks, message):
    prior, _ = networks
    save_file(UNREADABLE[message], tmp_path / "bad.safetensors")
    filters = [".depthwise"] if "taps" in message else None
    with pytest.raises(ValueError) as caught:
        load_lora(prior, tmp_path / "bad.safetensors", module_filters=filters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "bad.safetensors" in str(caught.value)
    assert not hasattr(prior, "peft_config")


HEADERS = [
    {"prior.lora_alpha": "4"}, {"prior.lora_alpha": 0}, {"prior.lora_dropout": 2}, {"prior.use_rslora": "yes"},
    {"prior.alpha_pattern": {"(a+)+$": 2}}, {"prior.alpha_pattern": {"(d|d)(o|o)": 2}},
    {"prior.alpha_pattern": {"a*b*c*d*": 2}},
]  # fmt: skip


@pytest.mark.parametrize("config", HEADERS)
def test_a_senseless_config_in_the_header_is_refused(tmp_path, networks, config):
    save_file(pair(f"prior.{Q}", down="lora_A", up="lora_B"), tmp_path / "x.safetensors",
              {"lora_adapter_metadata": json.dumps(config)})  # fmt: skip
    with pytest.raises(ValueError, match="in its header; take lora_adapter_metadata out of it"):
        load_lora(networks[0], tmp_path / "x.safetensors")


def unwritable():
    yield "none of peft, original", "peft_2", {}, {}
    yield "nearest: 'onetrainer", "onetrainr", {}, {}
    yield "does not end in .safetensors", "kohya", {"target": "folder"}, {}
    yield "is a DoRA, which no original file can hold", "original", {}, {"dora": True, "text": False}
    yield "a part for the text_encoder, which no original file can hold", "original", {}, {}
    yield "has no tokenizer and text_encoder", "original", {"tokens": True, "train_tokens": [["[owl]", None]]}, {}


@pytest.mark.parametrize("message, format, how, what", list(unwritable()))
def test_what_a_format_cannot_hold_is_refused(tmp_path, base, message, format, how, what):
    source = trained(tmp_path, **what)
    if "tokens" in how:
        save_file({"[fox]": torch.ones(32)}, source.parent / "learned_embeds.safetensors")
    target = tmp_path / how.get("target", "x.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        convert_lora(source, target, format, base=base, train_tokens=how.get("train_tokens"))
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_folder_with_the_targets_name_stays(tmp_path, base):
    kept = tmp_path / "x.safetensors" / "kept.txt"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(ValueError, match=r"target '.*x\.safetensors' is a folder and is not replaced"):
        convert_lora(trained(tmp_path), kept.parent, "kohya", base=base)
    assert kept.is_file()


def test_a_part_for_stage_b_goes_into_peft_alone(tmp_path, base):
    decoder = tiny_decoder()
    add_lora(decoder, module_filters=[".attn"], rank=2)
    tensors = {f"decoder.{key}": value for key, value in lora_state_dict(decoder).items()}
    save_file(tensors, tmp_path / "b.safetensors")
    assert convert_lora(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "peft", base=base).layers == {
        "decoder": 8
    }
    with pytest.raises(ValueError, match="a part for the decoder, which no kohya file can hold; write peft instead"):
        convert_lora(tmp_path / "b.safetensors", tmp_path / "d.safetensors", "kohya", base=base)


def test_tokens_change_without_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give base, the pipeline it was trained for, and train_tokens"):
        convert_lora(FOLDER / "ckpt_lora.safetensors", tmp_path / "x.safetensors", "peft")


def test_other_entries_of_the_header_go_along(tmp_path, base):
    source = trained(tmp_path, text=False)
    tensors, header = contents(source)
    save_file(tensors, source, {**header, "ss_training_comment": "fox", "sshs_model_hash": "1234"})
    report = convert_lora(source, tmp_path / "x.safetensors", "kohya", base=base, metadata={"by": "me"})
    found = contents(tmp_path / "x.safetensors")[1]
    assert (found["ss_training_comment"], found["by"], found["ss_network_dim"]) == ("fox", "me", "4")
    assert "sshs_model_hash" not in found
    assert any("sshs_model_hash" in note for note in report.notes)


assert PRIOR["block_out_channels"] == [16, 16]  # the widths that the pairs above are made for
