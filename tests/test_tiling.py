"""Stage A in tiles is Stage A: the same images and latents, with memory for one tile."""

from __future__ import annotations

import pytest
import torch

from stable_cascade.models import tiling, vqgan
from stable_cascade.models.tiling import decode_margin, encode_margin, spans
from tests.test_vqgan import random_vqgan

SIZES = [{"bottleneck_blocks": 2}, {"levels": 3, "embed_dim": 16}, {"levels": 1, "bottleneck_blocks": 3}]


def made(**config):
    return random_vqgan(**config).eval()


def least_side(model):
    return model.stride * (2 * decode_margin(model.config.levels, model.config.bottleneck_blocks) + 1)


def shapes_seen(model, name, monkeypatch):
    """The shapes that the method `name` is called with, a list that grows."""
    seen, method = [], getattr(model, name)
    monkeypatch.setattr(model, name, lambda x: (seen.append(tuple(x.shape)), method(x))[1])
    return seen


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize(("height", "width", "rows"), [(17, 9, 2), (8, 23, 1)])
@pytest.mark.parametrize("more", [1, 4])
@torch.no_grad()
def test_tiles_equal_the_whole(config, height, width, rows, more, monkeypatch):
    """In float32, to rounding: a product may go to another library where it is smaller. In float64 see below."""
    model = made(**config)
    latents = torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(1))
    pixels = torch.rand(rows, 3, height * model.stride, width * model.stride)
    whole, coded = model.decode(latents).sample, model.decode(latents, force_not_quantize=False).sample
    encoded = model.encode(pixels).latents
    side = least_side(model) + more * model.stride
    model.enable_tiling(side, side + model.stride)
    decoded, read = (shapes_seen(model, name, monkeypatch) for name in ("_decode", "_encode"))
    torch.testing.assert_close(model.decode(latents).sample, whole, rtol=0, atol=5e-6)
    torch.testing.assert_close(model.decode(latents, force_not_quantize=False).sample, coded, rtol=0, atol=5e-6)
    torch.testing.assert_close(model.encode(pixels).latents, encoded, rtol=0, atol=5e-6)
    for seen, before in ((decoded, model.stride), (read, 1)):
        assert len(seen) > rows
        assert all(b == 1 and h * before <= side and w * before <= side + model.stride for b, _, h, w in seen)


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("name", ["decode_margin", "encode_margin"])
@torch.no_grad()
def test_the_margin_is_just_enough(config, name, monkeypatch):
    model = made(**config).double()
    pixels = torch.rand(1, 3, 24 * model.stride, 24 * model.stride, dtype=torch.float64)
    latents = torch.randn(1, 4, 24, 24, dtype=torch.float64)
    run = (lambda: model.decode(latents).sample) if name == "decode_margin" else (lambda: model.encode(pixels).latents)
    whole, side, margin = run(), least_side(model), getattr(tiling, name)
    model.enable_tiling(side, side)
    assert (run() - whole).abs().max() < 1e-12
    monkeypatch.setattr(vqgan, name, lambda *sizes: margin(*sizes) - 1)
    assert (run() - whole).abs().max() > 1e-6


def test_margins_of_the_released_size():
    assert (decode_margin(2, 12), encode_margin(2)) == (13, 2)


@pytest.mark.parametrize("margin", [0, 1, 4])
def test_spans_cover_everything_once(margin):
    for length in range(1, 90):
        for tile in range(2 * margin + 1, 2 * margin + 9):
            found = spans(length, tile, margin)
            assert [cell for span in found for cell in range(span.first, span.last)] == list(range(length))
            for span in found:
                assert 0 <= span.start <= max(0, span.first - margin) + margin * (span.start == 0)
                assert span.start == 0 or span.first - span.start == margin
                assert span.stop == length or span.stop - span.last == margin
                assert span.stop - span.start <= tile


def test_memory_is_that_of_a_tile():
    """The largest tensor, and the sum of those that live at one time, do not grow with the image."""
    from stable_cascade.estimate.memory import peak_bytes

    with torch.device("meta"):
        model = vqgan.StableCascadeVQGAN(bottleneck_blocks=4, embed_dim=64).eval()

    def peak(side, rows=1):
        latents = torch.empty(rows, 4, side // 4, side // 4, device="meta")
        with torch.no_grad():
            taken = peak_bytes(lambda: model.decode(latents).sample, model.parameters())
        return taken - rows * 3 * side**2 * 4  # beside the images themselves

    model.disable_tiling()
    one, larger = peak(256), peak(512, 2)
    assert larger > 7.9 * one
    model.enable_tiling(256, 256)
    assert peak(512, 2) < 1.2 * one
    assert peak(768) < 1.2 * one


def test_large_images_are_tiled_without_being_asked(monkeypatch):
    model = made()
    seen = shapes_seen(model, "_decode", monkeypatch)
    monkeypatch.setattr(vqgan, "WHOLE_BELOW", 2 * 64 * 64)
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        model.decode(latents[:1])
        model.decode(latents)
        model.disable_tiling()
        model.decode(latents)
    assert [shape[0] for shape in seen] == [1, 1, 1, 2]
    model.use_tiling = None
    model.decode(latents)  # with gradients all tiles would be kept
    assert seen[-1][0] == 2


def test_gradients_pass_through_tiles():
    model, latents = made(), torch.randn(1, 4, 12, 12)
    gradients = []
    for tiles in (False, True):
        model.enable_tiling(32, 32) if tiles else model.disable_tiling()
        x = latents.clone().requires_grad_()
        model.decode(x).sample.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_training_encodes_the_whole_batch():
    model, pixels = made().train(), torch.rand(2, 3, 48, 48)
    model.enable_tiling(32, 32)
    tiles = model.encode(pixels).latents
    model.disable_tiling()
    torch.testing.assert_close(tiles, model.encode(pixels).latents)


@pytest.mark.parametrize("side", [0, -4, 30, 16, True, 32.0, "64"])
def test_impossible_tiles_are_refused(side):
    with pytest.raises(ValueError, match=r"tile_sample_min_width is .*; must be a multiple of 4 from 20 up") as error:
        made().enable_tiling(tile_sample_min_width=side)
    assert "\n" not in str(error.value)


def test_pipelines_and_the_session_pass_it_on():
    from stable_cascade.drawing import Session
    from stable_cascade.pipelines.habits import VAETilingMixin

    images, kept = [], []
    for tiling_ in (None, True, False):
        session = Session(tiling=tiling_)
        drawing = session.drawing(prompt="a fox", height=128, width=96, prior_num_inference_steps=1,
                                  num_inference_steps=1)  # fmt: skip
        assert isinstance(session.pipeline, VAETilingMixin)
        if tiling_:
            side = least_side(session.pipeline.vqgan) + 16
            session.pipeline.enable_vae_tiling(side, side)
        images.append(torch.tensor(list(session.draw(drawing)[0].image.tobytes()), dtype=torch.int16))
        kept.append(session.pipeline.vqgan.use_tiling)
    assert kept == [None, True, False]
    assert torch.equal(images[0], images[2])
    assert (images[1] - images[0]).abs().max() <= 1


@pytest.mark.parametrize(("words", "wanted"), [([], None), (["--tiling"], True), (["--no-tiling"], False)])
def test_the_commands_have_it(words, wanted):
    from stable_cascade.cli.main import make_parser

    assert make_parser().parse_args(["generate", "a fox", *words]).tiling is wanted
