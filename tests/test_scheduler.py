"""StableCascadeScheduler: the original's trajectories, diffusers' scheduler, and one image alone or in a batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from stable_cascade.diffusion import guide, scales
from stable_cascade.diffusion.samplers import SAMPLERS
from stable_cascade.schedulers import StableCascadeScheduler
from tests.golden import FOLDER, entry, tensors

GDF = {
    "std": {},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample"},
    "rf": {
        "prediction_type": "flow",
        "schedule": "rectified_flow",
        "noising": "lerp",
        "condition": "rectified_flow",
    },
}
ORIGINALS = {"default (DDPMSampler)": "ddpm", "DDIMSampler": "ddim", "LCMSampler": "lcm"}
BALANCE = json.loads((FOLDER / "gdf_tables.json").read_text())["scalers"]["tables"]["LERPScaler()"]["a"][6]
CASES = [key for key, value in entry("gdf_sampling").items() if isinstance(value, dict) and "gdf" in value]


def toy(x, ratio, c, extras=(), e=None):
    """The network of the golden trajectories."""
    r = ratio.reshape(-1, 1, 1, 1)
    prediction = x * (0.5 + 0.3 * torch.cos(3 * r)) + 0.2 * c
    for value in extras:
        prediction = prediction + 0.1 * value
    return prediction if e is None else prediction + 0.05 * e


def guided_over_the_batch(cond, uncond, scale, rescale):
    """The original's guidance: one standard deviation for the whole batch, which `guide` on purpose does not offer."""
    guided = guide(cond, uncond, scale, rescale=0)
    if not rescale:
        return guided
    return rescale * guided * (cond.std() / guided.std()) + (1 - rescale) * guided


def golden_predictions(case, data, info):
    """A function (step, t, x, r) -> prediction, with the case's guidance."""
    kwargs = dict(info["kwargs"])
    conditions = {"c": data[f"{case}.in.c"]}
    if case == "lists":
        first, last = data["lists.in.lst.0"], data["lists.in.lst.2"]
        e = data["lists.in.extra.e"]
        conditions |= {"extras": [first, last], "e": e}
        without = {"c": data["lists.in.c_uncond"], "extras": [0.5 * first, last], "e": torch.zeros_like(e)}
    else:
        without = {"c": data.get(f"{case}.in.c_uncond", torch.zeros_like(conditions["c"]))}
    state = {"cfg": kwargs.get("cfg"), "cfg_rho": kwargs.get("cfg_rho", 0.7)}

    def predict(step, t, x, r):
        state.update(info["send"].get(str(step - 1), {}))
        cond, cfg = toy(x, r, **conditions), state["cfg"]
        if cfg is None or not kwargs.get("cfg_t_stop", 0) <= t <= kwargs.get("cfg_t_start", 1):
            return cond
        scale = cfg if isinstance(cfg, float) else cfg[0] * float(t) + cfg[1] * (1 - float(t))
        return guided_over_the_batch(cond, toy(x, r, **without), scale, state["cfg_rho"])

    return predict


def golden_scheduler(info):
    kwargs = info["kwargs"]
    settings = dict(GDF[info["gdf"]], sampler=ORIGINALS[info["sampler"]], shift=kwargs.get("shift", 1))
    settings["eta"] = kwargs.get("sampler_params", {}).get("eta", 0.0)
    if info["schedule"] is not None:
        assert info["schedule"] == "G.LinearSchedule([-6,6])"
        settings |= {"schedule": "linear", "log_snr_range": (-6.0, 6.0)}
    scheduler = StableCascadeScheduler(**settings)
    scheduler.set_timesteps(kwargs["timesteps"], t_start=kwargs.get("t_start", 1.0), t_end=kwargs.get("t_end", 0.0))
    if info["gdf"] == "rf":
        # At t = 0.5 the original's lerp is off by 1.6e-4 (it guards a division by zero there): walk through the time
        # that really has the share which the original computes for 0.5, as its table of shares says.
        points = scheduler.timesteps
        points[points == 0.5] = 1 - BALANCE
        scheduler.set_timesteps(timesteps=points)
    return scheduler


