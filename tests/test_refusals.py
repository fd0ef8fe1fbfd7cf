"""Every documented mistake ends a trainer with status 2 and one line, before any weight is read."""

from __future__ import annotations

import shutil

import pytest

from stable_cascade.config import run_main
from tests.making_shards import undecodable, write_tar
from tests.trainer_runs import settings, trainer_main, write_cascade, write_config, write_images


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory):
    """A cascade whose weights files are damaged: whoever reads one fails in another way."""
    folder = write_cascade(tmp_path_factory.mktemp("unreadable"))
    write_images(folder / "images.tar")
    write_tar(folder / "texts.tar", {"000.txt": "a dog", "001.txt": "a snail"})
    write_tar(folder / "broken.tar", {f"{i:03}.{end}": undecodable() if end == "png" else "a dog"
                                      for i in range(4) for end in ("png", "txt")})  # fmt: skip
    (folder / "no_tar.tar").write_bytes(b"these are not the bytes of a tar" * 100)
    whole = (folder / "images.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 2])
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    return folder


def run(trainer, folder, capsys, arguments=(), **changes):
    """What the trainer wrote to stderr before it left with status 2."""
    config = write_config(folder / "run.yaml", changes)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: trainer_main(trainer)(["--config", str(config), *arguments]))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def refusal(trainer, tmp_path, cascade, capsys, **changes):
    written = run(trainer, tmp_path, capsys, **settings(trainer, tmp_path, cascade, **changes))
    assert written.startswith("error: ")
    assert written.count("\n") == 1, written
    assert not (tmp_path / "runs").exists()
    return written


