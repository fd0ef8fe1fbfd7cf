import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from stable_cascade import embedded
from stable_cascade.data import index_samples

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "examples" / "embedded"
INK = ROOT / "examples" / "data" / "ink_emoji.tar"


@pytest.fixture(scope="module", autouse=True)
def example_modules():
    """The example's own modules are importable while these tests run, as when its scripts run."""
    sys.path.insert(0, str(EMBEDDED))
    yield
    sys.path.remove(str(EMBEDDED))
    for name in ("concepts", "measures", "prepare_data", "render"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def ink_parts():
    with tarfile.open(INK) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_ink_set_is_small_and_complete(ink_parts):
    assert INK.stat().st_size < 400_000
    keys = {name.partition(".")[0] for name in ink_parts}
    assert len(keys) == 60
    assert set(ink_parts) == {f"{key}.{ending}" for key in keys for ending in ("png", "txt", "json")}


def test_ink_images_are_black_on_white(ink_parts):
    for name, data in ink_parts.items():
        if name.endswith(".png"):
            with Image.open(io.BytesIO(data)) as image:
                assert (image.mode, image.size) == ("RGB", (96, 96)), name
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(96, 96, 3).int()
            assert (pixels.amax(-1) - pixels.amin(-1)).max() == 0, f"{name} has colour"
            corners = pixels[::95, ::95].float().mean()
            assert corners > 250, f"{name} is not on white"
            assert 0.03 < (pixels[..., 0] < 64).float().mean() < 0.7, f"{name} is no drawing"


def test_ink_captions_and_licences(ink_parts):
    from concepts import INK_LABELS, caption_name

    concepts = []
    for name, data in ink_parts.items():
        if name.endswith(".json"):
            known = json.loads(data)
            caption = ink_parts[name.replace(".json", ".txt")].decode()
            assert caption == f"{caption_name(known['concept'])} in [ink] style"
            assert caption == caption.lower()
            assert known["licence"] == "MIT"
            assert known["source"].startswith("@iconify-json/fluent-emoji-high-contrast@")
            concepts.append(known["concept"])
    assert sorted(concepts) == sorted(INK_LABELS)


def test_library_reads_the_ink_set():
    samples = index_samples(str(INK))
    assert len(samples) == 60
    data, caption = samples.read(0)
    assert caption.endswith(" in [ink] style")
    assert data.startswith(b"\x89PNG")


def test_vocabulary_is_consistent():
    from concepts import BASE_LABELS, INK_LABELS, SHORT_NAMES, caption_name

    assert len(set(BASE_LABELS)) == len(BASE_LABELS) >= 150
    assert set(INK_LABELS) < set(BASE_LABELS)
    names = [caption_name(label) for label in (*BASE_LABELS, *SHORT_NAMES)]
    assert len(set(names)) == len(set(BASE_LABELS) | set(SHORT_NAMES)), "two concepts share a caption"
    assert all(name == name.lower() and name.isascii() and "," not in name for name in names)


def test_retrieval_captions_are_training_captions():
    from concepts import BASE_LABELS
    from measures import read_mosaic
    from prepare_data import caption_for, key_for

    known = {
        key_for(label, style, 0): caption_for(label, style) for label in BASE_LABELS for style in ("noto", "flat")
    }
    keys, captions, tiles = read_mosaic(EMBEDDED / "captions_100.webp", side=32)
    assert len(keys) == len(set(keys)) == len(set(captions)) == len(tiles) == 100
    assert [known[key] for key in keys] == captions
    assert sum("noto style" in caption for caption in captions) == 50


def test_held_out_images_are_of_no_base_concept():
    from concepts import BASE_LABELS, caption_name
    from measures import read_mosaic

    keys, captions, tiles = read_mosaic(EMBEDDED / "held_out_200.webp", side=64)
    assert len(keys) == len(set(keys)) == len(tiles) == 200
    names = {caption.rpartition(", ")[0] for caption in captions}
    assert len(names) == 100
    assert not names & {caption_name(label) for label in BASE_LABELS}
    assert (tiles.amax((1, 2, 3)) - tiles.amin((1, 2, 3))).min() > 0.2, "a tile is empty"


def test_an_image_is_its_own_nearest():
    from measures import distances, ranks, read_mosaic, shrink

    _, _, tiles = read_mosaic(EMBEDDED / "captions_100.webp", side=32)
    right = torch.arange(100)
    assert ranks(distances(shrink(tiles), shrink(tiles)), right).tolist() == [0] * 100
    # Shifted by one, an image is never the nearest: its neighbour is there at distance 0.
    assert ranks(distances(shrink(tiles.roll(1, 0)), shrink(tiles)), right).min() > 0
    # Where everything is equally near, nothing is found.
    assert ranks(torch.ones(1, 100), torch.tensor([3])).item() == 99


def test_licence_texts_come_with_the_weights():
    text = (Path(embedded.__file__).parent / "LICENSES.md").read_text(encoding="utf-8")
    for needed in (
        "Copyright (c) Microsoft Corporation.",
        "Copyright (c) 2017-2019 Miles Johnson",
        "Apache License",
        "END OF TERMS AND CONDITIONS",
        "The above copyright notice and this permission notice shall be included",
    ):
        assert needed in text


def test_embedded_path_is_complete_or_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"lacks model_index\.json.*examples/embedded/README\.md") as caught:
        embedded.embedded_path()
    assert "\n" not in str(caught.value)
    for name in embedded.REQUIRED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert embedded.embedded_path() == tmp_path.resolve()
