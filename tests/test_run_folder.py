"""A run's folder: nothing foreign is touched, one training at a time, damage is told, the data are known."""

import importlib.util
import json
import os
import re
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from stable_cascade.data import index_samples
from stable_cascade.training.processes import StopRequest
from stable_cascade.training.run_folders import LOCK, check_run_folders, held, rotate, set_aside, sweep
from stable_cascade.training.tracking import LogFile, check_launch, trackers_of
from tests.making_shards import image, write_tar
from tests.toy_run import make_accelerator, saved, toy_config, toy_train
from tests.trainer_runs import settings, train, trainer_main, write_cascade, write_config, write_images

FOREIGN = ["step-00000002-good", "step-best", "step-last", "step-2", "my-step-00000002", "backup-old"]


def run_json(folder, step):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    """Checkpoints of the steps 2, 10, 100, folders of others, and a link to a checkpoint elsewhere."""
    for name in FOREIGN:
        run_json(tmp_path / "run" / name, 0)
    for step in (2, 10, 100):
        run_json(tmp_path / f"run/step-{step:08d}", step)
    run_json(tmp_path / "elsewhere", 1)
    (tmp_path / "run/step-00000001").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "run"


def names(run):
    return {path.name for path in run.iterdir()}


def test_rotation_deletes_old_checkpoints_alone(run):
    rotate(run, 1, run / "step-00000100")
    assert names(run) == {*FOREIGN, "step-00000001", "step-00000100"}
    assert (run.parent / "elsewhere/run.json").is_file()


def test_rotation_keeps_what_was_just_written_and_after_it_the_highest_steps(run):
    """A run that was resumed from an early step writes checkpoints below those that are there."""
    rotate(run, 2, run / "step-00000010")
    assert names(run) == {*FOREIGN, "step-00000001", "step-00000010", "step-00000100"}
    rotate(run, None, run / "step-00000010")
    assert len(names(run)) == len(FOREIGN) + 3


def test_sweep_and_set_aside_leave_what_is_not_the_runs(run):
    for name in (".tmp-step-00000002-77", ".tmp-old-final-5", ".tmp-notes", ".tmp-step-mine"):
        (run / name).mkdir()
    sweep(run)
    assert {name for name in names(run) if name.startswith(".tmp")} == {".tmp-notes", ".tmp-step-mine"}
    aside = set_aside(run)
    assert names(aside) == {"step-00000001", "step-00000002", "step-00000010", "step-00000100"}
    assert names(run) >= set(FOREIGN)


def test_a_training_in_a_folder_of_others_deletes_nothing_of_theirs(tmp_path):
    run = tmp_path / "runs/toy"
    for name in FOREIGN:
        run_json(run / name, 0)
    config = toy_config(tmp_path, save_every=2, checkpoints_total_limit=1)
    toy_train(config)
    (run / "final/notes.txt").write_text("mine")
    toy_train(config)  # all is done; the export is written once more
    assert names(run) == {*FOREIGN, "step-00000012", "final"}
    assert (run / "final/notes.txt").read_text() == "mine"


def test_a_second_training_on_the_same_folder_is_refused(tmp_path):
    run = tmp_path / "runs/toy"
    with (
        held(run),
        pytest.raises(ValueError, match=r"is in use by another training \('process \d+ on .*another ex"),
    ):
        toy_train(toy_config(tmp_path))
    with held(run), pytest.raises(ValueError, match="is in use"):
        check_run_folders(toy_config(tmp_path))
    (run / LOCK).write_text("process 1 on a machine that crashed")
    assert toy_train(toy_config(tmp_path)).finished
    assert not (run / LOCK).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_path": "FILE"}, r"checkpoint_path: '.*file/toy' cannot be written to \(Not a directory\)"),
        ({"output_path": "FILE"}, r"output_path: '.*file/toy' cannot be written to \(Not a directory\)"),
        ({"experiment_id": "x" * 300}, r"checkpoint_path: .* cannot be written to \(File name too long\)"),
        ({"checkpoint_path": "/proc/here"}, r"checkpoint_path: '/proc/here/toy' cannot be written to"),
    ],
)
def test_folders_that_cannot_be_written_to_are_told_at_the_start(tmp_path, changes, message):
    (tmp_path / "file").write_text("")
    changes = {key: str(value).replace("FILE", str(tmp_path / "file")) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message) as caught:
        check_run_folders(toy_config(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_trying_the_folders_leaves_nothing_behind(tmp_path):
    check_run_folders(toy_config(tmp_path / "deep/er"))
    assert not list(tmp_path.iterdir())


def edited(record, **changes):
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes", [{"step": "4"}, {"step": 9}, {"step": 3}, {"files": {}}, {"samples_seen": 5}, {"settings": []}]
)
@pytest.mark.parametrize("checked", [True, False])
def test_an_edited_record_is_damage(tmp_path, changes, checked):
    """Without the check, as earlier versions wrote it, all but another count of samples is found."""
    toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"))
    record = tmp_path / "runs/toy/step-00000004/run.json"
    content = json.loads(record.read_text())
    if not checked:
        if "samples_seen" in changes:
            return
        del content["check"]
    record.write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=r"step-00000004 has a damaged or incomplete run.json; set resume: latest_in"):
        toy_train(toy_config(tmp_path, lr_scheduler="constant"))


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "7", '{"format": 1}', ""])
def test_a_record_that_is_none_is_damage(tmp_path, text):
    toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"))
    (tmp_path / "runs/toy/step-00000004/run.json").write_text(text)
    with pytest.raises(ValueError, match=r"damaged or incomplete run.json"):
        toy_train(toy_config(tmp_path, lr_scheduler="constant"))


