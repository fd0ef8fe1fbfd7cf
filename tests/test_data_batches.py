"""Batches: the same samples for every number of workers, processes and starting points."""

from __future__ import annotations

import gc
import io
import logging
from itertools import islice
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade.data import Batch, SampleIndex, index_samples
from stable_cascade.data.images import in_unit_range
from stable_cascade.data.plan import Order, global_batches, make_buckets
from tests.making_shards import batches_of, encoded, image, undecodable, write_shard, write_tar

SETTINGS = {"image_size": 32, "batch_size": 8, "bucket_factor": 8, "multi_aspect_ratio": ["1/1", "3/4"], "seed": 3}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> SampleIndex:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "0.tar", 20)
    write_shard(folder / "1.tar", 17, start=20)
    return index_samples(str(folder), cache_dir=str(folder / "cache"))


def take(samples, count: int, **changes) -> list[Batch]:
    return list(islice(batches_of(samples, **{**SETTINGS, **changes}), count))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys == b.keys
        assert a.captions == b.captions
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.seeds, b.seeds)
        assert torch.equal(a.pixels, b.pixels)
        assert a.broken == b.broken


def test_batch(samples):
    batches = take(samples, 12)
    shapes = {tuple(batch.pixels.shape) for batch in batches}
    assert shapes == {(8, 3, 32, 32), (8, 3, 32, 24), (8, 3, 24, 32)}
    for batch in batches:
        assert batch.pixels.dtype == torch.float32
        assert 0 <= batch.pixels.min()
        assert batch.pixels.max() <= 1
        assert batch.seeds.dtype == batch.positions.dtype == torch.int64
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert caption == f"caption {int(key[-4:])}"
    assert len({int(seed) for batch in batches for seed in batch.seeds}) == 96


def test_an_epoch_has_every_sample_once(samples):
    batches = take(samples, 37, batch_size=5, multi_aspect_ratio=None, crop="smart")
    keys = [key for batch in batches for key in batch.keys]
    for epoch in range(5):
        assert sorted(keys[37 * epoch : 37 * epoch + 37]) == sorted(samples.key(i) for i in range(37))
    assert keys[:37] != keys[37:74]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(samples, workers):
    assert_equal(take(samples, 10), take(samples, 10, num_workers=workers))


@pytest.mark.parametrize("ratios", [["1/1", "3/4"], None])
def test_processes_share_the_global_batch(samples, ratios):
    """Two processes with accumulation 2: sample j is in micro-batch j // (P m) of process (j // m) % P."""
    whole = take(samples, 6, multi_aspect_ratio=ratios)
    parts = [
        take(samples, 12, multi_aspect_ratio=ratios, grad_accum_steps=2, num_processes=2, process_index=process)
        for process in range(2)
    ]
    for step, batch in enumerate(whole):
        ordered = [parts[process][2 * step + micro] for micro in range(2) for process in range(2)]
        assert [key for part in ordered for key in part.keys] == batch.keys
        assert torch.equal(torch.cat([part.pixels for part in ordered]), batch.pixels)
        assert torch.equal(torch.cat([part.seeds for part in ordered]), batch.seeds)


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_later_equals_skipping(samples, workers):
    whole = take(samples, 26, grad_accum_steps=2)
    assert_equal(take(samples, 6, grad_accum_steps=2, start_step=10, num_workers=workers), whole[20:])


def test_other_seed_other_order(samples):
    first, second = take(samples, 3), take(samples, 3, seed=4)
    assert [b.keys for b in first] != [b.keys for b in second]
    assert not set(first[0].seeds.tolist()) & set(second[0].seeds.tolist())


