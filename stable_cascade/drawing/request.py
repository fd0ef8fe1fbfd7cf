"""What decides an image, in one frozen object that goes into JSON and comes back checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stable_cascade.diffusion.samplers import SAMPLERS
from stable_cascade.pipelines.call import KNOBS, interval
from stable_cascade.wording import brief

TASKS = ("generate", "variation", "img2img", "inpaint", "control", "reconstruct")
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
MOST_TEXT = 20_000
# What a task that starts from an image changes of it where nothing else is said.
STRENGTHS = {"img2img": 0.75, "inpaint": 1.0}


@dataclass(frozen=True)
class InputFile:
    """An image on disk; `sha256` is of the file's bytes, filled in when it is drawn from."""

    path: str
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_path("path", self.path)
        check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA, in any known format, and how strongly it acts; a path is a file, a folder or a Hub name."""

    path: str
    weight: float = 1.0
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_path("lora", self.path)
        check_number("lora weight", self.weight, -100, 100)
        check_sha256("lora sha256", self.sha256)


@dataclass(frozen=True)
class ControlChoice:
    """A ControlNet, the image it looks at, and when and how strongly it acts.

    `filtered` says that the image is a control image already; `filter` names the filter of a ControlNet that does
    not say by itself which one it was trained with.
    """

    path: str
    image: InputFile | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    filtered: bool = False
    filter: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_path("controlnet", self.path)
        check_kind("controlnet image", self.image, InputFile, optional=True)
        check_number("controlnet scale", self.scale, -100, 100)
        interval("controlnet start and end", (self.start, self.end))
        check_kind("controlnet filtered", self.filtered, bool)
        if self.filter is not None:
            check_text("controlnet filter", self.filter, 200)
        check_sha256("controlnet sha256", self.sha256)


@dataclass(frozen=True)
class Drawing:
    """Every setting that decides an image.

    Sizes that are None are the model's own, or the input image's; `strength`, `sampler` and `shift` that are None
    are the task's and the model's own. What comes back with an image has sizes, strength and sums filled in.

    Raises:
        ValueError: a setting that means nothing, in one line.
    """

    task: str = "generate"
    model: str = "embedded"
    lite: bool = False
    variant: str | None = None
    dtype: str = "float32"
    prompt: str = ""
    negative_prompt: str = ""
    weighted: bool = False
    seed: int = 0
    height: int | None = None
    width: int | None = None
    prior_num_inference_steps: int = 20
    prior_guidance_scale: float = 4.0
    num_inference_steps: int = 10
    decoder_guidance_scale: float = 1.1
    guidance_method: str = KNOBS["guidance_method"].default
    guidance_rescale: float = KNOBS["guidance_rescale"].default
    guidance_interval: tuple[float, float] = KNOBS["guidance_interval"].default
    cache_interval: int = KNOBS["cache_interval"].default
    guide_prior: str | None = None
    sampler: str | None = None
    shift: float | None = None
    strength: float | None = None
    loras: tuple[LoraChoice, ...] = ()
    image: InputFile | None = None
    mask_image: InputFile | None = None
    outpaint: tuple[int, int, int, int] | None = None
    images: tuple[InputFile, ...] = ()
    image_weights: tuple[float, ...] | None = None
    controlnets: tuple[ControlChoice, ...] = ()
    preview: bool = False

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("dtype", self.dtype, DTYPES)
        check_path("model", self.model)
        if self.variant is not None:
            check_text("variant", self.variant, 100)
        if self.guide_prior is not None:
            check_path("guide_prior", self.guide_prior)
        for name in ("lite", "weighted", "preview"):
            check_kind(name, getattr(self, name), bool)
        for name in ("prompt", "negative_prompt"):
            check_text(name, getattr(self, name), MOST_TEXT)
        self._check_sampling()
        self._check_inputs()

    def _check_sampling(self) -> None:
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        for name in ("height", "width"):
            check_side(name, getattr(self, name))
        for name in ("prior_num_inference_steps", "num_inference_steps"):
            check_whole(name, getattr(self, name), 1, MOST_STEPS)
        for name in ("prior_guidance_scale", "decoder_guidance_scale"):
            check_number(name, getattr(self, name), 0, 1000)
        for name, knob in KNOBS.items():
            object.__setattr__(self, name, knob.check(name, getattr(self, name)))
        if self.sampler is not None:
            check_choice("sampler", self.sampler, tuple(SAMPLERS))
        if self.shift is not None:
            check_number("shift", self.shift, 0.01, 100)
        if self.strength is not None:
            check_number("strength", self.strength, 0, 1)

    def _check_inputs(self) -> None:
        # Files and choices, each LoRA once.
        for name, kind in (("loras", LoraChoice), ("images", InputFile), ("controlnets", ControlChoice)):
            check_items(name, getattr(self, name), kind)
        for name in ("image", "mask_image"):
            check_kind(name, getattr(self, name), InputFile, optional=True)
        paths = [lora.path for lora in self.loras]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise ValueError(f"loras name '{brief(twice)}' twice; name it once, with the sum of the weights")
        # Weights and margins within their ranges.
        if self.image_weights is not None:
            if not isinstance(self.image_weights, tuple) or len(self.image_weights) > MOST_ITEMS:
                raise ValueError(f"image_weights {self.image_weights!r} is no tuple of at most {MOST_ITEMS} numbers")
            for weight in self.image_weights:
                check_number("image_weights", weight, -100, 100)
        if self.outpaint is not None:
            if not isinstance(self.outpaint, tuple) or len(self.outpaint) != 4:
                raise ValueError(f"outpaint {self.outpaint!r} is not left, top, right, bottom in pixels")
            for pixels in self.outpaint:
                check_whole("outpaint", pixels, 0, LARGEST_SIDE)
            if not any(self.outpaint):
                raise ValueError("outpaint 0,0,0,0 adds nothing; give pixels on one side at least")
        if self.outpaint is not None and self.mask_image is not None:
            raise ValueError("mask_image and outpaint are both given; outpaint makes its own mask, give one of them")

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and values, of which `from_json` makes an equal object."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, values: Any) -> Drawing:
        """The drawing that `to_json` described; absent keys get their default.

        Raises:
            ValueError: an unknown key, a wrong type, or a setting that means nothing.
        """
        known = _known(cls, values, "drawing")
        for name, kind in (("loras", LoraChoice), ("images", InputFile), ("controlnets", ControlChoice)):
            if name in known:
                known[name] = tuple(_made(kind, item, name) for item in _listed(name, known[name]))
        for name in ("image", "mask_image"):
            if known.get(name) is not None:
                known[name] = _made(InputFile, known[name], name)
        for name in ("guidance_interval", "image_weights", "outpaint"):
            if known.get(name) is not None:
                known[name] = tuple(_listed(name, known[name]))
        return cls(**known)


def field_names() -> tuple[str, ...]:
    """The names of a drawing's settings."""
    return tuple(field.name for field in fields(Drawing))


