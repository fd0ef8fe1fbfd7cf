"""A step asks the device for no number: what every step would wait for, counted on the CPU, where nobody notices."""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stable_cascade.adapters import add_lora
from stable_cascade.data import Batch
from stable_cascade.diffusion.weighting import AdaptiveLossWeight, p2_weight
from stable_cascade.objectives.denoising import ConditionedPrior, decoder_loss, prior_loss
from stable_cascade.training import make_accelerator, train
from stable_cascade.training.tracking import LossByNoiseLevel
from stable_cascade.transfer import to_device, to_host
from tests.tiny_cascade import tiny_decoder, tiny_prior
from tests.toy_run import Toy, save_toy, toy_batches, toy_config, toy_loss

READ = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal}
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
"""What makes the host wait for a number, or, with a mask as the index, for a shape that only the device knows."""


class Reads(TorchDispatchMode):
    """Counts reads of tensors by the line of the package that asked; `tolist` is no operation on the CPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.places: Counter[str] = Counter()
        plain = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda values: self.count() or plain(values))

    def count(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/stable_cascade/" in frame.filename]
        self.places[f"{frames[-1].filename.rpartition('/')[2]}: {frames[-1].line}" if frames else "elsewhere"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.overloadpacket in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or function.overloadpacket in READ:
            self.count()
        return function(*args, **(kwargs or {}))


def seeds() -> torch.Tensor:
    return torch.tensor([5, 6])


def prior_step(lora: bool):
    """A function that does a whole step of Stage C's training."""
    prior = tiny_prior(dropout=0.1).requires_grad_(not lora).train()
    if lora:
        add_lora(prior, module_filters=[".attn"], rank=2)
    generator = torch.Generator().manual_seed(0)
    hidden, pooled, clean = (torch.randn(*s, generator=generator) for s in ((2, 5, 32), (2, 1, 32), (2, 16, 4, 4)))
    model = ConditionedPrior(prior, lambda captions: (hidden, pooled))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    adaptive, levels = AdaptiveLossWeight(), LossByNoiseLevel()

    def step() -> None:
        for weight in (p2_weight, adaptive):
            terms = prior_loss(model, clean, ["a dog", "a snail"], seeds(), weight=weight, mask=torch.ones(2, 1, 4, 4))
            terms["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        adaptive.update(terms["log_snr"], terms["unweighted"])
        levels.add(terms["log_snr"], terms["unweighted"])

    return step


def decoder_step():
    """A function that does a step of Stage B's training."""
    decoder = tiny_decoder().requires_grad_(True).train()
    generator = torch.Generator().manual_seed(0)
    pixels, pooled = (torch.rand(*shape, generator=generator) for shape in ((2, 3, 64, 64), (2, 1, 32)))
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)

    def step() -> None:
        terms = decoder_loss(
            decoder, pixels, ["a dog", ""], seeds(), 3,
            encode_vq=lambda shown: torch.nn.functional.avg_pool2d(shown, 4).repeat(1, 2, 1, 1)[:, :4],
            encode_semantic=lambda shown: torch.nn.functional.avg_pool2d(shown, 32).repeat(1, 6, 1, 1)[:, :16],
            embed_text=lambda captions: pooled, weight=p2_weight, effnet_noise=0.1,
        )  # fmt: skip
        terms["loss"].mean().backward()
        optimizer.step()

    return step


JUSTIFIED = {"noise.py", "denoising.py: dropped = chosen", "denoising.py: draw = torch.rand"}
"""The samples' seeds, which captions are dropped, the shrunk image's size: drawn on the CPU and never elsewhere."""


@pytest.mark.parametrize(
    "made", [lambda: prior_step(True), lambda: prior_step(False), decoder_step], ids=["lora", "prior", "decoder"]
)
def test_a_step_reads_only_what_was_drawn_on_the_cpu(made, monkeypatch):
    step = made()
    step()
    with Reads(monkeypatch) as reads:
        step()
    odd = {place for place in reads.places if not any(place.startswith(name) for name in JUSTIFIED)}
    assert not odd, reads.places
    assert reads.places, "the seeds at least are read"


def test_reads_are_seen(monkeypatch):
    with Reads(monkeypatch) as reads:
        value = torch.ones(3)
        assert bool(value.any())
        value[value > 0] = 2
        assert value[value > 0].sum().item() == 6
        assert value.tolist() == [2, 2, 2]
    assert sum(reads.places.values()) == 5


def test_the_loop_reads_one_status_per_step(tmp_path, monkeypatch):
    """And reads it late where the device allows: after the next step's gradients are on their way."""
    from stable_cascade.training import loop, run

    monkeypatch.setattr(run, "reads_late", lambda config, device: True)
    config = toy_config(tmp_path, updates=6, save_every=100, log_every=100)
    events: list[str] = []

    def watched(values):
        read = to_host(values)
        number = sum(event.startswith("sent") for event in events)
        events.append(f"sent {number}")
        return lambda: events.append(f"read {number}") or read()

    monkeypatch.setattr(loop, "to_host", watched)
    weight = AdaptiveLossWeight()
    train(config, make_accelerator(config), model=Toy(), batches=toy_batches(config), loss_fn=toy_loss(weight),
          save_fn=save_toy, preview_fn=lambda *_: [], after_step=weight.update)  # fmt: skip
    steady = [f"{what} {step - (what == 'read')}" for step in range(1, 6) for what in ("sent", "read")]
    assert events == ["sent 0", *steady, "read 5"]


def test_tensors_that_stay_on_the_cpu_are_left_alone():
    x = torch.ones(3)
    assert to_device(x, "cpu") is x
    assert to_host(x)() == [1.0, 1.0, 1.0]


def test_batch_knows_its_tensors():
    """`pin_memory` reaches all of them; a batch of an unknown class would be left in ordinary memory."""
    batch = Batch(torch.ones(1), ["a"], ["k"], torch.ones(1), torch.ones(1), masks=torch.ones(1), weights=None)
    assert set(batch.tensors()) == {"pixels", "seeds", "positions", "masks"}
