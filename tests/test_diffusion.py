"""Schedules, noise conditions, scales, targets and guidance: the golden tables, and the laws behind them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from stable_cascade import diffusion as d
from tests.golden import FOLDER, entry, tensors

TABLES = json.loads((FOLDER / "gdf_tables.json").read_text())
FILE_NAMES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow": "rf"}
TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)

SCHEDULES = {
    "CosineSchedule()": d.cosine_log_snr,
    "CosineSchedule(clamp_range=[0.0001,0.9999])": lambda t, shift: d.cosine_log_snr(
        t, clamp=(1e-4, 0.9999), shift=shift
    ),
    "CosineSchedule(s=0.02,clamp_range=[0.001,0.99])": lambda t, shift: d.cosine_log_snr(
        t, s=0.02, clamp=(1e-3, 0.99), shift=shift
    ),
    "CosineSchedule(norm_instead=True)": lambda t, shift: d.cosine_log_snr(t, normalize=True, shift=shift),
    # A shift given to the original's constructor moves the limits with it.
    "CosineSchedule(shift=2)": lambda t, shift: d.shift_log_snr(
        d.cosine_log_snr(t, shift=2, limited=False), shift, limits=(-9.2102404 - 2 * math.log(2), 7.8239460)
    ),
    "CosineSchedule(force_limits=False)": lambda t, shift: d.cosine_log_snr(t, shift=shift, limited=False),
    "CosineSchedule2()": d.tangent_log_snr,
    "SqrtSchedule()": d.sqrt_log_snr,
    "RectifiedFlowsSchedule()": d.rectified_flow_log_snr,
    "EDMSampleSchedule()": d.edm_log_snr,
    "LinearSchedule()": d.linear_log_snr,
    "StableDiffusionSchedule()": d.stable_diffusion_log_snr,
}

CONDITIONS = {
    "CosineTNoiseCond()": d.cosine_t,
    "CosineTNoiseCond(s=0.02)": lambda x: d.cosine_t(x, s=0.02),
    "CosineTNoiseCond(shift=2)": lambda x: d.cosine_t(x, shift=2),
    "CosineTNoiseCond(clamp_range=[0.1,0.9])": d.cosine_t,  # the original ignores the clamp
    "LogSNRNoiseCond()": lambda x: x,
    "RectifiedFlowsNoiseCond()": d.rectified_flow_condition,
}

LEFT_OUT = {
    "CosineSchedule(discrete_steps=11)",
    "InterpolatedSchedule(CosineSchedule(),LinearSchedule(),shifts=[1.0,2.0])",
    "EDMNoiseCond()",
    "SigmoidNoiseCond()",
    "SigmoidNoiseCond(clamp_range=[0.1,0.9])",
    "EDMSigmaNoiseCond(sigma_data=0.5)",
    "StableDiffusionNoiseCond()",
    "DiscreteNoiseCond(CosineTNoiseCond(),steps=1000)",
}
"""What the original has, and no network here is trained or sampled with."""


def assert_near(actual: torch.Tensor, expected: torch.Tensor, *, rtol: float = 1e-4, share: float = 1e-5) -> None:
    torch.testing.assert_close(actual.to(expected), expected, rtol=rtol, atol=share * expected.abs().max().item())


def logsnr_grid() -> torch.Tensor:
    return torch.tensor(TABLES["loss_weights"]["logSNR"], dtype=torch.float32)


def test_every_table_is_covered():
    assert set(TABLES["schedules"]["tables"]) - LEFT_OUT == set(SCHEDULES)
    assert set(TABLES["noise_conds"]["tables"]) - LEFT_OUT == set(CONDITIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_table(name, dtype):
    t = torch.tensor(TABLES["schedules"]["t"], dtype=dtype)
    for shift, values in TABLES["schedules"]["tables"][name]["values"].items():
        expected = torch.tensor(values, dtype=torch.float64)
        actual = SCHEDULES[name](t, shift=float(shift))
        assert actual.dtype == dtype
        bound = 1e-4 * expected.abs() + torch.where(expected.abs() > 8, 2e-4, 2e-5)
        # A shifted end is as inexact in float32 as the end itself.
        bound[0] += 2e-4
        assert ((actual.double() - expected).abs() <= bound).all(), (name, shift, actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONDITIONS)
def test_noise_condition_table(name, dtype):
    log_snr = torch.tensor(TABLES["noise_conds"]["logSNR"], dtype=dtype)
    expected = torch.tensor(TABLES["noise_conds"]["tables"][name]["values"], dtype=torch.float64)
    actual = CONDITIONS[name](log_snr)
    if name.startswith("RectifiedFlows"):
        actual, expected = without_balance(actual, expected)
        log_snr, _ = without_balance(log_snr, log_snr)
    assert actual.dtype == dtype
    bound = 1e-4 * expected.abs() + torch.where(log_snr.abs() > 8, 1e-4, 2e-5)
    assert ((actual.double() - expected).abs() <= bound).all(), (actual, expected)


def without_balance(actual: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops log_snr = 0, where the original's share is off (see `test_lerp_is_exact_where_the_original_is_not`)."""
    keep = logsnr_grid() != 0
    return actual[keep], expected[keep]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaler_tables(dtype):
    log_snr = torch.tensor(TABLES["scalers"]["logSNR"], dtype=dtype)
    for name, table in TABLES["scalers"]["tables"].items():
        scaler = "lerp" if name.startswith("LERP") else "vp"
        limits = None
        if "limits" in table:
            ends = d.cosine_log_snr(torch.tensor([1.0, 0.0]), shift=2 if "shift=2" in name else 1).tolist()
            limits = d.stretch_limits(
                tuple(ends), scaler, to_noise="stretch_max=True" in name, to_clean="stretch_min=True" in name
            )
        for actual, key in zip(d.scales(log_snr, scaler, limits=limits), "ab", strict=True):
            expected = torch.tensor(table[key], dtype=torch.float64)
            assert actual.dtype == dtype
            if scaler == "lerp":
                actual, expected = without_balance(actual, expected)
            torch.testing.assert_close(
                actual.double(), expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_lerp_is_exact_where_the_original_is_not():
    """The original divides by SNR - 1, at least 0.001: at log_snr = 0 it gives the share of SNR 1.001."""
    at_balance = TABLES["scalers"]["tables"]["LERPScaler()"]["a"][6]
    assert d.scales(torch.tensor(math.log(1.001)), "lerp")[0].item() == pytest.approx(at_balance, abs=5e-5)
    a, b = d.scales(torch.tensor(0.0), "lerp")
    assert a == b == 0.5


@pytest.mark.parametrize("scaler", ["vp", "lerp"])
@pytest.mark.parametrize("kind", d.PREDICTION_TYPES)
def test_golden_targets(scaler, kind):
    data = tensors("gdf_targets")
    log_snr, clean, noise, prediction = (data[f"in.{key}"] for key in ("logSNR", "x0", "epsilon", "pred"))
    a, b = d.scales(log_snr, scaler)
    assert_near(a, data[f"{scaler}.a"])
    assert_near(b, data[f"{scaler}.b"])
    noised = d.add_noise(clean, noise, log_snr, scaler)
    assert_near(noised, data[f"{scaler}.noised"])
    name = f"{scaler}.{FILE_NAMES[kind]}"
    assert_near(d.target(kind, clean, noise, log_snr, scaler), data[f"{name}.target"])
    # The original's inverse of the flow target lacks the division by a + b, which is one for "lerp" only.
    correction = d.expand(a + b, clean) if kind == "flow" else 1
    noised = data[f"{scaler}.noised"]
    assert_near(d.to_clean(kind, prediction, noised, log_snr, scaler) * correction, data[f"{name}.to_x0"])
    assert_near(d.to_noise(kind, prediction, noised, log_snr, scaler) * correction, data[f"{name}.to_epsilon"])


GDF = {
    "std": (d.cosine_log_snr, "vp", "epsilon", d.cosine_t, d.p2_weight),
    "v": (d.cosine_log_snr, "vp", "v_prediction", d.cosine_t, None),
    "x0": (d.cosine_log_snr, "vp", "sample", d.cosine_t, torch.ones_like),
    "rf": (d.rectified_flow_log_snr, "lerp", "flow", d.rectified_flow_condition, torch.ones_like),
}


@pytest.mark.parametrize("case", ["std", "shift2", "shift4_loss1", "offset", "v", "x0", "rf"])
def test_golden_diffuse(case):
    data, info = tensors("gdf_diffuse"), entry("gdf_diffuse")[case]
    schedule, scaler, kind, condition, weight = GDF[info["gdf"]]
    if weight is None:

        def weight(x):
            return (x.exp() + 1).clamp(max=5) / (x.exp() + 1)

    clean, noise = data["in.x0"], data["in.epsilon"]
    if info["offset_noise"]:
        noise = noise + info["offset_noise"] * data["in.offset"]
    log_snr = schedule(data["in.t"], shift=info["kwargs"].get("shift", 1))
    noised = d.add_noise(clean, noise, log_snr, scaler)
    prediction = data["in.pred"]
    assert_near(log_snr, data[f"{case}.logSNR"])
    assert_near(noised, data[f"{case}.noised"])
    assert_near(noise, data[f"{case}.noise"])
    assert_near(d.target(kind, clean, noise, log_snr, scaler), data[f"{case}.target"])
    assert_near(condition(log_snr), data[f"{case}.noise_cond"])
    loss_shift = info["kwargs"].get("loss_shift", 1)
    assert_near(weight(d.shift_log_snr(log_snr, 1 / loss_shift)), data[f"{case}.loss_weight"])
    assert_near(d.to_clean(kind, prediction, noised, log_snr, scaler), data[f"{case}.undiffuse_x0"])
    assert_near(d.to_noise(kind, prediction, noised, log_snr, scaler), data[f"{case}.undiffuse_epsilon"])


def test_golden_diffuse_with_stretched_limits():
    data = tensors("gdf_diffuse")
    limits = d.stretch_limits((-9.2102404, 9.2100744))
    log_snr = d.cosine_log_snr(data["in.t"])
    assert_near(torch.tensor(limits), torch.tensor(entry("gdf_diffuse")["stretched"]["limits"]))
    noised = d.add_noise(data["in.x0"], data["in.epsilon"], log_snr, limits=limits)
    assert_near(noised, data["stretched.noised"])
    assert_near(d.target("epsilon", data["in.x0"], data["in.epsilon"], log_snr), data["stretched.target"])


def test_time_to_log_snr_and_back():
    t = TIMES[1:-1]
    torch.testing.assert_close(d.cosine_t(d.cosine_log_snr(t)), t, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["cosine", "tangent", "linear", "rectified_flow", "edm", "stable_diffusion"])
def test_a_schedule_falls_from_clean_to_noise(name):
    values = getattr(d, f"{name}_log_snr")(TIMES)
    assert (values[1:] < values[:-1]).all()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_warp_keeps_the_ends_and_moves_towards_noise(power):
    warped = d.warp_times(TIMES, power)
    assert warped[0] == 0
    assert warped[-1] == 1
    assert (warped >= TIMES).all()


@pytest.mark.parametrize("scaler", d.SCALERS)
@pytest.mark.parametrize("kind", d.PREDICTION_TYPES)
def test_a_perfect_prediction_gives_both_parts_back(scaler, kind):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 9, 3, 4, 5, generator=generator, dtype=torch.float64)
    log_snr = torch.linspace(-9, 9, 9, dtype=torch.float64)
    noised = d.add_noise(clean, noise, log_snr, scaler)
    prediction = d.target(kind, clean, noise, log_snr, scaler)
    torch.testing.assert_close(d.to_clean(kind, prediction, noised, log_snr, scaler), clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d.to_noise(kind, prediction, noised, log_snr, scaler), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaler", d.SCALERS)
def test_scales_have_the_log_snr_they_were_given(scaler):
    log_snr = torch.linspace(-15, 15, 31, dtype=torch.float64)
    a, b = d.scales(log_snr, scaler)
    torch.testing.assert_close(2 * torch.log(a / b), log_snr)
    torch.testing.assert_close(a**2 + b**2 if scaler == "vp" else a + b, torch.ones_like(a))


def test_condition_at_the_noisy_end_is_not_one():
    assert d.cosine_t(d.cosine_log_snr(torch.tensor(1.0))).item() == pytest.approx(0.9935832, abs=1e-6)
    clamped = d.cosine_t(torch.tensor([-9.0, 9.0]), clamp=(0.1, 0.9))
    torch.testing.assert_close(clamped, torch.tensor([0.9, 0.1]))


def test_guidance_is_per_sample():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 3, 4, 5, 5, generator=generator)
    cond[1] *= 10
    together = d.guide(cond, uncond, 4.0)
    alone = torch.cat([d.guide(cond[i : i + 1], uncond[i : i + 1], 4.0) for i in range(3)])
    assert torch.equal(together, alone)
    scales = torch.tensor([1.5, 4.0, 7.0])
    each = torch.cat([d.guide(cond[i : i + 1], uncond[i : i + 1], float(scales[i])) for i in range(3)])
    torch.testing.assert_close(d.guide(cond, uncond, scales), each)


