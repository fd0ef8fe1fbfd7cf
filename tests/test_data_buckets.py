"""Buckets and the plan: the original's integers, and the laws of the endless order."""

from __future__ import annotations

import json
import time
from itertools import islice

import numpy as np
import pytest
import torch

from stable_cascade.data.draws import draws, mixed, permutation, uniforms
from stable_cascade.data.images import covering_size, resize_to_cover
from stable_cascade.data.plan import (
    GlobalBatch,
    Order,
    check_batch_size,
    global_batches,
    make_buckets,
    micro_batches,
)
from tests.golden import FOLDER, tensors
from tests.making_shards import crop_to

SETS = json.loads((FOLDER / "bucketeer.json").read_text())["sets"]


@pytest.mark.parametrize("number", range(len(SETS)))
def test_golden_buckets(number):
    data = SETS[number]
    buckets = make_buckets(
        data["image_size"], data["input_ratios"], factor=data["factor"], mirror=data["reverse_list"]
    )
    assert np.allclose(buckets.ratios, data["ratios_after"], rtol=0, atol=1e-12)
    assert [list(size) for size in buckets.sizes] == data["sizes_hw"]
    for row in data["rows"]:
        height, width = row["image_hw"]
        bucket = buckets.sizes[int(buckets.nearest(np.array([width]), np.array([height]))[0])]
        assert list(bucket) == row["bucket_hw"]
        resized = covering_size(height, width, bucket)
        assert list(resized) == row["resized_hw"]
        assert min(resized) == row["resize_size"]


def test_golden_batches():
    """Images in order, batch size 2, centre crop: the same buckets fill, with the same pixels."""
    data = tensors("bucketeer_batches")
    images = [data[f"in.image.{i}"] for i in range(8)]
    buckets = make_buckets(48, ["1/1", "3/4", "1/3"], factor=8)
    sizes = np.array([image.shape[1:] for image in images])
    nearest = buckets.nearest(sizes[:, 1], sizes[:, 0])
    waiting: dict[int, list[int]] = {}
    batches = []
    for i, bucket in enumerate(nearest.tolist()):
        waiting.setdefault(bucket, []).append(i)
        if len(waiting[bucket]) == 2:
            batches.append((bucket, waiting.pop(bucket)))
    assert [members for _, members in batches] == [[0, 3], [1, 5]]
    for number, (bucket, members) in enumerate(batches):
        size = buckets.sizes[bucket]
        actual = torch.stack([crop_to(resize_to_cover(images[i], size), size, "center", 0) for i in members])
        expected = data[f"out.batch.{number}"]
        bound = 1e-5 * expected.abs().max() + 1e-4 * expected.abs()
        assert ((actual - expected).abs() <= bound).all()


def test_covering_size_always_covers_and_keeps_the_shape():
    rng = np.random.default_rng(0)
    for height, width, tall, wide in rng.integers(1, 3000, (500, 4)).tolist():
        new = covering_size(height, width, (tall, wide))
        assert new[0] >= tall
        assert new[1] >= wide
        scale = max(tall / height, wide / width)
        assert abs(new[0] - scale * height) <= max(1, height / width) + 1
        assert abs(new[1] - scale * width) <= max(1, width / height) + 1


def test_square_needs_a_multiple():
    assert make_buckets(64, factor=8).sizes == ((64, 64),)
    with pytest.raises(ValueError, match=r"image_size 760 is not a multiple of 32.*nearest: 736 or 768"):
        make_buckets(760)


@pytest.mark.parametrize("ratio", ["0/1", "1/0", "wide", "-1/2"])
def test_no_ratio(ratio):
    with pytest.raises(ValueError, match="multi_aspect_ratio"):
        make_buckets(768, [ratio])


def test_too_narrow_ratio():
    with pytest.raises(ValueError, match="shorter than 32 pixels"):
        make_buckets(64, ["1/6"])


