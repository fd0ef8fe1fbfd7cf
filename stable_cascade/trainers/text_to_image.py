"""Trains Stage C on images with captions: `stable-cascade train text-to-image FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_cascade import factory
from stable_cascade.config import TextToImageConfig, load_config, run_main
from stable_cascade.objectives.denoising import ConditionedPrior
from stable_cascade.trainers.check import plan_training
from stable_cascade.trainers.previews import prior_previews
from stable_cascade.trainers.start import start
from stable_cascade.training.loop import train
from stable_cascade.training.optimizers import averaged


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `prior/` (the moving average where there is one) in diffusers layout."""
    # Check everything that can be checked before weights are read.
    config = load_config(TextToImageConfig, argv)
    needs = ["prior", "semantic_encoder", *factory.preview_networks(config)]
    plan = plan_training(config, trains="prior", needs=needs)
    if config.check:
        return plan.report()

    # Find the images, start the processes.
    index = factory.samples(config)
    accelerator = start(config, plan.text, index)

    # Load the frozen networks and the prior.
    inputs = factory.prior_inputs(config, accelerator, index)
    prior = factory.network(config, "prior")
    factory.checkpoint_gradients(config, prior)
    model = ConditionedPrior(prior, inputs.text)
    weighting = factory.loss_weight(config)

    # What is exported.
    def save_fn(directory: Path, model: Any, ema: Any) -> None:
        with averaged(model, ema):
            model.prior.save_pretrained(directory / "prior")

    train(
        config,
        accelerator,
        model=model,
        batches=inputs.batches,
        loss_fn=factory.prior_loss_fn(config, inputs, weighting.weight),
        save_fn=save_fn,
        preview_fn=prior_previews(config, accelerator.device, inputs),
        stateful=weighting.stateful,
        after_step=weighting.after_step,
        data=factory.content(index),
    )


if __name__ == "__main__":
    run_main(main)
