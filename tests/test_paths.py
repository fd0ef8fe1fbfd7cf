"""One rule for every path, and one bounded way to the Hub."""

import ast
import socket
import time
from dataclasses import fields
from pathlib import Path

import pytest

from stable_cascade import StableCascadePrior
from stable_cascade.config import TRAINERS, LoraConfig, keys_where, load_config
from stable_cascade.disk import local_path, path_text
from stable_cascade.hub import HubError, NotAskedError, ask, cache_only, hub_file
from tests.tiny_cascade import tiny_prior
from tests.tiny_pipelines import cascade

ROOT = Path(__file__).resolve().parents[1]
ANYTHING_PATHLIKE = ("_path", "_dir", "model_name", "dataset_name", "resume")
NO_PATHS = {"hub_model_id"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home of mine"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home of mine").mkdir()
    return tmp_path / "home of mine"


def test_the_rule(home):
    assert local_path("~/a b/ü.png") == home / "a b/ü.png"
    assert local_path("~") == home
    for literal in ("$HOME/a", "a~b", "./~x", "owner/name", "%TEMP%"):
        assert local_path(literal) == Path(literal)
    assert path_text("https://host/~me/x.tar") == "https://host/~me/x.tar"
    assert path_text(None) is None


def test_every_key_that_may_name_a_path_follows_it():
    for cls in TRAINERS:
        named = {field.name for field in fields(cls) if field.name.endswith(ANYTHING_PATHLIKE)} - NO_PATHS
        assert named <= keys_where([cls], path=True)


def test_home_in_configs_and_overrides(home, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "checkpoint_path: ~/runs\noutput_path: ~/out\nexperiment_id: a\nimage_size: 64\nbatch_size: 1\n"
        "webdataset_path: ['~/a.tar', 's3://b/c.tar']\npretrained_model_name_or_path: ~/model\nupdates: 1\nrank: 2\n"
    )
    config = load_config(LoraConfig, ["c.yaml", "--cache_dir=~/cache", "--resume", "~/runs/a/step-00000001"])
    assert config.checkpoint_path == str(home / "runs")
    assert config.webdataset_path == [str(home / "a.tar"), "s3://b/c.tar"]
    assert config.cache_dir == str(home / "cache")
    assert config.resume == str(home / "runs/a/step-00000001")
    assert config.pretrained_model_name_or_path == str(home / "model")


def test_home_in_python(home):
    prior = tiny_prior()
    prior.save_pretrained("~/prior")
    assert (home / "prior/config.json").is_file()
    assert StableCascadePrior.from_pretrained("~/prior").config.in_channels == prior.config.in_channels
    pipeline = cascade()
    pipeline.save_pretrained("~/whole")
    assert (home / "whole/model_index.json").is_file()
    type(pipeline).from_pretrained("~/whole")
    assert not Path("~").exists()


def test_options_that_are_paths_are_read_by_the_rule():
    """`type=Path` would take a `~` that no shell has expanded, as in `--output=~/x`, to the letter."""
    for file in (ROOT / "stable_cascade/cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type":
                assert getattr(node.value, "id", "") != "Path", f"{file.name}:{node.value.lineno}"


def test_a_name_that_the_hub_has_not(hub):
    with pytest.raises(HubError, match=r"'some/one' is no file or folder here and .* \(it has no such model\)"):
        StableCascadePrior.from_pretrained("some/one")


def test_a_file_that_the_repository_has_not(hub):
    hub.files["some/one"] = {"a.txt": b"x"}
    assert hub_file("some/one", "a.txt").read_bytes() == b"x"
    with pytest.raises(FileNotFoundError, match=r"'some/one' has no file 'b.txt' on the Hub"):
        hub_file("some/one", "b.txt")


def test_what_the_cache_has_is_used_where_the_hub_is_gone(hub, caplog):
    from stable_cascade.hub import forget_silence

    hub.files["some/one"] = {"a.txt": b"x"}
    hub_file("some/one", "a.txt")
    hub.broken = "some"
    forget_silence()
    assert hub_file("some/one", "a.txt").read_bytes() == b"x"
    assert "the Hub cannot be reached" in caplog.text
    with pytest.raises(HubError, match=r"it cannot be reached, and the cache has it not\); give a local path"):
        hub_file("some/one", "b.txt")


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    """It accepts connections and says nothing; the second question is not even asked."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("stable_cascade.hub.PATIENCE", 0.2)
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(HubError, match="cannot be reached"):
                ask("some/one", lambda **options: hub_file("some/one", "a.txt", **options))
        assert time.monotonic() - started < 5


def test_where_the_hub_is_not_to_be_asked_it_is_not(hub):
    hub.files["some/one"] = {"a.txt": b"x"}
    with cache_only(), pytest.raises(NotAskedError, match="'some/one' is not in the cache; a run will ask the Hub"):
        hub_file("some/one", "a.txt")
    assert not hub.asked


def test_check_asks_no_network(hub, tmp_path, capsys, monkeypatch):
    from tests.trainer_runs import trainer_main

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    arguments = {
        "experiment_id": "a", "checkpoint_path": tmp_path, "output_path": tmp_path, "updates": 1, "batch_size": 1,
        "image_size": 64, "model_version": "1B", "pretrained_model_name_or_path": "some/cascade",
        "webdataset_path": "s3://bucket/a.tar", "check": "true", "rank": 2, "num_preview_images": 0,
    }  # fmt: skip
    trainer_main("lora")([f"--{key}={value}" for key, value in arguments.items()])
    plan = capsys.readouterr().out
    assert "prior           NETWORK: 'some/cascade' is not in the cache" in plan
    assert "data            NETWORK: 's3://bucket/a.tar' is not on this machine; a run will read it" in plan
    assert not hub.asked
