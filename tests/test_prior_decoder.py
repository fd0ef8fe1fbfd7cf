"""The two diffusion networks against the original, against diffusers, and against themselves run another way."""

import contextlib
import re
from itertools import pairwise

import pytest
import torch
from diffusers import StableCascadeUNet

from stable_cascade.files import to_original
from stable_cascade.files.loading import on_meta
from stable_cascade.models import PRESETS, StableCascadeControlNet, StableCascadeDecoder, StableCascadePrior, blocks
from stable_cascade.models.blocks import project
from tests.golden import assert_matches, entry, fill, manifest, tensors
from tests.golden_networks import BLOCKS, golden_inputs, golden_network

GOLDEN = [
    file["file"].split(".")[0]
    for file in manifest()["files"]
    if re.match(r"io_stage_[bc]_(?!controlnet)", file["file"])
]
PRIOR = {
    "conditioning_dim": 24,
    "block_out_channels": [16, 16],
    "num_attention_heads": [2, 2],
    "down_num_layers_per_block": [1, 2],
    "up_num_layers_per_block": [2, 1],
    "clip_text_in_channels": 12,
    "clip_text_pooled_in_channels": 12,
    "clip_image_in_channels": 10,
    "switch_level": [False],
    "dropout": 0.0,
}
DECODER = {
    "conditioning_dim": 24,
    "block_out_channels": [8, 12, 16],
    "num_attention_heads": [-1, 0, 4],
    "down_num_layers_per_block": [1, 1, 2],
    "up_num_layers_per_block": [2, 1, 1],
    "down_blocks_repeat_mappers": [1, 1, 1],
    "up_blocks_repeat_mappers": [3, 2, 1],
    "block_types_per_layer": [[BLOCKS[letter] for letter in level] for level in ("CT", "CT", "CTA")],
    "clip_text_pooled_in_channels": 12,
    "dropout": 0.0,
}