def test_draws_are_fixed_numbers():
    """Values, so that a change of the generator, which would change every training, is seen."""
    assert draws(0, "sample", np.arange(2)).tolist() == [7741110214689122631, 15938619573605395806]
    assert permutation(3, 1, 6).tolist() == [4, 5, 0, 3, 2, 1]
    published = mixed(np.array([0x9E3779B97F4A7C15], np.uint64))[0]
    assert published == 0xE220A8397B1DCDAF, "the first number of SplitMix64 from state 0"
    many = uniforms(1, "x", np.arange(20000))
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(many.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03


def order_of(count: int, *, share: float = 0.1, seed: int = 5, ratios=("1/1", "1/2", "3/4")) -> Order:
    buckets = make_buckets(64, ratios or None, factor=8)
    rng = np.random.default_rng(1)
    sizes = rng.integers(30, 100, (2, count))
    return Order(count, buckets.nearest(*sizes), buckets, seed, share)


def sequential(order: Order, batch_size: int, steps: int) -> list[tuple[int, list[int], list[int]]]:
    """The plan written as a loop over single positions."""
    waiting: dict[int, list[tuple[int, int]]] = {}
    found = []
    position = 0
    while len(found) < steps:
        epoch, offset = divmod(position, order.count)
        sample = permutation(order.seed, epoch, order.count)[offset]
        bucket = int(order.bucket_numbers(np.array([position]), np.array([sample]))[0])
        waiting.setdefault(bucket, []).append((position, int(sample)))
        if len(waiting[bucket]) == batch_size:
            pairs = waiting.pop(bucket)
            found.append((bucket, [p for p, _ in pairs], [s for _, s in pairs]))
        position += 1
    return found


@pytest.mark.parametrize(
    ("count", "batch_size", "ratios"), [(7, 4, ("1/1", "1/2")), (300, 16, ("1/1", "3/4")), (50, 8, ())]
)
def test_plan_equals_the_simple_loop(count, batch_size, ratios):
    order = order_of(count, ratios=ratios)
    steps = 120
    planned = [
        (batch.bucket, batch.positions.tolist(), batch.samples.tolist())
        for batch in islice(global_batches(order, batch_size), steps)
    ]
    assert planned == sequential(order, batch_size, steps)


@pytest.mark.parametrize("ratios", [("1/1", "1/2"), ()])
def test_skipping_equals_dropping(ratios):
    order = order_of(100, ratios=ratios)
    whole = list(islice(global_batches(order, 8), 300))
    for start in (0, 1, 17, 250):
        part = list(islice(global_batches(order, 8, start), 10))
        assert [b.positions.tolist() for b in part] == [b.positions.tolist() for b in whole[start : start + 10]]
        assert [b.samples.tolist() for b in part] == [b.samples.tolist() for b in whole[start : start + 10]]


def test_no_position_is_lost_or_repeated():
    order = order_of(64)
    seen = np.concatenate([batch.positions for batch in islice(global_batches(order, 8), 400)])
    assert len(set(seen.tolist())) == len(seen)
    # Only what still waits in one of the buckets is missing below the last position.
    assert len(set(range(seen.max() + 1)) - set(seen.tolist())) < 8 * len(set(order.buckets.sizes))


def test_random_share():
    order = order_of(5000, share=0.05)
    positions = np.arange(5000)
    numbers = order.bucket_numbers(positions, positions)
    changed = (numbers != order.nearest).mean()
    assert 0.02 < changed < 0.05  # some of the drawn buckets are the nearest ones


def test_micro_batches_share_out_a_global_batch():
    batch = GlobalBatch(np.arange(24), np.arange(24), 0)
    for j in range(24):  # P 2, accumulation 3, m 4
        process, micro = j // 4 % 2, j // 8
        parts = list(micro_batches(batch, grad_accum_steps=3, num_processes=2, process_index=process))
        assert j in parts[micro].positions


def test_batch_size_must_divide():
    check_batch_size(32, 4, 2)
    with pytest.raises(ValueError, match=r"batch_size 30 .* 2 processes x 4 grad_accum_steps = 8; nearest: 24 or 32"):
        check_batch_size(30, 4, 2)
    with pytest.raises(ValueError, match="at least 1"):
        check_batch_size(0, 1, 1)


def test_going_to_a_late_step_is_quick():
    """20,000 steps of 64 in seven buckets are integer work of well under a second."""
    order = order_of(20000, ratios=("1/1", "1/2", "3/4", "2/3"))
    begin = time.perf_counter()
    next(global_batches(order, 64, 20_000))
    assert time.perf_counter() - begin < 10


def test_a_tie_goes_to_the_first_ratio():
    for ratios, expected in ((["1/1", "1/2"], (64, 64)), (["1/2", "1/1"], (88, 40))):
        buckets = make_buckets(64, ratios, factor=8)
        assert buckets.sizes[int(buckets.nearest(np.array([3]), np.array([4]))[0])] == expected