def test_guidance_values():
    cond, uncond = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    plain = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(d.guide(cond, uncond, 3.0, rescale=0), plain)
    torch.testing.assert_close(d.guide(cond, uncond, 1.0), cond)
    full = d.guide(cond, uncond, 3.0, rescale=1.0)
    torch.testing.assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(d.guide(cond, uncond, 3.0, rescale=0.7), 0.7 * full + 0.3 * plain)


def test_guidance_of_zeros_is_zero_not_nan():
    assert torch.equal(d.guide(torch.zeros(2, 3), torch.zeros(2, 3), 4.0), torch.zeros(2, 3))


def test_guidance_in_half_precision_is_rounded_once():
    cond, uncond = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    result = d.guide(cond, uncond, 4.0)
    assert torch.equal(result, d.guide(cond.float(), uncond.float(), 4.0).to(torch.bfloat16))


@pytest.mark.parametrize(
    "call",
    [
        lambda: d.scales(torch.zeros(1), "ve"),
        lambda: d.target("x0", torch.zeros(1), torch.zeros(1), torch.zeros(1)),
        lambda: d.to_clean("eps", torch.zeros(1), torch.zeros(1), torch.zeros(1)),
        lambda: d.to_noise("eps", torch.zeros(1), torch.zeros(1), torch.zeros(1)),
        lambda: d.shift_log_snr(torch.zeros(1), 0),
    ],
)
def test_refusals(call):
    with pytest.raises(ValueError, match=r"must be|at least") as error:
        call()
    assert "\n" not in str(error.value)
