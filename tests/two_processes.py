"""Starts a program on two CPU processes, as a user would: accelerate's launcher with the config of the repository."""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
SHARDED = ROOT / "accelerate_configs" / "fsdp2.yaml"
# On a busy machine two processes now and then fail to find each other's sockets, before any code of ours runs.
NEVER_MET = "Gloo connectFullMesh failed"


def launch_two(script: Path, *arguments: str, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """What the launch printed and how it ended; tried again, at most twice, when the processes never met."""
    return _launch([str(CONFIG), str(script), *arguments], timeout, environment)


def launch_sharded(
    script: Path, *arguments: str, options: tuple[str, ...] = (), timeout: int = 240, **environment: str
) -> subprocess.CompletedProcess:
    """The same with the model sharded (FSDP 2) as `fsdp2.yaml` says."""
    usual = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    program = [str(SHARDED), *usual, *options, str(ROOT / "tests/sharded_run.py"), str(script)]
    return _launch([*program, *arguments], timeout, environment)


def _launch(arguments: list[str], timeout: int, environment: dict[str, str]) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    with open(Path(tempfile.gettempdir()) / "stable_cascade_two_processes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one launch at a time, whatever the test workers do
        for _ in range(3):
            began = time.monotonic()
            done = subprocess.run(
                [*launcher, *arguments],
                env={**variables, **environment},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            done.seconds = time.monotonic() - began
            if NEVER_MET not in done.stderr:
                break
    return done
