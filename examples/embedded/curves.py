"""Draws the loss curves of the runs that made the embedded cascade, one panel a part.

Run: python examples/embedded/curves.py [--logs outputs/embedded/previews] [--out docs/images/embedded_curves.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {
    "vqgan": "Stage A",
    "image_encoder": "image encoder and previewer",
    "clip": "CLIP",
    "decoder": "Stage B",
    "prior": "Stage C",
}


def read_losses(log: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of one run; each loss is the mean since the point before it."""
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if "loss" in row]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def smooth(values: list[float], window: int) -> list[float]:
    """Means of up to `window` values that end at each place."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
            for i in range(len(values))]  # fmt: skip


def main() -> None:
    """Writes one PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("outputs/embedded/previews"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/embedded_curves.png"))
    arguments = parser.parse_args()
    figure, panels = plt.subplots(1, len(PARTS), figsize=(4 * len(PARTS), 3.2), layout="constrained")
    for panel, (run, name) in zip(panels, PARTS.items(), strict=True):
        steps, losses = read_losses(arguments.logs / run / "log.jsonl")
        panel.plot(steps, losses, color="#c8d3e8", linewidth=0.8)
        panel.plot(steps, smooth(losses, 20), color="#1f4e9c", linewidth=1.6)
        panel.set(title=f"{name}: {losses[-1]:.3f}", xlabel="step", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("training loss")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=80)
    print(arguments.out)


if __name__ == "__main__":
    main()
