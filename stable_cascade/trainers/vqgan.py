"""Trains Stage A, the autoencoder: `stable-cascade train vqgan FILE`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade import factory
from stable_cascade.config import VQGANConfig, load_config, run_main
from stable_cascade.models.vqgan import PatchDiscriminator
from stable_cascade.objectives.denoising import chosen
from stable_cascade.objectives.vqgan import AdversarialAutoencoder, latent_scale, prepare_new, vqgan_loss
from stable_cascade.trainers.check import plan_training
from stable_cascade.trainers.previews import vqgan_previews
from stable_cascade.trainers.start import start
from stable_cascade.training.loop import step_seed, train
from stable_cascade.training.optimizers import averaged

MEASURED = 64
"""Images that the statistics of a new Stage A are measured on, and its `scale_factor`."""


def main(argv: list[str] | None = None) -> None:
    """Reads the config, trains, writes `vqgan/` (the moving average where there is one) in diffusers layout."""
    # Check everything that can be checked before weights are read.
    config = load_config(VQGANConfig, argv)
    plan = plan_training(config, trains="vqgan", needs=["vqgan"])
    if config.check:
        return plan.report()

    # Find the images, start the processes.
    index = factory.samples(config)
    # Before adversarial_start the discriminator takes no part in a step, which several processes have to expect.
    accelerator = start(config, plan.text, index, may_idle=bool(config.adversarial_start))
    device = accelerator.device

    # Load Stage A, or make it, its statistics measured on the first images; add discriminator and codebook revival.
    vqgan, new = factory.network(config, "vqgan").to(device), config.stage_a_checkpoint_path == factory.SCRATCH
    batches = factory.batches(config, index, accelerator, factor=vqgan.stride)
    first = first_images(config, index, vqgan.stride).to(device)
    if new:
        prepare_new(vqgan, first, seed=config.seed)
    factory.checkpoint_gradients(config, vqgan)
    model = AdversarialAutoencoder(vqgan, make_discriminator(config), quantize=config.quantize_share > 0)
    revival = None
    if model.quantize and config.revive_every:
        revival = CodebookRevival(vqgan.vquantizer.embedding, accelerator, every=config.revive_every,
                                  batch_size=config.batch_size, seed=config.seed)  # fmt: skip

    # What a step computes, and what is exported.
    def loss_fn(model, numbered_batch):
        batch, step = numbered_batch.batch, numbered_batch.step
        if revival is not None:
            revival.before(step)
        pixels = factory.shown(batch, device)
        as_codes = chosen(batch.seeds, "quantize", config.quantize_share)
        rebuilt = model(pixels, as_codes, adversarial=step >= config.adversarial_start)
        if revival is not None:
            revival.record(rebuilt.indices, rebuilt.latents, batch.positions)
        return vqgan_loss(
            rebuilt,
            pixels,
            codebook_weight=config.codebook_weight,
            commitment_weight=config.commitment_weight,
            adversarial_weight=config.adversarial_weight,
        )

    def save_fn(directory: Path, model: Any, ema: Any) -> None:
        with averaged(model, ema):
            if new:  # a finetuned Stage A keeps the scale that Stage B was trained with
                model.vqgan.register_to_config(scale_factor=latent_scale(model.vqgan, first))
            model.vqgan.save_pretrained(directory / "vqgan")

    def learning_rate(name: str) -> float:
        own = config.discriminator_lr if name.startswith("discriminator.") else None
        return config.lr if own is None else own

    train(
        config,
        accelerator,
        model=model,
        batches=numbered(batches, config.grad_accum_steps),
        loss_fn=loss_fn,
        save_fn=save_fn,
        preview_fn=vqgan_previews(config, first),
        stateful={} if revival is None else {"codebook": revival},
        learning_rate=learning_rate,
        data=factory.content(index),
    )


def first_images(config: VQGANConfig, index, stride: int) -> torch.Tensor:
    """The first images of the training, the same on every process and for every split of a batch.

    Shapes: -> (up to 64, 3, H, W) in [0, 1].
    """
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    whole = replace(config, grad_accum_steps=1, num_workers=0)
    batch: Any = next(factory.batches(whole, index, alone, factor=stride)(0))
    return batch.pixels[:MEASURED]


def make_discriminator(config: VQGANConfig) -> PatchDiscriminator | None:
    """A new discriminator from the config's seed, if it has a say."""
    if not config.adversarial_weight:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return PatchDiscriminator(config.discriminator_channels)