MISTAKES = {
    "misspelt key": ({"image_siez": 32}, ["unknown key 'image_siez'", "32", "nearest: 'image_size'"]),
    "another trainer's key": ({"effnet_dropout": 0.1}, ["'effnet_dropout'", "DecoderConfig"]),
    "another trainer's word": ({"train_batch_size": 8}, ["'train_batch_size'", "'batch_size'"]),
    "wrong type": ({"updates": "many"}, ["updates", "'many'", "whole number"]),
    "outside its choices": ({"lr_scheduler": "cosin"}, ["lr_scheduler", "'cosin'", "nearest: 'cosine'"]),
    "outside its range": ({"caption_dropout": 1.5}, ["caption_dropout", "1.5", "[0, 1]"]),
    "batch that does not divide": ({"batch_size": 5}, ["batch_size", "5", "grad_accum_steps 2", "nearest: 4"]),
    "rank 0": ({"rank": 0}, ["rank", "0", "at least 1"]),
    "missing shard": (
        {"webdataset_path": "{cascade}/image.tar"},
        ["webdataset_path", "image.tar", "images.tar"],
    ),
    "missing folder": ({"pretrained_model_name_or_path": "{cascade}/x"}, ["pretrained_model_name_or_path", "/x'"]),
    "missing network": ({"effnet_checkpoint_path": "{cascade}/e.pt"}, ["effnet_checkpoint_path", "e.pt", "folder"]),
    "missing LoRA": ({"lora_checkpoint_path": "{cascade}/l.safetensors"}, ["LoRA", "l.safetensors", "give"]),
    "shard that is no tar": ({"webdataset_path": "{cascade}/no_tar.tar"}, ["no_tar.tar", "not a tar"]),
    "truncated tar": ({"webdataset_path": "{cascade}/cut.tar"}, ["cut.tar", "truncated"]),
    "tar without images": ({"webdataset_path": "{cascade}/texts.tar"}, ["texts.tar", "image"]),
    "filter with a call": (
        {"dataset_filters": [["score", "lambda s: open(s) > 1"]]},
        ["dataset_filters", "open(s) > 1", "open"],
    ),
    "filter with an attribute": (
        {"dataset_filters": [["score", "lambda s: s.real > 1"]]},
        ["dataset_filters", "s.real > 1", "attribute"],
    ),
    "filter that nothing passes": ({"dataset_filters": [["score", "lambda s: s > 99"]]}, ["score", "s > 99", "12"]),
    "module filter without a match": ({"module_filters": [".atn"]}, ["module_filters", "'.atn'", "'.attn'"]),
    "token regex without a match": ({"train_tokens": [["^zebra", None]]}, ["train_tokens", "'^zebra'", "nearest"]),
    "token regex that is none": ({"train_tokens": [["^(dog", None]]}, ["train_tokens", "'^(dog'", "expression"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_before_weights(tmp_path, unreadable, capsys, mistake):
    changes, parts = MISTAKES[mistake]
    filled = {key: value.format(cascade=unreadable) if isinstance(value, str) else value
              for key, value in changes.items()}  # fmt: skip
    written = refusal("lora", tmp_path, unreadable, capsys, **filled)
    assert all(part in written for part in parts), written


@pytest.mark.parametrize("trainer", ["text_to_image", "decoder"])
@pytest.mark.parametrize("mistake", ["misspelt key", "missing shard", "filter with a call", "truncated tar"])
def test_the_other_trainers_too(tmp_path, unreadable, capsys, trainer, mistake):
    changes, parts = MISTAKES[mistake]
    filled = {key: value.format(cascade=unreadable) if isinstance(value, str) else value
              for key, value in changes.items()}  # fmt: skip
    written = refusal(trainer, tmp_path, unreadable, capsys, **filled)
    assert all(part in written for part in parts), written


def test_weights_are_read_after_that(tmp_path, unreadable):
    """The control of the tests above: without a mistake the damaged weights are what stops the trainer."""
    config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, unreadable))
    with pytest.raises(Exception, match=r"(?i)header|safetensors|damaged"):
        trainer_main("lora")(["--config", str(config)])


@pytest.mark.parametrize(
    ("trainer", "part"), [("lora", "prior"), ("decoder", "vqgan"), ("text_to_image", "text_encoder")]
)
def test_missing_weights(tmp_path, unreadable, capsys, trainer, part):
    bare = tmp_path / "bare"
    shutil.copytree(unreadable, bare)
    for file in (bare / part).glob("*.safetensors"):
        file.unlink()
    written = refusal(trainer, tmp_path, bare, capsys)
    assert f"bare/{part}' holds no .safetensors" in written
    shutil.rmtree(bare / part)
    assert f"'{part}'" in refusal(trainer, tmp_path, bare, capsys)


def test_missing_config_file(tmp_path, capsys):
    write_config(tmp_path / "lora.yaml", {})
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: trainer_main("lora")(["--config", str(tmp_path / "lroa.yaml")]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: --config {tmp_path}/lroa.yaml: no such file; nearest: 'lora.yaml'\n"


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"rank": 4}, "rank 4"), ({"module_filters": ["channelwise"]}, "absent"), ({"lora_alpha": 1.0}, "lora_alpha: 2"),
     ({"train_tokens": None}, "'[fox]'")],
)  # fmt: skip
def test_lora_file_that_does_not_fit(tmp_path, unreadable, capsys, changes, part):
    from stable_cascade.adapters import add_learned_tokens, add_lora, save_lora
    from tests.tiny_cascade import tiny_prior, tiny_text_encoder, tiny_tokenizer

    prior, encoder, tokenizer = tiny_prior(), tiny_text_encoder(), tiny_tokenizer()
    add_lora(prior, module_filters=[".attn"], rank=2)
    tokens = add_learned_tokens(tokenizer, encoder, [["[fox]", "^dog</w>"]])
    save_lora(tmp_path / "lora", prior=prior, tokens=tokens)
    changes = {"lora_checkpoint_path": str(tmp_path / "lora"), **changes}
    written = refusal("lora", tmp_path, unreadable, capsys, **changes)
    assert part in written
    assert "lora_checkpoint_path" in written
