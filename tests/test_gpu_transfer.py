"""On a GPU: the host runs ahead of the device; batches come in page-locked memory; float8 where the chip has it."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from stable_cascade import factory
from stable_cascade.data import index_samples
from stable_cascade.training import float8, loop
from stable_cascade.transfer import to_device, to_host
from tests.making_shards import batches_of
from tests.test_float8 import CLOSE, layers, relative, rows
from tests.trainer_runs import assert_same, train, write_cascade, write_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"), dropout=0.0)
    write_images(folder / "images.tar")
    return folder


@contextlib.contextmanager
def waiting_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("trainer", ["lora", "text_to_image"])
def test_no_step_waits_for_the_device(tmp_path, cascade, monkeypatch, trainer):
    """Steps 3 to 7 of the real loop, from inputs to moving average; log and checkpoint come later."""
    plain, watched = loop.gradients, []
    modes = contextlib.ExitStack()

    def gradients(run, stream, loss_fn):
        if run.step == 2:
            modes.enter_context(waiting_is_an_error())
        if run.step == 7:
            modes.close()
        watched.append(run.step)
        return plain(run, stream, loss_fn)

    monkeypatch.setattr(loop, "gradients", gradients)
    changes = {"cache": True, "train_tokens": None, "updates": 9, "log_every": 100, "num_preview_images": 0,
               "ema_beta": 0.9, "adaptive_loss_weight": True}  # fmt: skip
    with modes:
        train(trainer, tmp_path, cascade, **changes)
    assert watched == list(range(9))


def test_what_a_batch_is_made_of_is_sent_without_waiting(cascade):
    index = index_samples(str(cascade / "images.tar"))
    given = {"image_size": 32, "batch_size": 4, "as_stored": True, "pin_memory": True}
    for workers in (0, 2):
        batch = next(batches_of(index, num_workers=workers, **given))
        assert batch.pixels.is_pinned()
        assert batch.pixels.dtype == torch.uint8
        assert batch.seeds.is_pinned()
        with waiting_is_an_error():
            pixels = factory.shown(batch, torch.device("cuda"))
        plain = next(batches_of(index, image_size=32, batch_size=4))
        assert torch.equal(pixels.cpu(), plain.pixels)


def test_numbers_arrive_though_later_work_is_queued():
    busy = torch.randn(4096, 4096, device="cuda")
    with waiting_is_an_error():
        x = to_device(torch.arange(3.0), "cuda")
        read = to_host(x + 1)
    ended = torch.cuda.Event()
    for _ in range(50):
        busy = busy @ busy * 1e-3
    ended.record()
    assert read() == [1.0, 2.0, 3.0]
    assert not ended.query(), "it waited for what was queued after it"


def needs_float8() -> None:
    if torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("needs compute capability 8.9")


@pytest.mark.parametrize("trained", [False, True])
def test_float8_layers_are_close_to_plain_ones(trained):
    needs_float8()
    if trained:
        pytest.importorskip("torchao", reason="float8 layers that train are torchao's")
    plain, rounded = (layers().to("cuda", torch.bfloat16).requires_grad_(trained) for _ in range(2))
    float8.convert_to_float8(rounded, float8.float8_layers(rounded, 64))
    x, y = (rows(torch.bfloat16).detach().cuda().requires_grad_() for _ in range(2))
    plain(x).square().sum().backward()
    with waiting_is_an_error():
        rounded(y).square().sum().backward()
    assert 0 < relative(rounded(y), plain(x)) < CLOSE
    assert 0 < relative(y.grad, x.grad) < 2 * CLOSE


def test_lora_trains_in_float8(tmp_path, cascade, monkeypatch):
    """The whole trainer; its layers are far smaller than those that gain by it."""
    needs_float8()
    monkeypatch.setattr(float8, "float8_layers", functools.partial(float8.float8_layers, smallest=16))
    final = train("lora", tmp_path, cascade, dtype="bfloat16", float8=True, num_preview_images=0, updates=3)
    assert_same(final, final)
