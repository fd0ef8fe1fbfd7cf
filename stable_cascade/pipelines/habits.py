"""What code written for diffusers asks of a pipeline: `from_pipe`, its schedulers, guidance that callbacks change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

SCHEDULERS = ("scheduler", "prior_scheduler")
FOREIGN = ("safety_checker", "requires_safety_checker", "add_watermarker", "watermark")
"""Arguments of other pipelines of diffusers, whose absence (None, False) may be asked for here as well."""


OF_PRIOR = {
    f"prior_{name}": name for name in ("prior", "text_encoder", "tokenizer", "feature_extractor", "image_encoder")
}
"""diffusers' names for Stage C's components in the combined pipeline, and ours: one of a kind serves both stages."""


class OtherName:
    """An attribute under a second name."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, pipeline: Any, owner: type) -> Any:
        return self if pipeline is None else getattr(pipeline, self.name)

    def __set__(self, pipeline: Any, value: Any) -> None:
        setattr(pipeline, self.name, value)


def under_our_names(components: dict[str, Any]) -> dict[str, Any]:
    """Arguments with Stage C's components under our names.

    Raises:
        ValueError: the two stages have different text encoders or tokenizers.
    """
    own = {name: value for name, value in components.items() if name not in OF_PRIOR}
    for theirs, name in OF_PRIOR.items():
        if theirs in components and not _same(own.setdefault(name, components[theirs]), components[theirs]):
            raise ValueError(f"{theirs} and {name} differ; one serves both stages here, so give {name} alone")
    return own


def with_diffusers_names(make: Callable[..., None]) -> Callable[..., None]:
    """A constructor of the combined pipeline that also takes diffusers' names of its components."""

    @functools.wraps(make)
    def made(self: Any, *args: Any, **components: Any) -> None:
        make(self, *args, **under_our_names(components))

    return made


def _same(one: Any, other: Any) -> bool:
    """Whether two components are one, or hold the same weights or words; what is None agrees with anything."""
    if one is other or one is None or other is None:
        return True
    if isinstance(one, torch.nn.Module) and isinstance(other, torch.nn.Module):
        states = one.state_dict(), other.state_dict()
        return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    return getattr(one, "get_vocab", dict)() == getattr(other, "get_vocab", dict)()


class HabitsMixin:
    """The first base of each pipeline."""

    _guidance_scale: float | None = None
    _num_timesteps: int | None = None
    _interrupt = False

    if TYPE_CHECKING:  # what the pipeline beside this mixin has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline of this class with the components of another, which are shared and not copied.

        Args:
            pipeline: any of this library's, or of diffusers' Stable Cascade pipelines.
            **kwargs: components and config values to use instead of its own; `torch_dtype`, or `dtype`, for all
                networks, which the other pipeline then has too.

        Raises:
            ValueError: the other pipeline lacks a component that is needed.
        """
        # The components of the other pipeline, and those that are given instead.
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        needed, settings = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        optional = cls._optional_components  # type: ignore[attr-defined]
        unknown = sorted(set(kwargs) - set(needed) - set(settings))
        if unknown:
            raise ValueError(f"from_pipe has no argument '{unknown[0]}'; it has {', '.join(sorted(needed))}")
        parts = {name: _part(pipeline, name) for name in needed if name not in kwargs}
        values = {name: pipeline.config[name] for name in settings if name in pipeline.config}
        # All that this class needs must be among them.
        missing = [name for name, part in parts.items() if part is None and name not in optional]
        if missing:
            raise ValueError(
                f"{cls.__name__}.from_pipe needs '{missing[0]}', which a {type(pipeline).__name__} has not; pass "
                f"{missing[0]}=…"
            )
        made = cls(**{**values, **parts, **kwargs})
        return made if dtype is None else made.to(dtype)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SCHEDULERS and value is not None:
            value = self._own_scheduler(name, value)
        super().__setattr__(name, value)

    @property
    def guidance_scale(self) -> float | None:
        """That of the stage that is drawn, for callbacks; they may set `_guidance_scale` for the steps that follow."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the stage that is drawn is guided."""
        return self._guidance_scale is not None and self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        """Steps of the stage that is drawn, or was drawn last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback set `_interrupt`, which ends the stage after its step."""
        return self._interrupt


def _part(pipeline: Any, name: str) -> Any:
    """A pipeline's component under our name: Stage C's scheduler is `scheduler` where Stage C lives alone."""
    own = pipeline.components
    if "prior" in own and "decoder" not in own and name == "prior_scheduler":
        return own.get("scheduler")
    if name == "scheduler" and "prior_scheduler" in own and "decoder" in own:
        return own["scheduler"]
    return own.get(name, own.get(f"prior_{name}"))


def without_foreign(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those of other pipelines that ask for nothing.

    Raises:
        ValueError: one asks for something.
    """
    for name in FOREIGN:
        if kwargs.get(name):
            raise ValueError(f"{name} is of other pipelines, and Stable Cascade has none; leave it away")
    return {name: value for name, value in kwargs.items() if name not in FOREIGN}


class VAETilingMixin:
    """`enable_vae_tiling` and `disable_vae_tiling` of a pipeline with a `vqgan`."""

    vqgan: Any

    def enable_vae_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        """Stage A works in tiles: memory for one of them, and the same image.

        Images of 2048 x 2048 pixels and more do so without being asked; see `StableCascadeVQGAN.enable_tiling`.
        """
        self.vqgan.enable_tiling(tile_sample_min_height, tile_sample_min_width)

    def disable_vae_tiling(self) -> None:
        """Stage A works on whole images, however large."""
        self.vqgan.disable_tiling()
