"""The final export on the Hugging Face hub: asked for at the start, uploaded at the end, or by a command later."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stable_cascade.config import TrainingSettings
from stable_cascade.redaction import redacted
from stable_cascade.training.model_card import write_model_card
from stable_cascade.training.processes import broadcast

LATER = "`stable-cascade publish {folder} --repo {repo}`"


def check_upload(config: TrainingSettings, accelerator: Any) -> None:
    """Refuse a launch whose `push_to_hub` cannot succeed; one process asks the hub.

    Raises:
        ValueError: the hub cannot be reached, the token is missing, refused or may only read, or the repository is
            not the user's to make.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            check_token(repository(config))
        except ValueError as error:
            later = LATER.format(folder="FOLDER", repo=repository(config))
            problem = f"push_to_hub: {error}; or set push_to_hub: False and upload with {later} after the training"
    if problem := broadcast(accelerator, problem):
        raise ValueError(problem)


def repository(config: TrainingSettings) -> str:
    """The name of the hub repository that the config means."""
    return config.hub_model_id or config.experiment_id


def check_token(repo_id: str) -> str:
    """`repo_id` with its owner, after asking the hub who we are and whether that user may write there.

    Raises:
        ValueError: it says no, or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        user = HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(f"hub_model_id '{repo_id}' cannot name a repository ({_line(error)})") from None
    except LocalTokenNotFoundError:
        raise ValueError("there is no Hugging Face token; run `hf auth login` or set HF_TOKEN") from None
    except Exception as error:  # HTTP clients, proxies and the offline mode each have errors of their own
        raise ValueError(f"{_reason(error)}") from None
    _check_rights(user, repo_id)
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def _check_rights(user: dict[str, Any], repo_id: str) -> None:
    """Whether the answer of `whoami` allows an upload.

    Raises:
        ValueError: it does not.
    """
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError("the Hugging Face token may only read; make one that may write, and set HF_TOKEN to it")
    owner = repo_id.split("/")[0] if "/" in repo_id else user.get("name")
    owners = [user.get("name"), *(group.get("name") for group in user.get("orgs", []))]
    if owner not in owners:
        raise ValueError(
            f"hub_model_id '{repo_id}' belongs to '{owner}', but the token to {', '.join(map(str, owners))}; "
            f"use '{owners[0]}/{repo_id.split('/')[-1]}'"
        )


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False, message: str = "Upload") -> str:
    """Upload a folder to a hub repository, made if it is not there; returns the repository's address.

    Args:
        private: whether a repository that is made is private; one that exists stays as it is.

    Raises:
        ValueError: the folder is empty or missing, or the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    path = Path(folder)
    if not path.is_dir() or not any(path.iterdir()):
        raise ValueError(f"'{folder}' is no folder with files; name the folder final/ of a training, or an export/")
    api = HfApi()
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=path, commit_message=message)
    except Exception as error:  # as in check_token
        raise ValueError(f"the upload of '{folder}' to '{repo_id}' failed: {_reason(error)}") from None
    return str(made)


def publish_run(config: TrainingSettings, folder: Path) -> str:
    """Write the model card into the final export and upload it; returns a line that says how that went.

    An upload that fails is no reason to lose a training, so nothing is raised: the line says what to do.
    """
    repo = repository(config)
    try:
        repo = check_token(repo)
        write_model_card(folder, redacted(asdict(config)), repo)
        message = f"{config.experiment_id}, {config.updates} steps"
        address = push_to_hub(folder, repo, private=config.hub_private, message=message)
    except (ValueError, OSError) as error:
        return redacted(
            f"push_to_hub: {_line(error)}. Nothing is lost: the export is in {folder}, and "
            f"{LATER.format(folder=folder, repo=repo)} uploads it"
        )
    return f"uploaded {folder} to {address}"


def _reason(error: Exception) -> str:
    """An error of the hub's client as one line with a remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know the Hugging Face token; run `hf auth login`, or set HF_TOKEN to a new one"
    if status == 403:
        return f"the Hugging Face token has not the right to write there ({_line(error)})"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"
    if status is not None:
        return f"the hub answered {status} ({_line(error)}); try again"
    return f"the hub cannot be reached ({type(error).__name__}: {_line(error)}); check the network and HF_ENDPOINT"


def _line(error: Exception) -> str:
    """An error's text in one line, not too long, without credentials."""
    text = redacted(" ".join(str(error).split())).rstrip(".")
    return text if len(text) <= 240 else text[:237] + "..."
