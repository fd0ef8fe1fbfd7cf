"""The accelerator of a run."""

from __future__ import annotations

from typing import Any

from stable_cascade.data import SampleIndex, SampleStream
from stable_cascade.training.processes import shared
from stable_cascade.training.run_folder import check_run_folders
from stable_cascade.training.tracking import check_launch, make_accelerator

from .captions import caption_facts


def launch(config: Any, plan: str, index: SampleIndex | SampleStream, *, may_idle: bool = False) -> Any:
    """The accelerator of this process; prints the plan and what there is to train on.

    What would stop the training later stops it here, before weights are read: a launch that contradicts the config, a
    run folder that cannot be written to or is in use, tokens that no caption contains.

    Args:
        may_idle: some of what trains takes no part in some steps, which several processes have to expect.

    Raises:
        ValueError: as `check_launch`, `check_run_folders` and `caption_facts`.
    """
    options: dict[str, Any] = {}
    if may_idle:
        from accelerate import DistributedDataParallelKwargs

        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = make_accelerator(config, **options)
    check_launch(config, accelerator)
    lines, error = [plan], ""
    if accelerator.is_main_process:
        try:
            check_run_folders(config)
            lines.append(f"data            {data_entry(config, index)}")
        except ValueError as found:
            error = str(found)
    if error := shared(accelerator, error):
        raise ValueError(error)
    lines.append(f"processes       {accelerator.num_processes}, this one on {accelerator.device}")
    accelerator.print("\n".join(lines))
    return accelerator


def data_entry(config: Any, index: SampleIndex | SampleStream) -> str:
    """What there is to train on, as the plan tells it.

    Raises:
        ValueError: as `caption_facts`.
    """
    if isinstance(index, SampleStream):
        return "a stream, read in its order"
    return "\n                ".join([str(index.report), *caption_facts(config, index)])
