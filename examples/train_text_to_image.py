"""Trains Stage C on pictures with captions: `accelerate launch examples/train_text_to_image.py --config FILE`.

The accelerate config chooses devices, precision and sharding; everything else is in FILE (`--help` lists its keys).
"""

from __future__ import annotations

from pathlib import Path

import torch

from stable_cascade import build
from stable_cascade.config import TextToImageConfig, load_config, run_main
from stable_cascade.objectives.prior import ConditionedPrior, prior_loss
from stable_cascade.plan import plan_training
from stable_cascade.previews import prior_previews
from stable_cascade.training.ema import averaged
from stable_cascade.training.loop import train


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `prior/` (the moving average where there is one) in diffusers layout."""
    config = load_config(TextToImageConfig, argv)
    plan = plan_training(config, trains="prior", needs=["prior", "semantic_encoder", "previewer"])
    if config.check:
        print(plan)
        return
    index = build.samples(config)
    accelerator = build.launch(config, plan)
    device, dtype = accelerator.device, getattr(torch, config.dtype)

    encoder = build.frozen(config, "semantic_encoder", device)
    tokenizer, text_encoder = build.text_encoder(config, dtype=dtype)
    prior = build.network(config, "prior")
    if config.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    model = ConditionedPrior(prior, text_encoder.to(device), tokenizer)
    embed_image = build.image_embedder(config, device)
    weighting = build.loss_weight(config)
    batches = build.batches(config, index, accelerator, factor=encoder.stride)

    def loss_fn(model, batch):
        return prior_loss(
            model,
            batch.pixels.to(device),
            batch.captions,
            batch.seeds,
            encode=encoder,
            embed_image=embed_image,
            weight=weighting.weight,
            prediction_type=config.prediction_type,
            offset_noise=config.offset_noise,
            caption_dropout=config.caption_dropout,
            shift=config.shift,
        )

    def save_fn(directory: Path, model: ConditionedPrior, ema) -> None:
        with averaged(model, ema):
            model.prior.save_pretrained(directory / "prior")

    train(
        config,
        accelerator,
        model=model,
        batches=batches,
        loss_fn=loss_fn,
        save_fn=save_fn,
        preview_fn=prior_previews(config, device, batches, encoder),
        stateful=weighting.stateful,
        after_step=weighting.after_step,
    )


if __name__ == "__main__":
    run_main(main)