def randomised(model, seed=0):
    """Weights without zeros, so that every part of the network shows in its output."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith(("gamma", "beta")) else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) * scale)
    return model


def prior_inputs(size=(6, 4), batch=2, dtype=torch.float32, seed=1):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "sample": draw(batch, 16, *size),
        "timestep_ratio": torch.rand(batch, generator=rng, dtype=torch.float64).to(dtype),
        "clip_text_pooled": draw(batch, 1, 12),
        "clip_text": draw(batch, 5, 12),
        "clip_img": draw(batch, 1, 10),
    }


def decoder_inputs(size=(16, 24), batch=2, dtype=torch.float32, seed=1):
    inputs = prior_inputs((3, 2), batch, dtype, seed)
    sample = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return {
        "sample": sample,
        "timestep_ratio": inputs["timestep_ratio"],
        "clip_text_pooled": inputs["clip_text_pooled"],
        "effnet": inputs["sample"],
    }


def tiny(component, seed=0):
    model = StableCascadePrior(**PRIOR) if component == "prior" else StableCascadeDecoder(**DECODER)
    return randomised(model, seed).eval()


def tiny_inputs(component, **options):
    return prior_inputs(**options) if component == "prior" else decoder_inputs(**options)


def encoded(model, inputs):
    """The same call through `encode_conditions`."""
    passing = {"sample", "timestep_ratio", "sca", "crp", "control"}
    conditions = model.encode_conditions(**{key: value for key, value in inputs.items() if key not in passing})
    return {key: value for key, value in inputs.items() if key in passing} | {"conditions": conditions}


both = pytest.mark.parametrize("component", ["prior", "decoder"])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    model, component = golden_network(name)
    inputs, golden = golden_inputs(name), tensors(name)
    inputs["sample"].requires_grad_()
    out = model(**inputs).sample
    assert_matches(name, "out", out)
    if "out.loss" not in golden:
        return
    loss = (out - golden["in.target"]).square().mean()
    assert_matches(name, "out.loss", loss[None])
    loss.backward()
    gradients = to_original({key: parameter.grad for key, parameter in model.named_parameters()}, component)
    for key in golden:
        if key.startswith("grad."):
            assert_matches(
                name, key, inputs["sample"].grad if key == "grad.x" else gradients[key.removeprefix("grad.")]
            )


@pytest.mark.parametrize("name", ["io_stage_c_controlnet_effnet_c1", "io_stage_c_controlnet_simple"])
def test_golden_with_controlnet(name):
    model, _ = golden_network(name)
    info = entry(name)
    original = info["config"]["controlnet"]
    keys = {"c_in": "in_channels", "c_proj": "projection_channels", "proj_blocks": "blocks"}
    controlnet = StableCascadeControlNet(
        bottleneck=original["bottleneck_mode"], **{ours: original[theirs] for theirs, ours in keys.items()}
    ).eval()
    shapes = {key: value.shape for key, value in controlnet.state_dict().items()}
    controlnet.load_state_dict(fill(shapes, info["fill"]["controlnet"]))
    inputs = golden_inputs(name)
    with torch.no_grad():
        assert_matches(name, "out.without_cnet", model(**inputs).sample)
        assert_matches(name, "out.with_cnet", model(**inputs, control=controlnet(tensors(name)["in.image"])).sample)


@contextlib.contextmanager
def double_stays_double():
    """Diffusers resizes skips in float32 even where all else is float64."""
    original = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else original(x)
    try:
        yield
    finally:
        torch.Tensor.float = original


VARIANTS = {
    "prior": ("prior", {}, (6, 4)),
    "prior, odd size and sizes halved": ("prior", {"switch_level": [True], "block_out_channels": [16, 12]}, (7, 9)),
    "prior, repeats": ("prior", {"down_blocks_repeat_mappers": [2, 1], "up_blocks_repeat_mappers": [1, 3]}, (5, 3)),
    "prior, patches, odd embedding, wide kernel, mixed attention": (
        "prior",
        {"patch_size": 2, "timestep_ratio_embedding_dim": 7, "kernel_size": 5, "self_attn": [False, True]},
        (8, 6),
    ),
    "prior, one extra condition": ("prior", {"timestep_conditioning_type": ["sca"]}, (1, 1)),
    "decoder": ("decoder", {}, (16, 24)),
    "decoder, odd levels": ("decoder", {}, (22, 26)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_diffusers_in_double(variant):
    component, changed, size = VARIANTS[variant]
    cls, base = (StableCascadePrior, PRIOR) if component == "prior" else (StableCascadeDecoder, DECODER)
    ours = randomised(cls(**base | changed).double()).eval()
    theirs = StableCascadeUNet.from_config(ours.config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = tiny_inputs(component, size=size, dtype=torch.float64)
    inputs["sample"].requires_grad_()
    with double_stays_double():
        expected = theirs(**inputs).sample
    actual = ours(**inputs).sample
    assert (actual - expected).norm() <= 1e-12 * expected.norm()
    named = {**dict(ours.named_parameters()), "sample": inputs["sample"]}
    mine = dict(zip(named, torch.autograd.grad(actual.square().mean(), named.values()), strict=True))
    inputs_of_theirs = {**dict(theirs.named_parameters()), "sample": inputs["sample"]}
    reference = torch.autograd.grad(expected.square().mean(), inputs_of_theirs.values())
    scale = max(gradient.norm() for gradient in reference)
    for name, gradient in zip(inputs_of_theirs, reference, strict=True):
        assert (mine[name] - gradient).norm() <= 1e-12 * max(gradient.norm(), 1e-3 * scale), name


COUNTS = {
    ("prior", "3.6B"): (3_589_103_632, 1550),
    ("prior", "1B"): (1_030_785_040, 782),
    ("decoder", "3B"): (1_562_941_136, 1726),
    ("decoder", "700M"): (699_471_248, 970),
}


@pytest.mark.parametrize(("component", "version"), COUNTS)
def test_released_sizes(component, version):
    cls = StableCascadePrior if component == "prior" else StableCascadeDecoder
    model = on_meta(cls, PRESETS[component][version])
    state = model.state_dict()
    assert (sum(value.numel() for value in state.values()), len(state)) == COUNTS[component, version]
    theirs = on_meta(StableCascadeUNet, PRESETS[component][version]).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in theirs.items()}


def test_defaults_are_the_released_sizes():
    for cls, component, version in ((StableCascadePrior, "prior", "3.6B"), (StableCascadeDecoder, "decoder", "3B")):
        shapes = [
            {key: value.shape for key, value in on_meta(cls, config).state_dict().items()}
            for config in ({}, PRESETS[component][version])
        ]
        assert shapes[0] == shapes[1]


@both
def test_conditions_computed_once_equal_plain(component):
    model, inputs = tiny(component), tiny_inputs(component)
    with torch.no_grad():
        cached = encoded(model, inputs)
        for ratio in (0.9, 0.3):
            step = {"timestep_ratio": torch.full((2,), ratio)}
            expected = model(**inputs | step).sample
            torch.testing.assert_close(model(**cached | step).sample, expected, rtol=1e-5, atol=1e-6)
        larger = tiny_inputs(component, size=(8, 12))["sample"]
        expected = model(**inputs | {"sample": larger}).sample
        torch.testing.assert_close(model(**cached | {"sample": larger}).sample, expected, rtol=1e-5, atol=1e-6)


@both
def test_joined_projections_equal_separate_ones(component):
    model, inputs = tiny(component).double(), tiny_inputs(component, dtype=torch.float64)
    joined = model(**encoded(model, inputs)).sample
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: None)
    separate = model(**encoded(model, inputs)).sample
    assert not torch.equal(joined, separate)  # else the hooks did not switch anything
    torch.testing.assert_close(joined, separate, rtol=1e-12, atol=1e-12)


def test_project_joins_plain_layers_only():
    layers, calls = [torch.nn.Linear(4, 4) for _ in range(3)], []
    x = torch.randn(2, 5, 4)
    expected = [layer(x) for layer in layers]
    for actual, value in zip(project(layers, x), expected, strict=True):
        torch.testing.assert_close(actual, value)
    layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(project(layers, x)[1], expected[1])
    assert calls == [1]


@both
def test_large_projections_join_without_a_copy(component, monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_JOINED", 0)
    model, inputs = tiny(component), tiny_inputs(component)
    layer = next(module for module in model.modules() if isinstance(module, blocks.SDCascadeAttention))
    weights = [layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert blocks._joined(weights) is None
        expected = model(**inputs).sample
        model.fuse_qkv_projections()
        joined = blocks._joined(weights)
        assert joined.data_ptr() == layer.to_q.weight.data_ptr()
        assert torch.equal(joined, torch.cat(weights))
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-5, atol=1e-6)
    assert blocks._joined(weights) is None  # gradients go to the three parameters, not to a view
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        moved = model.double()(**{key: value.double() for key, value in inputs.items()}).sample
        torch.testing.assert_close(moved.float(), expected, rtol=1e-2, atol=1e-3)


@both
def test_adapters(component):
    from peft import LoraConfig

    model, inputs = tiny(component), tiny_inputs(component)
    before = model(**inputs).sample
    targets = ["to_q", "to_v", "to_out.0", "mapper_sca", "kv_mapper.1", "channelwise.4", "embedding.1", "clf.1"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=True))
    torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-5, atol=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    changed = model(**inputs).sample
    assert (changed - before).norm() > 0.1 * before.norm()
    changed.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in trained.values())
    with torch.no_grad():
        torch.testing.assert_close(model(**encoded(model, inputs)).sample, changed.detach(), rtol=1e-4, atol=1e-5)
    model.fuse_lora()
    torch.testing.assert_close(model(**inputs).sample, changed, rtol=1e-3, atol=1e-4)


@both
def test_weights_that_are_elsewhere_or_stored_otherwise(component):
    from accelerate import cpu_offload

    model, inputs = tiny(component), tiny_inputs(component)
    with torch.no_grad():
        expected = model(**inputs).sample
        offloaded = cpu_offload(tiny(component), torch.device("cpu"))
        assert next(offloaded.parameters()).is_meta
        torch.testing.assert_close(offloaded(**inputs).sample, expected, rtol=1e-4, atol=1e-4)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        rough = model(**{key: value.bfloat16() for key, value in inputs.items()}).sample
    assert rough.dtype == torch.bfloat16
    assert rough.isfinite().all()


@both
def test_checkpointing_changes_nothing(component):
    config = PRIOR if component == "prior" else DECODER
    model = randomised(type(tiny(component))(**config | {"dropout": 0.5})).train()
    inputs = tiny_inputs(component)

    def gradients():
        model.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model(**inputs).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("trained", [True, False])
def test_attention_dropout_acts_on_probabilities(trained):
    """With all values equal, a query's channels are the sum of its surviving probabilities: one number."""
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 40, 8, generator=rng).requires_grad_(trained)
    key, value = torch.randn(2, 3, 50, 8, generator=rng), torch.ones(2, 3, 50, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixed = blocks.attend(query, key, value, dropout=0.5)
    assert mixed.std(-1).max() < 1e-6
    assert mixed[..., 0].std() > 0.05
    assert mixed.mean().item() == pytest.approx(1, abs=0.05)
    whole = blocks.attend(query, key, value)
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_attention_kernels_agree():
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) for n in (5, 7, 7))
    expected = blocks.attend(query, key, value)
    assert (blocks.attend(query.requires_grad_(), key, value) - expected).abs().max() < 1e-14


