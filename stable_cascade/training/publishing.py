"""The final export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from stable_cascade.config import TrainingSettings


def publish(config: TrainingSettings, folder: Path) -> str:
    """Upload a folder to `hub_model_id` (or a repository named as the experiment); returns its name there."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = api.create_repo(config.hub_model_id or config.experiment_id, exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"{config.updates} steps")
    return name
