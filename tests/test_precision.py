"""bfloat16, float16 and weights in few bits against float32: what they cost in dB, and that nothing becomes NaN."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from stable_cascade.models.blocks import attend
from stable_cascade.models.layers import GlobalResponseNorm
from tests.golden_networks import golden_network
from tests.test_half_precision import inputs_in, relative_error

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "embedded" / "evaluate_precision.py"
MOST_LOST = {"bfloat16": 1.0, "float16": 2.0, "int8": 1.0, "int4": 2.0}
"""dB of PSNR against float32: for the halves what is promised, for few bits what was found and some more."""
LEAST_ALIKE = {"bfloat16": 35, "float16": 45, "int8": 35, "int4": 18}
"""dB between a form's images and float32's, from the same seeds."""
EXTREMES = ["", "apple " * 400, "🍎" * 50, "(red apple:10)"]


@pytest.fixture(scope="module")
def precision():
    """The example that prints the table, as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("evaluate_precision", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def small(precision):
    return precision.read_data(2, 2)


@pytest.fixture(scope="module")
def exact(precision, small):
    return precision.measure("float32", small, None)


def seed(number=0):
    return torch.Generator().manual_seed(number)


# What it costs


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8"])
def test_images_are_as_good_as_float32s(precision, small, exact, form):
    row = precision.measure(form, small, exact)
    print(precision.table({"float32": exact, form: row}))
    assert row["not_finite"] == 0
    assert row["rebuilt_loss"] <= MOST_LOST[form]
    assert row["drawn_loss"] <= MOST_LOST[form]
    assert row["to_float32"] >= LEAST_ALIKE[form]


@pytest.fixture(scope="module")
def everything(precision):
    data = precision.read_data(200, 100)
    return data, precision.measure("float32", data, None)


@pytest.mark.slow
@pytest.mark.parametrize("form", MOST_LOST)
def test_two_hundred_images_are_as_good_as_float32s(precision, everything, form):
    row = precision.measure(form, *everything)
    assert row["not_finite"] == 0
    assert row["rebuilt_loss"] <= MOST_LOST[form] / 2
    assert row["drawn_loss"] <= MOST_LOST[form] / 2
    assert row["nearest"] >= 0.99


# Nothing becomes NaN


def draw(pipeline, prompt, guidance, height, width):
    text = pipeline.encode_prompt(prompt=prompt, weighted=True)
    names = ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds", "negative_prompt_embeds_pooled")
    return pipeline(
        **dict(zip(names, text, strict=True)), prior_guidance_scale=guidance, decoder_guidance_scale=guidance,
        height=height, width=width, prior_num_inference_steps=2, num_inference_steps=1, generator=seed(),
        output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
def test_no_nan_whatever_is_asked_for(precision, form):
    pipeline, _ = precision.load(form)
    calls = zip(EXTREMES, (1.0, 4.0, 20.0, 20.0), (64, 72, 104, 256), (128, 64, 64, 64), strict=True)
    for prompt, guidance, height, width in calls:
        images = draw(pipeline, prompt, guidance, height, width)
        assert images.shape == (1, 3, height, width)
        assert images.isfinite().all(), (prompt[:20], guidance, height, width)
        assert images.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "int4"])
def test_no_nan_over_the_whole_range(precision, form):
    pipeline, _ = precision.load(form)
    for prompt in EXTREMES:
        for guidance in (1.0, 1.1, 4.0, 10.0, 20.0):
            for side in (64, 136, 256):
                assert draw(pipeline, prompt, guidance, side, side).isfinite().all(), (prompt[:20], guidance, side)


# Values beyond float16's range


def grow(model, how, factor, inputs):
    """Makes the image grow in the last level, as the released prior's does; float64's result and the peak."""
    for block in model.up_blocks[-1]:
        if how == "branches" and block.kind == "residual":
            block.channelwise[-1].weight.data.mul_(factor)
            block.channelwise[-1].bias.data.mul_(factor)
        if how == "modulation" and block.kind == "timestep":
            block.mapper.bias.data[: block.mapper.out_features // 2] += factor
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, x: seen.append(x.abs().max().item()))
        for block in model.up_blocks[-1]
    ]
    with torch.no_grad():
        expected = model.double()(**inputs).sample
    for hook in hooks:
        hook.remove()
    return expected, max(seen)


@pytest.mark.parametrize("how, factor, plain", [
    ("branches", 3e4, True), ("modulation", 6e4, True), ("modulation", 6e4, False),
])  # fmt: skip
def test_float16_is_exact_where_the_image_leaves_its_range(how, factor, plain):
    """The released prior's last blocks do this, and plain float16 gives black images.

    Layers that are not plain (adapters, quantised weights, offloading) return float16, the image still is float32.
    """
    model, _ = golden_network("io_stage_c_conds")
    expected, peak = grow(model, how, factor, inputs_in("io_stage_c_conds", torch.float64, torch.float64))
    assert peak > 2 * torch.finfo(torch.float16).max
    model.half()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not plain:
            layer.register_forward_hook(lambda module, inputs, output: None)
    with torch.no_grad():
        actual = model(**inputs_in("io_stage_c_conds", torch.float16, torch.float32)).sample
    error = relative_error(actual, expected)
    print(f"{how}: largest value {peak:.0f}, error {error:.5f}")
    assert error < 0.003


def test_diffusers_network_fails_there():
    """Otherwise the test above would say nothing."""
    from diffusers import StableCascadeUNet

    model, _ = golden_network("io_stage_c_conds")
    grow(model, "modulation", 6e4, inputs_in("io_stage_c_conds", torch.float64, torch.float64))
    theirs = StableCascadeUNet.from_config(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        actual = theirs.half()(**inputs_in("io_stage_c_conds", torch.float16, torch.float16)).sample
    assert not actual.isfinite().all()


def test_the_response_norm_sums_in_float32():
    """A thousand squares of 3e4 are far beyond float16."""
    norm = GlobalResponseNorm(8)
    norm.gamma.data.normal_(generator=seed(1))
    x = 3e4 * torch.rand(2, 32, 32, 8, generator=seed(2))
    expected = copy.deepcopy(norm).double()(x.half().double())
    found = norm.half()(x.half())
    inside = expected.abs() < 6e4
    assert found.isfinite().all()
    assert torch.allclose(found.double()[inside], expected[inside], rtol=3e-3, atol=1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 300])
def test_attention_stands_scores_beyond_the_range(size, masked):
    query, key, value = (torch.randn(2, 2, 20, 32, generator=seed(i)) for i in range(3))
    query, key, value = (size * query).half(), (size * key).half(), value.half()
    attended = None
    if masked:
        attended = torch.ones(2, 20, dtype=torch.bool)
        attended[1, 12:] = False
    expected = attend(query.double(), key.double(), value.double(), attended=attended)
    assert (attend(query, key, value, attended=attended).double() - expected).abs().max() < 5e-3