def _made(cls: Any, values: Any, name: str) -> Any:
    known = _known(cls, values, name)
    if known.get("image") is not None:
        known["image"] = _made(InputFile, known["image"], f"{name} image")
    if "path" not in known:
        raise ValueError(f"{name} has an entry without a path")
    return cls(**known)


def _known(cls: Any, values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is a {type(values).__name__}; expected an object with settings")
    names = [field.name for field in fields(cls)]
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0)
            raise ValueError(f"{name} has the unknown setting '{brief(key, 60)}'; nearest: '{nearest[0]}'")
    return dict(values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, (InputFile, LoraChoice, ControlChoice)):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) > MOST_ITEMS:
        raise ValueError(f"{name} is not a list of at most {MOST_ITEMS} entries")
    return list(value)


SMALLEST_SIDE, LARGEST_SIDE = 64, 8192
MOST_ITEMS = 64
LONGEST_PATH = 4096


def shown(value: Any) -> str:
    """The value in an error, short."""
    return brief(repr(value), 60)


def check_kind(name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """An instance of a class, or with `optional` None."""
    if not isinstance(value, kind) and not (optional and value is None):
        raise ValueError(f"{name} {shown(value)} is a {type(value).__name__}; expected {kind.__name__}")


def check_items(name: str, value: Any, kind: type) -> None:
    """A tuple of at most `MOST_ITEMS` instances of a class."""
    if not isinstance(value, tuple) or len(value) > MOST_ITEMS:
        raise ValueError(f"{name} is not a tuple of at most {MOST_ITEMS} entries")
    for item in value:
        check_kind(name, item, kind)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} {shown(value)} is not one of {', '.join(allowed)}")


def check_text(name: str, value: Any, longest: int) -> None:
    """A string that is not too long, with whole characters and no zero."""
    check_kind(name, value, str)
    if len(value) > longest:
        raise ValueError(f"{name} has {len(value):,} characters; at most {longest:,} are allowed")
    if "\0" in value:
        raise ValueError(f"{name} holds a zero character; leave it away")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character at place {error.start}; write it again") from None


def check_path(name: str, value: Any) -> None:
    """A string that can be a path or a name; file names need not be UTF-8."""
    check_kind(name, value, str)
    if not value:
        raise ValueError(f"{name} is empty; give a file, a folder or a name")
    if len(value) > LONGEST_PATH or "\0" in value:
        raise ValueError(
            f"{name} {shown(value)} is no path, of at most {LONGEST_PATH} characters and none of them zero"
        )


def check_sha256(name: str, value: Any) -> None:
    """None, or 64 hexadecimal digits."""
    if value is None:
        return
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{name} {shown(value)} is not a SHA-256 sum, 64 hexadecimal digits")


def check_whole(name: str, value: Any, lowest: int, highest: int) -> None:
    """A whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name} {shown(value)} is not a whole number from {lowest} to {highest}")


def check_number(name: str, value: Any, lowest: float, highest: float) -> None:
    """A finite number within limits."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # NaN is within no limits
        raise ValueError(f"{name} {shown(value)} is not a number from {lowest} to {highest}")


def check_side(name: str, value: Any) -> None:
    """None, or a size that can be drawn."""
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value % 8 or not SMALLEST_SIDE <= value <= LARGEST_SIDE:
        nearest = min(max(SMALLEST_SIDE, (value + 3) // 8 * 8), LARGEST_SIDE) if whole else SMALLEST_SIDE
        raise ValueError(
            f"{name} {shown(value)} is not a multiple of 8 from {SMALLEST_SIDE} to {LARGEST_SIDE}; nearest: {nearest}"
        )
