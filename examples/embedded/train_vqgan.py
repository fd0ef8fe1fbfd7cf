"""Trains Stage A of a small cascade: `accelerate launch examples/embedded/train_vqgan.py --config …/vqgan.yaml`."""

from __future__ import annotations

from pathlib import Path

import torch

from stable_cascade import build
from stable_cascade.config import VQGANConfig, load_config, run_main
from stable_cascade.objectives.autoencoding import Autoencoder, latent_scale, vqgan_loss
from stable_cascade.plan import plan_training
from stable_cascade.training.ema import averaged
from stable_cascade.training.loop import train
from stable_cascade.training.sheets import preview_sheet
from stable_cascade.training.tracking import make_accelerator


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `vqgan/` in diffusers layout with its latent scale measured."""
    config = load_config(VQGANConfig, argv)
    plan = plan_training(config, trains="vqgan", needs=["vqgan"])
    if config.check:
        print(plan)
        return
    index = build.samples(config)
    accelerator = make_accelerator(config)
    vqgan = build.network(config, "vqgan")
    for block in [m for m in vqgan.modules() if hasattr(m, "gammas")]:
        # gammas start at zero in the original, which leaves every block's branches dead for thousands of steps.
        block.gammas.data[2], block.gammas.data[5] = 1.0, 0.5
    model = Autoencoder(vqgan)
    batches = build.batches(config, index, accelerator, factor=4)
    shown = next(batches(0)).pixels[:16]

    def loss_fn(model, batch):
        return vqgan_loss(model, batch.pixels.to(accelerator.device))

    def save_fn(directory: Path, model, ema) -> None:
        with averaged(model, ema):
            scale = latent_scale(model.vqgan, [shown.to(accelerator.device)])
            model.vqgan.register_to_config(scale_factor=scale)
            model.vqgan.save_pretrained(directory / "vqgan")

    def preview_fn(directory: Path, model, step: int, ema) -> list[Path]:
        with torch.no_grad():
            rebuilt = model(shown.to(accelerator.device)).float().cpu().clamp(0, 1)
        rows = [("pictures", shown), ("rebuilt", rebuilt)]
        return [preview_sheet(rows, directory / f"{step:07d}.png")]

    train(config, accelerator, model=model, batches=batches, loss_fn=loss_fn, save_fn=save_fn, preview_fn=preview_fn)


if __name__ == "__main__":
    run_main(main)