@dataclass(frozen=True)
class NumberedBatch:
    """A micro-batch and the step it belongs to, counted from 0."""

    batch: Any
    step: int

    @property
    def keys(self) -> list[str]:
        """What the loop names when a loss is not finite."""
        return self.batch.keys

    @property
    def broken(self) -> int:
        """Number of samples that were replaced."""
        return self.batch.broken


def numbered(batches: Callable[[int], Iterator[Any]], parts: int) -> Callable[[int], Iterator[NumberedBatch]]:
    """The same micro-batches with their steps, for losses that change with the step; `parts` of them are a step."""

    def from_step(start: int) -> Iterator[NumberedBatch]:
        stream = batches(start)
        try:
            for number, batch in enumerate(stream):
                yield NumberedBatch(batch, start + number // parts)
        finally:
            if hasattr(stream, "close"):
                stream.close()

    return from_step


class CodebookRevival:
    """Counts how often each code is used; every `every` steps the unused ones become latents of the last step.

    Which latents is a function of (seed, step). Counts and candidates are those of all processes, and part of the
    checkpoint. The rows' moments in the optimizer are near zero, since an unused code has no gradient.

    Source: Dhariwal et al. 2020, *Jukebox*, section 3.3 (random restarts).
    """

    def __init__(self, codebook: nn.Embedding, accelerator: Any, *, every: int, batch_size: int, seed: int):
        self.codebook, self.accelerator, self.every, self.seed = codebook, accelerator, every, seed
        self.per_sample = -(-codebook.num_embeddings // batch_size)
        self.counts = torch.zeros(codebook.num_embeddings, dtype=torch.int64)
        self.candidates: list[tuple[Tensor, Tensor]] = []
        self.step = -1

    def before(self, step: int) -> int:
        """Called before every micro-batch; revives at the first one of the steps that are due, and says how many."""
        # Once per step, and only where the step is due.
        if step == self.step:
            return 0
        self.step = step
        if step % self.every or not self.candidates:
            return 0
        # Codes that nobody used take rows that were encoded lately; sorted, so that any number of processes agrees.
        dead = (self.counts == 0).nonzero().flatten()
        positions = torch.cat([positions for positions, _ in self.candidates])
        rows = torch.cat([rows for _, rows in self.candidates])[positions.argsort()].flatten(0, 1)
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        drawn = rows[torch.randperm(len(rows), generator=generator)[: len(dead)]]
        table = self.codebook.weight
        with torch.no_grad():
            table[dead[: len(drawn)].to(table.device)] = drawn.to(table)
        self.counts.zero_()
        self.candidates = []
        return len(drawn)

    def record(self, indices: Tensor, latents: Tensor, positions: Tensor) -> None:
        """Note the codes of a micro-batch, and in the step before a revival some of its latents.

        Shapes: indices (B, h, w) int64; latents (B, C, h, w); positions (B,) int64 global sample positions.
        """
        counts = torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.counts += self._over_processes(counts, "reduce").cpu()
        if (self.step + 1) % self.every:
            return
        rows = latents.detach().float().permute(0, 2, 3, 1).flatten(1, 2)
        drawn = []
        for row, position in zip(rows, positions.tolist(), strict=True):
            generator = torch.Generator().manual_seed(step_seed(self.seed, self.step, position))
            drawn.append(row[torch.randint(len(row), (self.per_sample,), generator=generator).to(row.device)])
        gathered = self._over_processes(torch.stack(drawn), "gather").cpu()
        self.candidates.append((self._over_processes(positions, "gather").cpu(), gathered))

    def _over_processes(self, value: Tensor, how: str) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        value = value.to(self.accelerator.device).contiguous()
        return self.accelerator.reduce(value, "sum") if how == "reduce" else self.accelerator.gather(value)

    def state_dict(self) -> dict[str, Any]:
        """Counts and candidates."""
        return {"counts": self.counts.clone(), "candidates": list(self.candidates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` saved."""
        self.counts = state["counts"].clone()
        self.candidates = list(state["candidates"])


if __name__ == "__main__":
    run_main(main)
