"""Several sets in one training: shares, repeats, prefixes, loss weights, and the same order however it is loaded."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest

from stable_cascade import factory
from stable_cascade.config import ConfigError, LoraConfig
from stable_cascade.config.sources import make_config
from stable_cascade.data import ImageSet, Plan, SampleIndex, index_samples, joined
from stable_cascade.data.plan import _Shown
from tests.making_shards import batches_of, image, undecodable, write_shard, write_tar
from tests.trainer_runs import assert_same, settings, train, write_cascade, write_images

SETTINGS = {"image_size": 32, "batch_size": 8, "bucket_factor": 8, "seed": 3}


@pytest.fixture
def sets(tmp_path) -> list[SampleIndex]:
    paths = [write_shard(tmp_path / f"{number}.tar", count) for number, count in enumerate((10, 20, 5))]
    return [index_samples(str(path), cache_dir=str(tmp_path / "cache")) for path in paths]


def shown(index: SampleIndex, count: int) -> np.ndarray:
    """The set of each of the first `count` positions."""
    order = Plan(**SETTINGS).order(index)
    return index.mixture.set_of(_Shown(order).samples(0, count))


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 2), (0.7, 0.2, 0.1), (5, 0.01, 1)])
def test_shares_are_exact_at_every_position(sets, weights):
    index = joined([ImageSet(one, weight=weight) for one, weight in zip(sets, weights, strict=True)])
    numbers = shown(index, 4000)
    for number, weight in enumerate(weights):
        wanted = np.arange(1, 4001) * weight / sum(weights)
        assert np.abs(np.cumsum(numbers == number) - wanted).max() < 2
    assert np.array_equal(_Shown(Plan(**SETTINGS).order(index)).samples(1000, 1300),
                          _Shown(Plan(**SETTINGS).order(index)).samples(0, 4000)[1000:1300])  # fmt: skip


def test_repeats_count_an_epochs_images(sets):
    """Sets of 10, 20 and 5 images, shown 1, 2 and 3 times: 65 positions are an epoch."""
    index = joined([ImageSet(one, repeats=times) for one, times in zip(sets, (1, 2, 3), strict=True)])
    keys = [key for batch in islice(batches_of(index, **{**SETTINGS, "batch_size": 5}), 26) for key in batch.keys]
    for epoch in (keys[:65], keys[65:]):
        counted = Counter(epoch)
        assert Counter(counted.values()) == {1: 10, 2: 20, 3: 5}
        assert {key.split("/")[0] for key in counted} == {"0.tar", "set 2", "set 3"}


def test_a_prefix_goes_before_every_caption_and_counts_as_other_captions(sets):
    plain, prefixed = joined([ImageSet(sets[0]), ImageSet(sets[1])]), joined([
        ImageSet(sets[0]), ImageSet(sets[1], caption_prefix="a photo of [fox], ")])  # fmt: skip
    assert {prefixed.caption(number).startswith("a photo of [fox], caption ") for number in range(10, 30)} == {True}
    assert prefixed.read(12)[1] == prefixed.caption(12) == "a photo of [fox], " + plain.caption(12)
    assert prefixed.caption(3) == plain.caption(3)
    assert prefixed.content["images"] == plain.content["images"]
    assert prefixed.content["all"] != plain.content["all"]


def test_the_order_is_the_same_for_any_processes_and_workers(sets):
    index = joined([ImageSet(one, weight=weight) for one, weight in zip(sets, (1, 2, 3), strict=True)])
    settings = {**SETTINGS, "multi_aspect_ratio": ["1/1", "3/4"]}
    whole = [batch.keys for batch in islice(batches_of(index, **settings), 12)]
    halves = [
        [batch.keys for batch in islice(batches_of(index, **settings, num_processes=2, process_index=rank,
                                                   num_workers=rank), 12)]
        for rank in range(2)
    ]  # fmt: skip
    assert whole == [one + other for one, other in zip(*halves, strict=True)]
    late = [batch.keys for batch in islice(batches_of(index, **settings, start_step=7), 5)]
    assert late == whole[7:]


def test_a_broken_image_is_replaced_by_one_of_its_set(tmp_path, sets):
    members: dict[str, bytes | str] = {}
    for i in range(6):
        members |= {f"{i}.png": image(36, 36, seed=i) if i else undecodable(36, 36), f"{i}.txt": "x"}
    broken = index_samples(str(write_tar(tmp_path / "b.tar", members)), cache_dir=str(tmp_path / "cache"))
    index = joined([ImageSet(sets[0], weight=1), ImageSet(broken, weight=1), ImageSet(sets[2], weight=1)])
    batches = list(islice(batches_of(index, **SETTINGS), 12))
    counted = Counter(key.split("/")[0] for batch in batches for key in batch.keys)
    assert {name: abs(count - 32) <= 1 for name, count in counted.items()} == {
        "0.tar": True,
        "set 2": True,
        "set 3": True,
    }
    assert sum(batch.broken for batch in batches) > 0
    assert "set 2/b.tar/0" not in {key for batch in batches for key in batch.keys}


def test_images_for_regularisation_come_last_and_have_their_weight(sets):
    index = joined([
        ImageSet(sets[0], regularization=True, loss_weight=0.25), ImageSet(sets[1]), ImageSet(sets[2]),
    ])  # fmt: skip
    assert index.subjects == 25
    assert index.weights(np.arange(35)).tolist() == [1.0] * 25 + [0.25] * 10
    assert index.key(30).startswith("regularization/0.tar/")
    assert "in 3 sets (20: 57.1%, 5: 14.3%, 10: 28.6% of the images shown)" in str(index.report)
    assert "10 of them for regularisation" in str(index.report)


def test_refusals(sets):
    for given, words in (
        ([ImageSet(sets[0], weight=1), ImageSet(sets[1])], "give a weight to each of them"),
        ([ImageSet(sets[0], repeats=0), ImageSet(sets[1])], "must be above 0"),
        ([ImageSet(sets[0], caption_prefix="\ud800"), ImageSet(sets[1])], "half a character"),
        ([ImageSet(joined([ImageSet(sets[0]), ImageSet(sets[1])])), ImageSet(sets[2])], "cannot be joined"),
    ):
        with pytest.raises(ValueError, match=words):
            joined(given)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"))
    write_images(folder / "images.tar")
    write_images(folder / "more.tar", 8)
    return folder


def config(tmp_path, cascade, **changes) -> LoraConfig:
    values = settings("lora", tmp_path, cascade, cache_dir=str(tmp_path / "cache"), **changes)
    return make_config(LoraConfig, {key: (value, "test") for key, value in values.items()})


def test_sets_of_a_config(tmp_path, cascade):
    """Plain entries are one set together; a mapping is a set of its own."""
    images, more = str(cascade / "images.tar"), str(cascade / "more.tar")
    together = factory.samples(config(tmp_path, cascade, webdataset_path=[images, more]))
    assert together.mixture is None
    assert len(together) == 20
    index = factory.samples(config(
        tmp_path, cascade, webdataset_path=[images, {"path": more, "repeats": 3, "caption_prefix": "old, "}]
    ))  # fmt: skip
    assert [float(share) for share in index.mixture.shares] == [12 / 36, 24 / 36]
    assert index.caption(12).startswith("old, a [fox] photo of")
    only = factory.samples(config(tmp_path, cascade, webdataset_path=[{"path": more, "caption_prefix": "old, "}]))
    assert only.caption(0).startswith("old, ")
    aside = factory.samples(config(
        tmp_path, cascade, prior_loss_weight=0.5,
        webdataset_path=[images, {"path": more, "regularization": True}],
        dataset_filters=[["score", "lambda s: s > 3"]],
    ))  # fmt: skip
    assert (aside.subjects, len(aside), aside.weights(np.array([19]))[0]) == (8, 16, 0.5)
    with pytest.raises(ValueError, match=r"regularization_path is set beside several sets; make it an entry"):
        factory.samples(config(tmp_path, cascade, webdataset_path=[images, {"path": more}], regularization_path=more))


def saved_dataset(folder, rows: int) -> str:
    """A folder that `datasets` wrote."""
    columns = {
        "image": [{"bytes": image(36, 36, seed=number), "path": None} for number in range(rows)],
        "text": [f"caption {number}" for number in range(rows)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return str(folder)


def test_data_sets_of_a_config_are_sets_and_streams_are_refused(tmp_path, cascade):
    one, other = saved_dataset(tmp_path / "one", 4), saved_dataset(tmp_path / "other", 6)
    names = [one, {"path": other, "repeats": 2, "caption_prefix": "old, "}]
    index = factory.samples(config(tmp_path, cascade, webdataset_path=None, dataset_name=names))
    assert [float(share) for share in index.mixture.shares] == [0.25, 0.75]
    assert (index.caption(0), index.caption(4)) == ("caption 0", "old, caption 0")
    with pytest.raises(ValueError, match=r"^dataset_name: several sets need random access.* set streaming: false"):
        factory.samples(config(tmp_path, cascade, webdataset_path=None, dataset_name=names, streaming=True))


@pytest.mark.parametrize("entry, words", [
    ({"pth": 1}, "must be a place, or a set"),
    ({"path": "a", "repeat": 2}, "has the key 'repeat'; a set has path, weight"),
    ({"path": 7}, "path must be a place, or a list of places"),
    ({"path": ["a", {"path": "b"}]}, "path must be a place, or a list of places"),
    ({"path": "a", "repeats": 0}, "entry 'a': repeats must be a number above 0"),
    ({"path": "a", "repeats": 10**5000}, "repeats must be a number above 0"),
    ({"path": "a", "weight": "much"}, "entry 'a': weight must be a number"),
    ({"path": "a", "weight": 1, "repeats": 2}, "give one of them"),
    ({"path": "a", "caption_prefix": 3}, "caption_prefix must be a text"),
    ({"path": "a", "regularization": "yes"}, "must be true or false"),
])  # fmt: skip
def test_wrong_entries_are_one_line(tmp_path, cascade, entry, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, cascade, webdataset_path=[entry])


def test_a_training_on_sets_resumes_to_the_same_bits(tmp_path, cascade):
    places = [
        {"path": str(cascade / "images.tar"), "weight": 1},
        {"path": str(cascade / "more.tar"), "weight": 3, "caption_prefix": "old, "},
    ]
    changes = {"webdataset_path": places, "lr_scheduler": "constant", "save_every": 3}
    whole = train("lora", tmp_path, cascade, experiment_id="whole", **changes)
    train("lora", tmp_path, cascade, experiment_id="part", **changes, updates=3)
    assert_same(whole, train("lora", tmp_path, cascade, experiment_id="part", **changes))
    places[1]["caption_prefix"] = "new, "
    with pytest.raises(ValueError, match="other captions or masks"):
        train("lora", tmp_path, cascade, experiment_id="part", **changes, updates=9)
