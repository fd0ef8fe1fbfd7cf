"""Only regular files are read, whatever names them: a pipe or a device is one line at once, and nothing hangs."""

import os
import threading

import pytest
import torch
from PIL import Image

from stable_cascade import bounds
from stable_cascade.adapters import load_lora, read_learned_embeds
from stable_cascade.config import LoraConfig, load_config
from stable_cascade.data.prepare import prepare_shards
from stable_cascade.drawing import read_drawing, read_image
from stable_cascade.files import lora
from stable_cascade.files.headers import read_header
from stable_cascade.files.json_files import read_json
from stable_cascade.files.places import describe
from stable_cascade.files.tensor_files import read_weights
from stable_cascade.pipelines.call import to_pixels


def prompts_of(path):
    from stable_cascade.cli.main import main

    if main(["generate", "--prompts-file", str(path)]) != 2:
        return
    raise ValueError("refused")


def prepared(path):
    prepare_shards(path.parent, path.parent / "out")


READERS = {
    "image": read_image,
    "settings of an image": read_drawing,
    "json": read_json,
    "header": read_header,
    "weights": read_weights,
    "lora": lora.read,
    "lora put into a network": lambda path: load_lora(torch.nn.Linear(2, 2), path),
    "tokens": read_learned_embeds,
    "inspected": describe,
    "config": lambda path: load_config(LoraConfig, [str(path)]),
    "prompts": prompts_of,
    "prepared": prepared,
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ending", ["x.png", "x.safetensors", "x.json"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, reader, kind, ending):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / ending
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    found = []

    def read():
        try:
            READERS[reader](path)
        except (ValueError, OSError) as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for ever"
    assert found, "it was read"
    assert "\n" not in str(found[0])


def test_extreme_shapes_are_refused_wherever_an_image_comes_in(tmp_path):
    thin = Image.new("RGB", (4000, 2))
    thin.save(tmp_path / "thin.png")
    told = f"one side may be at most {bounds.LONGEST_SHAPE} times the other"
    with pytest.raises(ValueError, match=told):
        read_image(tmp_path / "thin.png")
    for form in (thin, torch.zeros(3, 2, 4000)):
        with pytest.raises(ValueError, match=told):
            to_pixels(form)
