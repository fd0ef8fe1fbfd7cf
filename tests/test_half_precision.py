"""The diffusion networks in pure bfloat16 and float16, without autocast."""

import pytest
import torch
from diffusers import StableCascadeUNet

from tests.golden_networks import golden_inputs, golden_network

NAMES = ["io_stage_c_conds", "io_stage_b_plain"]
HALF = [torch.bfloat16, torch.float16]


def inputs_in(name, dtype, ratio_dtype):
    inputs = {key: value for key, value in golden_inputs(name, dtype).items() if key not in ("sca", "crp")}
    times = torch.tensor([0.8617, 0.3391])
    return inputs | {"timestep_ratio": times.to(ratio_dtype)}


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_a_twentieth_of_diffusers(name, dtype):
    """Diffusers' class gets what its pipelines feed it: times in the network's own type."""
    ours, _ = golden_network(name)
    theirs = StableCascadeUNet.from_config(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = ours.double()(**inputs_in(name, torch.float64, torch.float64)).sample
        mine = ours.to(dtype)(**inputs_in(name, dtype, torch.float32)).sample
        other = theirs.to(dtype)(**inputs_in(name, dtype, dtype)).sample
    assert mine.dtype == dtype
    error, reference = relative_error(mine, expected), relative_error(other, expected)
    print(f"{name} {dtype}: ours {error:.4f}, diffusers {reference:.4f}, {reference / error:.0f} times")
    assert error <= reference / 20


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_conditions_computed_once_and_float32_samples(name, dtype):
    model, component = golden_network(name)
    inputs = inputs_in(name, dtype, torch.float32)
    keys = ("clip_text_pooled", "clip_text", "clip_img") if component == "prior" else ("clip_text_pooled", "effnet")
    with torch.no_grad():
        model.to(dtype)
        expected = model(**inputs).sample
        conditions = model.encode_conditions(**{key: inputs.pop(key).float() for key in keys})
        actual = model(**inputs | {"sample": inputs["sample"].float()}, conditions=conditions).sample
    assert (actual - expected).norm() <= (4 if dtype is torch.bfloat16 else 1) * 2e-3 * expected.norm()


def peaked(model, where, peak, inputs):
    """Scales one weight until the largest activation of any layer is `peak`; returns the float64 output."""
    weight = {
        "stream": lambda: model.down_blocks[0][0].channelwise[-1].weight,
        "hidden": lambda: model.down_blocks[-1][0].channelwise[0].weight,
    }[where]()
    seen = []

    def watch(_, __, out):
        if torch.is_tensor(out):
            seen.append(out.abs().max().item())

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    model.double()
    with torch.no_grad():
        for _ in range(4):
            seen.clear()
            model(**inputs)
            weight.mul_(peak / max(seen))
        seen.clear()
        expected = model(**inputs).sample
    for hook in hooks:
        hook.remove()
    return expected, max(seen)


@pytest.mark.parametrize("where", ["stream", "hidden"])
@pytest.mark.parametrize("name", [*NAMES, "io_stage_c_variant_odd"])
def test_float16_stands_activations_of_30000(name, where):
    model, _ = golden_network(name)
    expected, peak = peaked(model, where, 3e4, inputs_in(name, torch.float64, torch.float64))
    assert 2.5e4 < peak < 3.5e4
    with torch.no_grad():
        actual = model.half()(**inputs_in(name, torch.float16, torch.float32)).sample
    assert actual.isfinite().all()
    assert relative_error(actual, expected) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_float16_saturates_beyond_its_range(name):
    model, _ = golden_network(name)
    peaked(model, "stream", 1e6, inputs_in(name, torch.float64, torch.float64))
    with torch.no_grad():
        actual = model.half()(**inputs_in(name, torch.float16, torch.float32)).sample
    assert actual.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_gradients(name):
    model, _ = golden_network(name)
    model.double()(**inputs_in(name, torch.float64, torch.float64)).sample.square().mean().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model.bfloat16()(**inputs_in(name, torch.bfloat16, torch.float32)).sample.float().square().mean().backward()
    total = torch.stack([(p.grad.double() - expected[key]).norm() for key, p in model.named_parameters()]).norm()
    assert total < 0.05 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
