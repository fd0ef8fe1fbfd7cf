"""Every JSON file that names a network is read within bounds: damaged ones are one line, told by their name."""

from types import SimpleNamespace

import pytest

from stable_cascade import bounds
from stable_cascade.factory import cache, control
from stable_cascade.factory.networks import network_on_meta
from stable_cascade.training.model_card import read_export

DAMAGED = {
    "cut": ("{", "is no JSON"),
    "deep": ("[" * 100_000, "nests its brackets too deeply"),
    "list": ("[1]", "is a JSON list, an object in braces is needed"),
    "long": (" " * (bounds.JSON_FILE + 1), "bytes, and at most 8,388,608 are read"),
}
READERS = {
    "network": lambda folder: network_on_meta(SimpleNamespace(generator_checkpoint_path=str(folder)), "prior"),
    "controlnet": lambda folder: control._check_checkpoint(str(folder), SimpleNamespace(config={})),
    "model card": read_export,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_config_is_refused_in_one_line(tmp_path, kind, reader):
    text, words = DAMAGED[kind]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config.json' .*{words}") as caught:
        READERS[reader](tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_sizes_that_nobody_could_build_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 99999999999}')
    with pytest.raises(ValueError, match="num_attention_heads' is 99999999999; at most"):
        READERS["network"](tmp_path)


def test_a_controlnet_that_notes_nothing_is_another(tmp_path):
    (tmp_path / "config.json").write_text('{"blocks": [0]}')
    with pytest.raises(ValueError, match="with channels of controlnet_filter not noted, this config has 3"):
        control._check_checkpoint(str(tmp_path), SimpleNamespace(config={"in_channels": 3}))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_memory_of_the_cache_is_none(tmp_path, kind):
    (tmp_path / "sources.json").write_text(DAMAGED[kind][0])
    assert cache._memory(tmp_path) == {}


@pytest.mark.parametrize("text", ['{"_class_name": ["x"]}', '{"architectures": [3]}', '{"architectures": 3}'])
def test_a_config_of_odd_values_is_no_model_of_a_card(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="holds no exported model"):
        read_export(tmp_path)
