"""What a batch names and weighs: identities, crops to be cached, masks, regularisation."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade.data import (
    Batch,
    Plan,
    SampleIndex,
    crop_batches,
    index_samples,
    with_regularization,
)
from stable_cascade.data.samples import content_hash
from tests.making_shards import batches_of, crops_of, encoded, image, undecodable, write_shard, write_tar

PLAN = {"image_size": 32, "batch_size": 8, "bucket_factor": 8, "multi_aspect_ratio": ["1/1", "3/4"], "seed": 3}


def indexed(path, **options) -> SampleIndex:
    samples = index_samples(str(path), cache_dir=str(os.path.dirname(path)) + "/cache", **options)
    assert isinstance(samples, SampleIndex)
    return samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> SampleIndex:
    return indexed(write_shard(tmp_path_factory.mktemp("shards") / "0.tar", 37))


def take(samples, count: int, **changes) -> list[Batch]:
    return list(islice(batches_of(samples, **{**PLAN, **changes}), count))


def by_identity(batches: list[Batch]) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for identity, pixels in zip(batch.identities, batch.pixels, strict=True):
            found.setdefault(identity, []).append(pixels)
    return found


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"crops_per_image": 2}, 2),
        ({"crops_per_image": 1}, 1),
        ({"crop": "center"}, 1),
        ({"crop": "center", "crops_per_image": 3}, 1),
        ({"crop": "smart", "crops_per_image": 3}, 1),
    ],
)
def test_equal_identities_are_equal_pixels(samples, changes, most):
    found = by_identity(take(samples, 40, **changes))
    assert len(found) < 40 * 8 / 2
    for identity, shown in found.items():
        assert all(torch.equal(shown[0], pixels) for pixels in shown[1:]), identity
    crops: dict[str, set[str]] = {}
    for identity in found:
        place, crop = identity.split("x", 1)[0], identity.split(" ", 3)[3]
        crops.setdefault(place, set()).add(crop)
    assert max(map(len, crops.values())) == most


def test_fresh_crops_have_fresh_identities(samples):
    batches = take(samples, 40)
    assert len(by_identity(batches)) == 320
    assert [batch.identities for batch in take(samples, 5)] == [batch.identities for batch in batches[:5]]


def test_crops_differ_between_numbers_images_and_seeds(samples):
    """Two crops of one image are two windows, not one; another seed has others."""
    found = by_identity(take(samples, 120, crops_per_image=8, multi_aspect_ratio=None))
    windows: dict[str, set[bytes]] = {}
    for identity, shown in found.items():
        windows.setdefault(identity.split(" ")[0], set()).add(shown[0].numpy().tobytes())
    wide = [len(kinds) for kinds in windows.values()]
    assert max(wide) >= 5, "a 40 x 30 image has 11 places, and 8 draws of them"
    other = by_identity(take(samples, 120, crops_per_image=8, multi_aspect_ratio=None, seed=4))
    assert not set(found) & set(other)


def test_identities_survive_a_move_and_see_a_changed_image(tmp_path):
    first = indexed(write_shard(tmp_path / "a" / "0.tar", 9))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = indexed(tmp_path / "b" / "0.tar")
    shown = {name for batch in take(first, 8, crops_per_image=2) for name in batch.identities}
    assert shown == {name for batch in take(moved, 8, crops_per_image=2) for name in batch.identities}
    members: dict[str, bytes | str] = {}
    for i in range(9):
        members[f"{i:04}.png"] = image(*((40, 30), (30, 40), (36, 36))[i % 3], seed=i if i != 4 else 99)
        members[f"{i:04}.txt"] = f"caption {i}\n"
    changed = indexed(write_tar(tmp_path / "c" / "0.tar", members))
    different = {name for batch in take(changed, 8, crops_per_image=2) for name in batch.identities} - shown
    assert different
    assert {name.split(" ")[0] for name in different} == {"0.tar/0004"}


def assert_same_names(first: Batch, second: Batch) -> None:
    assert first.keys == second.keys
    assert first.captions == second.captions
    assert first.identities == second.identities
    assert first.step_seed == second.step_seed
    assert torch.equal(first.seeds, second.seeds)
    assert torch.equal(first.positions, second.positions)
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("crops", [None, 2])
def test_undecoded_batches_are_the_same_without_images(samples, crops):
    part = {"crops_per_image": crops, "num_processes": 2, "process_index": 1, "grad_accum_steps": 2, "start_step": 3}
    for live, named in zip(take(samples, 9, **part), take(samples, 9, decode=False, **part), strict=True):
        assert named.pixels is None
        assert named.masks is None
        assert_same_names(live, named)


def test_naming_needs_no_image_bytes(tmp_path):
    path = write_shard(tmp_path / "0.tar", 9)
    samples = indexed(path)
    expected = take(samples, 4, decode=False)
    content = bytearray(path.read_bytes())
    for offset, size in samples.source.spans[:, 0]:
        content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    for first, second in zip(expected, take(samples, 4, decode=False), strict=True):
        assert_same_names(first, second)


def test_naming_is_quick(samples):
    started = time.process_time()
    assert len(take(samples, 2500, decode=False, crops_per_image=4)) == 2500
    assert time.process_time() - started < 5, "20,000 samples; 100,000 take a few seconds"


def test_planned_crops_are_what_training_shows(samples):
    settings = {"crops_per_image": 2, **PLAN}
    planned = crops_of(samples, 30, **settings)
    shown = by_identity(take(samples, 30, crops_per_image=2))
    assert [crop.identity for crop in planned] != sorted(shown)
    assert {crop.identity for crop in planned} == set(shown)
    assert len(planned) == len(shown)
    assert [crop.position for crop in planned if crop.size == (32, 32)] == sorted(
        crop.position for crop in planned if crop.size == (32, 32)
    )
    plan = Plan(image_size=32, batch_size=5, seed=3, crops_per_image=2)
    for workers in (0, 1):
        cached = by_identity(list(crop_batches(samples, planned, plan, batch_size=5, num_workers=workers)))
        assert cached.keys() == shown.keys()
        assert all(torch.equal(cached[name][0], shown[name][0]) for name in shown)
    assert len(crops_of(samples, 30, **PLAN)) == 240, "fresh crops are all distinct"


def test_plan_with_broken_images(tmp_path):
    members: dict[str, bytes | str] = {}
    for i in range(40):
        members[f"{i:03}.png"] = image(40, 32, seed=i) if i < 38 else undecodable(40, 32, seed=i)
        members[f"{i:03}.txt"] = f"{i}"
    samples = indexed(write_tar(tmp_path / "a.tar", members))
    settings = {**PLAN, "multi_aspect_ratio": None}
    first = crops_of(samples, 15, crop="center", **settings)
    made = list(crop_batches(samples, first, Plan(**{**settings, "crop": "center"}), batch_size=8))
    assert sum(batch.broken for batch in made) == 2
    present = {name for batch in made for name in batch.identities}
    broken = {crop.key for crop in first if crop.identity not in present}
    assert broken == {"a.tar/038", "a.tar/039"}
    second = crops_of(samples, 15, crop="center", known_broken=frozenset(broken), **settings)
    live = take(samples, 15, crop="center", multi_aspect_ratio=None)
    named = take(samples, 15, crop="center", multi_aspect_ratio=None, decode=False, known_broken=frozenset(broken))
    assert {crop.identity for crop in second} == {name for batch in live for name in batch.identities}
    for a, b in zip(live, named, strict=True):
        assert_same_names(a, b)
        assert a.broken == b.broken


@pytest.mark.parametrize("options", [{"crops_per_image": 0}, {"steps": -1}, {"batch_size": 0}])
def test_plan_refusals(samples, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        crops_of(samples, **{"steps": 1, **PLAN, **options})


def mask_of(width: int, height: int) -> Image.Image:
    """White where the image is drawn red, on the left."""
    array = np.zeros((height, width), np.uint8)
    array[:, : width // 2] = 255
    return Image.fromarray(array)


def half_red(width: int, height: int) -> Image.Image:
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0] = 255
    return Image.fromarray(array)


def masked_shard(folder, *, count: int = 12, kind: str = "png"):
    members: dict[str, bytes | str] = {}
    for i in range(count):
        size = ((48, 32), (32, 50), (120, 90))[i % 3]
        members[f"{i:03}.png"] = encoded(half_red(*size))
        members[f"{i:03}.txt"] = f"{i}"
        if i % 4 != 3:
            mask = mask_of(*size) if i % 2 else mask_of(*size).resize((size[0] // 2, size[1] // 2))
            members[f"{i:03}.mask.{kind}"] = encoded(mask, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return write_tar(folder / "a.tar", members)


@pytest.mark.parametrize("crop", ["random", "center", "smart"])
def test_masks_are_cropped_with_the_image(tmp_path, crop):
    samples = indexed(masked_shard(tmp_path), masks=True)
    assert samples.report.masked == 9
    batches = take(samples, 9, crop=crop)
    for batch in batches:
        assert batch.masks.shape == (8, 1, *batch.pixels.shape[2:])
        assert batch.masks.dtype == torch.float32
        for key, pixels, mask in zip(batch.keys, batch.pixels, batch.masks, strict=True):
            if int(key[-3:]) % 4 == 3:
                assert (mask == 1).all()
            else:  # a mask of half the size has a softer edge
                assert ((mask[0] > 0.5) != (pixels[0] > 0.5)).float().mean() < 0.03
    workers = take(samples, 9, crop=crop, num_workers=1)
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(batches, workers, strict=True))


def test_masks_are_off_unless_asked_for(tmp_path):
    path = masked_shard(tmp_path, kind="webp")
    plain, masked = take(indexed(path), 2), take(indexed(path, masks=True), 2)
    assert plain[0].masks is None
    assert masked[0].masks is not None
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(plain, masked, strict=True))
    names = [[name.split(" ")[1] for batch in batches for name in batch.identities] for batches in (plain, masked)]
    changed = {key for batch in plain for key in batch.keys if int(key[-3:]) % 4 != 3}
    keys = [key for batch in plain for key in batch.keys]
    assert {key for key, a, b in zip(keys, *names, strict=True) if a != b} == changed, "a mask is content too"


def test_masks_that_nobody_has_or_can_read(tmp_path):
    with pytest.raises(ValueError, match=r"none of 3 samples has one; add members KEY\.mask\.png"):
        indexed(write_shard(tmp_path / "x" / "0.tar", 3), masks=True)
    members: dict[str, bytes | str] = {}
    for i in range(20):
        members |= {f"{i:02}.png": image(seed=i), f"{i:02}.txt": "x", f"{i:02}.mask.png": encoded(mask_of(40, 30))}
    members["07.mask.png"] = undecodable()
    samples = indexed(write_tar(tmp_path / "y" / "0.tar", members), masks=True)
    batches = take(samples, 5)
    assert sum(batch.broken for batch in batches) == 2
    assert "0.tar/07" not in {key for batch in batches for key in batch.keys}


@pytest.fixture
def joined(tmp_path, samples) -> SampleIndex:
    return with_regularization(samples, indexed(write_shard(tmp_path / "0.tar", 10, start=20)), 0.3, 0.25)


def test_regularization_share_weight_and_names(joined, samples):
    batches = take(joined, 100)
    weights = torch.cat([batch.weights for batch in batches])
    keys = [key for batch in batches for key in batch.keys]
    for key, weight in zip(keys, weights.tolist(), strict=True):
        assert weight == (0.25 if key.startswith("regularization/0.tar/") else 1)
    positions = torch.cat([batch.positions for batch in batches])
    ordered = weights[positions.argsort()]
    for shown in (10, 100, 500):
        assert abs(int((ordered[:shown] != 1).sum()) - 0.3 * shown) <= 8, "what waits for its bucket is missing"
    captions = {key: caption for batch in batches for key, caption in zip(batch.keys, batch.captions, strict=True)}
    assert captions["regularization/0.tar/0025"] == captions["0.tar/0025"] == "caption 25"
    identities = {name for batch in batches for name in batch.identities}
    assert len(identities) == 800
    assert joined.report.regularization == 10
    assert "10 of them for regularisation" in str(joined.report)
    assert joined.fingerprint != samples.fingerprint


def test_regularization_keeps_the_epochs_of_both(joined):
    """Each set is shown whole before any of its images comes again; the main set in its usual order."""
    keys = [key for batch in take(joined, 25, batch_size=4, multi_aspect_ratio=None) for key in batch.keys]
    other = [key for key in keys if key.startswith("regularization/")]
    main = [key for key in keys if not key.startswith("regularization/")]
    assert len(other) == 30
    assert len(set(other[:10])) == len(set(other[10:20])) == len(set(other[20:])) == 10
    assert other[:10] != other[10:20]
    assert len(set(main[:37])) == 37
    whole = [key for batch in take(joined, 30, multi_aspect_ratio=None) for key in batch.keys]
    late = [key for batch in take(joined, 5, multi_aspect_ratio=None, start_step=25) for key in batch.keys]
    assert late == whole[200:]


def test_regularization_over_processes_workers_and_masks(tmp_path, joined):
    whole = take(joined, 6)
    halves = [take(joined, 6, num_processes=2, process_index=i, num_workers=i) for i in range(2)]
    for batch, a, b in zip(whole, *halves, strict=True):
        assert batch.keys == a.keys + b.keys
        assert torch.equal(batch.weights, torch.cat([a.weights, b.weights]))
    masked = indexed(masked_shard(tmp_path), masks=True)
    both = with_regularization(masked, indexed(masked_shard(tmp_path)), 0.5, 1.0)
    for batch in take(both, 4):
        for key, mask in zip(batch.keys, batch.masks, strict=True):
            assert (mask == 1).all() == (key.startswith("regularization") or int(key[-3:]) % 4 == 3)


def test_a_broken_regularization_image_is_replaced_by_another(tmp_path, samples):
    members: dict[str, bytes | str] = {}
    for i in range(6):
        members |= {f"{i}.png": image(36, 36, seed=i) if i else undecodable(36, 36), f"{i}.txt": "x"}
    other = indexed(write_tar(tmp_path / "1.tar", members))
    joined = with_regularization(replace(samples, max_broken_share=1), other, 0.5, 0.5)
    for batch in take(joined, 12):
        assert [key.startswith("regularization/") for key in batch.keys] == (batch.weights == 0.5).tolist()
        assert "regularization/1.tar/0" not in batch.keys


@pytest.mark.parametrize(
    ("share", "weight", "words"), [(0, 1, "share 0 "), (1, 1, "share 1 "), (0.5, -1, "weight -1")]
)
def test_regularization_refusals(samples, share, weight, words):
    with pytest.raises(ValueError, match=words):
        with_regularization(samples, samples, share, weight)
    joined = with_regularization(samples, samples, 0.5, 1.0)
    with pytest.raises(ValueError, match="already cannot be joined"):
        with_regularization(joined, samples, 0.5, 1.0)


@pytest.mark.parametrize("size", [1000, 100_000])
@pytest.mark.parametrize("place", [0, 500, -1])
def test_content_hash_sees_one_changed_byte_of_files_of_one_length(size, place):
    data = bytearray(range(250)) * (size // 250)
    other = bytearray(data)
    other[place] ^= 1
    assert content_hash(bytes(data)) == content_hash(bytes(bytearray(data)))
    assert content_hash(bytes(data)) != content_hash(bytes(other))
    assert content_hash(bytes(data)) != content_hash(bytes(data[:-1]))
