"""The cache: its files, what fills it, and that training from it is training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from stable_cascade.cli.main import main
from stable_cascade.data.store import StoreWriter, TensorStore, digest
from tests.making_shards import encoded, image, undecodable, write_tar
from tests.tiny_cascade import WORDS
from tests.trainer_runs import ROOT, SIZES, settings, tensors, train, write_cascade, write_config, write_images
from tests.two_processes import launch_two

PLAIN = {"image_embedding_share": 0.5, "num_preview_images": 0, "train_tokens": None, "updates": 5, "ema_beta": 0.5}
FRESH = {**PLAIN, "cache": True}
LIVE = {**PLAIN, "crops_per_image": 1}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"), dropout=0.0)
    write_images(folder / "images.tar")
    return folder


def filled(folder: Path, tensors: dict) -> Path:
    with StoreWriter(folder) as writer:
        writer.add(tensors)
    return folder


def losses(folder: Path, run: str = "run") -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in (folder / f"out/{run}/log.jsonl").read_text().splitlines()]


def broken(folder: Path) -> int:
    return json.loads((folder / "out/run/log.jsonl").read_text().splitlines()[-1])["broken"]


def assert_near(one: list[float], other: list[float]) -> None:
    assert len(one) == len(other) > 0
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-5


# -- files ----------------------------------------------------------------------------------------------------------


def test_stored_tensors_come_back(tmp_path):
    tensors = {
        "half": torch.randn(3, 4).to(torch.bfloat16), "one": torch.randn(()), "a b\nc": torch.randn(2, 1, 5),
    }  # fmt: skip
    store = TensorStore(filled(tmp_path / "s", tensors))
    assert len(store) == 3
    assert store.size == sum(value.nbytes for value in tensors.values())
    for name, value in tensors.items():
        assert store[name].dtype == value.dtype
        assert torch.equal(store[name], value)
    assert store.missing(["half", "other", "one"]) == ["other"]
    with pytest.raises(KeyError):
        store["other"]


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path):
    value = torch.arange(6.0).view(2, 3)
    filled(tmp_path, {"key": value})
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(str(file), "pt") as opened:
        assert list(opened.keys()) == [digest("key")]
        assert torch.equal(opened.get_tensor(digest("key")), value)


def test_many_shards_and_repeated_names(tmp_path):
    values = {f"key {number}": torch.full((4,), float(number)) for number in range(40)}
    with StoreWriter(tmp_path, shard_bytes=64) as writer:
        for name, value in values.items():
            writer.add({name: value})
    filled(tmp_path, {"key 3": values["key 3"], "new": torch.ones(2)})
    store = TensorStore(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 11
    assert len(store) == 41
    assert all(torch.equal(store[name], value) for name, value in values.items())


def test_what_was_added_before_an_error_is_kept(tmp_path):
    def fail():
        with StoreWriter(tmp_path) as writer:
            writer.add({"key": torch.ones(1)})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "key" in TensorStore(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_damaged_shard_is_named(tmp_path, keep):
    filled(tmp_path, {"key": torch.ones(8)})
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file.name} is damaged; delete it"):
        TensorStore(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {}}', b"[" * 100_000])
def test_a_header_that_is_none_is_one_line(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"a.safetensors is damaged; delete it"):
        TensorStore(tmp_path)


def test_abandoned_temporary_files_go_and_young_ones_stay(tmp_path):
    old, young = tmp_path / "a-1.part", tmp_path / "b-2.part"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    filled(tmp_path, {"key": torch.ones(1)})
    assert not old.exists()
    assert young.exists()
    assert len(TensorStore(tmp_path)) == 1


def test_a_killed_writer_leaves_whole_shards(tmp_path):
    code = (
        "import sys, torch; from stable_cascade.data.store import StoreWriter\n"
        "with StoreWriter(sys.argv[1], shard_bytes=400000) as writer:\n"
        "    for number in range(10**6):\n"
        "        writer.add({f'key {number}': torch.full((10000,), float(number))})\n"
        "        print(number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 57:
        pass
    process.kill()
    process.wait()
    store = TensorStore(tmp_path)
    assert len(store) >= 50
    assert len(store) % 10 == 0
    assert all(bool((store[f"key {number}"] == number).all()) for number in range(len(store)))


# -- equality with live training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        ("lora", {}),
        ("lora", {"train_tokens": [["[fox]", "^dog</w>"]], "num_preview_images": 1}),
        ("text_to_image", {"crop": "random", "crops_per_image": 3, "bucketeer_random_ratio": 0.5}),
        ("text_to_image", {"dtype": "bfloat16", "crop": "center", "offset_noise": 0.1}),
    ],
)
def test_cached_and_live_losses_are_equal(tmp_path, cascade, trainer, changes):
    train(trainer, tmp_path, cascade, **{**LIVE, **changes})
    cached = train(trainer, tmp_path, cascade, experiment_id="cached", **{**FRESH, **changes})
    assert cached.exists()
    assert_near(losses(tmp_path, "cached"), losses(tmp_path))


def test_cached_and_live_losses_are_equal_with_a_controlnet(tmp_path, cascade):
    """Whose batches keep their pixels, for the control images."""
    keys = {
        "controlnet_blocks": [0, 2], "controlnet_filter": "CannyFilter", "controlnet_filter_params": {"resize": 32},
        "image_embedding_share": 0.5, "num_preview_images": 1, "updates": 3, "train_tokens": None,
    }  # fmt: skip
    train("controlnet", tmp_path, cascade, crops_per_image=1, **keys)
    train("controlnet", tmp_path, cascade, experiment_id="cached", cache=True, **keys)
    assert_near(losses(tmp_path, "cached"), losses(tmp_path))


def masked_images(path: Path) -> Path:
    members = {}
    for number in range(12):
        width, height = SIZES[number % len(SIZES)]
        members[f"{number:03}.png"] = image(width, height, seed=number)
        members[f"{number:03}.txt"] = f"a {WORDS[number % 3]}"
        if number % 2:
            members[f"{number:03}.mask.png"] = image(width, height, seed=100 + number)
    return write_tar(path, members)


def test_cached_and_live_losses_are_equal_with_masks(tmp_path, cascade):
    data = str(masked_images(tmp_path / "masked.tar"))
    changes = {"webdataset_path": data, "masked_loss": True, "unmasked_weight": 0.0}
    train("lora", tmp_path, cascade, **{**LIVE, **changes})
    train("lora", tmp_path, cascade, experiment_id="cached", **{**FRESH, **changes})
    train("lora", tmp_path, cascade, experiment_id="whole", **{**LIVE, "webdataset_path": data})
    assert_near(losses(tmp_path, "cached"), losses(tmp_path))
    apart = [abs(a - b) for a, b in zip(losses(tmp_path), losses(tmp_path, "whole"), strict=True)]
    assert max(apart) > 1e-4  # the masks do something


def test_broken_images_are_replaced_and_counted_as_without_a_cache(tmp_path, cascade):
    members = {}
    for number in range(12):
        width, height = SIZES[number % len(SIZES)]
        members[f"{number:03}.png"] = (undecodable if number in (1, 5, 7) else image)(width, height, seed=number)
        members[f"{number:03}.txt"] = f"a {WORDS[number % 3]}"
    data = {"webdataset_path": str(write_tar(tmp_path / "broken.tar", members)), "max_broken_share": 0.5}
    train("lora", tmp_path, cascade, **{**LIVE, **data})
    live, count = losses(tmp_path), broken(tmp_path)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "runs")
    train("lora", tmp_path, cascade, **{**FRESH, **data})
    assert_near(losses(tmp_path), live)
    assert broken(tmp_path) == count > 0


def test_resumed_cached_run_ends_as_an_uninterrupted_one(tmp_path, cascade):
    train("lora", tmp_path, cascade, **{**FRESH, "updates": 2})
    resumed = train("lora", tmp_path, cascade, **FRESH)
    whole = train("lora", tmp_path, cascade, experiment_id="whole", **FRESH)
    one, other = tensors(resumed), tensors(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- no encoder, nothing stale, nothing twice -----------------------------------------------------------------------


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_training_from_the_cache_needs_no_encoder(tmp_path, cascade):
    """Their weights are gone: whoever wanted one of them could not have it."""
    own = tmp_path / "cascade"
    shutil.copytree(cascade, own)
    cache = {"cache_dir": str(tmp_path / "cache")}
    train("lora", tmp_path, own, **{**FRESH, **cache, "num_preview_images": 2, "validation_prompts": ["a red dog"]})
    before = files_of(tmp_path / "cache")
    assert before
    for name in ("text_encoder", "image_encoder", "semantic_encoder"):
        for file in (own / name).glob("*.safetensors"):
            file.unlink()
    again = {**FRESH, **cache, "num_preview_images": 2, "validation_prompts": ["a red dog"]}
    train("lora", tmp_path, own, experiment_id="again", **again)
    assert losses(tmp_path, "again") == losses(tmp_path)
    assert files_of(tmp_path / "cache") == before
    with pytest.raises((ValueError, OSError)):
        train("lora", tmp_path, own, experiment_id="live", **{**LIVE})


def test_another_encoder_and_another_image_are_computed_anew(tmp_path, cascade):
    own = tmp_path / "cascade"
    shutil.copytree(cascade, own)
    cache = {"cache_dir": str(tmp_path / "cache")}
    train("lora", tmp_path, own, **{**FRESH, **cache})
    first = set(files_of(tmp_path / "cache"))

    from safetensors.torch import load_file, save_file

    (file,) = (own / "semantic_encoder").glob("*.safetensors")
    weights = load_file(file)
    weights["mapper.0.weight"][0, 0] += 0.5
    save_file(weights, file, {"format": "pt"})
    train("lora", tmp_path, own, experiment_id="encoder", **{**FRESH, **cache})
    second = set(files_of(tmp_path / "cache"))
    assert {path.parent.name.split("-")[0] for path in second - first} == {"latents"}
    assert losses(tmp_path, "encoder") != losses(tmp_path)

    # The same names and sizes, other pixels.
    members = {}
    for number in range(12):
        members[f"{number:03}.png"] = image(*SIZES[number % len(SIZES)], seed=50 + number)
        members[f"{number:03}.txt"] = f"a [fox] photo of {WORDS[number % 3]}"
    write_tar(own / "images.tar", members)
    train("lora", tmp_path, own, experiment_id="images", **{**FRESH, **cache})
    train("lora", tmp_path, own, experiment_id="live", **LIVE)
    assert_near(losses(tmp_path, "images"), losses(tmp_path, "live"))
    third = set(files_of(tmp_path / "cache"))
    assert {path.parent.name.split("-")[0] for path in third - second} == {"latents", "images"}


def test_a_longer_training_adds_only_what_is_new(tmp_path, cascade):
    train("lora", tmp_path, cascade, **{**FRESH, "updates": 1})
    folder = next((tmp_path / "runs/cache").glob("latents-*"))
    one = TensorStore(folder)
    train("lora", tmp_path, cascade, **{**FRESH, "updates": 5})
    store = TensorStore(folder)
    shards = list(folder.glob("*.safetensors"))
    assert len(one) == 4 < len(store)
    assert len(shards) == 2
    held = [len(list(safe_open(str(shard), "pt").keys())) for shard in shards]
    assert sum(held) == len(store)


def test_a_stream_has_no_cache(tmp_path, cascade):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(image())
    (tmp_path / "images/metadata.csv").write_text("file_name,text\na.png,a dog\n")
    data = {"webdataset_path": None, "dataset_name": str(tmp_path / "images"), "streaming": True}
    with pytest.raises(ValueError, match="streaming"):
        train("lora", tmp_path, cascade, **{**FRESH, **data})


def test_masks_of_grey_images_are_cached_at_the_size_of_latents(tmp_path, cascade):
    from PIL import Image

    members = {"0.png": image(64, 64), "0.txt": "a dog", "0.mask.png": encoded(Image.new("L", (64, 64), 128))}
    data = {"webdataset_path": str(write_tar(tmp_path / "one.tar", members)), "masked_loss": True}
    train("lora", tmp_path, cascade, **{**FRESH, **data, "updates": 1, "multi_aspect_ratio": None})
    store = TensorStore(next((tmp_path / "runs/cache").glob("masks-*")))
    assert len(store) == 1
    (name,) = safe_open(str(next(store.folder.glob("*.safetensors"))), "pt").keys()
    with safe_open(str(next(store.folder.glob("*.safetensors"))), "pt") as opened:
        mask = opened.get_tensor(name)
    assert mask.shape == (1, 4, 4)
    assert torch.allclose(mask, torch.tensor(128 / 255), atol=1e-3)


# -- the command, and several processes -----------------------------------------------------------------------------


def test_the_command_fills_what_the_training_reads(tmp_path, cascade, capsys):
    values = settings("lora", tmp_path, cascade, **PLAIN)
    config = write_config(tmp_path / "ahead.yaml", values)
    assert main(["cache", str(config), "--updates", "5"]) == 0
    assert "latents" in capsys.readouterr().out
    before = files_of(tmp_path / "runs/cache")
    train("lora", tmp_path, cascade, **FRESH)
    assert files_of(tmp_path / "runs/cache") == before
    assert len(before) == 3


def test_the_command_refuses_a_training_without_a_cache(tmp_path, cascade, capsys):
    config = write_config(tmp_path / "run.yaml", settings("decoder", tmp_path, cascade, effnet_dropout=0.1))
    assert main(["cache", str(config)]) == 2
    assert "decoder configs are not for this" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path, cascade):
    values = settings("lora", tmp_path / "two", cascade, experiment_id="two", **{**FRESH, "adam_epsilon": 1e-5})
    config = write_config(tmp_path / "two.yaml", values)
    done = launch_two(ROOT / "tests/trainer_runs.py", "lora", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes       2," in done.stdout
    train("lora", tmp_path, cascade, experiment_id="one", **{**FRESH, "adam_epsilon": 1e-5})
    assert_near(losses(tmp_path / "two", "two"), losses(tmp_path, "one"))
    for kind in ("latents", "images", "texts"):
        shards = list(next((tmp_path / "two/runs/cache").glob(f"{kind}-*")).glob("*.safetensors"))
        names = [name for shard in shards for name in safe_open(str(shard), "pt").keys()]
        (own,) = (tmp_path / "runs/cache").glob(f"{kind}-*")
        assert len(shards) == 2  # one from each process, and nothing twice
        assert len(names) == len(set(names)) == len(TensorStore(own))
