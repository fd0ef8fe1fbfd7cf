"""No test talks to the world: a missing file is then an error at once, not a download tried again and again.

Fixtures of several files are here; what they are made of is imported only where one of them is used.
"""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub that everything in this process takes for the real one."""
    from huggingface_hub import constants

    from stable_cascade.hub import forget_silence
    from tests.hub_stand_in import TOKEN, hub_stand_in

    forget_silence()
    with hub_stand_in() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
    forget_silence()


@pytest.fixture(scope="module")
def pipeline():
    """The tiny cascade."""
    from tests.tiny_pipelines import cascade

    return cascade()


@pytest.fixture(scope="module")
def controlled():
    """The tiny cascade with a ControlNet."""
    from tests.tiny_pipelines import cascade, tiny_controlnet

    return cascade(controlnet=tiny_controlnet())