def test_latest_intact_gives_way_to_the_one_before(tmp_path, capsys):
    whole = saved(toy_train(toy_config(tmp_path / "whole")).export)
    toy_train(toy_config(tmp_path, checkpoints_total_limit=3))
    broken = tmp_path / "runs/toy/step-00000012/weights.safetensors"
    broken.write_bytes(b"?" + broken.read_bytes()[1:])
    with pytest.raises(ValueError, match="missing or damaged"):
        toy_train(toy_config(tmp_path))
    again = saved(toy_train(toy_config(tmp_path, resume="latest_intact")).export)
    assert "passed over: checkpoint file" in capsys.readouterr().out
    assert all(again["own"][name].equal(value) for name, value in whole["own"].items())


def test_a_torn_line_of_the_log_does_not_stop_a_resumption(tmp_path, caplog):
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss_by_log_snr": {"-9": 1.0}', '{"step": 3}', '{"step"']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log = LogFile(tmp_path, 2)
    log.write({"step": 3})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n{"step": 3}\n'
    assert "line 2, 4 holds no figures" in caplog.text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_are_wishes_to_stop(name):
    usual = signal.getsignal(getattr(signal, name))
    with StopRequest() as stop:
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.wanted
    assert signal.getsignal(getattr(signal, name)) is usual


def test_an_ignored_hangup_stays_ignored():
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wanted
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_tracker_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else name)
    for tracker in ("tensorboard", "all"):
        with pytest.raises(ValueError, match=f"tracker: {tracker} needs the package tensorboard, .* pip install"):
            trackers_of(toy_config(tmp_path, tracker=tracker, wandb_project="p"))
    assert trackers_of(toy_config(tmp_path, tracker="wandb", wandb_project="p")) == ["wandb"]


def test_deepspeed_asked_for_on_the_cpu_is_refused(tmp_path, monkeypatch):
    """accelerate then runs plain processes and says nothing."""
    config = toy_config(tmp_path)
    accelerator = make_accelerator(config)
    check_launch(config, accelerator)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="asked for DeepSpeed"):
        check_launch(config, accelerator)
    with pytest.raises(ValueError, match="asked for DeepSpeed"):  # also where the package is not installed
        make_accelerator(config)


@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp_over_processes_without_accelerators_is_told_as_such(tmp_path, monkeypatch, processes):
    """Each process takes itself for the only one, whatever was asked for; one alone would train without sharding."""
    variables = {"WORLD_SIZE": str(processes), "LOCAL_RANK": str(processes - 1), "ACCELERATE_USE_FSDP": "true"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    alone = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(value="NO"), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"asks for FSDP, which needs an accelerator.*; launch .*cpu_2proc.yaml here"):
        check_launch(toy_config(tmp_path), alone)
    alone.device = torch.device("cuda")
    with pytest.raises(
        ValueError, match=r"^ACCELERATE_USE_FSDP is set, but accelerate runs NO; launch with .*fsdp.yaml"
    ):
        check_launch(toy_config(tmp_path), alone)


def shard(path, seeds, caption="a fox"):
    members = {}
    for number, seed in enumerate(seeds):
        members |= {f"{number:04}.png": image(seed=seed), f"{number:04}.txt": caption}
    return write_tar(path, members)


def test_content_is_known_by_images_and_captions_not_by_place(tmp_path):
    def content(path):
        return index_samples(str(path), cache_dir=str(tmp_path / "cache")).content

    one = content(shard(tmp_path / "one.tar", [1, 2, 3]))
    moved = shutil.copy(tmp_path / "one.tar", tmp_path / "moved.tar")
    assert {key: value for key, value in content(moved).items() if key != "some"} == {
        key: value for key, value in one.items() if key != "some"
    }
    swapped = content(shard(tmp_path / "swapped.tar", [2, 1, 3]))
    assert swapped["images"] == one["images"]
    assert swapped["order"] != one["order"]
    retold = content(shard(tmp_path / "retold.tar", [1, 2, 3], "a cat"))
    assert retold["order"] == one["order"]
    assert retold["all"] != one["all"]
    assert content(shard(tmp_path / "other.tar", [1, 2, 4]))["images"] != one["images"]


