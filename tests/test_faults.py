"""Faults in real processes: nothing that was saved is lost, and the error names the cause."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stable_cascade.diffusion.weighting import AdaptiveLossWeight
from stable_cascade.training.run_folders import DiskFullError, out_of_space, write_folder
from tests.dying_run import in_child
from tests.toy_run import saved, toy_arguments, toy_config, toy_loss, toy_train
from tests.two_processes import ROOT, launch_two


def assert_same(one: dict, other: dict) -> None:
    for kind in ("own", "ema"):
        assert set(one[kind]) == set(other[kind])
        assert all(torch.equal(weight, other[kind][name]) for name, weight in one[kind].items())


def die_at(tmp_path: Path, places: int) -> list[dict]:
    program = [sys.executable, str(ROOT / "tests/dying_run.py"), str(tmp_path), str(places)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("places", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_writing_resumes_to_the_same_bits(tmp_path, places):
    """SIGKILL at places spread over all that a run writes: checkpoints, backups, rotation, the final export."""
    runs = die_at(tmp_path, places)
    assert len(runs) == places
    assert all(run["status"] == -9 for run in runs), runs
    assert all(run["again"] == 0 and run["same"] and not run["rest"] for run in runs), runs
    assert any(name.startswith(".tmp-step") for run in runs for name in run["left"])


def run_out(config, spend) -> str:
    """A run whose space ends after its first checkpoint, in a process of its own; the error's words."""

    def work() -> None:
        loss_fn = toy_loss(weight := AdaptiveLossWeight())

        def spending(model, batch):
            if "toy.tar/0040" in batch.keys:  # step 6
                spend()
            return loss_fn(model, batch)

        try:
            toy_train(config, loss_fn=spending, stateful={"weight": weight}, after_step=weight.update)
        except DiskFullError as error:
            words.write_text(str(error))

    words = Path(config.output_path) / "error"
    in_child(work)
    return words.read_text()


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """The system refuses to make a file larger than the weights: the optimizer's state does not fit any more."""

    def spend() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    told = run_out(toy_config(tmp_path), spend)
    run = tmp_path / "runs/toy"
    assert told.startswith(f"no space to write {run}/step-00000008: it needs about 0.")
    assert "MB are free" in told
    assert "earlier checkpoints are whole" in told
    assert "\n" not in told
    assert [path.name for path in run.iterdir()] == ["step-00000004"]
    whole = toy_train(toy_config(tmp_path / "whole"))
    assert_same(saved(toy_train(toy_config(tmp_path)).export), saved(whole.export))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_small_disk_leaves_the_earlier_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        config = toy_config(disk, output_path=tmp_path / "out")
        told = run_out(config, lambda: (disk / "filler").write_bytes(b"x" * 150_000))
        assert "no space to write" in told
        assert [path.name for path in (disk / "runs/toy").iterdir()] == ["step-00000004"]
        (disk / "filler").unlink()
        whole = toy_train(toy_config(tmp_path / "whole"))
        assert_same(saved(toy_train(config).export), saved(whole.export))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(13, "Permission denied"), False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_only_want_of_space_is_told_as_such(tmp_path, error, full):
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise error

    assert out_of_space(error) == full
    with pytest.raises(DiskFullError if full else type(error)):
        write_folder(tmp_path / "step-00000001", fill)
    assert not (tmp_path / "step-00000001").exists()


@pytest.mark.parametrize(
    ("fault", "told"),
    [("raise", "OSError: shard of step 6 is gone"), pytest.param("kill", "exitcode  : -9", marks=pytest.mark.slow)],
)
def test_dying_process_ends_the_others_within_a_minute(tmp_path, fault, told):
    done = launch_two(ROOT / "tests/toy_run.py", *toy_arguments(tmp_path), TOY_FAULT=f"1:5:{fault}", timeout=100)
    assert done.seconds < 60
    assert done.returncode != 0
    assert told in done.stderr
    if fault == "raise":
        assert f"error: process 1 failed: {told}" in done.stderr
    assert [path.name for path in (tmp_path / "runs/toy").iterdir()] == ["step-00000004"]


@pytest.mark.slow
def test_stuck_process_learns_of_the_failure(tmp_path):
    """A process that hangs after its error (a data loader that does not end, say) holds nobody up."""
    done = launch_two(ROOT / "tests/toy_run.py", *toy_arguments(tmp_path), TOY_FAULT="1:5:stuck", timeout=100)
    assert done.seconds < 60
    assert done.returncode != 0
    assert "error: process 1 failed: OSError: shard of step 6 is gone" in done.stderr


def test_all_differing_keys_are_named(tmp_path):
    toy_train(toy_config(tmp_path, updates=4))
    with pytest.raises(ValueError) as caught:
        toy_train(toy_config(tmp_path, updates=8, batch_size=16, seed=1, save_every=2))
    told = str(caught.value)
    assert "batch_size was 8 and is 16, seed was 0 and is 1, updates was 4 and is 8; set them back" in told
    assert "save_every" not in told
    with pytest.raises(ValueError, match=r"updates was 4 and is 8, but under lr_scheduler cosine .* set it back, or"):
        toy_train(toy_config(tmp_path, updates=8))
