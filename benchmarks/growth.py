"""How cost grows: step time and memory over latent side and batch, data throughput over workers; a plot of each.

`python -m benchmarks.growth` writes `docs/images/growth.png` and prints the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stable_cascade import StableCascadePrior

from .data import ASPECTS, SIDE, write_shard
from .measure import forget_memory, memory, seconds
from .networks import gradients
from .proxies import prior_inputs, seeded
from .scale import CPU, GPU, Scale

ROOT = Path(__file__).resolve().parents[1]
SIDES, BATCHES, WORKERS = (12, 24, 48), (1, 4, 16), (0, 1, 2, 4)
MOST_TOKENS = 48 * 48 * 4
"""Latents in a batch up to which a CPU ends within a minute or two; the cells beyond it stay empty."""
LONGEST = 30.0
"""Seconds after which a cell is not measured again."""


def main(argv: list[str] | None = None) -> None:
    """Measures each cell in a process of its own, so that its peak memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs=2, type=int, metavar=("SIDE", "BATCH"), help="measure one cell, print JSON")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/growth.png")
    arguments = parser.parse_args(argv)
    scale = GPU if arguments.gpu else CPU
    if arguments.cell:
        print(json.dumps(step_cost(scale, *arguments.cell)))
        return
    cells = {}
    for side in SIDES:
        for batch in BATCHES:
            if scale.device == "cuda" or side * side * batch <= MOST_TOKENS:
                cells[side, batch] = in_own_process(side, batch, gpu=arguments.gpu)
                print(f"side {side}, batch {batch}: {cells[side, batch]}", flush=True)
    throughput = {workers: images_per_second(workers) for workers in WORKERS}
    print(f"images per second by workers: {throughput}")
    plot(cells, throughput, arguments.plot)
    print(f"wrote {arguments.plot}")


def in_own_process(side: int, batch: int, *, gpu: bool) -> dict[str, float]:
    """Seconds and gigabytes of one cell."""
    command = [sys.executable, "-m", "benchmarks.growth", "--cell", str(side), str(batch), *["--gpu"] * gpu]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step_cost(scale: Scale, side: int, batch: int) -> dict[str, float]:
    """Seconds of forward and backward of the prior, and the peak memory beyond that of the network."""
    network = seeded(StableCascadePrior(**scale.prior)).to(scale.device, scale.dtype).eval()
    inputs = prior_inputs(scale.prior, batch, side, scale.dtype, scale.device)
    gc.collect()
    forget_memory(scale.device)
    before, times = memory(scale.device), [seconds(lambda: gradients(network, inputs))]
    while len(times) < 3 and sum(times) < LONGEST:
        times.append(seconds(lambda: gradients(network, inputs)))
    return {"seconds": min(times), "gigabytes": memory(scale.device) - before}


def images_per_second(workers: int, batches: int = 16) -> float:
    """What the data stream delivers with so many worker processes."""
    from stable_cascade.data import Plan, index_samples, training_batches

    with tempfile.TemporaryDirectory() as folder:
        index = index_samples(str(write_shard(Path(folder) / "images.tar")), cache_dir=folder)
        plan = Plan(image_size=SIDE, batch_size=4, multi_aspect_ratio=ASPECTS)
        stream: Any = training_batches(index, plan, num_workers=workers)
        for _ in range(2):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return 4 * batches / (time.perf_counter() - start)


def plot(cells: dict[tuple[int, int], dict[str, float]], throughput: dict[int, float], path: Path) -> None:
    """Three panels: seconds, gigabytes, images per second."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for panel, key, label in (
        (panels[0], "seconds", "seconds a step"),
        (panels[1], "gigabytes", "GiB beside the weights"),
    ):
        for side in SIDES:
            points = [(batch, cells[side, batch][key]) for batch in BATCHES if (side, batch) in cells]
            panel.plot(*zip(*points, strict=True), "o-", label=f"{side} x {side} latents")
        panel.set(xscale="log", yscale="log", xlabel="batch", ylabel=label, xticks=BATCHES, xticklabels=BATCHES)
        panel.legend(loc="lower right")
        panel.grid(alpha=0.3)
    panels[2].plot(list(throughput), list(throughput.values()), "o-")
    panels[2].set(xlabel="data workers", ylabel="images a second", ylim=(0, None), xticks=WORKERS)
    panels[2].grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