def test_missing_conditions_are_zeros():
    model, inputs = tiny("prior"), prior_inputs()
    text, image = torch.zeros(2, 77, 12), torch.zeros(2, 1, 10)
    with torch.no_grad():
        for given in ({"clip_img": None}, {"clip_text": None}, {"clip_img": None, "clip_text": None}):
            zeros = {key: text if key == "clip_text" else image for key in given}
            assert torch.equal(model(**inputs | given).sample, model(**inputs | zeros).sample)
        without_image = model(**inputs | {"clip_img": None}).sample
        assert not torch.equal(
            without_image, model(**inputs | {"clip_img": None, "clip_text": -inputs["clip_text"]}).sample
        )


@both
def test_conditions_of_either_rank(component):
    model, inputs = tiny(component), tiny_inputs(component)
    flat = {key: inputs[key][:, 0] for key in ("clip_text_pooled", "clip_img") if key in inputs}
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, model(**inputs | flat).sample)
        sca = torch.tensor([0.2, 0.2])
        expected = model(**inputs, sca=sca).sample
        assert torch.equal(model(**inputs, sca=sca[:1]).sample, expected)
        assert torch.equal(model(**inputs, sca=sca[0]).sample, expected)
        assert not torch.equal(model(**inputs).sample, expected)
        apart = model(**inputs, sca=torch.tensor([0.2, 0.7])).sample
    torch.testing.assert_close(apart[0], expected[0])
    assert not torch.allclose(apart[1], expected[1])


