from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stable_cascade.diffusion.weighting import AdaptiveLossWeight
from tests.toy_run import Toy, saved, toy_arguments, toy_config, toy_loss, toy_train

ROOT = Path(__file__).parent.parent


def assert_same(one, other):
    for kind in ("own", "ema"):
        assert set(one[kind]) == set(other[kind])
        for name, weight in one[kind].items():
            assert torch.equal(weight, other[kind][name]), (kind, name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return saved(toy_train(toy_config(tmp_path_factory.mktemp("whole"))).export)


def start(folder: Path, pause: float) -> subprocess.Popen:
    """The toy as a process of its own, with the settings of `toy_config`."""
    arguments = toy_arguments(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOY_PAUSE": str(pause), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests/toy_run.py"), *arguments]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize(("kill", "began", "held"), [(signal.SIGTERM, 5, (5, 6, 7)), (signal.SIGKILL, 6, (4,))])
def test_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, kill, began, held):
    process = start(tmp_path, pause=0.25)
    wait_for(tmp_path / f"began-{began}", process)
    process.send_signal(kill)
    output = process.communicate(timeout=60)[0]
    if kill == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0, output
        assert "the same command resumes from" in output
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "runs/toy").glob("step-*"))
    assert steps[-1] in held
    assert not (tmp_path / "runs/toy/final").exists()
    result = toy_train(toy_config(tmp_path))
    assert result.finished
    assert result.samples_seen == 96
    assert_same(saved(result.export), uninterrupted)


def test_interrupt_finishes_the_step_and_saves(tmp_path, uninterrupted):
    usual = signal.getsignal(signal.SIGINT)
    config = toy_config(tmp_path)
    loss_fn = toy_loss(weight := AdaptiveLossWeight())

    def interrupted(model, batch):
        if "toy.tar/0044" in batch.keys:  # step 6, second micro-batch
            os.kill(os.getpid(), signal.SIGINT)
        return loss_fn(model, batch)

    result = toy_train(config, loss_fn=interrupted, stateful={"weight": weight}, after_step=weight.update)
    assert (result.step, result.finished) == (6, False)
    assert result.checkpoint == tmp_path / "runs/toy/step-00000006"
    assert signal.getsignal(signal.SIGINT) is usual
    assert_same(saved(toy_train(config).export), uninterrupted)


@pytest.mark.parametrize("at", [1, 4, 5])
def test_resume_at_any_step(tmp_path, uninterrupted, at):
    """Every step of the first run is a checkpoint; going on from one by its path gives the same end."""
    config = toy_config(tmp_path, save_every=1, checkpoints_total_limit="null")
    toy_train(config)
    again = toy_config(tmp_path, experiment_id="again", resume=tmp_path / f"runs/toy/step-{at:08d}")
    assert_same(saved(toy_train(again).export), uninterrupted)


def test_checkpoint_is_small_and_holds_the_config(tmp_path):
    from safetensors.torch import load_file

    toy_train(toy_config(tmp_path, updates=4))
    folder = tmp_path / "runs/toy/step-00000004"
    assert set(load_file(folder / "weights.safetensors")) == {
        "inner.weight", "inner.bias", "outer.weight", "outer.bias",
    }  # fmt: skip
    assert "batch_size: 8" in (folder / "config.yaml").read_text()
    assert (folder / "export/toy.pt").exists()


def test_running_statistics_are_kept(tmp_path):
    class WithStatistics(Toy):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(8, affine=False)

        def forward(self, rows):
            return self.norm(super().forward(rows))

    whole = toy_train(toy_config(tmp_path / "whole"), WithStatistics())
    toy_train(toy_config(tmp_path / "parts"), WithStatistics())
    parts = toy_config(tmp_path / "parts", experiment_id="b", resume=tmp_path / "parts/runs/toy/step-00000008")
    assert_same(saved(toy_train(parts, WithStatistics()).export), saved(whole.export))


def test_each_field_says_whether_a_resumed_run_may_change_it(tmp_path):
    """Changed alone, a key is refused by its name, unless its field says that it is free."""
    from stable_cascade.config.fields import settings_of
    from stable_cascade.training.checkpoints import read_checkpoint

    config = toy_config(tmp_path, updates=2)
    toy_train(config)
    refused = {}
    for key, value in vars(config).items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        try:
            read_checkpoint(tmp_path / "runs/toy/step-00000002", replace(config, **{key: other}))
        except ValueError as error:
            refused[key] = str(error)
    assert refused.keys() == {key for key, known in settings_of(type(config)).items() if known.resume == "fixed"}
    assert {"batch_size", "lr", "seed"} <= refused.keys()
    assert all(f"{key} was " in told for key, told in refused.items())


def test_rotation_keeps_the_newest_and_the_backups(tmp_path):
    config = toy_config(tmp_path, save_every=2, backup_every=5, checkpoints_total_limit=2)
    toy_train(config)
    names = sorted(path.name for path in (tmp_path / "runs/toy").iterdir())
    assert names == ["backup-00000005", "backup-00000010", "final", "step-00000010", "step-00000012"]


def test_leftovers_of_a_killed_write_are_ignored_and_removed(tmp_path, uninterrupted):
    toy_train(toy_config(tmp_path))
    run = tmp_path / "runs/toy"
    os.rename(run / "step-00000012", run / ".tmp-step-00000012-77")
    (run / "step-00000099").mkdir()  # no run.json: not a checkpoint
    assert_same(saved(toy_train(toy_config(tmp_path)).export), uninterrupted)
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "ema.safetensors", "run.json"])
def test_damaged_checkpoint_is_refused(tmp_path, file):
    toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"))
    path = tmp_path / "runs/toy/step-00000004" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"step-00000004.*damaged.*delete") as caught:
        toy_train(toy_config(tmp_path, lr_scheduler="constant"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"updates": 20}, "updates was 12 and is 20"),
        ({"ema_beta": 0.5}, "ema_beta was 0.9 and is 0.5"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    toy_train(toy_config(tmp_path))
    with pytest.raises(ValueError, match=message):
        toy_train(toy_config(tmp_path, **changes))


def test_settings_that_no_weight_depends_on_may_change(tmp_path):
    toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"))
    result = toy_train(toy_config(tmp_path, updates=6, lr_scheduler="constant", save_every=3, log_every=1))
    assert result.step == 6


def test_other_model_is_refused(tmp_path):
    toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"))
    model = Toy()
    model.outer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"step-00000004 and the model differ in 'outer.bias'"):
        toy_train(toy_config(tmp_path, lr_scheduler="constant"), model)


def test_never_sets_the_old_run_aside(tmp_path, uninterrupted):
    toy_train(toy_config(tmp_path, seed=5))
    result = toy_train(toy_config(tmp_path, resume="never"))
    assert_same(saved(result.export), uninterrupted)
    assert (tmp_path / "runs/toy/before-1/step-00000012/run.json").exists()


def test_finished_run_returns_at_once(tmp_path):
    first = toy_train(toy_config(tmp_path))
    again = toy_train(toy_config(tmp_path), loss_fn=None)
    assert again.finished
    assert_same(saved(first.export), saved(again.export))