@pytest.mark.parametrize("case", CASES)
def test_golden_trajectory(case):
    data, info = tensors("gdf_sampling"), entry("gdf_sampling")[case]
    scheduler, predict = golden_scheduler(info), golden_predictions(case, data, info)
    generator = torch.Generator().manual_seed(info["torch_manual_seed"])
    start = data[f"{case}.in.x_init"] if case == "img2img" else torch.randn(2, 3, 2, 2, generator=generator)
    if case != "img2img":
        assert torch.equal(start, data[f"{case}.in.x_T"])
    x, stack = start, {"pred": [], "x": [], "x0": []}
    for step, t in enumerate(scheduler.timesteps[:-1]):
        prediction = predict(step, t, x, scheduler.noise_condition(t))
        out = scheduler.step(prediction, t, x, generator=generator)
        x = out.prev_sample
        for key, value in (("pred", prediction), ("x", x), ("x0", out.pred_original_sample)):
            stack[key].append(value)
    for key, values in stack.items():
        expected = data[f"{case}.{key}"]
        bound = 1e-5 * expected.abs().max()
        assert (torch.stack(values) - expected).abs().max() <= bound, (case, key)


def sample(scheduler, start, generator, steps=6, predict=toy, **timesteps):
    scheduler.set_timesteps(steps, **timesteps)
    x = start
    for t in scheduler.timesteps[:-1]:
        prediction = predict(x, scheduler.noise_condition(t), torch.ones(len(x), 3, 1, 1))
        out = scheduler.step(prediction, t, x, generator=generator)
        x = out.prev_sample
    return out


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def start_of(size=4, seed=0, dtype=torch.float32):
    return torch.randn(size, 3, 4, 4, generator=seeded(seed)).to(dtype)


@pytest.mark.parametrize("scaler", [1.0, 0.7, 2.0])
def test_equals_diffusers_with_its_conventions(tmp_path, scaler):
    theirs = DDPMWuerstchenScheduler(scaler=scaler)
    theirs.save_pretrained(tmp_path)
    loaded = StableCascadeScheduler.from_pretrained(tmp_path)
    assert loaded.config.scaler == scaler
    assert loaded.config.shift == 1
    ours = StableCascadeScheduler.from_config(theirs.config, condition="timestep", last_noise=False)
    steps = 10
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = start_of()
    one, two = seeded(1), seeded(1)
    for t in theirs.timesteps[:-1]:
        ratio = t.expand(len(x))
        assert torch.equal(ours.noise_condition(t).expand(len(x)), ratio)
        x = theirs.step(toy(x, ratio, torch.ones(4, 3, 1, 1)), ratio, x, generator=one).prev_sample
        y = ours.step(toy(y, ratio, torch.ones(4, 3, 1, 1)), ratio, y, generator=two).prev_sample
        assert (x - y).abs().max() <= 1e-5 * max(1, x.abs().max())


def test_own_config_comes_back(tmp_path):
    scheduler = StableCascadeScheduler(
        shift=2.0, sampler="ddim", eta=0.3, schedule="linear", log_snr_range=(-6.0, 6.0), prediction_type="flow"
    )
    scheduler.save_pretrained(tmp_path)
    loaded = StableCascadeScheduler.from_pretrained(tmp_path)
    t = torch.linspace(0, 1, 5)
    assert torch.equal(loaded.log_snr(t), scheduler.log_snr(t))
    assert (loaded.config.sampler, loaded.config.eta, loaded.config.prediction_type) == ("ddim", 0.3, "flow")


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_alone_is_the_image_in_a_batch(sampler):
    scheduler, start = StableCascadeScheduler(shift=2.0, sampler=sampler), start_of()
    together = sample(scheduler, start, [seeded(i) for i in range(4)]).pred_original_sample
    for i in range(4):
        alone = sample(scheduler, start[i : i + 1], [seeded(i)]).pred_original_sample
        assert torch.equal(alone, together[i : i + 1])
        single = sample(scheduler, start[i : i + 1], seeded(i)).pred_original_sample
        assert torch.equal(single, alone)


def test_ddim_with_eta_one_is_ddpm():
    start = start_of(dtype=torch.float64)
    ddpm = sample(StableCascadeScheduler(), start, seeded(0))
    ddim = sample(StableCascadeScheduler(sampler="ddim", eta=1.0), start, seeded(0))
    assert torch.equal(ddpm.prev_sample, ddim.prev_sample)
    other = sample(StableCascadeScheduler(sampler="ddim", eta=0.5), start, seeded(0))
    assert not torch.equal(ddpm.prev_sample, other.prev_sample)


