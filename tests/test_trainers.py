"""The trainers through their own `main`s: resumed, on two processes, split up, minimal, all to the same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stable_cascade import StableCascadePipeline
from stable_cascade.config import run_main
from tests.trainer_runs import (
    LORA,
    ROOT,
    ROUNDED,
    TOKENS,
    assert_same,
    settings,
    tensors,
    train,
    trainer_main,
    write_cascade,
    write_config,
    write_images,
)
from tests.two_processes import launch_two

HARD = {"ema_beta": 0.5, "ema_iters": 1, "ema_start_iters": 2, "lora_dropout": 0.1, "num_workers": 2}
"""What makes a LoRA resumption hard, beside the buckets, accumulation, dropout and tokens of every run here."""


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"))
    write_images(folder / "images.tar")
    return folder


@pytest.fixture(scope="module")
def steady(tmp_path_factory, cascade):
    """The cascade without dropout, whose masks are per process and per micro-batch."""
    folder = tmp_path_factory.mktemp("steady")
    write_cascade(folder, dropout=0.0)
    shutil.copy(cascade / "images.tar", folder)
    return folder


def last_step(folder):
    log = folder / "out/run/log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cascade):
    return train("lora", tmp_path_factory.mktemp("whole"), cascade, updates=24, **HARD)


def test_terminated_lora_resumes_to_the_same_bits(tmp_path, cascade, uninterrupted):
    changes = {"updates": 24, **HARD}

    def terminate():
        while last_step(tmp_path) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    final = train("lora", tmp_path, cascade, **changes)
    thread.join()
    (held,) = (tmp_path / "runs/run").iterdir()
    assert 5 <= int(held.name.removeprefix("step-")) < 24
    assert not final.exists()
    assert_same(train("lora", tmp_path, cascade, **changes), uninterrupted)


def test_killed_lora_resumes_to_the_same_bits(tmp_path, cascade, uninterrupted):
    """Killed outright between two checkpoints, as a process of its own."""
    changes = {"updates": 24, "save_every": 6, **HARD}
    config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, cascade, **changes))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "examples/train_lora.py"), "--config", str(config)]
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while last_step(tmp_path) < 8:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    run = tmp_path / "runs/run"
    held = max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))
    assert held in (6, 12, 18)
    assert not (run / "final").exists()
    assert_same(train("lora", tmp_path, cascade, **changes), uninterrupted)


def test_lora_exports_the_moving_average(tmp_path, cascade):
    final = train("lora", tmp_path, cascade, ema_beta=0.9)
    exported, checkpoint = tensors(final), final.parent / "step-00000006"
    own, averages = (load_file(checkpoint / f"{name}.safetensors") for name in ("weights", "ema"))
    rows = next(name for name in averages if name.endswith("rows"))
    assert torch.equal(exported[f"{TOKENS}:[fox]"], averages[rows][0])
    assert not torch.equal(own[rows], averages[rows])
    adapters = {f"{LORA}:{name.replace('.default', '')}": name for name in averages if ".lora_" in name}
    assert adapters.keys() == {name for name in exported if name.startswith(LORA)}
    assert all(torch.equal(exported[short], averages[name]) for short, name in adapters.items())


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        ("text_to_image", {"adaptive_loss_weight": True, "ema_beta": 0.5}),
        ("decoder", {"adaptive_loss_weight": True, "ema_beta": 0.5, "effnet_noise": 0.1}),
    ],
)
def test_longer_run_continues_a_shorter_one_bitwise(tmp_path, cascade, trainer, changes):
    train(trainer, tmp_path, cascade, updates=3, **changes)
    again = train(trainer, tmp_path, cascade, updates=6, **changes)
    log = (tmp_path / "out/run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    whole = train(trainer, tmp_path, cascade, experiment_id="whole", **changes)
    assert_same(again, whole)
    # The bins of the adaptive weights are part of what is resumed, and they were used.
    states = [
        torch.load(tmp_path / f"runs/{name}/step-00000006/stateful.pt", weights_only=True) for name in ("run", "whole")
    ]
    first, second = (state["adaptive_loss_weight"] for state in states)
    assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.2, "offset_noise": 0.1, "image_embedding_share": 0.5, "lr_scheduler": "cosine"},
                {"image_embedding_share": 0.0, "multi_aspect_ratio": None, "use_dora": True, "train_tokens": None}],
)  # fmt: skip
def test_minimal_script_equals_the_trainer_bitwise(tmp_path, cascade, changes):
    full = train("lora", tmp_path, cascade, **changes)
    minimal = train("lora", tmp_path, cascade, script="minimal_train_lora", experiment_id="minimal", **changes)
    assert {path.name for path in minimal.iterdir()} == {path.name for path in full.iterdir()}
    assert_same(minimal, full)


@pytest.mark.parametrize("trainer", ["lora", "text_to_image", "decoder"])
def test_batch_equals_its_parts(tmp_path, steady, trainer):
    whole = train(trainer, tmp_path, steady, grad_accum_steps=1, **ROUNDED)
    parts = train(trainer, tmp_path, steady, grad_accum_steps=2, experiment_id="parts", **ROUNDED)
    assert_same(parts, whole, tolerance=1e-5)


@pytest.mark.parametrize(
    ("trainer", "choice"), [("lora", True), ("lora", "selective"), ("text_to_image", True), ("decoder", True)]
)
def test_gradient_checkpointing_changes_nothing(tmp_path, cascade, trainer, choice):
    """With dropout, whose masks the second computation has to repeat."""
    plain = train(trainer, tmp_path, cascade)
    again = train(trainer, tmp_path, cascade, gradient_checkpointing=choice, experiment_id="again")
    assert_same(again, plain, tolerance=1e-6)


def test_previews_show_whole_images_where_stage_b_is_named(tmp_path, cascade):
    places = {"rough": None, "named": str(cascade / "decoder"), "own": "pretrained"}
    for name, place in places.items():
        train("text_to_image", tmp_path, cascade, experiment_id=name, updates=1, stage_b_checkpoint_path=place)
    rough, named, own = ((tmp_path / f"out/{name}/step-00000001.png").read_bytes() for name in places)
    assert named == own
    assert named != rough
    with pytest.raises(ValueError, match=r"stage_b_checkpoint_path '.*none' does not exist"):
        train("text_to_image", tmp_path, cascade, stage_b_checkpoint_path=str(tmp_path / "none"))


def test_previews_do_not_change_the_weights(tmp_path, cascade):
    changes = {"ema_beta": 0.5, "lora_dropout": 0.2}
    without = train("lora", tmp_path, cascade, num_preview_images=0, **changes)
    watched = train("lora", tmp_path, cascade, experiment_id="watched", save_every=2, num_preview_images=2,
                    preview_steps=3, validation_prompts=["red dog", "[fox]", "a snail"], **changes)  # fmt: skip
    assert not list((tmp_path / "out/run").glob("step-*.png"))
    sheets = sorted(path.name for path in (tmp_path / "out/watched").glob("step-*.png"))
    assert sheets == ["step-00000002.png", "step-00000004.png", "step-00000006.png"]
    assert_same(watched, without)


def test_lora_trains_adapters_and_rows_alone(tmp_path, cascade):
    """The optimizer has nothing else, and the export brings exactly that into a pipeline."""
    before = tensors(cascade)
    final = train("lora", tmp_path, cascade, lr=0.02)
    assert all(torch.equal(value, before[name]) for name, value in tensors(cascade).items())
    checkpoint = final.parent / "step-00000006"
    trained = load_file(checkpoint / "weights.safetensors")
    assert all(".lora_" in name or name.endswith(".rows") for name in trained)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]
    assert len(state["param_groups"][0]["params"]) == len(trained) == 2 * 16 + 1

    pipeline = StableCascadePipeline.from_pretrained(cascade)
    pipeline.set_progress_bar_config(disable=True)
    request = {"prompt": "a [fox]", "prior_num_inference_steps": 2, "num_inference_steps": 1, "output_type": "pt"}
    plain = pipeline(**request, generator=torch.Generator().manual_seed(0)).images
    table = pipeline.text_encoder.get_input_embeddings().weight.clone()
    weights = {name: value.clone() for name, value in pipeline.prior.state_dict().items()}
    pipeline.load_lora_weights(final)
    drawn = pipeline(**request, generator=torch.Generator().manual_seed(0)).images
    assert (drawn - plain).abs().max() > 0.01
    changed = pipeline.text_encoder.get_input_embeddings().weight
    new = pipeline.tokenizer.convert_tokens_to_ids(["snail</w>", "snail", "snails</w>", "[fox]"])
    assert new[-1] == len(table)
    kept = [number for number in range(len(table)) if number not in new]
    assert torch.equal(changed[kept], table[kept])
    assert not torch.equal(changed[new[0]], table[new[0]])
    for name, value in pipeline.prior.state_dict().items():
        assert "lora_" in name or torch.equal(value, weights[name.replace(".base_layer", "")]), name


def test_training_goes_on_from_a_lora_file(tmp_path, cascade):
    first = train("lora", tmp_path, cascade)
    still = train("lora", tmp_path, cascade, experiment_id="b", lora_checkpoint_path=str(first), lr=0.0)
    assert_same(still, first)


def test_check_reads_no_weights(tmp_path, cascade, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(cascade, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, bare))
    command = ["--config", str(config), "--check", "--webdataset_path", str(tmp_path / "no.tar")]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: trainer_main("lora")(command))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    missing = [line.split()[0] for line in lines if " MISSING: " in line]
    assert missing == ["prior", "semantic_encoder", "previewer", "text_encoder", "image_encoder", "data"]
    assert any(line.startswith("adapters") and "[fox]" in line for line in lines)
    assert stopped.value.code == 2
    assert printed.err == f"error: a training would stop, missing or wrong: {', '.join(missing)}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("trainer", ["lora", "text_to_image", "decoder"])
def test_check_prints_the_plan(tmp_path, cascade, capsys, trainer):
    config = write_config(tmp_path / "run.yaml", settings(trainer, tmp_path, cascade))
    trainer_main(trainer)(["--config", str(config), "--check"])
    printed = capsys.readouterr().out
    assert "MISSING" not in printed
    assert f"{'decoder' if trainer == 'decoder' else 'prior'}" in printed
    assert "12 samples in 1 shards" in printed
    assert "4 = 2 x 2 over all processes" in printed


@pytest.mark.parametrize("trainer", ["lora", "text_to_image", "decoder"])
def test_help_lists_every_key(capsys, trainer):
    with pytest.raises(SystemExit) as stopped:
        trainer_main(trainer)(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{key} " in printed for key in settings(trainer, Path("x"), Path("y")))


def test_two_processes_equal_one(tmp_path, steady):
    """Both trainers in one launch: tokens, buckets, accumulation, adaptive weights, moving average."""
    runs = {
        "lora": ROUNDED,
        "text_to_image": {"adaptive_loss_weight": True, "ema_beta": 0.5, **ROUNDED},
    }
    arguments = []
    for trainer, changes in runs.items():
        values = settings(trainer, tmp_path / "two", steady, experiment_id=trainer, **changes)
        arguments += [trainer, str(write_config(tmp_path / f"{trainer}.yaml", values))]
    done = launch_two(ROOT / "tests/trainer_runs.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes       2,") == 2
    for trainer, changes in runs.items():
        one = train(trainer, tmp_path / "one", steady, experiment_id=trainer, **changes)
        assert_same(tmp_path / "two/runs" / trainer / "final", one, tolerance=1e-5)


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(tmp_path, steady):
    """Every trainer on two processes: whole, again from the checkpoint of its third step, and on one process."""
    runs = {
        "lora": {"ema_beta": 0.5, **ROUNDED},
        "text_to_image": {"adaptive_loss_weight": True, "gradient_checkpointing": True, **ROUNDED},
        "decoder": {"adaptive_loss_weight": True, "ema_beta": 0.5, "effnet_noise": 0.1, **ROUNDED},
    }
    folder = tmp_path / "two"
    for trainer, changes in runs.items():
        resumes = {trainer: "latest", f"{trainer}_again": str(folder / "runs" / trainer / "step-00000003")}
        for name, resume in resumes.items():
            values = settings(trainer, folder, steady, experiment_id=name, resume=resume, save_every=3, **changes)
            config = write_config(tmp_path / f"{name}.yaml", values)
            done = launch_two(ROOT / "tests/trainer_runs.py", trainer, str(config))
            assert done.returncode == 0, done.stderr[-3000:]
            assert "processes       2," in done.stdout
            assert ("resuming after step 3 from" in done.stdout) == (resume != "latest")
    for trainer, changes in runs.items():
        two = folder / "runs" / trainer / "final"
        assert_same(folder / f"runs/{trainer}_again/final", two)
        one = train(trainer, tmp_path / "one", steady, experiment_id=trainer, **changes)
        assert_same(two, one, tolerance=1e-5)
