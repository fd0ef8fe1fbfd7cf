"""`stable-cascade train`: from a built package in another folder, launch configs by name, mistakes in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from stable_cascade.cli.main import main
from stable_cascade.trainers import CONFIGS
from stable_cascade.trainers.launch import launch_arguments, launch_configs, run_launch
from tests.trainer_runs import ROOT, assert_same, settings, train, write_cascade, write_config, write_images


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"))
    write_images(folder / "images.tar")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The package as a wheel holds it."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run([*build, "build_py", "--build-lib", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def stable_cascade(package: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command of a package, run in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-P", "-m", "stable_cascade.cli.main", *arguments]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_a_built_package_trains_in_any_folder(tmp_path, cascade, built):
    """Through accelerate, to the bits that the trainer's own `main` reaches."""
    write_config(tmp_path / "lora.yaml", settings("lora", tmp_path, cascade, updates=3))
    done = stable_cascade(built, tmp_path, "train", "lora", "lora.yaml", "--launch", "cpu", "--experiment_id", "built")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "processes       1, this one on cpu" in done.stdout
    here = train("lora", tmp_path, cascade, updates=3)
    assert_same(tmp_path / "runs" / "built" / "final", here)


@pytest.mark.parametrize("launch", ["cpu", "cpu_2proc"])
def test_a_mistake_in_the_training_itself_is_its_line_and_status(tmp_path, cascade, launch):
    """Found by the trainer's process, which accelerate started: no trace of the launcher's follows."""
    write_config(tmp_path / "lora.yaml", settings("lora", tmp_path, cascade))
    done = stable_cascade(ROOT, tmp_path, "train", "lora", "lora.yaml", "--launch", launch, "--webdataset_path=no.tar")
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if "torch/distributed/elastic" not in line]
    assert set(lines) == {"error: webdataset_path 'no.tar' does not exist; '.' holds no .tar"}


def test_a_terminated_command_saves_as_its_training_does(tmp_path, cascade):
    write_config(tmp_path / "lora.yaml", settings("lora", tmp_path, cascade, updates=100_000))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "stable_cascade.cli.main", "train", "lora", "lora.yaml", "--launch", "cpu"]
    process = subprocess.Popen(program, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    held = list((tmp_path / "runs" / "run").iterdir())
    assert [path.name[:5] for path in held] == ["step-"]


def test_a_killed_training_is_named(tmp_path, monkeypatch, capfd):
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the handlers would outlive the call
    status = run_launch(["--config_file", str(launch_configs()["cpu"]), str(tmp_path / "dies.py")], {})
    assert status == 128 + signal.SIGKILL
    assert "error: the training was ended by SIGKILL" in capfd.readouterr().err


def test_a_built_package_has_the_launch_configs(built):
    program = (
        "from stable_cascade.trainers.launch import launch_configs as f; print(*map(str, f().values()), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(built)}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    held = [Path(line) for line in done.stdout.splitlines()]
    assert {path.stem for path in held} == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert all(path.is_relative_to(built) for path in held)


@pytest.mark.parametrize("trainer", CONFIGS)
def test_check_prints_the_plan_of_each_trainer(tmp_path, cascade, trainer, capsys):
    changes = {"stage_a_checkpoint_path": str(cascade / "vqgan"), "pretrained_model_name_or_path": None}
    values = settings(trainer, tmp_path, cascade, **(changes if trainer == "vqgan" else {}))
    for key in ("preview_steps", "preview_decoder_steps") if trainer == "vqgan" else ():
        del values[key]
    config = write_config(tmp_path / "c.yaml", values)
    assert main(["train", trainer.replace("_", "-"), str(config), "--check"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith("trains ")
    assert "steps           6, saved every 100" in plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "c.yaml", "--rnk", "3"], "command line: unknown key 'rnk' (value 3); nearest: 'rank'"),
        (["lora", "d.yaml"], "--config d.yaml: no such file; nearest: 'c.yaml'"),
        (["decoder", "c.yaml"], "it belongs to LoraConfig, not to DecoderConfig"),
        (["lora", "c.yaml", "--launch", "fsdp3"], "no launch config of the package; it has cpu, cpu_2proc, ddp"),
        (
            ["lora", "c.yaml", "--launch", "launch.yaml"],
            "--launch launch.yaml: must be lines of the form `key: value`",
        ),
        (
            ["lora", "c.yaml", "--launch", "cpu", "--processes", "2"],
            "cpu.yaml starts one process; choose --launch ddp",
        ),
        (["lora", "c.yaml", "--launch", "deepspeed_zero2"], "accelerate was asked for DeepSpeed, whose engine"),
        (["lora", "c.yaml", "--processes", "0"], "--processes 0 must be at least 1"),
        (["lora", "c.yaml", "--webdataset_path=none.tar", "--check"], "a training would stop, missing or wrong: data"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, cascade, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "c.yaml", settings("lora", tmp_path, cascade))
    (tmp_path / "launch.yaml").write_text("- 1\n")
    assert main(["train", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("stable-cascade train: error: ")
    assert message in told
    assert told.count("\n") == 1


def test_help_of_a_trainer_lists_its_keys(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "text-to-image", "--help"])
    assert caught.value.code == 0
    assert "  --caption_dropout  number in [0, 1]  (default 0.05)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("devices", "options", "name", "processes"),
    [
        (0, {}, "cpu", None),
        (0, {"processes": 2}, "cpu_2proc", 2),
        (1, {}, "single_gpu", None),
        (4, {}, "ddp", 4),
        (4, {"sharded": True}, "fsdp2", 4),
        (4, {"launch": "fsdp"}, "fsdp", 4),
        (4, {"launch": "fsdp", "processes": 2}, "fsdp", 2),
        (4, {"launch": "single_gpu"}, "single_gpu", None),
    ],
)
def test_the_launch_fits_the_devices(monkeypatch, devices, options, name, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    command, variables = launch_arguments("decoder", ["c.yaml", "--lr", "1"], **options)
    assert command[command.index("--config_file") + 1] == str(launch_configs()[name])
    assert ("--num_processes" in command) == (processes is not None)
    if processes is not None:
        assert command[command.index("--num_processes") + 1] == str(processes)
    assert command[-5:] == ["-m", "stable_cascade.trainers.decoder", "c.yaml", "--lr", "1"]
    assert bool(variables) == name.startswith("cpu")


def test_the_user_s_own_accelerate_config_comes_first(monkeypatch, tmp_path):
    own = tmp_path / "default_config.yaml"
    own.write_text(yaml.safe_dump({"num_processes": 3, "use_cpu": False}))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(own))
    command, variables = launch_arguments("lora", ["c.yaml"])
    assert command[command.index("--config_file") + 1] == str(own)
    assert "--num_processes" not in command
    assert not variables
    assert launch_arguments("lora", [], launch="cpu")[0][1] == str(launch_configs()["cpu"])
