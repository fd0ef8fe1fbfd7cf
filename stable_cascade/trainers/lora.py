"""Trains a LoRA, and tokens if asked, on Stage C: `stable-cascade train lora FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_cascade import factory
from stable_cascade.adapters import save_lora
from stable_cascade.config import LoraConfig, load_config, run_main
from stable_cascade.objectives.denoising import ConditionedPrior
from stable_cascade.trainers.check import plan_training
from stable_cascade.trainers.previews import prior_previews
from stable_cascade.trainers.start import start
from stable_cascade.training.loop import train
from stable_cascade.training.optimizers import averaged


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `pytorch_lora_weights.safetensors` and `learned_embeds.safetensors`."""
    # Check everything that can be checked before weights are read.
    config = load_config(LoraConfig, argv)
    plan = plan_training(
        config, trains="LoRA of the prior", needs=["prior", "semantic_encoder", *factory.preview_networks(config)]
    )
    if config.check:
        return plan.report()

    # Find the images, start the processes.
    index = factory.samples(config)
    accelerator = start(config, plan.text, index)
    device = accelerator.device

    # Load the frozen networks; put adapters on the prior, tokens and adapters on the text encoder.
    text = factory.trainable_text(config)
    inputs = factory.prior_inputs(config, accelerator, index, text and text.to(device))
    prior = factory.frozen_base(config, device)
    factory.add_config_lora(config, prior)
    factory.checkpoint_gradients(config, prior)
    model = ConditionedPrior(prior, inputs.text)
    weighting = factory.loss_weight(config)

    # What is exported.
    def save_fn(directory: Path, model: Any, ema: Any) -> None:
        with averaged(model, ema):
            save_lora(directory, prior=model.prior, text_encoder=getattr(model.text, "text_encoder", None))

    train(
        config,
        accelerator,
        model=model,
        batches=inputs.batches,
        loss_fn=factory.prior_loss_fn(config, inputs, weighting.weight),
        save_fn=save_fn,
        preview_fn=prior_previews(config, device, inputs),
        stateful=weighting.stateful,
        after_step=weighting.after_step,
        learning_rate=factory.learning_rate(config),
        data=factory.content(index),
    )


if __name__ == "__main__":
    run_main(main)
