"""The three stages as the pipelines run them: what a call says about text, size and images meets the networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .call import (
    Generators,
    check_count,
    check_guidance,
    check_output_type,
    check_size,
    check_steps,
    check_times,
    checked,
    is_number,
    resolve_generator,
    seen_size,
    semantic_size,
    to_images,
    whole,
)
from .control import ControlInput, run_control
from .prompts import PromptArguments, embed_images, encode
from .sampling import (
    Kept,
    OnStep,
    Settings,
    Text,
    decode_vq,
    encode_vq,
    sample_semantic,
    sample_vq,
    start_noise,
    vq_noise_shape,
)
from .source import Source


@dataclass(frozen=True)
class Call:
    """What the stages of one call share; `source` has one row for each of `count` images."""

    arguments: PromptArguments
    source: Source
    count: int
    generators: Generators
    device: torch.device
    progress: Callable[..., Any]


def begin(pipeline: Any, source: Source, arguments: PromptArguments, copies: int, generator: Any) -> Call:
    """A call of `copies` images per prompt; one prompt is repeated where there are several starting images.

    Raises:
        ValueError: neither one image nor one per prompt, a number of copies or generators that means nothing.
    """
    copies = whole(copies)
    check_count(copies)
    _check_networks(pipeline, arguments)
    images = 1 if source.pixels is None else len(source.pixels)
    if images not in (1, arguments.count):
        arguments = arguments.for_count(images)
    count, device = arguments.count * copies, pipeline._execution_device
    generators = resolve_generator(generator, count)
    return Call(arguments, source.repeated(count), count, generators, device, pipeline.progress_bar)


def _check_networks(pipeline: Any, arguments: PromptArguments) -> None:
    """Passes when the networks compute in a type that they can, and given embeddings are as wide as they read.

    Raises:
        ValueError: they are not.
    """
    first = "prior" if hasattr(pipeline, "prior") else "decoder"
    network = getattr(pipeline, first)
    if network is None:
        raise ValueError(f"this {type(pipeline).__name__} has no {first}; build or load it with {first}=…")
    if network.dtype == torch.float64:
        raise ValueError("the networks are float64, and sampling is float32; call .to(torch.float32)")
    for name in ("prompt_embeds", "prompt_embeds_pooled"):
        key = name.replace("prompt_embeds", "clip_text")
        width = getattr(network.config, f"{key}_in_channels", None)
        for sign in ("", "negative_"):
            given = getattr(arguments, sign + name, None)
            if width and given is not None and given.shape[-1] != width:
                raise ValueError(f"{sign}{name} are {given.shape[-1]} wide, and this network reads {width}")


def embed_text(pipeline: Any, call: Call, *settings: Settings) -> Text:
    """The text, one row per image; the negative prompts too where a stage is guided."""
    guided = any(one.guided for one in settings)
    copies = call.count // call.arguments.count
    return encode(call.arguments, pipeline.text_encoder, pipeline.tokenizer, call.device, guided=guided, copies=copies)


def stage_settings(
    steps: int,
    guidance_scale: float,
    sampling: Mapping[str, Any],
    *,
    timesteps: Any = None,
    names: tuple[str, str] = ("num_inference_steps", "guidance_scale"),
) -> Settings:
    """How a stage is sampled, as a call says it; given times take the place of the number of steps.

    Raises:
        ValueError: a value that means nothing, under the name that the call has for it.
    """
    steps = whole(steps)
    check_steps(steps, names[0])
    check_guidance(guidance_scale, names[1])
    times = None if timesteps is None else check_times(timesteps)
    return Settings(steps, guidance_scale, timesteps=times, knobs=checked(sampling))


def check_call(
    pipeline: Any, source: Source, latents: Tensor | None, output_type: str = "latent", *, preview: bool = False
) -> None:
    """Raises ValueError when a call needs a part that the pipeline lacks, or says what it cannot mean."""
    check_output_type(output_type)
    if preview and pipeline.previewer is None:
        raise ValueError("preview needs a previewer, and this pipeline has none; pass previewer=… when loading")
    if source.pixels is not None and pipeline.semantic_encoder is None:
        raise ValueError("image needs a semantic_encoder, and this pipeline has none; pass semantic_encoder=…")
    if source.strength == 0 and latents is not None:
        raise ValueError("latents are noise to start from, and strength 0 starts from none; leave one of them out")


def check_guide(prior: Any, guide_prior: Any, call: Call) -> None:
    """Passes for None, and for a prior that reads what the pipeline's own reads, where it computes.

    Raises:
        ValueError: it is something else, or lies elsewhere, or there is a negative prompt, which it would displace.
    """
    if guide_prior is None:
        return
    keys = ("in_channels", "clip_text_in_channels", "clip_text_pooled_in_channels", "clip_image_in_channels")
    is_prior = type(guide_prior) is type(prior)
    if not is_prior or any(guide_prior.config[key] != prior.config[key] for key in keys):
        raise ValueError(
            f"guide_prior is a {type(guide_prior).__name__} that does not read what the prior reads; give a "
            "StableCascadePrior of the same text encoder"
        )
    if guide_prior.device.type != call.device.type:
        raise ValueError(
            f"guide_prior is on {guide_prior.device.type}, this call computes on {call.device.type}; move it"
        )
    if call.arguments.negative_prompt:
        raise ValueError("negative_prompt and guide_prior are both given; Stage C is guided away from one, choose it")


def control_size(pipeline: Any, height: int, width: int) -> tuple[tuple[int, int], int]:
    """Sides of an image as image encoder and ControlNets see it, for a drawing of that size, and their stride.

    Raises:
        ValueError: no size that can be drawn.
    """
    check_size(height, width)
    multiple, encoder = pipeline.config["resolution_multiple"], pipeline.semantic_encoder
    stride = round(0.75 * multiple) if encoder is None else encoder.stride
    return seen_size(height, width, multiple, stride), stride


def encode_semantic(semantic_encoder: Any, pixels: Tensor, multiple: float) -> Tensor:
    """Semantic latents of images, each of `multiple` of their pixels a side.

    The encoder looks at them at its stride by `multiple` of their size: as released at three quarters.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 16, ceil(H / multiple), ceil(W / multiple)).
    """
    size = seen_size(pixels.shape[-2], pixels.shape[-1], multiple, semantic_encoder.stride)
    shrunk = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return semantic_encoder(shrunk).float()


def draw_semantic(
    pipeline: Any,
    scheduler: Any,
    call: Call,
    text: Text,
    image_embeds: Tensor | None,
    settings: Settings,
    *,
    image_weights: Sequence[float] | None,
    latents: Tensor | None,
    control: Sequence[ControlInput],
    on_step: OnStep | None,
    guide_prior: Any = None,
) -> Tensor:
    """Stage C: from noise, from the noised latents of the source, or, at strength 0, those latents themselves.

    Shapes: -> (count, 16, h, w).
    """
    # Strength 0 keeps the latents of the image.
    source, multiple = call.source, pipeline.config["resolution_multiple"]
    size = semantic_size(source.height, source.width, multiple)
    clean = None
    if source.pixels is not None and (source.strength < 1 or source.mask is not None):
        clean = encode_semantic(pipeline.semantic_encoder, source.pixels.to(call.device), multiple)
        if source.strength == 0:
            return clean
    # Start from noise, or from the image's latents noised as far as the strength says.
    shape = (pipeline.prior.config.in_channels, *size)
    noise = start_noise(shape, call.count, call.generators, call.device, latents)
    start = noise if clean is None or source.strength == 1 else scheduler.add_noise(clean, noise, source.strength)
    # What the mask keeps, and what ControlNets add.
    seen, stride = control_size(pipeline, source.height, source.width)
    kept = None
    if clean is not None and source.mask is not None:
        cell = (stride * source.height / seen[0], stride * source.width / seen[1])
        kept = Kept(clean, noise, source.repainted(size, cell).to(call.device))
    residuals = run_control(pipeline.controlnet, control, seen, size, call.device)
    weights = None if image_weights is None else torch.tensor(list(image_weights), dtype=torch.float32)
    return sample_semantic(
        pipeline.prior, scheduler, start, text, image_embeds, source.shortened(settings), generator=call.generators,
        progress=call.progress, on_step=on_step, control=residuals, kept=kept, image_weights=weights,
        guide_prior=guide_prior,
    )  # fmt: skip


def draw_vq(
    pipeline: Any,
    call: Call,
    text: Text,
    semantic_latents: Tensor,
    settings: Settings,
    *,
    latents: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Stage B, around what a mask keeps. Shapes: (count, 16, h, w) -> (count, 4, h', w')."""
    source, vqgan = call.source, pipeline.vqgan
    shape = vq_noise_shape(pipeline.decoder, vqgan, source.height, source.width)
    noise = start_noise(shape, call.count, call.generators, call.device, latents)
    kept = None
    if source.pixels is not None and source.mask is not None:
        size = (shape[1], shape[2])
        clean = encode_vq(vqgan, source.pixels.to(call.device), size)
        kept = Kept(clean, noise, source.repainted(size, (vqgan.stride, vqgan.stride)).to(call.device))
    return sample_vq(
        pipeline.decoder, pipeline.scheduler, noise, text, semantic_latents, settings, generator=call.generators,
        progress=call.progress, on_step=on_step, kept=kept,
    )  # fmt: skip