def test_ddpm_step_is_the_posterior_of_the_paper():
    scheduler = StableCascadeScheduler()
    scheduler.set_timesteps(10)
    t, following = scheduler.timesteps[4], scheduler.timesteps[5]
    x, prediction = start_of(dtype=torch.float64), start_of(seed=1, dtype=torch.float64)
    before, after = (torch.sigmoid(scheduler.log_snr(value).double()) for value in (t, following))
    alpha = before / after
    mean = (x - (1 - alpha) / (1 - before).sqrt() * prediction) / alpha.sqrt()
    std = ((1 - alpha) * (1 - after) / (1 - before)).sqrt()
    noise = torch.randn(x.shape, generator=seeded(3)).double()
    out = scheduler.step(prediction, t, x, generator=seeded(3)).prev_sample
    torch.testing.assert_close(out, mean + std * noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_the_deterministic_samplers(sampler, order):
    """Of Gaussian data the flow is known: twice the steps divide the error by two, or at second order by four."""
    spread = 0.5
    scheduler = StableCascadeScheduler(sampler=sampler, prediction_type="sample")

    def error(steps):
        scheduler.set_timesteps(steps, t_start=0.9, t_end=0.2)
        first, last = (scheduler.log_snr(scheduler.timesteps[i]).double() for i in (0, -1))
        x = start = start_of(dtype=torch.float64)
        for t in scheduler.timesteps[:-1]:
            a, b = scales(scheduler.log_snr(t).double())
            x = scheduler.step(a * spread**2 / (a**2 * spread**2 + b**2) * x, t, x).prev_sample
        (a, b), (a_last, b_last) = scales(first), scales(last)
        exact = start * ((a_last**2 * spread**2 + b_last**2) / (a**2 * spread**2 + b**2)).sqrt()
        return (x - exact).norm() / exact.norm()

    assert error(80) < 0.01
    assert abs(torch.log2(error(40) / error(80)) - order) < 0.2


def test_the_first_step_of_dpmpp_2m_is_ddims_and_a_new_run_forgets_the_last():
    start = start_of(dtype=torch.float64)
    first = StableCascadeScheduler(sampler="dpmpp_2m")
    fresh = sample(first, start, seeded(0), steps=5)
    again = sample(first, start, seeded(0), steps=5)
    assert torch.equal(fresh.prev_sample, again.prev_sample)
    moved = [sample(StableCascadeScheduler(sampler=name), start, seeded(0), steps=1) for name in ("dpmpp_2m", "ddim")]
    torch.testing.assert_close(moved[0].prev_sample, moved[1].prev_sample, rtol=1e-9, atol=1e-9)


def test_a_time_asked_for_twice_is_a_first_step_of_dpmpp_2m():
    scheduler, start = StableCascadeScheduler(sampler="dpmpp_2m"), start_of(dtype=torch.float64)
    scheduler.set_timesteps(4)
    t, prediction = scheduler.timesteps[1], start_of(seed=1, dtype=torch.float64)
    first = scheduler.step(prediction, t, start).prev_sample
    scheduler.step(2 * prediction, t, start)
    assert torch.equal(scheduler.step(prediction, t, start).prev_sample, first)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_deterministic_samplers_draw_nothing(sampler):
    generator = seeded(0)
    before = generator.get_state()
    sample(StableCascadeScheduler(sampler=sampler), start_of(), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_oracle_leads_to_the_clean_sample(kind, sampler):
    """A network that knows the clean sample: whatever it predicts, the result is that sample."""
    from stable_cascade.diffusion import target, to_noise

    scheduler = StableCascadeScheduler(shift=2.0, prediction_type=kind, sampler=sampler)
    scheduler.set_timesteps(5)
    clean, x = start_of(seed=5, dtype=torch.float64), start_of(dtype=torch.float64)
    for t in scheduler.timesteps[:-1]:
        log_snr = scheduler.log_snr(t).double()
        prediction = target(kind, clean, to_noise("sample", clean, x, log_snr), log_snr)
        out = scheduler.step(prediction, t, x, generator=seeded(0))
        x = out.prev_sample
        torch.testing.assert_close(out.pred_original_sample, clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_stays_float32_under_half_precision_networks(dtype):
    def half(x, ratio, c):
        assert ratio.dtype == torch.float32
        return toy(x, ratio, c).to(dtype)

    scheduler = StableCascadeScheduler(shift=2.0)
    out = sample(scheduler, start_of(dtype=dtype), seeded(0), predict=half)
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.float32
    assert torch.isfinite(out.prev_sample).all()
    noised = scheduler.add_noise(start_of(dtype=dtype), start_of(seed=1, dtype=dtype), 0.5)
    assert noised.dtype == torch.float32


def test_noise_condition():
    scheduler = StableCascadeScheduler()
    assert scheduler.noise_condition(1.0).item() == pytest.approx(0.9935832, abs=1e-6)
    assert scheduler.noise_condition(0.5).item() == pytest.approx(0.5, abs=1e-6)
    shifted = StableCascadeScheduler(shift=2.0)
    assert shifted.noise_condition(1.0).item() == pytest.approx(0.9935832, abs=1e-6)
    assert shifted.noise_condition(torch.tensor([0.5, 0.1])).tolist() == pytest.approx(
        [0.7056450, 0.2018116], abs=1e-6
    )
    assert shifted.log_snr(0.5).item() == pytest.approx(scheduler.log_snr(0.5).item() - 2 * math.log(2), abs=1e-5)


def test_image_to_image_starts_at_its_strength():
    scheduler = StableCascadeScheduler(shift=2.0)
    scheduler.set_timesteps(4, t_start=0.6)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([0.6, 0.45, 0.3, 0.15, 0.0]), rtol=0, atol=1e-6)
    clean, noise = start_of(seed=1), start_of(seed=2)
    noised = scheduler.add_noise(clean, noise, scheduler.timesteps[0])
    variance = torch.sigmoid(scheduler.log_snr(0.6))
    torch.testing.assert_close(noised, variance.sqrt() * clean + (1 - variance).sqrt() * noise)
    per_sample = scheduler.add_noise(clean, noise, torch.tensor([0.6, 0.5, 0.2, 0.1]))
    torch.testing.assert_close(per_sample[0], noised[0])
    out = scheduler.step(noise, scheduler.timesteps[0], noised, generator=seeded(0))
    torch.testing.assert_close(out.pred_original_sample, clean, rtol=1e-4, atol=1e-5)


def test_times_per_sample_are_allowed():
    scheduler = StableCascadeScheduler(sampler="ddim")
    scheduler.set_timesteps(4)
    x, prediction = start_of(2), start_of(2, seed=1)
    mixed = scheduler.step(prediction, torch.tensor([1.0, 0.5]), x).prev_sample
    for i, t in enumerate([1.0, 0.5]):
        assert torch.equal(mixed[i], scheduler.step(prediction, t, x).prev_sample[i])
    assert torch.equal(scheduler.step(prediction, 1.0, x, return_dict=False)[0][0], mixed[0])


def test_given_timesteps():
    scheduler = StableCascadeScheduler()
    scheduler.set_timesteps(timesteps=[1.0, 0.7, 0.2, 0.0])
    assert scheduler.num_inference_steps == 3
    assert scheduler.timesteps.tolist() == pytest.approx([1.0, 0.7, 0.2, 0.0])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prediction_type": "x0"}, "prediction_type 'x0'.*sample"),
        ({"sampler": "euler"}, "sampler 'euler'.*ddpm"),
        ({"schedule": "cos"}, "schedule 'cos'.*cosine"),
        ({"noising": "ve"}, "noising 've'.*vp"),
        ({"condition": "t"}, "condition 't'.*timestep"),
        ({"shift": 0.0}, "positive"),
        ({"scaler": -1.0}, "positive"),
        ({"eta": 1.5}, "eta 1.5"),
        ({"log_snr_range": (-6.0, 6.0)}, "fixed range"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        StableCascadeScheduler(**settings)


def test_calls_are_checked():
    scheduler, x = StableCascadeScheduler(), start_of(2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1.0, x)
    for bad in ({"num_inference_steps": 0}, {}, {"num_inference_steps": 3, "t_start": 1.2}, {"timesteps": [0.1, 0.5]}):
        with pytest.raises(ValueError, match=r"num_inference_steps|t_start|timesteps"):
            scheduler.set_timesteps(**bad)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="3 entries for 2 samples"):
        scheduler.step(x, 1.0, x, generator=[seeded(i) for i in range(3)])
