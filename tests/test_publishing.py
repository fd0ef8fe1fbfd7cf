"""Publishing: the model card of every kind of export, and its upload to a hub that runs on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

from stable_cascade import StableCascadeControlNet
from stable_cascade.adapters import add_learned_tokens, add_lora, save_lora
from stable_cascade.cli.main import main
from stable_cascade.embedded import embedded_path
from stable_cascade.training.model_card import public_place, recorded_settings, write_model_card
from stable_cascade.training.publishing import check_token, push_to_hub
from stable_cascade.training.sheets import preview_sheet, sheet_images
from tests.hub_stand_in import TOKEN, hub_stand_in
from tests.tiny_cascade import tiny_decoder, tiny_prior
from tests.toy_run import toy_config, toy_train
from tests.trainer_runs import ROOT


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA and a token of the embedded cascade."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    from stable_cascade import StableCascadePrior

    folder = tmp_path_factory.mktemp("lora")
    prior = StableCascadePrior.from_pretrained(embedded_path(), subfolder="prior")
    tokenizer = CLIPTokenizer.from_pretrained(embedded_path(), subfolder="tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(embedded_path(), subfolder="text_encoder")
    add_learned_tokens(tokenizer, encoder, [["[ink]", "^flat</w>"]])
    add_lora(prior, module_filters=[".attn"], rank=2)
    return save_lora(folder, prior=prior, text_encoder=encoder)


SETTINGS = {
    "experiment_id": "ink", "checkpoint_path": "/data/secret-project/runs", "output_path": "nowhere",
    "pretrained_model_name_or_path": "embedded", "image_size": 48, "batch_size": 2, "updates": 1000,
    "validation_prompts": ["a cat", "a [ink] owl"], "train_tokens": [["[ink]", "^flat</w>"]], "rank": 2,
    "webdataset_path": [
        "s3://key:word@bucket/set/{000..003}.tar?X-Amz-Signature=abc", "https://me:pw@host.org/x.tar?sig=def#g",
        "/srv/shards/mine.tar", "file:/srv/other.tar", "examples/data/ink_emoji.tar",
    ],
}  # fmt: skip


def test_card_of_a_lora(tmp_path, lora):
    folder = shutil.copytree(lora, tmp_path / "final")
    text = write_model_card(folder, SETTINGS, "someone/ink").read_text()
    head = front_matter(text)
    assert head["license"] == "apache-2.0"
    assert "base_model" not in head
    assert head["tags"] == ["stable-cascade", "text-to-image", "lora"]
    assert head["instance_prompt"] == "[ink]"
    data = text.split("## Data")[1].split("##")[0]
    assert re.findall(r"- `(.*)`", data) == [
        "s3://bucket/set/{000..003}.tar", "https://host.org/x.tar", "mine.tar", "other.tar",
        "examples/data/ink_emoji.tar",
    ]  # fmt: skip
    recorded = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recorded["rank"] == 2
    assert recorded["train_tokens"] == [["[ink]", "^flat</w>"]]
    for secret in ("pw", "word@", "abc", "sig", "srv/", "secret-project"):
        assert secret not in text, secret


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"model_version": "3.6B"}, {"base_model": "stabilityai/stable-cascade", "license": "other",
                                     "license_name": "stable-cascade-nc-community"}),
        ({"pretrained_model_name_or_path": "lab/cascade"}, {"base_model": "lab/cascade", "license": None}),
        ({"pretrained_model_name_or_path": "/models/mine"}, {"base_model": None, "license": None}),
        ({"model_version": "1B", "generator_checkpoint_path": "scratch"}, {"base_model": None, "license": None}),
        ({}, {"base_model": None, "license": None}),
    ],
)  # fmt: skip
def test_base_and_licence(tmp_path, lora, settings, wanted):
    text = write_model_card(shutil.copytree(lora, tmp_path / "final"), settings, "someone/x").read_text()
    head = front_matter(text)
    assert {key: head.get(key) for key in wanted} == wanted
    assert ("non-commercial" in text) == (wanted["license"] == "other")
    assert "/models" not in text


def tiny_controlnet():
    return StableCascadeControlNet(in_channels=1, projection_channels=16, blocks=(0, 1), bottleneck="simple")


@pytest.mark.parametrize(
    ("kind", "make", "line"),
    [
        ("prior", tiny_prior, 'prior = StableCascadePrior.from_pretrained("someone/x", subfolder="prior"'),
        ("decoder", tiny_decoder, 'decoder = StableCascadeDecoder.from_pretrained("someone/x", subfolder="decoder"'),
        ("controlnet", tiny_controlnet, 'StableCascadeControlNet.from_pretrained("someone/x", subfolder="controlnet"'),
    ],
)
def test_card_of_a_whole_network(tmp_path, kind, make, line):
    make().save_pretrained(tmp_path / kind)
    text = write_model_card(tmp_path, {"model_version": "1B", "updates": 5, "batch_size": 2}, "someone/x").read_text()
    head = front_matter(text)
    assert head["tags"][-1] == kind
    assert head["base_model_relation"] == ("adapter" if kind == "controlnet" else "finetune")
    assert line in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_card_shows_the_last_sheet(tmp_path, lora):
    folder = shutil.copytree(lora, tmp_path / "runs/ink/final")
    rows = [("images", torch.zeros(2, 3, 32, 32)), ("samples", torch.ones(2, 3, 32, 32) * 0.5)]
    for step in (10, 20):
        preview_sheet(rows, tmp_path / f"out/ink/step-{step:08d}.png", captions=["a cat", "an [ink] owl"], cell=96)
    (tmp_path / "runs/ink/step-00000020").mkdir()
    settings = {"experiment_id": "ink", "output_path": str(tmp_path / "out")}
    (tmp_path / "runs/ink/step-00000020/config.yaml").write_text(yaml.safe_dump(settings))
    assert recorded_settings(folder) == settings
    main(["publish", str(folder), "--repo", "someone/ink", "--card-only"])
    text = (folder / "README.md").read_text()
    assert front_matter(text)["widget"] == [
        {"text": "a cat", "output": {"url": "samples/00.png"}},
        {"text": "an [ink] owl", "output": {"url": "samples/01.png"}},
    ]
    assert "(samples/sheet.png)" in text
    assert len(sheet_images(folder / "samples/sheet.png")) == 4
    (folder / "README.md").write_text("mine")
    main(["publish", str(folder), "--repo", "someone/ink", "--card-only"])
    assert (folder / "README.md").read_text() == "mine", "an edited card is kept"


HOSTILE = ['a "quoted" \\ cat', "x\n---\nlicense: mit\n```\n# Owned", "{{ 7*7 }} {% raw %}", "<b>&</b>"]


def test_hostile_captions_stay_captions(tmp_path, lora):
    folder = shutil.copytree(lora, tmp_path / "final")
    rows = [("samples", torch.zeros(len(HOSTILE), 3, 32, 32))]
    preview_sheet(rows, tmp_path / "out/ink/step-00000010.png", captions=HOSTILE, cell=96)
    for prompt in HOSTILE:
        settings = {
            "pretrained_model_name_or_path": "lab/cascade", "experiment_id": "ink",
            "output_path": str(tmp_path / "out"), "validation_prompts": [f"[ink] {prompt}", *HOSTILE],
        }  # fmt: skip
        text = write_model_card(folder, settings, "someone/ink").read_text()
        card = ModelCard(text)
        assert [shown["text"] for shown in card.data.to_dict()["widget"]] == HOSTILE
        assert card.data.license is None
        fence = re.search("^(`+)yaml$", text, re.MULTILINE)[1]
        recorded = text.split(f"\n{fence}yaml\n")[1].split(f"\n{fence}\n")[0]
        assert yaml.safe_load(recorded)["validation_prompts"] == [f"[ink] {prompt}", *HOSTILE]
        code = compile(text.split("```python\n")[1].split("\n```\n")[0], "card", "exec")
        assert f"[ink] {prompt}" in code.co_consts


def test_places():
    assert public_place("~/data") == "data"
    assert public_place("../data") == "data"
    assert public_place("C:\\Users\\me\\x.tar") == "x.tar"
    assert public_place("data/x.tar") == "data/x.tar"


def test_upload_arrives_whole_and_the_cards_code_draws(tmp_path, hub, lora, monkeypatch):
    """A round trip: uploaded by the command, downloaded again by the lines that the card shows."""
    folder = shutil.copytree(lora, tmp_path / "final")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert main(["publish", str(folder), "--repo", "ink", "--private"]) == 0
    assert hub.repos == {"someone/ink": True}
    uploaded = hub.files["someone/ink"]
    assert set(uploaded) == {"README.md", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"}
    for name, content in uploaded.items():
        assert (folder / name).read_bytes() == content
    code = uploaded["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert 'load_lora_weights("someone/ink")' in code
    monkeypatch.chdir(tmp_path)
    few = code.replace("seed(0))", "seed(0), prior_num_inference_steps=1, num_inference_steps=1)")
    names: dict = {}
    exec(compile(few, "card", "exec"), names)
    assert names["pipeline"].tokenizer.tokenize("[ink]") == ["[ink]"]
    assert (tmp_path / "image.png").exists()


def test_run_uploads_its_export(tmp_path, hub, lora):
    config = toy_config(tmp_path, updates=4, push_to_hub=True, hub_model_id="lab/toy", hub_private=True)
    toy_train(config, save_fn=lambda folder, model, ema: shutil.copytree(lora, folder, dirs_exist_ok=True))
    assert hub.repos == {"lab/toy": True}
    assert set(hub.files["lab/toy"]) > {"README.md", "pytorch_lora_weights.safetensors"}
    assert "trained for 4 steps of 8 images" in hub.files["lab/toy"]["README.md"].decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no token", r"push_to_hub: there is no Hugging Face token; run `hf auth login` or set HF_TOKEN; or set push"),
        ("bad token", r"the hub does not know the Hugging Face token"),
        ("read", r"may only read"),
        ("owner", r"'other/toy' belongs to 'other', but the token to someone, lab; use 'someone/toy'"),
        ("name", r"hub_model_id 'a b' cannot name a repository"),
        ("offline", r"HF_HUB_OFFLINE is set"),
        ("down", r"the hub cannot be reached .* check the network and HF_ENDPOINT"),
    ],
)
def test_a_run_that_could_not_upload_does_not_start(tmp_path, hub, monkeypatch, change, message):
    name = {"owner": "other/toy", "name": "a b"}.get(change, "lab/toy")
    if change == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif change == "bad token":
        monkeypatch.setenv("HF_TOKEN", "hf_badbadbadbadbadbad")
    elif change == "read":
        hub.role = "read"
    elif change == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif change == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=message) as caught:
        toy_train(toy_config(tmp_path, push_to_hub=True, hub_model_id=name))
    assert "\n" not in str(caught.value)
    assert "stable-cascade publish FOLDER --repo" in str(caught.value)
    assert "hf_" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_failed_upload_loses_nothing_and_says_what_to_do(tmp_path, hub, lora, capsys):
    hub.broken = "/commit/"
    config = toy_config(tmp_path, updates=4, push_to_hub=True, hub_model_id="lab/toy")
    result = toy_train(config, save_fn=lambda folder, model, ema: shutil.copytree(lora, folder, dirs_exist_ok=True))
    assert result.finished
    told = capsys.readouterr().out
    command = re.search(r"`stable-cascade (publish \S+ --repo lab/toy)` uploads it", told)
    assert command, told
    assert "the hub answered 507" in told
    hub.broken = ""
    assert main(command[1].split()) == 0
    assert "pytorch_lora_weights.safetensors" in hub.files["lab/toy"]


def test_nothing_to_upload_is_said(tmp_path, hub, capsys):
    with pytest.raises(ValueError, match="no folder with files"):
        push_to_hub(tmp_path / "nothing", "someone/x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("x")
    assert main(["publish", str(tmp_path / "empty"), "--repo", "x"]) == 2
    assert "holds no exported model" in capsys.readouterr().err
    assert check_token("x") == "someone/x"


@pytest.mark.slow
def test_command_as_a_process_with_the_environment_alone(tmp_path, lora):
    """The same with no test's hand in the process: the hub's address comes from HF_ENDPOINT."""
    folder = shutil.copytree(lora, tmp_path / "final")
    with hub_stand_in() as hub:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {
            "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        command = [sys.executable, "-m", "stable_cascade.cli.main", "publish", str(folder), "--repo", "ink"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"uploaded {folder} to {hub.address}/someone/ink" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
        assert "README.md" in hub.files["someone/ink"]
