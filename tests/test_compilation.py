"""torch.compile, block by block: few graphs, the plain numbers, weights under their names."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from stable_cascade import StableCascadePipeline, compilation
from stable_cascade.drawing import Session
from stable_cascade.models.checkpointing import selective_checkpoint
from tests.tiny_cascade import MULTIPLE, tiny_parts, tiny_prior
from tests.trainer_runs import (
    ROUNDED,
    assert_same,
    settings,
    train,
    trainer_main,
    write_cascade,
    write_config,
    write_images,
)

SQUARE, TALL, WIDE = (12, 12), (16, 8), (8, 16)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and torch's settings as they were after it."""
    import torch.fx.experimental._config as symbols

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(), torch._functorch.config.patch(), symbols.patch():
        kept = symbols.use_duck_shape, torch._dynamo.config.recompile_limit, torch._functorch.config.recompute_views
        yield
        symbols.use_duck_shape, torch._dynamo.config.recompile_limit, torch._functorch.config.recompute_views = kept
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A tiny cascade without dropout, whose masks inductor draws in its own way."""
    folder = write_cascade(tmp_path_factory.mktemp("cascade"), dropout=0.0)
    write_images(folder / "images.tar")
    return folder


def inputs(batch, height, width):
    draw = torch.Generator().manual_seed(batch + height)
    shapes = {"sample": (batch, 16, height, width), "clip_text": (batch, 12, 32), "clip_text_pooled": (batch, 1, 32),
              "clip_img": (batch, 1, 24), "timestep_ratio": (batch,)}  # fmt: skip
    return {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}


def gradients(network, given):
    network.zero_grad()
    output = network(**given).sample
    (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in network.parameters())]


def assert_near(ours, theirs, tolerance=1e-5):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1, other.abs().max())


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_one_graph_per_kind_of_block_whatever_the_image_and_batch(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    plain, network = (tiny_prior(dropout=0.0).requires_grad_(True).train() for _ in range(2))
    assert compilation.compile_blocks(network) == [""]
    for batch, size in ((4, SQUARE), (2, WIDE), (3, TALL), (2, (20, 20))):
        assert_near(gradients(network, inputs(batch, *size)), gradients(plain, inputs(batch, *size)))
    assert graphs() == 4  # residual with and without a skip, timestep, attention


@pytest.mark.slow
def test_a_single_image_is_a_family_of_its_own(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    plain, network = (tiny_prior(dropout=0.0).requires_grad_(True).train() for _ in range(2))
    compilation.compile_blocks(network)
    for batch, size in ((2, SQUARE), (1, SQUARE), (1, WIDE), (3, TALL), (1, TALL)):
        assert_near(gradients(network, inputs(batch, *size)), gradients(plain, inputs(batch, *size)))
    assert graphs() == 8  # torch treats a batch of one as a kind of its own


def test_names_and_copies_know_nothing_of_it():
    network = tiny_prior()
    names = list(network.state_dict())
    network.compile_repeated_blocks(dynamic=True)
    assert list(network.state_dict()) == names
    assert [name for name, _ in network.named_modules()] == [name for name, _ in tiny_prior().named_modules()]
    assert all(module._compiled_call_impl is None for module in copy.deepcopy(network).modules())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_selective_checkpointing_runs_blocks_as_written(monkeypatch, backend):
    """Generated code writes over what selective checkpointing has kept, and gradients come out wrong."""
    monkeypatch.setattr(compilation, "BACKEND", backend)
    network, given = tiny_prior(dropout=0.0).requires_grad_(True).train(), inputs(2, *SQUARE)
    plain = [value.clone() for value in gradients(network, given)]
    compilation.compile_blocks(network)
    network.enable_gradient_checkpointing(selective_checkpoint)
    assert_near(gradients(network, given), plain)
    assert graphs() == 0


def test_as_written_compiles_nothing(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    network = tiny_prior()
    compilation.compile_blocks(network)
    with torch.no_grad(), compilation.as_written():
        network(**inputs(2, *SQUARE))
    assert graphs() == 0


def test_a_compiled_training_gives_the_plain_weights(tmp_path, cascade, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    options = {**ROUNDED, "updates": 3, "ema_beta": 0.5, "grad_accum_steps": 1}
    plain = train("text_to_image", tmp_path / "plain", cascade, **options)
    assert not graphs()
    compiled = train("text_to_image", tmp_path / "compiled", cascade, **options, compile=True)
    assert graphs() == 4  # portrait, square and landscape, and none for the preview sheets
    assert_same(plain, compiled, 1e-5)


def test_a_pipeline_draws_the_same_compiled():
    pipeline = StableCascadePipeline(**tiny_parts(), resolution_multiple=MULTIPLE)
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline)
    pipeline.prior.compile_repeated_blocks(dynamic=True, backend="eager")
    assert np.abs(draw(pipeline) - plain).max() <= 1e-4
    assert graphs() == 5  # four, and one for the keys and values of the tokens
    draw(pipeline, height=96)
    assert graphs() == 5


def draw(pipeline, **changes):
    options = {"height": 64, "width": 64, "prior_num_inference_steps": 2, "num_inference_steps": 1} | changes
    return pipeline("a red dog", generator=torch.Generator().manual_seed(0), output_type="np", **options).images


def test_without_a_compiler_it_says_so_before_anything_is_read(tmp_path, cascade, capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler, and torch finds none; install g\+\+"):
            Session("no such folder", compile=True, device="cpu")
        config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, cascade, compile=True))
        with pytest.raises(ValueError, match=r"missing or wrong: compile$"):
            trainer_main("lora")(["--config", str(config), "--check"])
    assert "compile         MISSING: compile needs a C++ compiler" in capsys.readouterr().out


def test_a_config_cannot_ask_for_selective_checkpointing_as_well(tmp_path, cascade):
    values = settings("text_to_image", tmp_path, cascade, compile=True, gradient_checkpointing="selective")
    config = write_config(tmp_path / "both.yaml", values)
    with pytest.raises(
        ValueError, match=r"compile.*cannot run under gradient_checkpointing: selective; set that to true"
    ):
        trainer_main("text_to_image")(["--config", str(config)])


def test_a_network_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match=r"compile: Linear has no network with repeated blocks; set compile: false"):
        compilation.compile_blocks(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["lora", "text_to_image", "controlnet", "decoder"])
def test_a_training_compiled_for_real_gives_the_plain_weights(trainer, tmp_path, cascade):
    options = {**ROUNDED, "gradient_checkpointing": True, "ema_beta": 0.5, "updates": 4}
    plain = train(trainer, tmp_path / "plain", cascade, **options)
    assert_same(plain, train(trainer, tmp_path / "compiled", cascade, **options, compile=True), 1e-4)


@pytest.mark.slow
def test_a_compiled_training_resumes(tmp_path, cascade):
    options = {**ROUNDED, "save_every": 2, "compile": True}
    whole = train("text_to_image", tmp_path / "whole", cascade, **options, updates=4)
    train("text_to_image", tmp_path / "parts", cascade, **options, updates=2)
    assert_same(whole, train("text_to_image", tmp_path / "parts", cascade, **options, updates=4), 1e-5)


@pytest.mark.slow
def test_the_embedded_cascade_draws_the_same_compiled_for_real():
    sessions = Session(), Session(compile=True)
    steps = {"prior_num_inference_steps": 20, "num_inference_steps": 10, "height": 64, "width": 64}
    prompt = "red apple, flat style"
    plain, fast = (
        session.pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **steps).images
        for session in sessions
    )
    assert np.abs(plain - fast).max() <= 1e-4
    drawn = sessions[1].draw(sessions[1].drawing(prompt=prompt, prior_num_inference_steps=2, num_inference_steps=1))
    assert drawn[0].made_with["compiled"] is True
