"""Rows of one optimizer step: LoRA, full finetuning, ControlNet; and from the start of a run to its first update."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.adapters import add_lora
from stable_cascade.diffusion.process import add_noise
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t
from stable_cascade.diffusion.weighting import p2_weight
from stable_cascade.files.presets import PRESETS
from stable_cascade.models.clip import encode_prompts
from stable_cascade.objectives.denoising import ConditionedPrior, prior_loss

from .measure import Row, in_turns
from .proxies import prior_pair, seeded
from .scale import Scale

ROOT = Path(__file__).resolve().parents[1]
FILTERS = [".attn"]
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 4
PIXELS_PER_LATENT = 32


def rows(scale: Scale) -> Iterator[Row]:
    """Every training row."""
    rounds = scale.slow["training"]
    yield lora_row(scale, rounds, live=True)
    yield lora_row(scale, rounds, live=False)
    if scale.dtype is torch.float32:
        yield lora_row(replace(scale, dtype=torch.bfloat16), rounds, live=True)
        yield lora_row(replace(scale, dtype=torch.bfloat16), rounds, live=False)
    yield finetune_row(scale, rounds)
    yield controlnet_row(scale, rounds)
    if scale.device == "cpu":
        yield start_row(rounds=3)


def lora_row(scale: Scale, rounds: int, *, live: bool) -> Row:
    """A LoRA step on cached conditions; the peer's runs its encoders where `live`, which nobody's cache spares it."""
    ours, peer = prior_pair(scale.prior, scale.dtype, scale.device)
    add_lora(ours, module_filters=FILTERS, rank=RANK)
    with_peft(peer)
    clean, hidden, pooled, image = conditions(scale)
    own = our_step(scale, ours, clean, hidden, pooled, image)
    encode = live_encoders(scale) if live else lambda: (clean, hidden, pooled, image)
    name = "diffusers UNet + PEFT" + (", encoders live" if live else ", cached as well")
    row = f"LoRA step, {PIXELS_PER_LATENT * scale.semantic} px, {str(scale.dtype).removeprefix('torch.')}"
    return in_turns(row, own, peer_step(scale, peer, encode), peer_name=name, rounds=rounds)


def finetune_row(scale: Scale, rounds: int) -> Row:
    """A step in which every weight trains, on conditions at hand."""
    ours, peer = prior_pair(scale.prior, scale.dtype, scale.device)
    made = conditions(scale)
    return in_turns(
        "full finetune step, batch 1", our_step(scale, ours, *made), peer_step(scale, peer, lambda: made),
        peer_name="diffusers UNet, torch AdamW", rounds=rounds,
    )  # fmt: skip


def controlnet_row(scale: Scale, rounds: int) -> Row:
    """A ControlNet step; no peer trains one beside this prior, so the row has a time alone."""
    from stable_cascade import StableCascadeControlNet

    prior, _ = prior_pair(scale.prior, scale.dtype, scale.device)
    width = scale.prior["block_out_channels"][0]
    last = 2 * sum(scale.prior["down_num_layers_per_block"]) - 1
    controlnet = StableCascadeControlNet(
        **PRESETS["controlnet"]["canny"] | {"projection_channels": width, "blocks": [0, last // 2, last]}
    )
    side = PIXELS_PER_LATENT * scale.semantic
    control = torch.rand(1, 1, side, side, device=scale.device)
    prior.requires_grad_(False)
    # The backbone keeps its own initial scale: weights of 0.02 in a row of convolutions make denormal gradients.
    seeded(controlnet.projections)
    step = our_step(scale, prior, *conditions(scale), controlnet=controlnet, control=control)
    alone = in_turns("ControlNet step, batch 1", step, lambda: None, peer_name="none", rounds=rounds)
    return Row(alone.row, alone.ours, None, "s", None, None, "no peer trains one")


def our_step(
    scale: Scale, prior: Any, clean: Tensor, hidden: Tensor, pooled: Tensor, image: Tensor,
    controlnet: Any = None, control: Tensor | None = None,
) -> Callable[[], None]:  # fmt: skip
    """One update as the library's loop makes it."""
    model = ConditionedPrior(prior, lambda captions: (hidden, pooled), controlnet).to(scale.device)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    seeds = torch.arange(len(clean))

    def step() -> None:
        with torch.autocast(scale.device, scale.dtype, enabled=scale.dtype != torch.float32):
            terms = prior_loss(
                model, clean, [""] * len(clean), seeds, weight=p2_weight, clip_img=image, control=control
            )
        update(optimizer, parameters, terms["loss"].mean())

    return step


