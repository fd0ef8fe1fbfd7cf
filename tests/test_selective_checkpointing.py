"""Selective checkpointing: the gradients of a plain step, less memory, and no matrix product computed twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stable_cascade.models import checkpointing as module
from stable_cascade.models.checkpointing import chosen_checkpoint, chosen_contexts, selective_checkpoint
from stable_cascade.models.controlnet import LargeBottleneck
from stable_cascade.models.semantic_encoder import EfficientNetFeatures
from tests.test_vqgan import random_vqgan
from tests.tiny_cascade import tiny_decoder, tiny_prior

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.convolution.default)
STAGES = {"stem_width": 8, "block_types": ("fused", "mbconv"), "widths": (8, 16), "depths": (1, 2), "strides": (1, 2),
          "expansions": (2, 2), "head_width": 16, "stochastic_depth": 0.5}  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prior_case():
    prior = tiny_prior(dropout=[0.2, 0.2])
    text = {"clip_text": drawn(2, 7, 32), "clip_text_pooled": drawn(2, 1, 32)}
    return prior, lambda: prior(drawn(2, 16, 6, 8), torch.tensor([0.3, 0.9]), **text).sample


def decoder_case():
    decoder = tiny_decoder()
    inputs = {"clip_text_pooled": drawn(2, 1, 32), "effnet": drawn(2, 16, 4, 4)}
    return decoder, lambda: decoder(drawn(2, 4, 16, 16), torch.tensor([0.3, 0.9]), **inputs).sample


def vqgan_case():
    vqgan = random_vqgan(bottleneck_blocks=3)
    return vqgan, lambda: vqgan(drawn(2, 3, 16, 16)).sample


def efficientnet_case():
    torch.manual_seed(0)
    network = EfficientNetFeatures(**STAGES)
    return network, lambda: network(drawn(2, 3, 32, 32))


def bottleneck_case():
    torch.manual_seed(0)
    network = LargeBottleneck(3, hidden=16, width=16, depth=2, out_channels=8)
    return network, lambda: network(drawn(2, 3, 6, 6))


CASES = {"prior": prior_case, "decoder": decoder_case, "vqgan": vqgan_case, "efficientnet": efficientnet_case,
         "large bottleneck": bottleneck_case}  # fmt: skip


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def choose(network, choice):
    """As diffusers sets it, for networks and parts of them."""
    for part in network.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = bool(choice)
            torch_own = lambda function, *args: checkpoint(function, *args, use_reentrant=False)  # noqa: E731
            part._gradient_checkpointing_func = chosen_checkpoint(choice) or torch_own


def step(case, choice):
    """Gradients, buffers, what ran, and the bytes that autograd held before the backward pass."""
    network, forward = CASES[case]()
    network.train().requires_grad_(True)
    choose(network, choice)
    torch.manual_seed(1)
    with Counting() as counting:
        forward().square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients, dict(network.named_buffers()), counting.counts


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_plain_step_and_no_product_runs_twice(case):
    gradients, buffers, counts = step(case, False)
    kept_gradients, kept_buffers, kept_counts = step(case, "selective")
    assert len(gradients) == len(kept_gradients) > 5
    for name, gradient in gradients.items():
        torch.testing.assert_close(kept_gradients[name], gradient, rtol=1e-6, atol=1e-6, msg=name)
    assert all(torch.equal(value, kept_buffers[name]) for name, value in buffers.items())
    assert [kept_counts[name] for name in PRODUCTS] == [counts[name] for name in PRODUCTS]
    full = step(case, True)[2]
    assert sum(full[name] for name in PRODUCTS) > sum(counts[name] for name in PRODUCTS)
    cheap = [aten.gelu.default, aten.silu.default]
    assert sum(kept_counts[name] for name in cheap) > sum(counts[name] for name in cheap)


def held_bytes(choice):
    """Bytes that live between forward and backward pass, beside weights."""
    from stable_cascade.estimate.memory import _Trace, checkpointing

    with torch.device("meta"):
        prior = tiny_prior(block_out_channels=[64, 64], down_num_layers_per_block=[2, 2],
                           up_num_layers_per_block=[2, 2]).train().requires_grad_(True)  # fmt: skip
        inputs = torch.empty(1, 16, 16, 16), torch.empty(1)
        text = {"clip_text": torch.empty(1, 7, 32), "clip_text_pooled": torch.empty(1, 1, 32)}
    if choice:
        prior.enable_gradient_checkpointing(checkpointing(None, chosen_contexts(choice)))
    with _Trace([*prior.parameters(), *prior.buffers()], 1) as trace:
        output = prior(*inputs, **text).sample
        held = trace.live
    del output
    return held


def test_memory_lies_between_plain_and_full():
    plain, selective, full = (held_bytes(choice) for choice in (False, "selective", True))
    assert full < 0.6 * selective
    assert selective < 0.5 * plain


@pytest.mark.parametrize("cast_before", [False, True])
def test_autocast_beside_it_changes_nothing(cast_before):
    """Weights that autocast keeps cast from an earlier forward pass must not make the repetition another one."""
    gradients = []
    for choice in (False, "selective"):
        network, forward = prior_case()
        choose(network.train().requires_grad_(True), choice)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward().float().square().mean()
            if cast_before:
                loss = loss + forward().float().square().mean()
        loss.backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    # A weight that is cast once for two passes adds up its gradient in bfloat16.
    close = {"rtol": 2**-7, "atol": 1e-4} if cast_before else {"rtol": 1e-6, "atol": 1e-6}
    for plain, selective in zip(*gradients, strict=True):
        torch.testing.assert_close(selective, plain, **close)


def test_attention_is_kept_unless_it_draws_numbers():
    query = torch.empty(1, 2, 8, 4)
    kernel = aten._scaled_dot_product_efficient_attention.default
    policy = module.CheckpointPolicy
    assert module._policy(None, kernel, query, query, query, None, True) is policy.MUST_SAVE
    assert module._policy(None, kernel, query, query, query, None, True, 0.1) is policy.PREFER_RECOMPUTE
    assert module._policy(None, kernel, query, query, query, None, True, dropout_p=0.1) is policy.PREFER_RECOMPUTE


def test_scores_are_computed_again_and_their_products_kept():
    tokens, head = torch.empty(2, 100, 8), torch.empty(2, 8, 100)
    policy = module.CheckpointPolicy
    assert module._policy(None, aten.bmm.default, tokens, head) is policy.PREFER_RECOMPUTE
    assert module._policy(None, aten.bmm.default, torch.empty(2, 100, 100), tokens) is policy.MUST_SAVE


def test_lora_on_a_frozen_prior():
    from stable_cascade.adapters import add_lora

    gradients = []
    for choice in (False, "selective"):
        network, forward = prior_case()
        network.requires_grad_(False)
        add_lora(network, module_filters=[".attn"], rank=2, lora_dropout=0.2, seed=0)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
        choose(network.train(), choice)
        torch.manual_seed(1)
        forward().square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert len(gradients[0]) >= 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], False), (["--gradient_checkpointing"], True), (["--gradient_checkpointing", "selective"], "selective"),
     (["--gradient_checkpointing", "False"], False), (["--gradient_checkpointing=true"], True)],
)  # fmt: skip
def test_the_config_key(words, wanted):
    from stable_cascade.config import LoraConfig, load_config

    needed = ["--experiment_id", "a", "--checkpoint_path", "c", "--output_path", "o", "--webdataset_path", "d.tar",
              "--updates", "1", "--batch_size", "1", "--image_size", "64", "--rank", "4",
              "--model_version", "embedded"]  # fmt: skip
    found = load_config(LoraConfig, [*needed, *words]).gradient_checkpointing
    assert found is wanted or found == wanted == "selective"
    assert chosen_checkpoint(found) is (selective_checkpoint if wanted == "selective" else None)


@pytest.mark.parametrize("value", ["full", "1", "null", "selectve"])
def test_other_values_are_refused(value):
    from stable_cascade.config import LoraConfig, load_config

    with pytest.raises(ValueError, match=r"gradient_checkpointing takes True \| False \| selective") as error:
        load_config(LoraConfig, ["--gradient_checkpointing", value])
    assert "\n" not in str(error.value)