def test_control_shorter_than_the_network_and_too_long():
    model, inputs = tiny("prior"), prior_inputs()
    residual = torch.ones(2, 16, 3, 3)
    with torch.no_grad():
        plain = model(**inputs).sample
        assert torch.equal(model(**inputs, control=[None] * 6).sample, plain)
        assert not torch.equal(model(**inputs, control=[None] * 5 + [residual]).sample, plain)
        with pytest.raises(ValueError, match="more residual blocks"):
            model(**inputs, control=[None] * 6 + [residual])


def test_a_silent_channel_has_a_finite_gradient():
    from stable_cascade.models.layers import GlobalResponseNorm

    norm = GlobalResponseNorm(6).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.gamma.normal_(generator=torch.Generator().manual_seed(1))
        norm.beta.normal_(generator=torch.Generator().manual_seed(2))
    torch.autograd.gradcheck(norm, (x.requires_grad_(),))
    silent = x.detach().clone()
    silent[..., 2] = 0
    norm(silent.requires_grad_()).sum().backward()
    assert silent.grad.isfinite().all()


@both
def test_initialisation_is_the_originals(component):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {"block_out_channels": [64, 64], "num_attention_heads": [2, 2], "conditioning_dim": 64}
        base = PRIOR
        if component == "decoder":
            layers = PRESETS["prior"]["3.6B"]["block_types_per_layer"]
            base = DECODER | {key: PRIOR[key] for key in ("down_num_layers_per_block", "up_num_layers_per_block")}
            base |= {
                "block_types_per_layer": layers,
                "down_blocks_repeat_mappers": [1, 1],
                "up_blocks_repeat_mappers": [1, 1],
            }
        cls = StableCascadePrior if component == "prior" else StableCascadeDecoder
        model = cls(**base | config)
    state = model.state_dict()
    xavier = {"down_blocks.1.0.channelwise.0": (64, 256), "down_blocks.0.2.kv_mapper.1": (64, 64)}
    xavier |= {"down_blocks.0.2.attention.to_out.0": (64, 64), "down_blocks.0.2.attention.to_k": (64, 192)}
    for key, fans in xavier.items():
        assert state[f"{key}.weight"].abs().max() == pytest.approx((6 / sum(fans)) ** 0.5, rel=0.02)
    scaled = state["up_blocks.0.3.channelwise.4.weight"].abs().max()
    assert scaled == pytest.approx((6 / 320) ** 0.5 * (1 / 3) ** 0.5, rel=0.02)
    patches = 16 if component == "prior" else 4 * 4
    assert state["embedding.1.weight"].abs().max() == pytest.approx(0.02 * (6 / (64 + patches)) ** 0.5, rel=0.02)
    normal = [key for key in state if re.match(r"clip_.*mapper.weight|(effnet|pixels)_mapper.[02].weight", key)]
    assert len(normal) == (3 if component == "prior" else 5)
    assert all(state[key].std() == pytest.approx(0.02, rel=0.1) for key in normal)
    zero = [key for key in state if re.search(r"bias$|gamma$|beta$|\.mapper(_\w+)?\.weight$|^clf\.1\.weight$", key)]
    zero = [key for key in zero if not re.match(r"up_upscalers.*bias", key)]  # a transposed convolution keeps torch's
    assert all(not state[key].any() for key in zero)
    assert "down_blocks.0.1.mapper_sca.weight" in zero


