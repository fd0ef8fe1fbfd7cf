"""The launch configs: every key is one of accelerate's, every class they name exists, slurm.sh starts what it says."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stable_cascade import StableCascadeDecoder, StableCascadePrior
from stable_cascade.training import check_launch
from tests.tiny_cascade import tiny_decoder, tiny_prior
from tests.toy_run import toy_config

FOLDER = Path(__file__).parent.parent / "accelerate_configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml"))


def test_all_launches_are_there():
    assert CONFIGS == ["cpu.yaml", "cpu_2proc.yaml", "ddp.yaml", "deepspeed_zero2.yaml", "fsdp.yaml", "fsdp2.yaml",
                       "single_gpu.yaml"]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_knows_every_key(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    loaded = load_config_from_file(str(FOLDER / name))  # refuses unknown keys
    written = yaml.safe_load((FOLDER / name).read_text())
    known = {action.dest for action in launch_command_parser()._actions}
    for group in ("fsdp_config", "deepspeed_config"):
        assert set(written.get(group, {})) <= known, group
        assert getattr(loaded, group, {}) == written.get(group, {})
    assert loaded.distributed_type.value == written["distributed_type"]
    assert loaded.num_processes == written["num_processes"]


@pytest.mark.parametrize("name", ["fsdp.yaml", "fsdp2.yaml"])
def test_the_blocks_to_wrap_exist(name):
    wrapped = yaml.safe_load((FOLDER / name).read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(
        ","
    )
    for model in (tiny_prior(), tiny_decoder()):
        assert set(wrapped) <= {type(module).__name__ for module in model.modules()}
    assert set(wrapped) <= set(StableCascadePrior._no_split_modules)
    assert set(wrapped) <= set(StableCascadeDecoder._no_split_modules)


def test_deepspeed_is_refused_with_the_launch_to_use(tmp_path):
    accelerator = SimpleNamespace(num_processes=2, distributed_type=SimpleNamespace(value="DEEPSPEED"))
    with pytest.raises(ValueError, match=r"asked for DeepSpeed, .*; launch accelerate_configs/fsdp2.yaml"):
        check_launch(toy_config(tmp_path), accelerator)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    """All of them would train the same and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    alone = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(value="NO"))
    with pytest.raises(ValueError, match=r"2 processes were started.*on the CPU set ACCELERATE_USE_CPU=true"):
        check_launch(toy_config(tmp_path), alone)


def stand_in(folder: Path, name: str, text: str) -> None:
    """A program of the cluster, as far as the script can tell."""
    program = folder / name
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)


def test_slurm_starts_one_launcher_per_machine(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in(programs, "scontrol", '[ "$1 $2" = "show hostnames" ] && printf "node7\\nnode8\\nnode9\\n"')
    # srun runs its command once per machine, with the machine's number in the environment.
    stand_in(programs, "srun", 'shift; for rank in 0 1 2; do SLURM_PROCID=$rank "$@"; done')
    stand_in(programs, "accelerate", 'printf "%s\\n" "$*"')
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "VENV": str(tmp_path),
                   "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_NNODES": "3", "SLURM_JOB_ID": "41234",
                   "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}  # fmt: skip
    script = FOLDER / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    command = ["bash", str(script), "examples/train_lora.py", "--config", "a b.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = [
        "launch --config_file accelerate_configs/fsdp2.yaml --num_machines 3 --num_processes 12 "
        f"--machine_rank {rank} --main_process_ip node7 --main_process_port 21234 "
        "examples/train_lora.py --config a b.yaml"
        for rank in range(3)
    ]
    assert done.stdout.splitlines() == expected
    usage = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert usage.returncode == 2
    assert "usage:" in usage.stderr
