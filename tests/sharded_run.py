"""Runs a program of the tests sharded over CPU processes: python tests/sharded_run.py PROGRAM [ARGUMENTS]

Accelerate shards on accelerators only: on the CPU its state is MULTI_CPU whatever the launch config says. So this sets
the state's type itself; everything after it (wrapping, optimizer, clipping) is accelerate's own FSDP path, with the
plugin made from the launch config.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard() -> None:
    """Makes the accelerator that the program builds a sharding one."""
    state = Accelerator().state
    assert state.num_processes == int(os.environ["WORLD_SIZE"])
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(state.mixed_precision)


if __name__ == "__main__":
    shard()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