@both
def test_autocast_stays_close_and_trains(component):
    model, inputs = tiny(component).train(), tiny_inputs(component)
    expected = model(**inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**inputs).sample
    assert (rough.float() - expected).norm() < 0.03 * expected.norm()
    rough.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


REFUSED = [
    ("prior", {"down_num_layers_per_block": [1]}, "down_num_layers_per_block has 1 entries, block_out_channels has 2"),
    ("prior", {"switch_level": [False, False]}, "switch_level .* must have 1 entries"),
    ("prior", {"block_types_per_layer": [["SDCascadeResBlok"]] * 2}, "'SDCascadeResBlok'; known: SDCascadeResBlock"),
    ("prior", {"num_attention_heads": [-1, 2]}, "num_attention_heads -1 does not divide the 16 channels"),
    ("prior", {"num_attention_heads": [3, 2]}, "num_attention_heads 3 does not divide the 16 channels"),
    ("prior", {"effnet_in_channels": 16}, "effnet_in_channels is 16: only StableCascadeDecoder"),
    ("decoder", {"clip_text_in_channels": 16}, "clip_text_in_channels is 16: only StableCascadePrior"),
]


@pytest.mark.parametrize(("component", "changed", "message"), REFUSED)
def test_refused_configs(component, changed, message):
    cls, base = (StableCascadePrior, PRIOR) if component == "prior" else (StableCascadeDecoder, DECODER)
    with pytest.raises(ValueError, match=message):
        cls(**base | changed)


def test_refused_calls():
    inputs = decoder_inputs(size=(16, 15))
    with pytest.raises(ValueError, match="16 x 15; both sides must be multiples of patch_size 2"):
        tiny("decoder")(**inputs)
    with pytest.raises(ValueError, match="clip_text_pooled is missing"):
        tiny("prior")(inputs["sample"], inputs["timestep_ratio"])


@both
def test_returns_a_tuple_on_request(component):
    model, inputs = tiny(component), tiny_inputs(component)
    (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, model(**inputs).sample)


@both
def test_channels_stay_last(component):
    """No block copies the image to move its channels: every block gets and returns contiguous (B, H, W, C)."""
    model, seen = tiny(component), []
    for levels in (model.down_blocks, model.up_blocks):
        for block in (block for level in levels for block in level):
            block.register_forward_hook(
                lambda _, given, out: seen.append(given[0].is_contiguous() and out.is_contiguous())
            )
    with torch.no_grad():
        model(**tiny_inputs(component))
    assert len(seen) > 10
    assert all(seen)


@pytest.mark.slow
@both
def test_compiles(component):
    """Whole without a graph break, and block by block; compiled sines of large angles round differently."""
    model, inputs = tiny(component), tiny_inputs(component)
    expected = model(**inputs).sample
    whole = torch.compile(model, fullgraph=True)
    out = whole(**inputs).sample
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        once = whole(**encoded(model, inputs)).sample
        assert (once - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.slow
def test_compiles_block_by_block():
    model, inputs = tiny("prior"), tiny_inputs("prior")
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True)
    assert (model(**inputs).sample - expected).norm() <= 1e-5 * expected.norm()


def test_levels_pair_up():
    """The deepest level comes first on the way up."""
    model = tiny("decoder")
    widths = [blocks[0].depthwise.out_channels for blocks in model.up_blocks]
    assert widths == [16, 12, 8]
    assert all(a > b for a, b in pairwise(widths))
