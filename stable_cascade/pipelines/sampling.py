"""Sampling: the one loop of every pipeline, and the stages as functions of networks and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.diffusion.guidance import guide

from .inputs import Generators, vq_size

OnStep = Callable[[int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""(step, time, tensors `latents` and `clean`) -> those of them that change."""


@dataclass(frozen=True)
class Settings:
    """How one stage is sampled."""

    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.7
    t_start: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional half of the batch."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Text:
    """Embedded prompts, one row per image, and the embedded negative prompts where guidance needs them.

    Shapes: hidden (B, L, D), pooled (B, 1, P).
    """

    hidden: Tensor | None
    pooled: Tensor
    negative_hidden: Tensor | None = None
    negative_pooled: Tensor | None = None

    def guided_hidden(self, guided: bool) -> Tensor | None:
        """Hidden states for the whole batch, the unconditional half last."""
        return _both(self.hidden, self.negative_hidden, guided)

    def guided_pooled(self, guided: bool) -> Tensor:
        """Pooled text for the whole batch, the unconditional half last."""
        pooled = _both(self.pooled, self.negative_pooled, guided)
        assert pooled is not None
        return pooled


def sample(
    network: Any,
    scheduler: Any,
    latents: Tensor,
    conditions: Any,
    settings: Settings,
    *,
    generator: Generators,
    progress: Callable[..., Any],
    on_step: OnStep | None = None,
    control: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The clean latents that the last step predicts, float32.

    Shapes: (B, C, h, w) -> (B, C, h, w); with guidance `conditions` hold 2 B rows, the unconditional ones last.

    Args:
        control: a ControlNet's residuals, each (B, c, h, w); both halves of a guided batch get the same.
    """
    extra = {} if control is None else {"control": _for_both(control, settings.guided)}
    scheduler.set_timesteps(settings.num_inference_steps, device=latents.device, t_start=settings.t_start)
    state = clean = latents.float()
    with progress(total=settings.num_inference_steps) as bar:
        for number, time in enumerate(scheduler.timesteps[:-1]):
            prediction = _predict(network, scheduler, state, time, conditions, settings, extra)
            output = scheduler.step(prediction, time, state, generator=generator)
            state, clean = output.prev_sample, output.pred_original_sample
            if on_step is not None:
                changed = on_step(number, time, {"latents": state, "clean": clean})
                state, clean = changed.get("latents", state), changed.get("clean", clean)
            bar.update()
    return clean


def _for_both(control: Sequence[Tensor | None], guided: bool) -> list[Tensor | None]:
    """The residuals for the whole batch; as in the original, the unconditional half is controlled alike."""
    return [torch.cat([one, one]) if guided and one is not None else one for one in control]


def _predict(
    network: Any, scheduler: Any, state: Tensor, time: Tensor, conditions: Any, settings: Settings,
    extra: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The prediction at one time, guided where the settings say so. Shapes: (B, C, h, w) -> (B, C, h, w), float32."""
    batch = torch.cat([state, state]) if settings.guided else state
    ratio = scheduler.noise_condition(time).expand(len(batch))
    (prediction,) = network(batch, ratio, conditions=conditions, return_dict=False, **extra)
    if not settings.guided:
        return prediction.float()
    conditional, unconditional = prediction.float().chunk(2)
    return guide(conditional, unconditional, settings.guidance_scale, rescale=settings.guidance_rescale)


def sample_semantic(
    prior: Any, scheduler: Any, noise: Tensor, text: Text, image_embeds: Tensor | None, settings: Settings, **run: Any
) -> Tensor:
    """Stage C: semantic latents from text and, perhaps, embedded pictures.

    Shapes: noise (B, 16, h, w), image_embeds (B, n, D) -> (B, 16, h, w).
    """
    if image_embeds is not None and settings.guided:
        image_embeds = torch.cat([image_embeds, torch.zeros_like(image_embeds)])
    bring_in(prior)
    conditions = prior.encode_conditions(
        text.guided_pooled(settings.guided), text.guided_hidden(settings.guided), image_embeds
    )
    return sample(prior, scheduler, noise, conditions, settings, **run)


def sample_vq(
    decoder: Any, scheduler: Any, noise: Tensor, text: Text, semantic_latents: Tensor, settings: Settings, **run: Any
) -> Tensor:
    """Stage B: Stage A's latents from semantic latents; zeros stand for them in the unconditional half.

    Shapes: noise (B, 4, h, w), semantic_latents (B, 16, h', w') -> (B, 4, h, w).
    """
    effnet = semantic_latents
    if settings.guided:
        effnet = torch.cat([effnet, torch.zeros_like(effnet)])
    bring_in(decoder)
    conditions = decoder.encode_conditions(text.guided_pooled(settings.guided), effnet)
    return sample(decoder, scheduler, noise, conditions, settings, **run)


def decode_vq(vqgan: Any, vq_latents: Tensor, height: int, width: int) -> Tensor:
    """Stage A: pixels, cropped to the size that was asked for.

    Shapes: (B, 4, h, w) -> (B, 3, height, width) float32 in [0, 1].
    """
    pixels = vqgan.decode(vqgan.config.scale_factor * vq_latents).sample
    return pixels[..., :height, :width].float().clamp(0, 1)


def vq_noise_shape(decoder: Any, vqgan: Any, height: int, width: int) -> tuple[int, int, int]:
    """Shape of one picture's noise for Stage B."""
    stride = vqgan.config.up_down_scale_factor * 2 ** (vqgan.config.levels - 1)
    return (decoder.config.in_channels, *vq_size(height, width, stride=stride, patch=decoder.config.patch_size))


def start_noise(
    shape: tuple[int, ...], images: int, generator: Generators, device: torch.device, latents: Tensor | None = None
) -> Tensor:
    """The given latents, or noise: one draw for the batch, or each image's from its own generator.

    Shapes: -> (images, *shape) float32.

    Raises:
        ValueError: the given latents have another shape.
    """
    if latents is not None:
        if tuple(latents.shape) != (images, *shape):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, this call needs {(images, *shape)}")
        return latents.to(device, torch.float32)
    if isinstance(generator, list):
        rows = [torch.randn(shape, generator=one, device=one.device).to(device) for one in generator]
        return torch.stack(rows)
    return torch.randn((images, *shape), generator=generator, device=generator.device).to(device)


def repeat_text(text: Text, times: int) -> Text:
    """Every prompt `times` times, one after the other."""
    rows = [text.hidden, text.pooled, text.negative_hidden, text.negative_pooled]
    hidden, pooled, *negative = (None if row is None else row.repeat_interleave(times, dim=0) for row in rows)
    assert pooled is not None
    return Text(hidden, pooled, *negative)


def bring_in(module: nn.Module) -> None:
    """Moves an offloaded network to its device before a method other than `forward`, which would do it by itself."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)


def _both(conditional: Tensor | None, unconditional: Tensor | None, guided: bool) -> Tensor | None:
    if conditional is None or not guided:
        return conditional
    assert unconditional is not None
    return torch.cat([conditional, unconditional])
