"""The accelerator of a run."""

from __future__ import annotations

from typing import Any

from stable_cascade.training.tracking import check_launch, make_accelerator


def launch(config: Any, plan: str, *, may_idle: bool = False) -> Any:
    """The accelerator of this process, after refusing a launch that contradicts the config; prints the plan.

    Args:
        may_idle: some of what trains takes no part in some steps, which several processes have to expect.

    Raises:
        ValueError: as `check_launch`.
    """
    options: dict[str, Any] = {}
    if may_idle:
        from accelerate import DistributedDataParallelKwargs

        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = make_accelerator(config, **options)
    check_launch(config, accelerator)
    accelerator.print(f"{plan}\nprocesses       {accelerator.num_processes}, this one on {accelerator.device}")
    return accelerator