def decode(pipeline: Any, call: Call, vq_latents: Tensor, output_type: str) -> Any:
    """Stage A: the images in the form that was asked for, with what a mask keeps over them."""
    if output_type == "latent":
        return vq_latents
    pixels = decode_vq(pipeline.vqgan, vq_latents, call.source.height, call.source.width)
    return to_images(call.source.pasted(pixels), output_type)


def rough(previewer: Any, semantic_latents: Tensor, output_type: str) -> Any:
    """The previewer's images at its own size, or the latents where they are asked for.

    Shapes: (B, 16, h, w) -> (B, 3, 8 h, 8 w).
    """
    return semantic_latents if output_type == "latent" else to_images(previewer(semantic_latents), output_type)


def preview_images(previewer: Any, semantic_latents: Any) -> list[Image.Image]:
    """Rough PIL images of semantic latents. Shapes: (B, 16, h, w) -> B images of 8 w x 8 h."""
    if previewer is None:
        raise ValueError("preview_images needs a previewer, and this pipeline has none; load it with previewer=…")
    channels, shape = previewer.config.in_channels, tuple(getattr(semantic_latents, "shape", ()))
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"preview_images takes semantic latents (B, {channels}, h, w), not {shape}; Stage C has them")
    return rough(previewer, semantic_latents.to(previewer.device), "pil")


