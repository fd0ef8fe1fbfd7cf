"""What every filter asks of its arguments, and draws from a sample's generator."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from stable_cascade.wording import brief, quoted

T = TypeVar("T")

LARGEST_KERNEL = 127
"""Pixels; a disc's work grows with the square of its size."""


def per_sample(pixels: Tensor, generators: Sequence[Generator] | None) -> list[tuple[Tensor, Generator | None]]:
    """Each image, (3, H, W) float32 on the CPU, with its generator (None: nothing is drawn).

    Raises:
        ValueError: `pixels` is no batch of RGB images, or the numbers of images and generators differ.
    """
    checked_pixels(pixels)
    if generators is not None and len(generators) != len(pixels):
        raise ValueError(f"{len(generators)} generators for {len(pixels)} images; give one for each, or None")
    own: Sequence[Generator | None] = [None] * len(pixels) if generators is None else generators
    return list(zip(pixels.detach().float().cpu(), own, strict=True))


def checked_pixels(pixels: Tensor) -> Tensor:
    """`pixels`, if it is a batch of RGB images in floating point."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        seen = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"a filter takes RGB images (batch, 3, height, width) in [0, 1] as floats; got {seen}")
    if not pixels.numel():
        raise ValueError(f"a filter takes at least one image of at least one pixel; got {tuple(pixels.shape)}")
    return pixels


def draw_uniform(low: float, high: float, generator: Generator | None) -> float:
    """A number uniform in [low, high); the middle without a generator."""
    u = 0.5 if generator is None else float(torch.rand((), generator=generator))
    return low + (high - low) * u


def draw_chance(probability: float, generator: Generator | None) -> bool:
    """True with this probability; False without a generator. Always one draw, whatever the probability."""
    return generator is not None and float(torch.rand((), generator=generator)) < probability


def draw_choice(options: Sequence[T], generator: Generator | None) -> T:
    """One of the options; the first without a generator."""
    if generator is None:
        return options[0]
    return options[int(torch.randint(len(options), (), generator=generator))]


def checked_probability(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is no number in [0, 1].
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; allowed: a number in [0, 1]")
    return float(value)


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is no number in [low, high].
    """
    if not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed: a number in [{low:g}, {high:g}]")
    return float(value)


def checked_count(name: str, value: Any, *, lowest: int = 1, highest: int = 8192, optional: bool = False) -> Any:
    """`value`, a whole number from `lowest` to `highest` (or None where `optional`).

    Raises:
        ValueError: it is neither.
    """
    whole = isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest
    if not whole and not (optional and value is None):
        allowed = f"a whole number from {lowest} to {highest}{' or null' * optional}"
        raise ValueError(f"{name} is {brief(repr(value), 60)}; allowed: {allowed}")
    return value


def checked_range(name: str, value: Any) -> tuple[float, float]:
    """`value` as (low, high).

    Raises:
        ValueError: it is no pair of numbers 0 <= low <= high <= 1.
    """
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 <= pair[0] <= pair[1] <= 1:
        raise ValueError(f"{name} is {value!r}; allowed: [low, high] with 0 <= low <= high <= 1, as [0.04, 0.4]")
    return float(pair[0]), float(pair[1])


def checked_sizes(name: str, value: Any) -> tuple[int, ...]:
    """`value` as a tuple of kernel sizes.

    Raises:
        ValueError: it is no list of sizes that are 0 (nothing is done) or odd, and at most `LARGEST_KERNEL`.
    """
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    good = all(
        isinstance(size, int) and 0 <= size <= LARGEST_KERNEL and (size == 0 or size % 2 == 1) for size in sizes
    )
    if not sizes or not good:
        allowed = f"a list of odd numbers up to {LARGEST_KERNEL} and 0, as [3, 5, 7]"
        raise ValueError(f"{name} is {brief(repr(value), 60)}; allowed: {allowed}")
    return sizes


def needed_module(name: str, needed_by: str, remedy: str) -> ModuleType:
    """The module, imported now.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{needed_by} needs {name}, which cannot be imported ({error}); {remedy}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def load_class(key: str, name: Any, known: Mapping[str, Any]) -> Any:
    """The class that `known` has under `name`, or that `package.module:Class` names.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key} is {brief(repr(name), 60)}; allowed: {', '.join(known)}, or 'package.module:Class'")
    if ":" in name:
        return _imported(key, name)
    if name not in known:
        raise ValueError(
            f"{key} {quoted(name, 60)} is unknown;{nearest(name[:200], known)} or write 'package.module:Class'"
        )
    return known[name]


def constructed(cls: Any, params: Mapping[str, Any] | None, key: str, **extra: Any) -> Any:
    """`cls(**params)`; of `extra`, which the program gives, only what the constructor takes.

    Raises:
        ValueError: a parameter is unknown or missing, or the constructor refuses a value.
    """
    name = getattr(cls, "__name__", str(cls))
    given = dict(params or {})
    # What the constructor takes, and what the program gives.
    signature = _signature(cls, name)
    accepted = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    free = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    names = [p.name for p in accepted]
    own = [parameter for parameter in names if parameter not in extra]
    # Every given name must be known, and every required one given.
    for parameter in given:
        if parameter in extra:
            raise ValueError(f"{key} holds {parameter!r}, which {name} is given by the program; leave it away")
        if parameter not in names and not free:
            raise ValueError(
                f"{key} {quoted(parameter, 60)} is unknown to {name};{nearest(str(parameter)[:200], own)}"
            )
    missing = [p.name for p in accepted if p.default is p.empty and p.name not in {*given, *extra}]
    if missing:
        raise ValueError(f"{key} lacks {', '.join(map(repr, missing))}, which {name} requires")
    # Construct; a value that it refuses is named with its key.
    wanted = {parameter: value for parameter, value in extra.items() if parameter in names}
    try:
        return cls(**given, **wanted)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{key}: {name}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error about an unknown name ends: the nearest known one, if any is near, and all of them."""
    names = list(known)
    lower = {candidate.lower(): candidate for candidate in names}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)]
    listed = f" known: {', '.join(names)}" if names else " it takes none"
    return f" nearest: {close[0]!r};{listed}" if close else listed


def _imported(key: str, name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key} {name!r}: module {module_name!r} cannot be imported ({reason})") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None) if part else None
    if found is None:
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and not n.startswith("_")]
        raise ValueError(f"{key} {name!r}: module {module_name!r} has no {attribute!r};{nearest(attribute, classes)}")
    return found


def _signature(cls: Any, name: str) -> inspect.Signature:
    if not callable(cls):
        raise ValueError(f"{name} is a {type(cls).__name__}, not a class; name a class")
    try:
        return inspect.signature(cls)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the parameters of {name} cannot be read ({error}); give it a plain __init__") from error
