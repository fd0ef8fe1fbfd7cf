"""Starting a trainer through accelerate's launcher, in a process of its own or in several."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_cascade.config.sources import read_yaml
from stable_cascade.disk import local_path
from stable_cascade.training.tracking import NO_DEEPSPEED

PACKAGE = Path(__file__).parents[1]
SEVERAL = ("ddp", "fsdp", "fsdp2")
"""Launch configs for all the GPUs of a machine."""


def launch_configs() -> dict[str, Path]:
    """Name -> accelerate config: an installed package has them inside, a checkout beside it."""
    folders = [folder / "accelerate_configs" for folder in (PACKAGE, PACKAGE.parent)]
    folder = next(folder for folder in folders if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def launch_arguments(
    trainer: str,
    arguments: Sequence[str],
    *,
    launch: str | None = None,
    processes: int | None = None,
    sharded: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """The arguments of `accelerate launch` that start a trainer, and the variables it needs beside the present ones.

    Args:
        arguments: the trainer's own: the config file and `--key value`.
        launch: a name of `launch_configs` or a file; absent: the user's own accelerate config, or else what fits
            the devices of this machine.
        processes: how many processes; absent: one per GPU with a launch config for several, else what it says.
        sharded: the config says `use_fsdp`.

    Raises:
        ValueError: there is no such launch config, it is none, or it cannot start so many processes.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file

    # Choose the launch config.
    named, devices = launch_configs(), torch.cuda.device_count()
    if launch is None and not Path(default_config_file).is_file():
        alone = "cpu" if processes in (None, 1) else "cpu_2proc"
        launch = "fsdp2" if sharded else alone if not devices else "single_gpu" if devices == 1 else "ddp"
    path = Path(default_config_file) if launch is None else named.get(launch, local_path(launch))
    if not path.is_file():
        near = difflib.get_close_matches(str(launch), named, 1, 0.5)
        raise ValueError(
            f"--launch '{launch}' is no file and no launch config of the package; it has {', '.join(named)}"
            + (f"; nearest: '{near[0]}'" if near else "")
        )

    # Fit it to this machine: accelerate stays on the CPU with several processes only if a variable says so.
    settings = read_yaml(str(path), what="--launch")
    if settings.get("distributed_type") == "DEEPSPEED":
        raise ValueError(NO_DEEPSPEED)
    if processes is None and launch in SEVERAL:
        processes = max(devices, 1)
    if processes is not None and processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    if (processes or 1) > 1 and settings.get("distributed_type", "NO") in ("NO", False):
        raise ValueError(
            f"--processes {processes}: {path.name} starts one process; choose --launch ddp or fsdp2, or cpu_2proc"
        )
    on_cpu = settings.get("use_cpu")
    options = ["--config_file", str(path), *(["--num_processes", str(processes)] if processes else [])]
    variables = {"ACCELERATE_USE_CPU": "true"} if on_cpu and "ACCELERATE_USE_CPU" not in os.environ else {}
    return [*options, "-m", f"stable_cascade.trainers.{trainer}", *arguments], variables


def run_launch(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """Start `accelerate launch` with these arguments, wait for the end; the training's exit status.

    What stops the training has been printed by its process: the launcher's own trace of it is left out.
    """
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A terminal interrupts the training too, which saves and ends; what only this process is sent is passed on.
    def pass_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, pass_on)
    os.environ.update(variables)
    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except subprocess.CalledProcessError as ended:
        status = ended.returncode
    except ChildFailedError as ended:
        status = ended.get_first_failure()[1].exitcode
    except SignalException as ended:
        status = -ended.sigval
    else:
        return 0
    if status >= 0:
        return status
    sys.stderr.write(f"error: the training was ended by {signal.Signals(-status).name}\n")
    return 128 - status