CALLBACK_TENSORS = ["latents", "clean"]


def step_callback(
    pipeline: Any, settings: Settings, callback: Callable[..., Any] | None, names: Sequence[str], prefix: str = ""
) -> OnStep:
    """`callback(pipeline, step, time, tensors)` as the loop calls it; what it returns replaces the tensors.

    `latents` are the noised latents, `clean` what the step takes the result to be, fit for previews. A callback that
    sets `pipeline._guidance_scale` changes the guidance of the steps that follow, one that sets `pipeline._interrupt`
    ends the stage.

    Raises:
        ValueError: a name that is not among the tensors.
    """
    unknown = [name for name in names if name not in CALLBACK_TENSORS]
    if unknown:
        allowed = ", ".join(CALLBACK_TENSORS)
        raise ValueError(f"{prefix}callback_on_step_end_tensor_inputs '{unknown[0]}' is not one of {allowed}")

    def on_step(step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if step == 0:
            pipeline._guidance_scale, pipeline._interrupt = settings.guidance_scale, False
            pipeline._num_timesteps = settings.num_inference_steps
        if callback is None:
            return {}
        shown = {name: tensors[name] for name in names}
        changed = callback(pipeline, step, time, shown) or {}
        return {**changed, "guidance_scale": pipeline._guidance_scale, "interrupt": pipeline._interrupt}

    return on_step


def image_conditions(
    image_encoder: Any, images: Any, image_embeds: Tensor | None, weights: Sequence[float] | None, call: Call
) -> Tensor | None:
    """Embedded reference images, one row per image to draw; None without any. The weights are only checked.

    Shapes: n images, or embeddings (n, D), (1, n, D) or (count, n, D) -> (count, n, D).

    Raises:
        ValueError: images and embeddings are both given, a wrong number of rows, or of weights.
    """
    check_references(images, image_embeds, weights, count=call.count)
    if images is not None:
        return embed_images(images, image_encoder, call.device, count=call.count)
    if image_embeds is None:
        return None
    image_embeds = image_embeds[None] if image_embeds.ndim == 2 else image_embeds
    return image_embeds.to(call.device).expand(call.count, -1, -1)


def check_references(images: Any, image_embeds: Tensor | None, weights: Sequence[float] | None, *, count: int) -> None:
    """Raises ValueError for what `image_conditions` refuses, before anything is embedded."""
    if images is not None and image_embeds is not None:
        raise ValueError("images and image_embeds are both given; give one of them")
    # How many images there are, given as such or as embeddings.
    references = 0
    if images is not None:
        batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        references = len(images) if batch else 1
        if not references:
            raise ValueError("images is empty; give at least one image, or leave it out")
    if image_embeds is not None:
        if image_embeds.ndim not in (2, 3):
            raise ValueError(f"image_embeds have shape {tuple(image_embeds.shape)}; give (n, D) or (images, n, D)")
        if image_embeds.ndim == 3 and len(image_embeds) not in (1, count):
            raise ValueError(f"image_embeds has {len(image_embeds)} rows for {count} images; give 1, or one per image")
        references = image_embeds.shape[-2]
    # One weight for each.
    if weights is None:
        return
    if len(weights) != references:
        raise ValueError(f"image_weights has {len(weights)} entries for {references} images; give one for each")
    for weight in weights:
        if not is_number(weight):
            raise ValueError(f"image_weights holds {weight!r}; give finite numbers, 1 for an image as it is")