def data(seeds, caption="a fox", folder="a"):
    some = {f"{folder}.tar/{number}": f"{seed:016x}" for number, seed in enumerate(seeds)}
    order = ".".join(map(str, seeds))
    images = ".".join(map(str, sorted(seeds)))
    return {"samples": len(seeds), "images": images, "order": order, "all": order + caption, "some": some}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (data([1, 2]), r"3 samples then, 2 now \(not found again: 'a.tar/2'\)"),
        (data([1, 2, 4]), r"other images among them \(not found again: 'a.tar/2'\)"),
        (data([2, 1, 3]), r"the same images in another order; name the shards as before"),
        (data([1, 2, 3], "a cat"), "other captions or masks"),
    ],
)
def test_a_run_resumes_on_its_own_data_alone(tmp_path, now, message):
    settings = {"updates": 4, "lr_scheduler": "constant"}
    toy_train(toy_config(tmp_path, **settings), data=data([1, 2, 3]))
    assert toy_train(toy_config(tmp_path, **settings), data=data([1, 2, 3], folder="moved")).finished
    with pytest.raises(ValueError, match=message):
        toy_train(toy_config(tmp_path, **settings), data=now)


def test_a_run_that_wrote_pictures_for_images_resumes_and_says_what_differs(tmp_path):
    settings, old = {"updates": 4, "lr_scheduler": "constant"}, data([1, 2, 3])
    old["pictures"] = old.pop("images")
    toy_train(toy_config(tmp_path, **settings), data=old)
    assert toy_train(toy_config(tmp_path, **settings), data=data([1, 2, 3])).finished
    with pytest.raises(ValueError, match="the same images in another order"):
        toy_train(toy_config(tmp_path, **settings), data=data([2, 1, 3]))


def test_a_run_goes_on_with_other_data_where_that_is_asked_for(tmp_path):
    first, second = data([1, 2, 3]), data([4, 5], "a cat")
    toy_train(toy_config(tmp_path, updates=4, lr_scheduler="constant"), data=first)
    with pytest.raises(ValueError, match="set resume_with_other_data: True to go on with these"):
        toy_train(toy_config(tmp_path, updates=8, lr_scheduler="constant"), data=second)
    changed = toy_config(tmp_path, updates=8, lr_scheduler="constant", resume_with_other_data=True)
    assert toy_train(changed, data=second).step == 8
    # From then on its data are the new ones.
    config = toy_config(tmp_path, updates=12, lr_scheduler="constant")
    with pytest.raises(ValueError, match="trained on other data: 2 samples then, 3 now"):
        toy_train(config, data=first)
    assert toy_train(config, data=second).step == 12


def test_other_content_under_the_same_path_is_refused_and_the_same_under_another_taken(tmp_path, toy_cascade):
    """Through a trainer, with its own index of the shards."""
    changes = {"updates": 2, "lr_scheduler": "constant", "train_tokens": None, "num_preview_images": 0}
    shard(tmp_path / "a/set.tar", range(8))
    train("lora", tmp_path, toy_cascade, webdataset_path=str(tmp_path / "a/set.tar"), **changes)
    (tmp_path / "a").rename(tmp_path / "b")
    train("lora", tmp_path, toy_cascade, webdataset_path=str(tmp_path / "b/set.tar"), **changes)
    shard(tmp_path / "b/set.tar", range(1, 9))
    with pytest.raises(ValueError, match="it was trained on other data"):
        train("lora", tmp_path, toy_cascade, webdataset_path=str(tmp_path / "b/set.tar"), **changes)


def test_tokens_that_no_caption_contains_are_an_error_at_the_start(tmp_path, toy_cascade, capsys):
    for token, options in (("[zz]", []), ("[zz]", ["--check", "true"]), ("[fox]", ["--check", "true"])):
        values = settings("lora", tmp_path, toy_cascade, train_tokens=[[token, "^dog</w>"]])
        config = write_config(tmp_path / "run.yaml", values)
        if options:
            missing = pytest.raises(ValueError, match=r"missing or wrong: data$") if token == "[zz]" else nullcontext()
            with missing:
                trainer_main("lora")(["--config", str(config), *options])
            out = capsys.readouterr().out
            assert ("MISSING: train_tokens: [zz] is in 0 of" in out) == (token == "[zz]")
            assert token != "[fox]" or "[fox] is in " in out
        else:
            with pytest.raises(ValueError, match=r"\[zz\] is in 0 of 12 captions, so it would not learn"):
                trainer_main("lora")(["--config", str(config)])


def test_captions_longer_than_the_encoder_reads_are_counted(tmp_path, toy_cascade, capsys):
    write_tar(
        tmp_path / "long.tar",
        {"0.png": image(seed=1), "0.txt": "a fox", "1.png": image(seed=2), "1.txt": "a fox " * 60},
    )
    values = settings("lora", tmp_path, toy_cascade, webdataset_path=str(tmp_path / "long.tar"), train_tokens=None)
    config = write_config(tmp_path / "run.yaml", values)
    trainer_main("lora")(["--config", str(config), "--check", "true"])
    told = r"1 of 2 captions are cut: the text encoder reads \d+ tokens, the longest has \d+"
    assert re.search(told, capsys.readouterr().out)


@pytest.fixture(scope="module")
def toy_cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"))
    write_images(folder / "images.tar")
    return folder
