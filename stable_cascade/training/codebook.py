"""Codes that no picture uses get a new life as latents of current pictures, the same on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.training.randomness import step_seed


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
        if step == self.step:
            return 0
        self.step = step
        if step % self.every or not self.candidates:
            return 0
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
