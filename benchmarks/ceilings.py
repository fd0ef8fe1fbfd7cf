"""Where a step's time goes: kinds of operations, and the floating-point operations against this machine's ceiling.

`python -m benchmarks.ceilings` prints the tables of docs/performance.md for the machine at hand.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .measure import seconds
from .networks import forward, gradients
from .proxies import decoder_inputs, decoder_pair, prior_inputs, prior_pair
from .run import hardware
from .scale import CPU, GPU, Scale

KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("aten::bmm", "aten::baddbmm", "softmax", "scaled_dot_product", "flash", "efficient_attention"),
    "convolutions": ("conv",),
    "norms": ("layer_norm", "ResponseScale", "aten::pow", "aten::square", "aten::sum", "vector_norm", "aten::mean"),
    "activations": ("gelu", "silu"),
    "copies": ("aten::cat", "aten::copy_", "aten::clone", "aten::fill_", "aten::zero_"),
}
"""Parts of operators' names by kind, the first that fits; what fits none is the arithmetic between them."""


def main(argv: list[str] | None = None) -> None:
    """Prints operations, time and utilisation of ours and the peer, and the shares of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    scale = GPU if parser.parse_args(argv).gpu else CPU
    ceiling = matrix_ceiling(scale)
    print(f"{hardware()}, {str(scale.dtype).removeprefix('torch.')}: {ceiling / 1e9:.0f} GFLOP/s in a matrix product")
    print(f"copies {bandwidth(scale) / 1e9:.1f} GB/s (bytes read and written)\n")
    print("| work | whose | GFLOP | s | GFLOP/s | of the ceiling | " + " | ".join([*KINDS, "the rest"]) + " |")
    print("|---" * (6 + len(KINDS) + 1) + "|")
    for name, work, networks in works(scale):
        for whose, network in zip(("ours", "diffusers"), networks, strict=True):
            print(line(name, whose, lambda network=network, work=work: work(network), ceiling, scale))


def works(scale: Scale) -> list[tuple[str, Callable[[Any], Any], list[Any]]]:
    """(name, work, [our network, the peer's])."""
    prior = prior_pair(scale.prior, scale.dtype, scale.device)
    decoder = decoder_pair(scale.decoder, scale.dtype, scale.device)
    given = prior_inputs(scale.prior, 1, scale.semantic, scale.dtype, scale.device)
    given_b = decoder_inputs(scale.decoder, 1, scale.vq, scale.semantic, scale.dtype, scale.device)
    return [
        ("prior forward", lambda network: forward(network, given), prior),
        ("prior forward + backward", lambda network: gradients(network, given), prior),
        ("Stage B forward", lambda network: forward(network, given_b), decoder),
    ]


def line(name: str, whose: str, work: Callable[[], Any], ceiling: float, scale: Scale) -> str:
    """One row: the fastest of a few runs, and the shares of a profiled one."""
    work()
    with FlopCounterMode(display=False) as counter:
        work()
    operations, time = counter.get_total_flops(), min(seconds(work) for _ in range(5))
    columns = [f"{operations / 1e9:.0f}", f"{time:.3f}", f"{operations / time / 1e9:.0f}",
               f"{operations / time / ceiling:.0%}"]  # fmt: skip
    columns += [f"{part:.0%}" for part in shares(work, scale).values()]
    return f"| {name} | {whose} | " + " | ".join(columns) + " |"


def shares(work: Callable[[], Any], scale: Scale) -> dict[str, float]:
    """The share of each kind of operation in the time of one run, on the device that computes."""
    on_gpu = scale.device == "cuda"
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=kinds) as taken:
        work()
    spent: dict[str, float] = defaultdict(float)
    for event in taken.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.key)] += own
    total = sum(spent.values())
    return {kind: spent[kind] / total for kind in (*KINDS, "the rest")}


def kind_of(operator: str) -> str:
    """The kind of an operator by its name."""
    for kind in ("attention", *KINDS):  # attention first: its softmax and products have names of their own
        if any(operator == part or (":" not in part and part in operator) for part in KINDS[kind]):
            return kind
    return "the rest"


def matrix_ceiling(scale: Scale) -> float:
    """Floating-point operations a second of a large matrix product in the networks' type."""
    side = 8192 if scale.device == "cuda" else 2048
    left, right = (torch.randn(side, side, device=scale.device, dtype=scale.dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: left @ right) for _ in range(6))


def bandwidth(scale: Scale) -> float:
    """Bytes read and written a second when a large tensor is copied."""
    source = torch.zeros(2**28 if scale.device == "cuda" else 2**26, device=scale.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))


if __name__ == "__main__":
    main()
