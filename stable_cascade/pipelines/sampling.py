"""Sampling: the one loop of every pipeline, and the stages as functions of networks and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.diffusion.guidance import GUIDANCES, Guided
from stable_cascade.models.unet import DeepCache

from .call import Generators, Sampling, checked, vq_size

OnStep = Callable[[int, Tensor, dict[str, Tensor]], dict[str, Any]]
"""(step, time, tensors `latents` and `clean`) -> those that change, the `guidance_scale` from then on, `interrupt`."""


@dataclass(frozen=True)
class Settings:
    """How one stage is sampled."""

    num_inference_steps: int
    guidance_scale: float
    t_start: float = 1.0
    timesteps: tuple[float, ...] | None = None
    knobs: Sampling = field(default_factory=lambda: checked({}))

    @property
    def guided(self) -> bool:
        """Whether the conditions have an unconditional half."""
        return self.guidance_scale > 1

    def guides(self, time: float) -> bool:
        """Whether guidance acts at a time; the unconditional half runs only then."""
        low, high = self.knobs["guidance_interval"]
        return self.guided and low - 1e-6 <= time <= high + 1e-6  # times are float32, the interval is not


@dataclass(frozen=True)
class Control:
    """A ControlNet's residuals, scaled, and the part of the run in which they act.

    Shapes: residuals, each (B, c, h, w) or None. A run goes from 0 to 1 in steps of equal length.
    """

    residuals: Sequence[Tensor | None]
    start: float = 0.0
    end: float = 1.0

    def acts(self, step: int, steps: int) -> bool:
        """Whether the whole of a step lies between start and end, as diffusers counts."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(frozen=True)
class Kept:
    """What inpainting keeps: clean latents and the noise they are shown with; `repaint` is where they are not kept.

    Shapes: clean, noise (B, C, h, w), repaint (B, 1, h, w) bool.
    """

    clean: Tensor
    noise: Tensor
    repaint: Tensor

    def noised(self, scheduler: Any, state: Tensor, time: Tensor) -> Tensor:
        """`state`, with the kept latents noised to `time` in their place."""
        return torch.where(self.repaint, state, scheduler.add_noise(self.clean, self.noise, time))

    def cleaned(self, clean: Tensor) -> Tensor:
        """`clean`, with the kept latents in their place."""
        return torch.where(self.repaint, clean, self.clean)


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


@dataclass(frozen=True)
class Moment:
    """A step of a run: its number of `steps`, its time as a number and on the device, and its noise condition."""

    number: int
    steps: int
    t: float
    time: Tensor
    ratio: Tensor


Denoiser = Callable[..., Tensor]
"""(moment, latents, conditions, **more for the network) -> its prediction, float32, of the latents' shape."""


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
    control: Sequence[Control] = (),
    kept: Kept | None = None,
    worse: tuple[Any, Any] | None = None,
) -> Tensor:
    """The clean latents that the last step predicts, float32.

    Shapes: (B, C, h, w) -> (B, C, h, w); with guidance `conditions` hold 2 B rows, the unconditional ones last.

    Args:
        latents: noise, or latents noised to `settings.t_start`.
        control: residuals of ControlNets, which are summed; both halves of a guided batch get the same.
        kept: what inpainting keeps, put back after every step.
        worse: a worse network and its conditions, to guide away from; `conditions` then hold B rows.
    """
    # The denoiser of this run, from the inside out.
    moments = _moments(scheduler, settings, latents.device)
    denoise = with_control(with_cache(plain(network), moments, settings, control), control)
    guidance = Guidance(denoise, conditions, settings, scheduler, len(latents), worse)
    state = clean = latents.float()
    if kept is not None:
        state = kept.noised(scheduler, state, moments[0].time)
    with progress(total=len(moments)) as bar:
        for moment in moments:
            # One step of the sampler; what inpainting keeps is put back.
            output = scheduler.step(guidance(moment, state), moment.time, state, generator=generator)
            state, clean = output.prev_sample, output.pred_original_sample
            if kept is not None:
                state = kept.noised(scheduler, state, scheduler.timesteps[moment.number + 1])
                clean = kept.cleaned(clean)
            # A callback may change the latents and the guidance, and end the run.
            interrupt = False
            if on_step is not None:
                changed = on_step(moment.number, moment.time, {"latents": state, "clean": clean})
                state, clean = _after_callback(changed, state, clean, last=moment.number == len(moments) - 1)
                guidance.change_scale(changed.get("guidance_scale"))
                interrupt = bool(changed.get("interrupt"))
            bar.update()
            if interrupt:
                break
    return clean


