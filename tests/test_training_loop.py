from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from stable_cascade.config import OptimizerSettings, TrainingSettings
from stable_cascade.training import MovingAverage, NonFiniteError, averaged, learning_rate_share, preview_sheet, run
from stable_cascade.training.loop import seeded, step_seed
from tests.toy_run import Toy, saved, toy_batches, toy_config, toy_train


def test_loop_is_the_flat_loop_bit_for_bit(tmp_path):
    """The value test: plain torch, written out, gives the same weights and averages."""
    config = toy_config(tmp_path)
    result = toy_train(config, loss_fn=plain_loss, after_step=None, stateful={})
    model, ema = flat_training(config)
    written = saved(result.export)
    for name, weight in model.state_dict().items():
        assert torch.equal(written["own"][name], weight), name
    for name, weight in ema.items():
        assert torch.equal(written["ema"][name], weight), name
    assert not torch.equal(written["own"]["outer.weight"], Toy().outer.weight)
    assert torch.equal(written["own"]["frozen.weight"], Toy().frozen.weight)


def plain_loss(model, batch):
    return {"loss": (model(batch.pixels) - batch.pixels.flip(-1)).square().mean(1)}


def flat_training(config: TrainingSettings, rates=None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = Toy().train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "full": rates(name) if rates else config.lr} for name, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    ema = {name: p.detach().clone() for name, p in trained.items()}
    stream = toy_batches(config)(0)
    for step in range(config.updates):
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * learning_rate_share("cosine", step, warmup=3, updates=12)
        for part in range(config.grad_accum_steps):
            with torch.random.fork_rng():
                torch.manual_seed(step_seed(config.seed, step, part, 0))
                loss = plain_loss(model, next(stream))["loss"]
            (loss.mean() / config.grad_accum_steps).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 2 == 0:
            for name, p in trained.items():
                ema[name].lerp_(p.detach(), 1 - (0.9 if done > 2 else 0.0))
    return model, ema


def test_accumulation_equals_one_large_batch(tmp_path):
    results = []
    for parts in (1, 2, 4):
        config = toy_config(tmp_path / str(parts), grad_accum_steps=parts)
        results.append(saved(toy_train(config, Toy(dropout=0.0)).export))
    for other in results[1:]:
        for kind in ("own", "ema"):
            for name, weight in results[0][kind].items():
                torch.testing.assert_close(other[kind][name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("polynomial", [0.5, 1.0, 1.0, 0.325, 0.1]),
        ("inverse_sqrt", [0.5, 1.0, 1.0, (2 / 7) ** 0.5, (2 / 11) ** 0.5]),
    ],
)
def test_learning_rate(name, values):
    final = 0.0 if name in ("constant", "inverse_sqrt") else 0.1
    shares = [learning_rate_share(name, step, warmup=2, updates=10, final=final) for step in (0, 1, 2, 6, 10)]
    if name == "inverse_sqrt":
        shares[2] = 1.0  # (2 / 3) ** 0.5, the first step after the warm-up
    assert shares == pytest.approx(values)


def test_learning_rate_without_warmup_is_full_at_once():
    assert learning_rate_share("constant", 0, warmup=0, updates=10) == 1.0
    assert learning_rate_share("constant", 0, warmup=1, updates=10) == 1.0


def test_parameters_have_rates_of_their_own(tmp_path):
    """Rates by name, with one schedule: plain torch with two groups gives the same bits, and so does a resumed run."""
    rates = lambda name: 0.03 if name.startswith("outer") else 0.01  # noqa: E731
    plain = {"loss_fn": plain_loss, "after_step": None, "stateful": {}}
    config = toy_config(tmp_path / "whole")
    result = toy_train(config, learning_rate=rates, **plain)
    model, ema = flat_training(config, rates)
    written = saved(result.export)
    assert all(torch.equal(written["own"][name], weight) for name, weight in model.state_dict().items())
    assert all(torch.equal(written["ema"][name], weight) for name, weight in ema.items())

    everywhere = saved(toy_train(toy_config(tmp_path / "one"), **plain).export)
    same = saved(toy_train(toy_config(tmp_path / "same"), learning_rate=lambda name: 0.01, **plain).export)
    for name, weight in everywhere["own"].items():
        assert torch.equal(same["own"][name], weight)
        assert torch.equal(written["own"][name], weight) == name.startswith("frozen")

    toy_train(toy_config(tmp_path / "parts"), learning_rate=rates, **plain)
    again = toy_config(tmp_path / "again", resume=tmp_path / "parts/runs/toy/step-00000008")
    again = saved(toy_train(again, learning_rate=rates, **plain).export)
    assert all(torch.equal(again["own"][name], weight) for name, weight in written["own"].items())
    with pytest.raises(ValueError, match=r"learning rate nan of 'inner.weight' is not a finite number from 0"):
        toy_train(toy_config(tmp_path / "bad"), learning_rate=lambda name: float("nan"), **plain)


def test_moving_average_in_main_memory_is_the_same(tmp_path):
    usual, away = (saved(toy_train(toy_config(tmp_path / str(o), ema_offload=o)).export) for o in (False, True))
    assert usual["ema"]
    assert all(torch.equal(away["ema"][name], weight) for name, weight in usual["ema"].items())


def test_moving_average_copies_then_averages():
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, beta=0.9, start=4, every=2)
    seen = []
    for step in range(1, 7):
        model.weight.data.fill_(float(step))
        average.update(model, step)
        seen.append(round(average.weights["weight"].item(), 4))
    assert seen[1:] == [2.0, 2.0, 4.0, 4.0, pytest.approx(0.9 * 4 + 0.1 * 6)]  # at step 4 still a copy
    with averaged(model, average):
        assert model.weight.item() == pytest.approx(4.2)
    assert model.weight.item() == 6.0
    with averaged(model, None):
        assert model.weight.item() == 6.0


