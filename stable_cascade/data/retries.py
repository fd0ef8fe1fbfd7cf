"""Trying again what a network or a busy server spoiled."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from .draws import uniforms

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, … attempt."""

_PERMANENT = (FileNotFoundError, IsADirectoryError, PermissionError, NotImplementedError, ImportError)
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")
_WORTH_ANOTHER = (408, 425, 429)


class ShardFailure(ValueError):
    """A shard that is damaged, or that still cannot be read after all attempts; others may be fine."""


def with_retries(what: str, action: Callable[[], T]) -> T:
    """The action's result; a failure that may pass is tried again after WAITS, each wait between 1 and 1.5 times it.

    Args:
        what: named in the log.

    Raises:
        Exception: the last error, or at once one that will not pass (missing, forbidden, no credentials).
    """
    for attempt, wait in enumerate((*WAITS, None)):
        try:
            return action()
        except Exception as error:  # every file system has its own errors
            if wait is None or not may_pass(error):
                raise
            # A counter-based number, so that the processes of a cluster do not all come back at the same moment.
            spread = 1 + 0.5 * float(uniforms(os.getpid(), what, np.array([attempt]))[0])
            log.warning("%s: %s; trying again in %.1f s", what, short(error), wait * spread)
            time.sleep(wait * spread)
    raise AssertionError("unreachable")


def cause_of(error: BaseException) -> BaseException:
    """What a file system's error stands for: fsspec tells any failed first request over HTTP as a missing file."""
    cause = error.__cause__
    return cause_of(cause) if isinstance(error, FileNotFoundError) and cause is not None else error


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    error = cause_of(error)
    if isinstance(error, _PERMANENT) or type(error).__name__ in _CREDENTIALS:
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _WORTH_ANOTHER
    return True


def short(error: BaseException) -> str:
    """Kind and first line of an error, and what an HTTP status that refuses means."""
    error = cause_of(error)
    if (status := getattr(error, "status", None)) in (401, 403):
        return f"the server refuses it (HTTP {status}); check the address, its signature or the credentials"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
