"""The loss by noise level: added up, logged, drawn, and the same after a resume."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from stable_cascade.training import make_accelerator
from stable_cascade.training.tracking import COUNTS, MEANS, LossByNoiseLevel, Span, plot_spans, spans_of_log
from tests.toy_run import Toy, saved, toy_config, toy_train


class Alone:
    num_processes = 1


def test_buckets_hold_the_mean_of_their_samples():
    levels = LossByNoiseLevel()
    levels.add(torch.tensor([-9.9, -8.1, 0.0, 1.99]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    levels.add(torch.tensor([-30.0, 30.0, 2.0]), torch.tensor([5.0, 2.0, 4.0]))
    assert levels.read(Alone()) == {
        MEANS: {"-9": 3.0, "1": 6.0, "3": 4.0, "9": 2.0},
        COUNTS: {"-9": 3, "1": 2, "3": 1, "9": 1},
    }
    assert levels.read(Alone()) == {}, "reading begins anew"


def test_gradients_do_not_live_on_in_it():
    levels = LossByNoiseLevel()
    loss = torch.ones(2, requires_grad=True) * 2
    levels.add(torch.zeros(2), loss)
    assert not levels.totals.requires_grad


def logged(folder):
    return [json.loads(line) for line in (folder / "toy/log.jsonl").read_text().splitlines()]


def figures(lines):
    return [{key: line[key] for key in ("step", MEANS, COUNTS)} for line in lines]


def test_log_counts_every_sample_once_and_agrees_with_the_loss(tmp_path):
    config = toy_config(tmp_path, log_every=5, save_every=4)

    def unweighted(model, batch):
        loss = (model(batch.pixels) - batch.pixels.flip(-1)).square().mean(1)
        return {"loss": loss, "unweighted": loss, "log_snr": batch.pixels[:, 0] * 4}

    toy_train(config, loss_fn=unweighted, after_step=None, stateful={})
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12], "each checkpoint ends a line"
    done = 0
    for line in lines:
        assert sum(line[COUNTS].values()) == (line["step"] - done) * config.batch_size
        mean = sum(line[MEANS][name] * count for name, count in line[COUNTS].items()) / sum(line[COUNTS].values())
        assert mean == pytest.approx(line["loss"], rel=1e-5)
        done = line["step"]


def test_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    changes = {"lr_scheduler": "constant", "log_every": 3}
    whole = toy_train(toy_config(tmp_path / "whole", **changes))
    toy_train(toy_config(tmp_path / "parts", updates=8, **changes))
    again = toy_train(toy_config(tmp_path / "parts", **changes))
    assert figures(logged(tmp_path / "parts")) == figures(logged(tmp_path / "whole"))
    for name, weight in saved(whole.export)["own"].items():
        assert torch.equal(saved(again.export)["own"][name], weight)
    plots = [Image.open(tmp_path / name / "toy/loss_by_noise.png").tobytes() for name in ("whole", "parts")]
    assert plots[0] == plots[1]


def test_losses_without_noise_levels_are_logged_without_them(tmp_path):
    def plain(model, batch):
        return {"loss": model(batch.pixels).square().mean(1)}

    toy_train(toy_config(tmp_path), Toy(), loss_fn=plain, after_step=None, stateful={})
    assert not any(MEANS in line for line in logged(tmp_path))
    assert not (tmp_path / "toy/loss_by_noise.png").exists()


def write_log(path, steps, loss):
    lines = []
    for step in steps:
        means = {f"{middle}": loss(step, middle) for middle in range(-9, 10, 2)}
        lines.append({"step": step, "loss": 1.0, MEANS: means, COUNTS: dict.fromkeys(means, step)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_spans_weigh_lines_by_their_samples(tmp_path):
    log = write_log(tmp_path / "log.jsonl", (10, 20, 30, 40), lambda step, middle: float(step))
    spans = spans_of_log(log, 2)
    assert [(span.first, span.last) for span in spans] == [(1, 20), (21, 40)]
    assert spans[0].points[0] == (-9.0, pytest.approx((10 * 10 + 20 * 20) / 30))
    assert [len(spans_of_log(log, count)) for count in (1, 4, 9)] == [1, 4, 4]


def test_plot_has_a_curve_at_the_place_of_its_values(tmp_path):
    spans = [Span(1, 10, ((-9.0, 0.1), (9.0, 0.1))), Span(11, 20, ((-9.0, 1.0), (9.0, 1.0)))]
    plot = Image.open(plot_spans(spans, tmp_path / "plot.png")).convert("RGB")
    assert plot.size == (720, 440)
    column = [plot.getpixel((300, y)) for y in range(440)]
    blue = {y: sum(pixel) for y, pixel in enumerate(column) if pixel[2] - pixel[0] > 20}
    newest = min(blue, key=blue.get)
    lowest = max(blue)
    assert sum(column[newest]) < 400 < sum(column[lowest - 1]), "the newest span is the darkest line"
    assert newest < lowest - 100, "the greater loss is higher up"
    assert plot.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_plot_passes_over_what_a_logarithm_cannot_show(tmp_path, value):
    plot_spans([Span(1, 2, ((-9.0, value), (1.0, 0.5)))], tmp_path / "plot.png")
    with pytest.raises(ValueError, match="no loss was logged by noise level"):
        plot_spans([Span(1, 2, ((-9.0, value),))], tmp_path / "plot.png")


def test_nothing_waits_for_the_device(tmp_path):
    """On the meta device every question for a value is an error."""
    levels = LossByNoiseLevel()
    levels.add(torch.zeros(4, device="meta"), torch.zeros(4, device="meta"))
    levels.add(torch.zeros(4, device="meta"), torch.zeros(4, device="meta"))
    assert levels.totals.device.type == "meta"
    accelerator = make_accelerator(toy_config(tmp_path))
    with pytest.raises((NotImplementedError, RuntimeError)):
        levels.read(accelerator)
