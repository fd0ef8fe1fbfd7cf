"""The memory estimate: its parts against arithmetic, its trace against what torch allocates."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from stable_cascade.cli.main import main
from stable_cascade.estimate.memory import checkpointing, optimizer_bytes, peak_bytes, tensor_bytes
from stable_cascade.models.checkpointing import chosen_checkpoint
from tests.tiny_cascade import tiny_prior
from tests.trainer_runs import settings, write_cascade, write_config

BIG = {
    "experiment_id": "big", "checkpoint_path": "c", "output_path": "o", "webdataset_path": "d.tar", "updates": 10,
    "model_version": "3.6B", "image_size": 768, "batch_size": 1, "cache": True, "rank": 4, "num_preview_images": 0,
    "generator_checkpoint_path": "models/c.safetensors", "effnet_checkpoint_path": "models/e.safetensors",
    "dtype": "bfloat16", "gradient_checkpointing": True,
}  # fmt: skip
PRIOR = 3_593_297_936 - 4_194_304
"""Parameters of the 3.6B prior, and of adapters of rank 4 on its 256 attention projections."""


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("cascade"))


def figures(tmp_path, capsys, values, *arguments):
    config = write_config(tmp_path / "run.yaml", values)
    assert main(["estimate", "--json", *arguments, str(config)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(found["parts"].values())
    return found


# -- the trace ------------------------------------------------------------------------------------------------------


def test_peak_of_known_tensors():
    def run():
        first = torch.empty(1000, device="meta")
        second = first + 1
        del first
        return second * 2

    assert peak_bytes(run, granule=1) == 8000
    assert peak_bytes(run) == 2 * 4096


def test_views_and_resident_tensors_cost_nothing():
    weight = torch.empty(100, 100, device="meta")
    assert peak_bytes(lambda: weight.t().reshape(-1)[:50].view(5, 10), [weight], granule=1) == 40000  # reshape copies
    assert peak_bytes(lambda: weight.t().view(100, 100).detach(), [weight], granule=1) == 0


def network(device, depth=6):
    layers = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(depth)]
    return nn.Sequential(*layers).to(device)


def allocated_peak(run):
    """The peak of what torch allocates on the CPU while `run()` runs, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 10
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trace_is_what_torch_allocates(checkpointed):
    def step(model, device):
        x = torch.empty(512, 64, device=device) if device == "meta" else torch.zeros(512, 64)
        for _ in range(2):
            y = x
            for layer in model:
                y = checkpointing(None)(layer, y) if checkpointed else layer(y)
            y.square().mean().backward()

    on_meta, real = network("meta"), network("cpu")
    traced = peak_bytes(lambda: step(on_meta, "meta"), on_meta.parameters(), granule=1)
    measured = allocated_peak(lambda: step(real, "cpu"))
    assert abs(traced / measured - 1) < 0.05


def test_checkpointing_saves_memory_in_the_trace():
    def step(model, call):
        y = torch.empty(512, 64, device="meta")
        for layer in model:
            y = call(layer, y)
        y.sum().backward()

    plain, saving = network("meta"), network("meta")
    more = peak_bytes(lambda: step(plain, lambda layer, y: layer(y)), plain.parameters())
    less = peak_bytes(lambda: step(saving, checkpointing(None)), saving.parameters())
    assert less < 0.5 * more


def test_autocast_halves_what_a_layer_keeps_and_casts_its_weight_once():
    def run(dtype):
        model = nn.Linear(64, 64, device="meta")

        def step():
            x = torch.empty(4096, 64, device="meta")
            for _ in range(8):
                x = model(x).float()
            x.sum().backward()

        return peak_bytes(step, model.parameters(), autocast=dtype, granule=1)

    whole = 4096 * 64 * 4
    assert run(None) > 8 * whole
    assert run(torch.bfloat16) < 7 * whole


def test_attention_keeps_no_matrix_of_scores():
    query = torch.empty(1, 2, 1000, 8, device="meta", requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    assert peak_bytes(lambda: attend(query, query, query).sum().backward(), [query]) < 1000 * 1000 * 4


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_optimizer_states(optimizer):
    parameters = [nn.Parameter(torch.empty(128, 128)), nn.Parameter(torch.empty(10))]
    wanted = {"adamw": 8 * (128 * 128 + 10), "adamw_8bit": 2 * 128 * 128 + 8 * 64 + 80}
    assert optimizer_bytes(parameters, optimizer) == wanted[optimizer]


def test_adamw_keeps_what_is_counted():
    model = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 30)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert tensor_bytes(states) == optimizer_bytes(model.parameters(), "adamw")


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "limit"), [({}, 12e9), ({"quantization": "nf4"}, 8e9)])
def test_lora_of_the_large_prior_fits(tmp_path, capsys, changes, limit):
    found = figures(tmp_path, capsys, BIG | changes)
    assert found["trainer"] == "lora"
    assert (found["parameters"], found["trainable"]) == (PRIOR + 4_194_304, 4_194_304)
    parts = found["parts"]
    assert parts["weights that train"] == 4 * 4_194_304
    assert parts["optimizer"] == 8 * 4_194_304
    assert parts["gradients"] == 4 * 4_194_304
    if not changes:
        assert parts["frozen weights"] == 2 * PRIOR
    assert "text encoder" not in parts
    assert found["total"] < limit


