"""Trains an image encoder and its previewer as one autoencoder, as the embedded cascade needs them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stable_cascade import factory
from stable_cascade.config import SemanticEncoderConfig, load_config, run_main
from stable_cascade.objectives.vqgan import EncoderWithPreviewer, semantic_encoder_loss
from stable_cascade.trainers.check import plan_training
from stable_cascade.training.loop import train
from stable_cascade.training.optimizers import averaged
from stable_cascade.training.sheets import preview_sheet
from stable_cascade.training.tracking import make_accelerator


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `semantic_encoder/` and `previewer/` in diffusers layout."""
    config = load_config(SemanticEncoderConfig, argv)
    plan = plan_training(config, trains="semantic_encoder, previewer", needs=["semantic_encoder", "previewer"])
    if config.check:
        return plan.report()
    index = factory.samples(config)
    accelerator = make_accelerator(config)
    encoder, previewer = factory.network(config, "semantic_encoder"), factory.network(config, "previewer")
    batches = factory.batches(config, index, accelerator, factor=encoder.stride)
    model = EncoderWithPreviewer(encoder, previewer)
    shown = factory.shown(next(batches(0)), accelerator.device)[:16].cpu()

    def loss_fn(model: nn.Module, batch):
        return semantic_encoder_loss(
            model,
            factory.shown(batch, accelerator.device),
            batch.seeds,
            stride=encoder.stride,
            latent_noise=config.latent_noise,
        )

    def save_fn(directory: Path, model: EncoderWithPreviewer, ema) -> None:
        with averaged(model, ema):
            model.semantic_encoder.save_pretrained(directory / "semantic_encoder")
            model.previewer.save_pretrained(directory / "previewer")

    def preview_fn(directory: Path, model: EncoderWithPreviewer, step: int, ema) -> list[Path]:
        pixels = shown.to(accelerator.device)
        with torch.no_grad():
            rebuilt = model(pixels, torch.zeros(())).float().cpu().clamp(0, 1)
        rows = [("images", shown), ("rebuilt", rebuilt)]
        return [preview_sheet(rows, directory / f"{step:07d}.png")]

    train(config, accelerator, model=model, batches=batches, loss_fn=loss_fn, save_fn=save_fn, preview_fn=preview_fn)


if __name__ == "__main__":
    run_main(main)