def _after_callback(changed: Any, state: Tensor, clean: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
    """State and clean prediction, as a callback changed them.

    The last step's prediction is the result; who replaces its latents means the result.
    """
    given, own = changed.get("latents", state), changed.get("clean", clean)
    if own is clean and given is not state and last:
        own = given
    return given, own


def _moments(scheduler: Any, settings: Settings, device: torch.device) -> list[Moment]:
    """The steps of a run, after the scheduler's times are set on the device."""
    scheduler.set_timesteps(
        settings.num_inference_steps, device=device, t_start=settings.t_start, timesteps=settings.timesteps
    )
    times, ratios = scheduler.timesteps, scheduler.noise_condition(scheduler.timesteps)
    numbers, steps = times.tolist(), len(times) - 1
    return [Moment(number, steps, numbers[number], times[number], ratios[number]) for number in range(steps)]


def plain(network: Any) -> Denoiser:
    """The network's own prediction for one noise condition."""

    def denoise(moment: Moment, latents: Tensor, conditions: Any, **more: Any) -> Tensor:
        ratio = moment.ratio.expand(len(latents))
        (prediction,) = network(latents, ratio, conditions=conditions, return_dict=False, **more)
        return prediction.float()

    return denoise


def with_cache(
    denoise: Denoiser, moments: Sequence[Moment], settings: Settings, control: Sequence[Control]
) -> Denoiser:
    """A denoiser whose network runs whole at every `cache_interval`-th step, and where a ControlNet begins or ends.

    Between them its deeper half is what the last whole step computed (see `DeepCache`).
    """
    interval = settings.knobs["cache_interval"]
    if interval == 1:
        return denoise
    acting = [[one.acts(moment.number, moment.steps) for one in control] for moment in moments]
    whole = [number % interval == 0 or acting[number] != acting[number - 1] for number in range(len(moments))]
    cache = DeepCache()

    def cached(moment: Moment, latents: Tensor, conditions: Any, **more: Any) -> Tensor:
        nonlocal cache
        if whole[moment.number]:
            cache = DeepCache()
        return denoise(moment, latents, conditions, cache=cache, **more)

    return cached


def with_control(denoise: Denoiser, control: Sequence[Control]) -> Denoiser:
    """A denoiser with the residuals of the ControlNets that act at a step.

    As in the original, the unconditional half of a guided batch is controlled alike.
    """
    if not control:
        return denoise

    def controlled(moment: Moment, latents: Tensor, conditions: Any, **more: Any) -> Tensor:
        active = [one.residuals for one in control if one.acts(moment.number, moment.steps)]
        if active:
            more["control"] = _summed(active, len(latents))
        return denoise(moment, latents, conditions, **more)

    return controlled


def _summed(active: Sequence[Sequence[Tensor | None]], rows: int) -> list[Tensor | None]:
    """The residuals of all ControlNets together, repeated for a batch of so many rows."""
    total: list[Tensor | None] = []
    for parts in zip_longest(*active):
        present = [part for part in parts if part is not None]
        one = sum(present[1:], present[0]) if present else None
        total.append(one if one is None else torch.cat([one] * (rows // len(one))))
    return total


class Guidance:
    """A denoiser for one image a row: guided where guidance acts, with the conditions alone elsewhere.

    It guides away from the prediction without the conditions, which are the second half of what it is given, or from
    that of a worse network.

    Shapes: (B, C, h, w) -> (B, C, h, w), float32.

    Source: Ho and Salimans 2022 (classifier-free guidance); Karras et al. 2024 (autoguidance), eq. 3.
    """

    def __init__(
        self, denoise: Denoiser, conditions: Any, settings: Settings, scheduler: Any, rows: int,
        worse: tuple[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        self.denoise, self.settings, self.scheduler, self.worse = denoise, settings, scheduler, worse
        self.both = conditions
        self.conditional = conditions.first(rows) if settings.guided and worse is None else conditions
        self.memory: dict[str, Any] = {}

    def __call__(self, moment: Moment, latents: Tensor) -> Tensor:
        """The prediction. Shapes: (B, C, h, w) -> the same."""
        if not self.settings.guides(moment.t):
            return self.denoise(moment, latents, self.conditional)
        # The prediction and a worse one: of the same network in one batch, or of another network.
        if self.worse is None:
            better, worse = self.denoise(moment, torch.cat([latents, latents]), self.both).chunk(2)
        else:
            network, conditions = self.worse
            better = self.denoise(moment, latents, self.conditional)
            worse = plain(network)(moment, latents, conditions)
        # Their combination, by the method that was chosen.
        knobs = self.settings.knobs
        run = Guided(
            self.settings.guidance_scale, knobs["guidance_rescale"],
            to_clean=lambda prediction: self.scheduler.to_clean(prediction, moment.time, latents),
            from_clean=lambda clean: self.scheduler.from_clean(clean, moment.time, latents), memory=self.memory,
        )  # fmt: skip
        return GUIDANCES[knobs["guidance_method"]].combine(better, worse, run)

    def change_scale(self, scale: float | None) -> None:
        """Guides with another scale from now on.

        Raises:
            ValueError: it would begin in the middle of a run, which was prepared without an unconditional half.
        """
        if scale is None or scale == self.settings.guidance_scale:
            return
        if scale > 1 and self.both is self.conditional and self.worse is None:
            raise ValueError(
                f"guidance_scale {scale} cannot begin in the middle of a run; begin it with guidance above 1"
            )
        self.settings = replace(self.settings, guidance_scale=scale)


def sample_semantic(
    prior: Any,
    scheduler: Any,
    noise: Tensor,
    text: Text,
    image_embeds: Tensor | None,
    settings: Settings,
    *,
    image_weights: Tensor | None = None,
    guide_prior: Any = None,
    **run: Any,
) -> Tensor:
    """Stage C: semantic latents from text and, perhaps, embedded images.

    Shapes: noise (B, 16, h, w), image_embeds (B, n, D), image_weights (n,) -> (B, 16, h, w).

    Args:
        guide_prior: a worse prior, whose prediction takes the place of the one without conditions (autoguidance).
    """
    halves = settings.guided and guide_prior is None
    if image_embeds is not None and halves:
        image_embeds = torch.cat([image_embeds, torch.zeros_like(image_embeds)])
    given = (text.guided_pooled(halves), text.guided_hidden(halves), image_embeds, image_weights)
    bring_in(prior)
    conditions = prior.encode_conditions(*given)
    worse = None
    if settings.guided and guide_prior is not None:
        worse = (guide_prior, guide_prior.encode_conditions(*given))
    return sample(prior, scheduler, noise, conditions, settings, worse=worse, **run)


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


def encode_vq(vqgan: Any, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Stage A's latents of images as Stage B draws them, on a grid that may reach beyond their last pixels.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 4, *size) float32.
    """
    latents = vqgan.encode(pad_to(pixels, size, vqgan.stride)).latents
    return latents.float() / vqgan.config.scale_factor


def pad_to(pixels: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Images made as large as a grid of latents covers, their last rows and columns repeated.

    Shapes: (B, C, H, W) -> (B, C, size[0] * stride, size[1] * stride).
    """
    bottom, right = (cells * stride - side for cells, side in zip(size, pixels.shape[-2:], strict=True))
    return F.pad(pixels, (0, right, 0, bottom), mode="replicate") if bottom or right else pixels


def vq_noise_shape(decoder: Any, vqgan: Any, height: int, width: int) -> tuple[int, int, int]:
    """Shape of one image's noise for Stage B."""
    size = vq_size(height, width, stride=vqgan.stride, patch=decoder.config.patch_size)
    return (decoder.config.in_channels, *size)


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
