"""Starting a trainer through accelerate's launcher, in a process of its own or in several."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        ValueError: there is no such launch config.
    """
    import torch
    import yaml
    from accelerate.commands.config.config_args import default_config_file

    # Choose the launch config.
    named, devices = launch_configs(), torch.cuda.device_count()
    if launch is None and not Path(default_config_file).is_file():
        alone = "cpu" if processes in (None, 1) else "cpu_2proc"
        launch = "fsdp2" if sharded else alone if not devices else "single_gpu" if devices == 1 else "ddp"
    path = Path(default_config_file) if launch is None else named.get(launch, Path(launch))
    if not path.is_file():
        near = difflib.get_close_matches(str(launch), named, 1, 0.5)
        raise ValueError(
            f"--launch '{launch}' is no file and no launch config of the package; it has {', '.join(named)}"
            + (f"; nearest: '{near[0]}'" if near else "")
        )

    # Fit it to this machine: accelerate stays on the CPU with several processes only if a variable says so.
    if processes is None and launch in SEVERAL:
        processes = max(devices, 1)
    on_cpu = yaml.safe_load(path.read_text(encoding="utf-8")).get("use_cpu")
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
        return ended.returncode
    except ChildFailedError as ended:
        return ended.get_first_failure()[1].exitcode
    except SignalException as ended:
        return 128 + ended.sigval
    return 0
