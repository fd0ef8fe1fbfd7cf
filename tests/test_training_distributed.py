from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.toy_run import Toy, saved, toy_arguments, toy_config, toy_train
from tests.two_processes import launch_two

ROOT = Path(__file__).parent.parent


def launch(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """The toy on two processes, through torchrun: without mpirun accelerate's MULTI_CPU silently starts one."""
    return launch_two(ROOT / "tests/toy_run.py", *toy_arguments(folder), **environment)


def test_two_processes_equal_one(tmp_path):
    """With adaptive weights, accumulation and a moving average; without dropout, whose masks are per process."""
    done = launch(tmp_path / "two", TOY_DROPOUT="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes=2 finished=True step=12" in done.stdout
    one = saved(toy_train(toy_config(tmp_path / "one"), Toy(dropout=0.0)).export)
    two = saved(tmp_path / "two/runs/toy/final")
    for kind in ("own", "ema"):
        for name, weight in one[kind].items():
            assert (two[kind][name] - weight).abs().max() <= 1e-5, (kind, name)
    assert not torch.equal(one["own"]["outer.weight"], Toy().outer.weight)


def test_bad_sample_of_the_second_process_is_named(tmp_path):
    # Step 6, second micro-batch, second process: positions 5 * 8 + 4 + 2 and + 3.
    done = launch(tmp_path, TOY_BAD="toy.tar/0047")
    assert done.returncode != 0
    assert "step 6: the loss is not finite; samples: toy.tar/0047;" in done.stderr
    assert [path.name for path in (tmp_path / "runs/toy").iterdir()] == ["step-00000004"]


def test_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    from types import SimpleNamespace

    from stable_cascade.training import check_launch

    accelerator = SimpleNamespace(num_processes=3, distributed_type=SimpleNamespace(value="MULTI_GPU"))
    with pytest.raises(
        ValueError, match=r"batch_size 8 is not divisible by grad_accum_steps 2 x 3 processes; nearest: 6"
    ):
        check_launch(toy_config(tmp_path), accelerator)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from stable_cascade.training import sharding
from stable_cascade.training.ema import MovingAverage, averaged, trainable
from tests.toy_run import Toy

def make():
    model = Toy(dropout=0.0)
    plan = sharding.blueprint(model)
    assert all(weight.is_meta for weight in plan.state_dict().values())
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.inner, model.outer):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, plan, torch.optim.AdamW(trainable(model).values(), lr=0.01)

def steps(model, optimizer, ema, first, last):
    for step in range(first, last):
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        (model(rows) - rows.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1)

def gather(model, optimizer, ema):
    weights, state = sharding.gather_weights(model), sharding.gather_optimizer(model, optimizer)
    with averaged(model, ema):
        return weights, state, sharding.gather_weights(model)

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
model, plan, optimizer = make()
ema = MovingAverage(model, beta=0.9)
steps(model, optimizer, ema, 0, 3)
gathered = gather(model, optimizer, ema)
if dist.get_rank() == 0:
    torch.save(gathered, sys.argv[1])
dist.barrier()
steps(model, optimizer, ema, 3, 6)
whole = gather(model, optimizer, ema)

weights, state, average = torch.load(sys.argv[1], weights_only=True)
model, plan, optimizer = make()
ema = MovingAverage(model, beta=0.9)
sharding.spread_weights(model, average)
ema.take(model)
sharding.spread_weights(model, weights)
sharding.spread_optimizer(model, optimizer, state)
steps(model, optimizer, ema, 3, 6)
again = gather(model, optimizer, ema)
if dist.get_rank() == 0:
    for one, other in ((whole[0], again[0]), (whole[2], again[2])):
        assert all(torch.equal(one[name], other[name]) for name in one)
    built = sharding.build(plan, again[0], torch.device("cpu"))
    rows = torch.ones(2, 8)
    plain = Toy(dropout=0.0)
    plain.load_state_dict(again[0])
    assert torch.equal(built(rows), plain(rows))
    assert not torch.equal(plain.outer.weight, Toy().outer.weight)
    print("sharded resume is exact")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_weights_are_gathered_and_spread_without_loss(tmp_path):
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program),
         str(tmp_path / "state.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded resume is exact" in done.stdout