def test_non_finite_loss_stops_before_the_update_and_names_the_sample(tmp_path):
    config = toy_config(tmp_path)
    good = toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"))
    assert good.step == 4
    model = Toy()
    config = toy_config(tmp_path, updates=12, lr_scheduler="constant")
    with pytest.raises(NonFiniteError, match=r"step 6: the loss is not finite; samples: toy.tar/0045;") as caught:
        toy_train(config, model, bad="toy.tar/0045")
    assert "\n" not in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sorted(path.name for path in (tmp_path / "runs/toy").iterdir()) == ["final", "step-00000004"]
    assert toy_train(config).step == 12


def test_non_finite_gradient_stops_too(tmp_path):
    def loss_fn(model, batch):
        loss = plain_loss(model, batch)["loss"]
        # The root of zero has a finite value and an infinite slope.
        return {"loss": loss + (loss * 0).sqrt() if "toy.tar/0020" in batch.keys else loss}

    with pytest.raises(NonFiniteError, match=r"step 3: the gradient norm is not finite; samples: .*toy.tar/0020"):
        toy_train(toy_config(tmp_path), loss_fn=loss_fn, after_step=None, stateful={})


def test_device_that_is_asked_late_leaves_the_weights_alone_too(tmp_path, monkeypatch):
    """On CUDA the host learns of a bad step one step later; until then the optimizer itself skips the update."""
    usual = toy_train(toy_config(tmp_path / "usual"))
    monkeypatch.setattr(run, "reads_late", lambda config, device: True)
    late = toy_train(toy_config(tmp_path / "late"))
    for name, weight in saved(usual.export)["own"].items():
        assert torch.equal(saved(late.export)["own"][name], weight)
    model, five = Toy(), saved(toy_train(toy_config(tmp_path / "five", updates=5, lr_scheduler="constant")).export)
    config = toy_config(tmp_path / "bad", lr_scheduler="constant", save_every=7)
    with pytest.raises(NonFiniteError, match=r"step 6: the loss is not finite; samples: toy.tar/0045;"):
        toy_train(config, model, bad="toy.tar/0045")
    for name, weight in model.state_dict().items():
        assert torch.equal(five["own"][name], weight), name
    assert not list((tmp_path / "bad").glob("runs/toy/*"))


def test_previews_run_in_evaluation_mode_and_change_nothing(tmp_path):
    modes = []

    def preview(folder, model, step, ema):
        modes.append((step, model.training))
        torch.rand(3)
        with averaged(model, ema):
            return []

    plain = toy_train(toy_config(tmp_path / "plain"))
    drawn = toy_train(toy_config(tmp_path / "drawn", save_every=5), preview_fn=preview)
    assert modes == [(5, False), (10, False), (12, False)]
    for name, weight in saved(plain.export)["own"].items():
        assert torch.equal(saved(drawn.export)["own"][name], weight)


def test_dropout_depends_on_step_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    with seeded(torch.device("cpu"), 0, 1, 0, 0):
        first = torch.rand(4)
    with seeded(torch.device("cpu"), 0, 1, 0, 0):
        again = torch.rand(4)
    with seeded(torch.device("cpu"), 0, 2, 0, 0):
        other = torch.rand(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert step_seed(1, 23) != step_seed(12, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_fsdp": True}, r"use_fsdp: True, but accelerate runs NO; .*fsdp.yaml`, or set use_fsdp: False"),
        ({"resume": "nowhere"}, r"resume 'nowhere' is no checkpoint"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        toy_train(toy_config(tmp_path, **changes))


def test_refuses_a_model_without_trainable_parameters(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        toy_train(toy_config(tmp_path), Toy().requires_grad_(False))


def test_8bit_optimizer_says_what_is_missing():
    pytest.importorskip("importlib")
    from stable_cascade.training import build_optimizer

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        settings = OptimizerSettings(batch_size=1, optimizer="adamw_8bit")
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            build_optimizer(settings, list(nn.Linear(1, 1).parameters()))


def test_log_file_and_trackers_work_offline(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = toy_config(tmp_path, tracker="all", wandb_project="toy", updates=4)
    toy_train(config)
    lines = [json.loads(line) for line in (tmp_path / "toy/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    by_noise = {"loss_by_log_snr", "samples_by_log_snr"}
    assert set(lines[0]) == {"step", "loss", "lr", "samples_per_second", "samples_seen", "broken"} | by_noise
    assert lines[1]["samples_seen"] == 32
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert list(tmp_path.rglob("offline-run-*"))


def test_preview_sheet_holds_every_image_at_its_place(tmp_path):
    red, blue = torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 8, 16)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    path = preview_sheet(
        [("images", red), ("rebuilt", blue)], tmp_path / "new/sheet.png", captions=["a" * 99], cell=32
    )
    sheet = Image.open(path)
    colours = [colour for _, colour in sheet.getcolors(10_000)]
    assert (255, 0, 0) in colours
    assert (0, 0, 255) in colours
    counts = {colour: count for count, colour in sheet.getcolors(10_000)}
    assert counts[255, 0, 0] == 2 * 32 * 32
    assert counts[0, 0, 255] == 32 * 16
    assert sheet.height == 4 + 2 * (32 + 4) + 20
    with pytest.raises(ValueError, match="at least one row"):
        preview_sheet([("empty", red[:0])], tmp_path / "none.png")