def test_encoders_average_and_eight_bit_states_are_counted(tmp_path, cascade, capsys):
    values = settings("lora", tmp_path, cascade, train_tokens=None, image_embedding_share=0.5)
    plain = figures(tmp_path, capsys, values)
    assert {"image encoder", "CLIP image encoder", "text encoder", "previewer"} <= plain["parts"].keys()
    trainable = plain["trainable"]
    cached = figures(tmp_path, capsys, values | {"cache": True, "ema_beta": 0.9})
    assert not {"image encoder", "CLIP image encoder", "text encoder"} & cached["parts"].keys()
    assert cached["parts"]["moving average"] == 4 * trainable
    assert "moving average" not in figures(tmp_path, capsys, values | {"ema_beta": 0.9, "ema_offload": True})["parts"]
    tokens = figures(tmp_path, capsys, values | {"train_tokens": [["[fox]", "^dog</w>"]]})
    assert tokens["trainable"] == trainable + 32


@pytest.mark.parametrize("trainer", ["text_to_image", "decoder"])
def test_whole_networks(tmp_path, cascade, capsys, trainer):
    values = settings(trainer, tmp_path, cascade)
    found = figures(tmp_path, capsys, values, "--trainer", trainer)
    assert found["trainable"] == found["parameters"]
    assert found["parts"]["weights that train"] == 4 * found["trainable"]
    shared = figures(tmp_path, capsys, values | {"use_fsdp": True}, "--trainer", trainer, "--processes", "2")
    assert shared["parts"]["optimizer"] == found["parts"]["optimizer"] // 2
    assert shared["parts"]["weights that train"] == found["parts"]["weights that train"] // 2
    copied = figures(tmp_path, capsys, values, "--trainer", trainer, "--processes", "2")
    assert copied["parts"]["optimizer"] == found["parts"]["optimizer"]


@pytest.mark.parametrize("checkpointed", [False, True, "selective"])
def test_estimate_of_a_step_is_what_torch_allocates(tmp_path, cascade, capsys, monkeypatch, checkpointed):
    """Stage C in float32 without autocast, and without attention, which the CPU computes in another way than CUDA."""
    types = [["SDCascadeResBlock", "SDCascadeTimestepBlock"]] * 2
    sizes = {"down_num_layers_per_block": [2, 4], "up_num_layers_per_block": [4, 2], "block_types_per_layer": types}
    prior = tiny_prior(**sizes, dropout=0.1).requires_grad_(True).train()
    prior.save_pretrained(tmp_path / "prior")
    monkeypatch.setattr("stable_cascade.estimate.memory.peak_bytes.__kwdefaults__", {"autocast": None, "granule": 1})
    values = settings("text_to_image", tmp_path, cascade, cache=True, num_preview_images=0, image_size=256,
                      multi_aspect_ratio=None, grad_accum_steps=1, image_embedding_share=0,
                      gradient_checkpointing=checkpointed,
                      generator_checkpoint_path=str(tmp_path / "prior"))  # fmt: skip
    found = figures(tmp_path, capsys, values, "--trainer", "text_to_image", "--mixed-precision", "no")
    if checkpointed:
        prior.enable_gradient_checkpointing(chosen_checkpoint(checkpointed))
    grid = 256 // 8

    def step():
        text = {"clip_text": torch.zeros(4, 77, 32), "clip_text_pooled": torch.zeros(4, 1, 32)}
        sample = torch.zeros(4, 16, grid, grid)
        prior(sample, torch.zeros(4), **text).sample.square().mean().backward()

    measured = allocated_peak(step)
    traced = found["parts"]["activations"] + found["parts"]["gradients"]
    assert abs(traced / measured - 1) < 0.05, (traced, measured)


def test_fused_attention_takes_what_is_traced():
    attend = nn.functional.scaled_dot_product_attention

    def step(device):
        query, key, value = (torch.zeros(4, 8, 512, 16, device=device, requires_grad=True) for _ in range(3))
        attend(query, key, value).square().sum().backward()

    assert abs(peak_bytes(lambda: step("meta"), granule=1) / allocated_peak(lambda: step("cpu")) - 1) < 0.15


def test_the_text_lists_the_parts(tmp_path, cascade, capsys):
    config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, cascade, train_tokens=None))
    assert main(["estimate", str(config), "--rank", "8"]) == 0
    printed = capsys.readouterr().out
    for part in ("frozen weights", "weights that train", "optimizer", "activations", "expected peak per process"):
        assert part in printed
    assert f"trainable       {4 * 1024:,}" in printed


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"rank": None}, [], ["do not tell", "--trainer"]),
        ({"batch_size": 6}, ["--processes", "4"], ["batch_size 6", "4 processes"]),
        ({"rnak": 4}, [], ["unknown key 'rnak'", "'rank'"]),
        ({"module_filters": [".atn"]}, [], ["module_filters", "'.atn'", "nearest"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, cascade, capsys, changes, arguments, words):
    config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, cascade, train_tokens=None, **changes))
    assert main(["estimate", *arguments, str(config)]) == 2
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert all(word in written for word in words), written


@pytest.mark.parametrize(
    ("given", "trainer"),
    [
        ({"controlnet_blocks": [0], "model_version": "3.6B"}, "controlnet"),
        ({"module_filters": [".attn"]}, "lora"),
        ({"model_version": "700M"}, "decoder"),
        ({"effnet_dropout": 0.1}, "decoder"),
        ({"quantize_share": 0.5}, "vqgan"),
        ({"model_version": "1B"}, "text_to_image"),
        ({"offset_noise": 0.1}, "text_to_image"),
    ],
)
def test_a_config_is_told_by_its_keys(tmp_path, given, trainer):
    from stable_cascade.trainers import trainer_of

    assert trainer_of(str(write_config(tmp_path / "a.yaml", given))) == trainer
