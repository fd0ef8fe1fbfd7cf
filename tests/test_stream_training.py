"""Training on a stream: the trainer resumes it bitwise, also after SIGKILL, alone and in two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.making_shards import image, write_tar
from tests.trainer_runs import ROOT, settings, tensors, train, write_cascade, write_config
from tests.two_processes import launch_two

SIZES = ((40, 40), (64, 32), (32, 64))
STREAM = {
    "streaming": True, "shuffle_buffer": 8, "stream_lanes": 4, "num_preview_images": 0, "train_tokens": None,
    "multi_aspect_ratio": ["1/1", "1/2"], "lr_scheduler": "constant", "save_every": 2, "updates": 9, "log_every": 1,
    "image_embedding_share": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"), dropout=0.0)
    for shard in range(8):
        members = {}
        for i in range(5):
            number = 5 * shard + i
            members[f"{number:04}.png"] = image(*SIZES[number % 3], seed=number)
            members[f"{number:04}.txt"] = f"a dog {number}".encode()
        write_tar(folder / "set" / f"{shard}.tar", members)
    return folder


def log(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "out/run/log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def assert_same(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def run(folder: Path, cascade: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    train("lora", folder, cascade, **{**STREAM, "webdataset_path": str(cascade / "set"), **changes})
    return folder


def test_a_streamed_training_resumes_bitwise(tmp_path, cascade):
    whole = run(tmp_path / "whole", cascade)
    parts = tmp_path / "parts"
    for updates in (3, 4, 9):
        run(parts, cascade, updates=updates)
    assert_same(whole, parts)
    workers = run(tmp_path / "workers", cascade, updates=5, num_workers=2)
    run(workers, cascade, num_workers=2)
    assert_same(whole, workers)


def test_a_killed_streamed_training_resumes_bitwise(tmp_path, cascade):
    whole = run(tmp_path / "whole", cascade)
    killed = tmp_path / "killed"
    killed.mkdir()
    values = settings("lora", killed, cascade, **STREAM, webdataset_path=str(cascade / "set"))
    config = write_config(killed / "run.yaml", values)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/trainer_runs.py", "lora", str(config)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    begun = time.monotonic()
    while not list(killed.glob("runs/*/step-*4")) and time.monotonic() - begun < 120 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(killed, cascade)
    assert_same(whole, killed)


def test_two_processes_resume_and_are_one_with_twice_the_micro_batches(tmp_path, cascade):
    common = {"updates": 6, "adam_epsilon": 1e-5}
    one = run(tmp_path / "one", cascade, grad_accum_steps=2, **common)
    two = tmp_path / "two"
    for updates in (3, 6):
        changes = {**STREAM, **common, "webdataset_path": str(cascade / "set"), "updates": updates}
        changes["grad_accum_steps"] = 1
        config = write_config(two / "run.yaml", settings("lora", two, cascade, **changes))
        done = launch_two(ROOT / "tests/trainer_runs.py", "lora", str(config))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "a stream of 8 shards in 4 lanes" in done.stdout
    assert [step for step, _ in log(one)] == [step for step, _ in log(two)] == list(range(1, 7))
    assert max(abs(a - b) for (_, a), (_, b) in zip(log(one), log(two), strict=True)) < 1e-5
