"""The one way to ask the Hugging Face Hub: bounded in time, telling a missing name from a missing network.

Before anything is downloaded, the Hub is asked whether it knows the repository, for some seconds at most. Where it
cannot be reached, only the cache is used. Imports of the package only `wording`, so that every layer may use it.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from stable_cascade.wording import brief, quoted

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE, ATTEMPTS = 3.0, 2
"""Seconds that the Hub has to answer the first question, and how often it is asked."""
SILENCE = 30.0
"""Seconds for which a Hub that did not answer is not asked again."""

_cache_only = contextvars.ContextVar("cache_only", default=False)
_silent_until = [0.0]


class HubError(ValueError):
    """The Hub has no such repository or file, or cannot be reached and the cache has it not."""


class NotAskedError(HubError):
    """The cache has it not, and the Hub was not to be asked."""


@contextlib.contextmanager
def cache_only() -> Iterator[None]:
    """Inside its `with` block the Hub is not asked at all; what the cache has is found."""
    token = _cache_only.set(True)
    try:
        yield
    finally:
        _cache_only.reset(token)


def ask(name: str, action: Callable[..., T], *, kind: str = "model", **options: Any) -> T:
    """`action(**options)`, a call of a library that downloads from the repository `name`, or finds it in the cache.

    Args:
        kind: "model" or "dataset".
        options: `revision`, `token`, `cache_dir`, …; with `local_files_only` the Hub is not asked.

    Raises:
        HubError: the Hub does not know the repository, or gives not what the action wants.
        NotAskedError: inside `cache_only`, and the cache has it not.
    """
    reachable = _reachable(name, kind, options)
    try:
        return action(**options) if reachable else action(**{**options, "local_files_only": True})
    except NotImplementedError:
        raise
    except Exception as error:  # HTTP clients, proxies, the offline mode and the cache each have errors of their own
        if reachable:
            raise HubError(
                f"{quoted(name)} could not be loaded from the Hub ({type(error).__name__}: {brief(error)}); give a "
                "local path, or check the name and the network"
            ) from error
        if _cache_only.get():
            raise NotAskedError(f"{quoted(name)} is not in the cache; a run will ask the Hub for it") from error
        raise _refused(name, "it cannot be reached, and the cache has it not", "or check the network") from error


def _refused(name: str, why: str, remedy: str) -> HubError:
    """The one line for what is neither here nor on the Hub."""
    return HubError(
        f"{quoted(name)} is no file or folder here and could not be loaded from the Hub ({why}); give a local "
        f"path, {remedy}"
    )


def _reachable(name: str, kind: str, options: dict[str, Any]) -> bool:
    """Whether the Hub can be asked for the repository.

    Raises:
        HubError: it answers that there is none, or that this user may not see it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if options.get("local_files_only") or constants.HF_HUB_OFFLINE or _cache_only.get():
        return False
    if time.monotonic() < _silent_until[0]:
        return False
    asked = {key: options[key] for key in ("revision", "token") if options.get(key) is not None}
    for _ in range(ATTEMPTS):
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE, **asked)
            return True
        except RevisionNotFoundError:
            raise HubError(f"{quoted(name)} has no revision {quoted(asked.get('revision'))} on the Hub") from None
        except RepositoryNotFoundError:
            raise _refused(name, f"it has no such {kind}", "mend the name, or log in if it is a private one") from None
        except HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status in (401, 403):
                raise HubError(
                    f"the Hub refuses {quoted(name)} (HTTP {status}); ask for access on its page, and log in"
                ) from None
            problem: Exception = error
        except ValueError as error:  # the name has no form that the Hub knows
            raise _refused(name, f"no name it knows: {brief(error)}", "or mend the name") from None
        except Exception as error:  # each version of its client has network errors of its own
            problem = error
    _silent_until[0] = time.monotonic() + SILENCE
    log.warning("the Hub cannot be reached (%s: %s); only the cache is used", type(problem).__name__, brief(problem))
    return False


def hub_file(name: str, file: str, **options: Any) -> Path:
    """The local copy of a repository's file, downloaded if it is not in the cache.

    Raises:
        HubError: as `ask`.
        FileNotFoundError: the repository is there and has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing = object()

    def download(**options: Any) -> Any:
        try:
            return hf_hub_download(name, file, **options)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return missing

    found = ask(name, download, **options)
    if found is missing:
        raise FileNotFoundError(f"{quoted(name)} has no file {quoted(file)} on the Hub")
    return Path(found)


def forget_silence() -> None:
    """Ask again at once, as after the network came back."""
    _silent_until[0] = 0.0
