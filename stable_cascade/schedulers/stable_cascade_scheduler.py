"""The samplers of Stage C and Stage B, in log_snr, as a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Generator, Tensor

from stable_cascade.diffusion import process
from stable_cascade.diffusion import schedule as schedules
from stable_cascade.diffusion.samplers import SAMPLERS, Step

SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "cosine": schedules.cosine_log_snr,
    "tangent": schedules.tangent_log_snr,
    "sqrt": schedules.sqrt_log_snr,
    "linear": schedules.linear_log_snr,
    "rectified_flow": schedules.rectified_flow_log_snr,
    "edm": schedules.edm_log_snr,
    "stable_diffusion": schedules.stable_diffusion_log_snr,
}
CONDITIONS = ("cosine", "rectified_flow", "timestep")
WITH_RANGE = ("tangent", "linear", "rectified_flow")

Generators = Generator | Sequence[Generator] | None


@dataclass
class StableCascadeSchedulerOutput(BaseOutput):
    """The sample at the next time, and the clean sample that this step's prediction implies; both float32 or wider."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class StableCascadeScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Turns predictions into samples as the original does; loads a DDPMWuerstchenScheduler's config or its own.

    `timesteps` holds one point more than there are steps, from noise to clean. An image is the last step's
    `pred_original_sample`. The state stays float32 whatever the network's dtype:

        scheduler = StableCascadeScheduler(shift=2.0)
        scheduler.set_timesteps(20, device=sample.device)
        for t in scheduler.timesteps[:-1]:
            ratio = scheduler.noise_condition(t).expand(len(sample))
            prediction = prior(sample.to(prior.dtype), ratio, ...).sample
            out = scheduler.step(prediction, t, sample, generator=generators)
            sample = out.prev_sample
        latents = out.pred_original_sample

    Args:
        scaler: power that warps the times, as in DDPMWuerstchenScheduler; 1 leaves them.
        s: offset of the cosine schedule.
        shift: moves the schedule towards noise by 2 ln(shift); 2 for Stage C, 1 for Stage B.
        prediction_type: what the network predicts: epsilon, sample, v_prediction or flow.
        sampler: a name of `diffusion.samplers.SAMPLERS`: ddpm, ddim (with `eta`), lcm, ….
        eta: share of fresh noise in DDIM steps; 0 is deterministic and draws nothing, 1 is DDPM.
        schedule: cosine, tangent, sqrt, linear, rectified_flow, edm or stable_diffusion.
        log_snr_range: lowest and highest log_snr of a tangent, linear or rectified_flow schedule.
        noising: vp (variance preserving) or lerp (straight path).
        condition: the noise condition of the network: cosine (the original: the unshifted time with this log_snr),
            rectified_flow, or timestep (diffusers: t itself).
        last_noise: whether the step to t = 0 adds noise (the original) or not (diffusers); its clean prediction is
            the same.

    Raises:
        ValueError: a setting outside its choices.

    Source: the papers of each sampler, in `diffusion.samplers`.
    """

    _compatibles = ["DDPMWuerstchenScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        scaler: float = 1.0,
        s: float = 0.008,
        shift: float = 1.0,
        prediction_type: str = "epsilon",
        sampler: str = "ddpm",
        eta: float = 0.0,
        schedule: str = "cosine",
        log_snr_range: tuple[float, float] | None = None,
        noising: str = "vp",
        condition: str = "cosine",
        last_noise: bool = True,
    ) -> None:
        _choose("prediction_type", prediction_type, process.PREDICTION_TYPES)
        _choose("sampler", sampler, tuple(SAMPLERS))
        _choose("schedule", schedule, tuple(SCHEDULES))
        _choose("noising", noising, process.SCALERS)
        _choose("condition", condition, CONDITIONS)
        if not scaler > 0 or not shift > 0:
            raise ValueError(f"scaler {scaler} and shift {shift}: both must be positive; 1 changes nothing")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: must lie between 0 (deterministic) and 1 (DDPM)")
        if log_snr_range is not None and schedule not in WITH_RANGE:
            raise ValueError(f"log_snr_range {log_snr_range}: schedule {schedule!r} has a fixed range; leave it null")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._before: tuple[Tensor, Tensor] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        t_start: float = 1.0,
        t_end: float = 0.0,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Sets `timesteps` to N + 1 equally spaced points from `t_start` to `t_end`, or to the given points.

        Image-to-image starts from a sample noised to `t_start` (`add_noise`), so that all N steps remain.

        Raises:
            ValueError: no steps; times outside [0, 1] or not falling.
        """
        if timesteps is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps {num_inference_steps}: must be at least 1")
            if not 0 <= t_end < t_start <= 1:
                raise ValueError(f"t_start {t_start} and t_end {t_end}: need 0 <= t_end < t_start <= 1")
            points = torch.linspace(t_start, t_end, num_inference_steps + 1)
        else:
            points = torch.as_tensor(timesteps, dtype=torch.float32).cpu()
            falling = points.ndim == 1 and len(points) > 1 and bool((points[1:] < points[:-1]).all())
            if not falling or points[0] > 1 or points[-1] < 0:
                raise ValueError(f"timesteps {points.tolist()}: need two or more falling values in [0, 1]")
        self.num_inference_steps = len(points) - 1
        self.timesteps = points.to(device)
        self._before = None

    def log_snr(self, t: float | Tensor) -> Tensor:
        """The schedule's log_snr at `t`, shift included.

        Shapes: any, in [0, 1] -> the same.
        """
        config = self.config
        settings = {"s": config["s"]} if config["schedule"] == "cosine" else {}
        if config["log_snr_range"] is not None:
            settings["limits"] = tuple(config["log_snr_range"])
        t = schedules.warp_times(_times(t), config["scaler"])
        return SCHEDULES[config["schedule"]](t, shift=config["shift"], **settings)

    def noise_condition(self, t: float | Tensor) -> Tensor:
        """The noise condition at `t`: 0.9935832 at t = 1 by default.

        Shapes: any, in [0, 1] -> the same, float32 (or float64 where `t` is).
        """
        if self.config["condition"] == "timestep":
            return _times(t)
        if self.config["condition"] == "rectified_flow":
            return schedules.rectified_flow_condition(self.log_snr(t))
        return schedules.cosine_t(self.log_snr(t), s=self.config["s"])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`sample` as it is: this process needs no scaling of the input."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """`original_samples` noised to `timesteps`, with the sampling schedule's shift.

        Shapes: (B, ...), (B, ...), scalar or (B,) -> (B, ...) float32 or float64.
        """
        clean, noise = _state(original_samples), _state(noise)
        log_snr = self.log_snr(timesteps).to(clean)
        return process.add_noise(clean, noise, log_snr, self.config["noising"])

    def to_clean(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """The clean sample that a prediction at `timestep` implies. Shapes: (B, ...), scalar, (B, ...) -> (B, ...)."""
        sample = _state(sample)
        log_snr = self.log_snr(timestep).to(sample)
        kind, noising = self.config["prediction_type"], self.config["noising"]
        return process.to_clean(kind, model_output.to(sample), sample, log_snr, noising)

    def from_clean(self, clean: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """The prediction at `timestep` that implies a clean sample; undoes `to_clean`."""
        sample = _state(sample)
        log_snr = self.log_snr(timestep).to(sample)
        kind, noising = self.config["prediction_type"], self.config["noising"]
        noise = process.to_noise("sample", clean.to(sample), sample, log_snr, noising)
        return process.target(kind, clean.to(sample), noise, log_snr, noising)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StableCascadeSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from `timestep` to the next point of `timesteps`.

        With a list of generators image i depends on generator i alone; a single generator draws for the whole batch;
        none means torch's default generator, as in diffusers. Nothing is drawn by DDIM with eta 0.

        Shapes: (B, ...), scalar or (B,), (B, ...) -> two of (B, ...), float32 or float64.

        Raises:
            ValueError: `set_timesteps` was not called; a list of generators whose length is not B.
        """
        # Where the step leads, and how much of clean and noise a sample has here and there.
        sample = _state(sample)
        t = _times(timestep).to(sample.device)
        following = self._following(t)
        log_snr, log_snr_next = self.log_snr(torch.stack([t, following])).to(sample)
        kind, noising = self.config["prediction_type"], self.config["noising"]
        a, b = process.scales(log_snr, noising)
        a_next, b_next = process.scales(log_snr_next, noising)
        # What the network predicts, as clean and noise.
        prediction = model_output.to(sample)
        clean = process.to_clean(kind, prediction, sample, log_snr, noising)
        noise = process.to_noise(kind, prediction, sample, log_snr, noising)
        # The move, which may use the step before.
        a, b, log_snr, a_next, b_next, log_snr_next = (
            process.expand(one, sample) for one in (a, b, log_snr, a_next, b_next, log_snr_next)
        )
        fresh_share = 1.0 if self.config["last_noise"] else process.expand(following > 0, sample)
        step = Step(
            sample, clean, noise, a, b, log_snr, a_next, b_next, log_snr_next,
            draw=lambda: _draw(sample, generator), fresh_share=fresh_share, eta=self.config["eta"],
            before=self._before if self._before and self._before[0].shape == clean.shape else None,
        )  # fmt: skip
        moved = SAMPLERS[self.config["sampler"]].move(step)
        self._before = (clean, log_snr)
        if not return_dict:
            return moved, clean
        return StableCascadeSchedulerOutput(prev_sample=moved, pred_original_sample=clean)

    def _following(self, t: Tensor) -> Tensor:
        """The point after the one nearest to `t`, found on the device so that a step never waits for it."""
        if self.timesteps is None:
            raise ValueError("timesteps are not set: call set_timesteps(num_inference_steps) first")
        points = self.timesteps.to(t.device)
        index = (points - t[..., None]).abs().argmin(dim=-1)
        return points[(index + 1).clamp(max=len(points) - 1)]


def _draw(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise, drawn in float32 where the generator lives: no dtype or device changes the values."""
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise ValueError(f"generator has {len(generator)} entries for {len(like)} samples; give one for each")
        rows = [torch.randn(like.shape[1:], generator=g, device=g.device).to(like) for g in generator]
        return torch.stack(rows)
    generator = torch.default_generator if generator is None else generator
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def _times(t: float | Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float32)
    return t if t.dtype == torch.float64 else t.float()


def _state(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: must be one of {', '.join(allowed)}")
