"""Starts a program on two CPU processes, as a user would: accelerate's launcher with the config of the repository."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
# On a busy machine two processes now and then fail to find each other's sockets, before any code of ours runs.
NEVER_MET = "Gloo connectFullMesh failed"


def launch_two(script: Path, *arguments: str, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """What the launch printed and how it ended; tried again, at most twice, when the processes never met."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), str(script)]
    with open(Path(tempfile.gettempdir()) / "stable_cascade_two_processes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one launch at a time, whatever the test workers do
        for _ in range(3):
            done = subprocess.run(
                [*launcher, *arguments],
                env={**variables, **environment},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            if NEVER_MET not in done.stderr:
                break
    return done