def peer_step(scale: Scale, network: Any, encode: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    """One update as diffusers' training scripts make it."""
    network.to(scale.device).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        with torch.autocast(scale.device, scale.dtype, enabled=scale.dtype != torch.float32):
            with torch.no_grad():
                clean, hidden, pooled, image = encode()
            noise, log_snr = torch.randn_like(clean), cosine_log_snr(torch.rand(len(clean), device=scale.device))
            noised = add_noise(clean, noise, log_snr)
            prediction = network(
                sample=noised.to(scale.dtype), timestep_ratio=cosine_t(log_snr), clip_text_pooled=pooled,
                clip_text=hidden, clip_img=image,
            ).sample  # fmt: skip
            error = (prediction.float() - noise).square().flatten(1).mean(1)
        update(optimizer, parameters, (error * p2_weight(log_snr)).mean())

    return step


def update(optimizer: torch.optim.Optimizer, parameters: list[Tensor], loss: Tensor) -> None:
    """Backward, clip, step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def with_peft(network: Any) -> None:
    """Diffusers' network with PEFT's LoRA on its attention; all else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PEFT_TARGETS), network)


def conditions(scale: Scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a cache holds for one image: clean latents, hidden states, pooled text, image embedding."""
    draw = torch.Generator().manual_seed(2)
    shapes = [(1, 16, scale.semantic, scale.semantic), (1, 77, 1280), (1, 1, 1280), (1, 1, 768)]
    clean, *rest = (torch.randn(shape, generator=draw).to(scale.device) for shape in shapes)
    hidden, pooled, image = (one.to(scale.dtype) for one in rest)
    return clean, hidden, pooled, image


def live_encoders(scale: Scale) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The released encoders at their real size, which a prior of any size is trained with; random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from stable_cascade import StableCascadeSemanticEncoder

    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        hidden_act="gelu", vocab_size=49408,
    )  # fmt: skip
    text = ready(CLIPTextModelWithProjection(config), scale)
    encoder = ready(StableCascadeSemanticEncoder(**PRESETS["semantic_encoder"]["released"]), scale)
    side = PIXELS_PER_LATENT * scale.semantic
    pixels = torch.rand(1, 3, side, side, device=scale.device)
    image = torch.zeros(1, 1, 768, device=scale.device, dtype=scale.dtype)

    def encode() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, pooled, _ = encode_prompts(text, fixed_tokens, [""], scale.device)
        return encoder(pixels).float(), hidden, pooled, image

    return encode


def ready(network: nn.Module, scale: Scale) -> nn.Module:
    """Frozen, on the device, in its type."""
    return network.to(scale.device, scale.dtype).eval().requires_grad_(False)


class _Tokens(dict):
    """Token ids and mask, as tokenizers return them."""

    __getattr__ = dict.__getitem__


def fixed_tokens(captions: Sequence[str], **_: Any) -> Any:
    """77 token ids: tokenizing costs microseconds and its files are not at hand."""
    ids = torch.arange(1000, 1077).repeat(len(captions), 1)
    ids[:, -1] = 49407
    return _Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


fixed_tokens.model_max_length = 77  # type: ignore[attr-defined]


def start_row(rounds: int) -> Row:
    """Seconds from the command to the first update of a LoRA on the embedded cascade, in a process of its own."""
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            times.append(first_update(Path(folder)))
    spread = (min(times), max(times))
    return Row("start to first optimizer step", median(times), None, "s", None, spread, "none; at most 8 s wanted")


def first_update(folder: Path) -> float:
    """Launches the trainer as a user does, and reads when its log tells of the first update."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "accelerate_configs/cpu.yaml"), str(ROOT / "examples/train_lora.py"), "--config",
        str(ROOT / "examples/configs/lora_embedded.yaml"), "--updates", "2", "--checkpoint_path", str(folder),
        "--output_path", str(folder), "--save_every", "2", "--log_every", "1",
    ]  # fmt: skip
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(log.stat().st_size for log in folder.glob("*/log.jsonl")):
            time.sleep(0.01)
        elapsed = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"the trainer ended with {process.returncode}: {' '.join(command)}")
    return elapsed
