"""What can be set of sampling beside steps and scales: one table for pipelines, commands, page and `Drawing`."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Annotated, Any, TypedDict, get_type_hints

from stable_cascade import bounds
from stable_cascade.diffusion.guidance import GUIDANCES


@dataclass(frozen=True)
class Knob:
    """The default of a setting, the check that every value passes, and how it is offered on the command line."""

    default: Any
    check: Callable[[str, Any], Any]
    """(name, value) -> the value as it is kept; ValueError where it means nothing."""
    flag: str
    help: str
    option: Mapping[str, Any] = field(default_factory=dict)
    """What `argparse` is told of its values."""


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: Any) -> Any:
    """A whole number of numpy or torch as Python's; anything else is what it was."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    try:
        return operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return value


def _method(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in GUIDANCES:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(GUIDANCES)}")
    return value


def _share(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is not a number from 0 to 1; 0.7 is usual")
    return value


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two numbers from 0 to 1, the second not below the first.

    Raises:
        ValueError: something else.
    """
    pair: Any = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2:
        raise ValueError(f"{name} {value} is not two numbers from 0 to 1; (0, 1) is always")
    for end in pair:
        if not is_number(end) or not 0 <= end <= 1:
            raise ValueError(f"{name} {end} is not a number from 0 to 1")
    if pair[0] > pair[1]:
        raise ValueError(f"{name} {value}: the first must not be above the second")
    return pair


def _every(name: str, value: Any) -> int:
    value = whole(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bounds.STEPS:
        raise ValueError(f"{name} {value!r} is not a positive whole number; 1 runs all of every step")
    return value


class Sampling(TypedDict, total=False):
    """Keyword arguments that every pipeline's call takes and hands to both of its stages."""

    guidance_method: Annotated[
        str,
        Knob(
            "cfg", _method, "guidance-method",
            "; ".join(f"{name}: {method.about}" for name, method in GUIDANCES.items()) + " (default cfg)",
            {"choices": tuple(GUIDANCES)},
        ),
    ]  # fmt: skip
    guidance_rescale: Annotated[
        float, Knob(0.7, _share, "rescale", "of predictions guided by cfg (default 0.7)", {"type": float})
    ]
    guidance_interval: Annotated[
        tuple[float, float],
        Knob(
            (0.0, 1.0), interval, "guidance-interval", "times in which guidance acts, 1 is noise (default 0 1)",
            {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")},
        ),
    ]  # fmt: skip
    cache_interval: Annotated[
        int,
        Knob(
            1, _every, "cache-interval",
            "run the networks' deeper half every N-th step only: faster, rougher (default 1)",
            {"type": int, "metavar": "N"},
        ),
    ]  # fmt: skip


KNOBS: dict[str, Knob] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Sampling, include_extras=True).items()
}


def checked(given: Mapping[str, Any]) -> Sampling:
    """Every knob, with its default where it is not given.

    Raises:
        TypeError: a name that is no knob, as of any unknown argument.
        ValueError: a value that means nothing.
    """
    for name in given:
        if name not in KNOBS:
            nearest = difflib.get_close_matches(name, KNOBS, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise TypeError(f"unexpected keyword argument '{name}'{hint}")
    return Sampling(**{name: knob.check(name, given.get(name, knob.default)) for name, knob in KNOBS.items()})  # type: ignore[typeddict-item]