def test_global_generators_are_left_alone(samples):
    torch.manual_seed(0)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(samples, 3)
    take(samples, 2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()


def test_skipping_decodes_nothing(tmp_path, caplog):
    """Every image that only the skipped steps use is destroyed: nobody notices until it is decoded."""
    path = write_shard(tmp_path / "a.tar", 60)
    samples = index_samples(str(path), cache_dir=str(tmp_path / "cache"), max_broken_share=1)
    buckets = make_buckets(32, SETTINGS["multi_aspect_ratio"], factor=8)
    order = Order(60, buckets.nearest(samples.widths, samples.heights), buckets, SETTINGS["seed"], 0.05)
    plan = list(islice(global_batches(order, 8), 6))
    needed = {int(sample) for batch in plan[4:] for sample in batch.samples}
    destroyed = {int(sample) for batch in plan[:4] for sample in batch.samples} - needed
    assert len(destroyed) > 10
    content = bytearray(path.read_bytes())
    for sample in destroyed:
        offset, size = samples.source.spans[sample, 0]
        content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        late = take(samples, 2, start_step=4)
    assert [batch.broken for batch in late] == [0, 0]
    assert not caplog.text
    assert sum(batch.broken for batch in take(samples, 4)) == len(destroyed)


def broken_shard(folder, good: int, broken: int) -> str:
    members: dict[str, bytes | str] = {}
    for i in range(good + broken):
        members[f"{i:03}.png"] = image(32, 32, seed=i) if i < good else undecodable(32, 32, seed=i)
        members[f"{i:03}.txt"] = f"{i}"
    return str(write_tar(folder / "a.tar", members))


def test_broken_samples_are_replaced_counted_and_named_once(tmp_path, caplog):
    path = broken_shard(tmp_path, 38, 2)
    samples = index_samples(path, cache_dir=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        batches = take(samples, 15)
    assert [len(batch.keys) for batch in batches] == [8] * 15
    assert sum(batch.broken for batch in batches) == 6, "two in each of three epochs"
    assert not {"a.tar/038", "a.tar/039"} & {key for batch in batches for key in batch.keys}
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(message.split(":")[1].strip() for message in messages) == ["a.tar/038", "a.tar/039"]
    assert_equal(batches, take(samples, 15, num_workers=2))
    halves = [take(samples, 15, num_processes=2, process_index=i) for i in range(2)]
    assert [a.keys + b.keys for a, b in zip(*halves, strict=True)] == [batch.keys for batch in batches]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_stop_the_training(tmp_path, workers):
    samples = index_samples(broken_shard(tmp_path, 15, 15), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"^\d+ broken samples among \d+ are more than max_broken_share 0\.1"
    ) as error:
        take(samples, 100, num_workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_decodable(tmp_path, workers):
    samples = index_samples(broken_shard(tmp_path, 0, 3), cache_dir=str(tmp_path / "c"), max_broken_share=1)
    with pytest.raises(ValueError, match=r"^17 samples in a row are broken") as error:
        take(samples, 1, num_workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 9, "num_processes": 2}, "batch_size 9 is the global batch and does not divide"),
        ({"process_index": 1}, "process_index 1"),
        ({"crop": "middle"}, "crop 'middle' is none of random, center, smart"),
        ({"random_bucket_share": 2}, "random_bucket_share 2"),
        ({"start_step": -1}, "start_step -1"),
        ({"image_size": 33, "multi_aspect_ratio": None}, "image_size 33 is not a multiple of 8"),
    ],
)
def test_refusals(samples, changes, words):
    with pytest.raises(ValueError, match=words):
        next(iter(batches_of(samples, **{**SETTINGS, **changes})))


def test_refusals_come_at_the_call(samples):
    """Not at the first batch, when the weights are loaded already."""
    with pytest.raises(ValueError, match="does not divide"):
        batches_of(samples, **{**SETTINGS, "grad_accum_steps": 3})


def test_set_smaller_than_a_batch(tmp_path):
    path = write_shard(tmp_path / "a.tar", 3)
    samples = index_samples(str(path), cache_dir=str(tmp_path / "cache"))
    (batch,) = take(samples, 1, multi_aspect_ratio=None)
    assert sorted(batch.keys[:3]) == sorted(batch.keys[3:6]) == [f"a.tar/000{i}" for i in range(3)]


def test_pixels_as_stored_are_the_same_pixels(samples, tmp_path):
    """Bytes, a quarter of the floats; floats for a whole batch where one image has transparency."""
    floats, stored = take(samples, 4), take(samples, 4, as_stored=True)
    for one, other in zip(floats, stored, strict=True):
        assert other.pixels.dtype == torch.uint8
        assert torch.equal(one.pixels, in_unit_range(other.pixels))
    members: dict[str, bytes | str] = {}
    for i in range(8):
        opened = Image.open(io.BytesIO(image(32, 32, seed=i))).convert("RGBA" if i == 3 else "RGB")
        members |= {f"{i}.png": encoded(opened), f"{i}.txt": f"{i}"}
    mixed = index_samples(str(write_tar(tmp_path / "a.tar", members)), cache_dir=str(tmp_path / "cache"))
    settings = {"multi_aspect_ratio": None, "crop": "center"}
    (one,), (other,) = take(mixed, 1, **settings), take(mixed, 1, as_stored=True, **settings)
    assert other.pixels.dtype == torch.float32
    assert torch.equal(one.pixels, other.pixels)


def test_batches_of_workers_come_in_shared_memory(samples):
    (batch,) = take(samples, 1, num_workers=1, as_stored=True)
    assert batch.pixels.is_shared()
    assert batch.seeds.is_shared()


def reachable(thing: object) -> int:
    """How many Python objects something holds, types and modules aside."""
    seen, waiting = {id(thing)}, [thing]
    while waiting:
        for found in gc.get_referents(waiting.pop()):
            if id(found) not in seen and not isinstance(found, type | ModuleType | FunctionType):
                seen.add(id(found))
                waiting.append(found)
    return len(seen)


def test_an_index_holds_no_object_per_sample(tmp_path):
    """Columns of arrays: a worker process shares their pages, and a list's it would copy by counting references."""
    counts, sizes = [], []
    for number, shown in ((10, "few"), (400, "many")):
        path = write_shard(tmp_path / f"{shown}.tar", number)
        index = index_samples(str(path), cache_dir=str(tmp_path / shown))
        counts.append(reachable(index))
        sizes.append(len(index))
    assert sizes == [10, 400]
    assert abs(counts[1] - counts[0]) < 20
