"""Rows of text-to-image, 20 + 10 steps: the embedded cascade, and the proxy networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from stable_cascade.files.presets import PRESETS

from .measure import Row, in_turns
from .proxies import decoder_pair, prior_pair, vqgan_pair
from .scale import Scale

STEPS = (20, 10)
GUIDANCE = (4.0, 1.1)
PEER = "diffusers pipelines, eager"


def rows(scale: Scale) -> Iterator[Row]:
    """One image each."""
    rounds = scale.slow["drawing"]
    if scale.device == "cpu":
        ours, peer = embedded_pair()
        yield in_turns("text-to-image 64 px, embedded", ours, peer, peer_name=PEER, rounds=2 * rounds + 1)
    size = 384 if scale.device == "cpu" else 1024
    ours, peer = proxy_pair(scale, size)
    yield in_turns(f"text-to-image {size} px, {scale.name}", ours, peer, peer_name=PEER, rounds=rounds)


def embedded_pair() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The embedded cascade in our pipeline and in diffusers' two, text encoder included."""
    from stable_cascade import StableCascadePipeline
    from stable_cascade.embedded import embedded_path

    pipeline = StableCascadePipeline.from_pretrained(embedded_path())
    pipeline.set_progress_bar_config(disable=True)
    prior, decoder, vqgan = (_peer_of(getattr(pipeline, name)) for name in ("prior", "decoder", "vqgan"))
    return _ours(pipeline, 64), _peers(pipeline, prior, decoder, vqgan, 64, 10.67)


def proxy_pair(scale: Scale, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Networks of this scale with random weights; prompts are given as embeddings, the same for both."""
    from stable_cascade import StableCascadePipeline, StableCascadeScheduler

    prior, peer_prior = prior_pair(scale.prior, scale.dtype, scale.device)
    decoder, peer_decoder = decoder_pair(scale.decoder, scale.dtype, scale.device)
    vqgan, peer_vqgan = vqgan_pair(PRESETS["vqgan"]["released"], scale.dtype, scale.device)
    pipeline = StableCascadePipeline(
        tokenizer=None, text_encoder=None, prior=prior, prior_scheduler=StableCascadeScheduler(shift=2.0),
        decoder=decoder, scheduler=StableCascadeScheduler(), vqgan=vqgan,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    hidden, empty = (torch.randn(1, 77, 1280, generator=draw).to(scale.device, scale.dtype) for _ in range(2))
    pooled, empty_pooled = (torch.randn(1, 1, 1280, generator=draw).to(scale.device, scale.dtype) for _ in range(2))
    given = {
        "prompt_embeds": hidden, "prompt_embeds_pooled": pooled, "negative_prompt_embeds": empty,
        "negative_prompt_embeds_pooled": empty_pooled,
    }  # fmt: skip
    theirs = _peers(pipeline, peer_prior, peer_decoder, peer_vqgan, size, 42.67, given)
    return _ours(pipeline, size, given), theirs


def _ours(pipeline: Any, size: int, given: dict[str, Any] | None = None) -> Callable[[], Any]:
    text = given or {"prompt": "red apple, flat style"}
    return lambda: pipeline(
        **text, height=size, width=size, prior_num_inference_steps=STEPS[0], num_inference_steps=STEPS[1],
        prior_guidance_scale=GUIDANCE[0], decoder_guidance_scale=GUIDANCE[1],
        generator=torch.Generator().manual_seed(0), output_type="pt",
    )  # fmt: skip


def _peers(
    ours: Any, prior: Any, decoder: Any, vqgan: Any, size: int, multiple: float, given: dict[str, Any] | None = None
) -> Callable[[], Any]:
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline

    stage_c = StableCascadePriorPipeline(
        ours.tokenizer, ours.text_encoder, prior, DDPMWuerstchenScheduler(), resolution_multiple=multiple
    )
    stage_b = StableCascadeDecoderPipeline(
        decoder, ours.tokenizer, ours.text_encoder, DDPMWuerstchenScheduler(), vqgan, latent_dim_scale=multiple / 4
    )
    for pipeline in (stage_c, stage_b):
        pipeline.set_progress_bar_config(disable=True)
        if given:  # diffusers asks the text encoder for its type even when embeddings are given
            pipeline.text_encoder = _Stand(given["prompt_embeds"])
    text = given or {"prompt": "red apple, flat style"}

    def run() -> Any:
        generator = torch.Generator().manual_seed(0)
        made = stage_c(
            **text, height=size, width=size, num_inference_steps=STEPS[0], guidance_scale=GUIDANCE[0],
            generator=generator, output_type="pt",
        )  # fmt: skip
        return stage_b(
            made.image_embeddings, **text, num_inference_steps=STEPS[1], guidance_scale=GUIDANCE[1],
            generator=generator, output_type="pt",
        )  # fmt: skip

    return run


class _Stand(torch.nn.Module):
    """Stands where a text encoder would: it only knows its type and device."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        self.dtype, self.device = like.dtype, like.device


def _peer_of(network: Any) -> Any:
    """Diffusers' class with the weights of ours."""
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    cls = PaellaVQModel if type(network).__name__ == "StableCascadeVQGAN" else StableCascadeUNet
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    peer = cls(**config)
    peer.load_state_dict(network.state_dict())
    return peer.eval()
