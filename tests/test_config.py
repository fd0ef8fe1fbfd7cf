from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from stable_cascade.config import (
    TRAINERS,
    ConfigError,
    ControlNetConfig,
    DecoderConfig,
    LoraConfig,
    TextToImageConfig,
    TrainingSettings,
    documentation,
    help_text,
    keys_where,
    load_config,
    reference,
)
from stable_cascade.config.fields import setting

RATIOS = ["1/1", "1/2", "1/3", "2/3", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "9/16"]
BLOCKS = [0, 4, 8, 12, 51, 55, 59, 63]
LARGE = [["width", "lambda w: w >= 768"], ["height", "lambda h: h >= 768"]]
EVERY_TRAINING = {
    "checkpoint_path": "/path/to/checkpoint", "output_path": "/path/to/output", "wandb_project": "StableCascade",
    "wandb_entity": "wandb_username", "lr": 1.0e-4, "grad_accum_steps": 1, "warmup_updates": 1,
    "webdataset_path": ["s3://path/to/your/first/dataset/on/s3", "file:/path/to/your/local/dataset.tar"],
    "effnet_checkpoint_path": "models/effnet_encoder.safetensors",
}  # fmt: skip
STAGE_C = {
    **EVERY_TRAINING, "model_version": "3.6B", "previewer_checkpoint_path": "models/previewer.safetensors",
    "generator_checkpoint_path": "models/stage_c_bf16.safetensors",
}  # fmt: skip
FINETUNE_C = {
    **STAGE_C, "experiment_id": "stage_c_3b_finetuning", "batch_size": 512, "image_size": 768,
    "multi_aspect_ratio": RATIOS, "updates": 100000, "backup_every": 20000, "save_every": 2000, "use_fsdp": True,
    "adaptive_loss_weight": True,
}  # fmt: skip
STAGE_B = {
    **EVERY_TRAINING, "stage_a_checkpoint_path": "models/stage_a.safetensors", "image_size": 1024, "shift": 4,
    "backup_every": 20000, "use_fsdp": True, "adaptive_loss_weight": True,
}  # fmt: skip
CONTROL = {
    **STAGE_C, "batch_size": 256, "image_size": 768, "backup_every": 2000, "save_every": 1000, "use_fsdp": True,
    "captions_getter": ["txt", "identity"], "dataset_filters": LARGE,
}  # fmt: skip
GUIDE = {
    "training/controlnet_c_3b_canny": (ControlNetConfig, {
        **CONTROL, "experiment_id": "stage_c_3b_controlnet_canny", "updates": 10000, "controlnet_blocks": BLOCKS,
        "controlnet_filter": "CannyFilter", "controlnet_filter_params": {"resize": 224},
    }),
    "training/controlnet_c_3b_identity": (ControlNetConfig, {
        **CONTROL, "experiment_id": "stage_c_3b_controlnet_identity", "updates": 200000,
        "controlnet_bottleneck_mode": "simple", "controlnet_blocks": list(range(64)),
        "controlnet_filter": "IdentityFilter",
        "controlnet_filter_params": {"max_faces": 4, "p_drop": 0.05, "p_full": 0.3},
    }),
    "training/controlnet_c_3b_inpainting": (ControlNetConfig, {
        **CONTROL, "experiment_id": "stage_c_3b_controlnet_inpainting", "updates": 10000, "controlnet_blocks": BLOCKS,
        "controlnet_filter": "InpaintFilter", "offset_noise": 0.1,
        "controlnet_filter_params": {"thresold": [0.04, 0.4], "p_outpaint": 0.4},
    }),
    "training/controlnet_c_3b_sr": (ControlNetConfig, {
        **CONTROL, "experiment_id": "stage_c_3b_controlnet_sr", "updates": 30000, "backup_every": 5000,
        "controlnet_bottleneck_mode": "large", "controlnet_blocks": BLOCKS, "controlnet_filter": "SREffnetFilter",
        "controlnet_filter_params": {"scale_factor": 0.5}, "offset_noise": 0.1,
    }),
    "training/finetune_b_3b": (DecoderConfig, {
        **STAGE_B, "experiment_id": "stage_b_3b_finetuning", "model_version": "3B", "batch_size": 256,
        "updates": 100000, "save_every": 1000, "generator_checkpoint_path": "models/stage_b_bf16.safetensors",
    }),
    "training/finetune_b_700m": (DecoderConfig, {
        **STAGE_B, "experiment_id": "stage_b_700m_finetuning", "model_version": "700M", "batch_size": 512,
        "updates": 10000, "save_every": 2000, "generator_checkpoint_path": "models/stage_b_lite_bf16.safetensors",
    }),
    "training/finetune_c_1b": (TextToImageConfig, {
        **STAGE_C, "experiment_id": "stage_c_1b_finetuning", "model_version": "1B", "batch_size": 1024,
        "image_size": 768, "updates": 10000, "backup_every": 20000, "save_every": 2000, "use_fsdp": True,
        "generator_checkpoint_path": "models/stage_c_lite_bf16.safetensors",
    }),
    "training/finetune_c_3b": (TextToImageConfig, FINETUNE_C),
    "training/finetune_c_3b_lora": (LoraConfig, {
        **STAGE_C, "experiment_id": "stage_c_3b_lora", "batch_size": 32, "image_size": 768, "grad_accum_steps": 4,
        "multi_aspect_ratio": RATIOS, "updates": 10000, "backup_every": 1000, "save_every": 100, "use_fsdp": False,
        "module_filters": [".attn"], "rank": 4, "train_tokens": [["[fernando]", "^dog</w>"]],
    }),
    "training/finetune_c_3b_lowres": (TextToImageConfig, {**FINETUNE_C, "batch_size": 1024, "image_size": 384}),
    "training/finetune_c_3b_v": (TextToImageConfig, {**FINETUNE_C, "edm_objective": True}),
}  # fmt: skip


def write(path, values) -> str:
    import yaml

    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("name", GUIDE)
def test_every_config_of_the_guide_loads_as_it_stands(name, tmp_path):
    cls, values = GUIDE[name]
    config = load_config(cls, [write(tmp_path / "guide.yaml", values)])
    for key, value in values.items():
        assert getattr(config, key) == value, key


@pytest.fixture
def lora(tmp_path):
    return write(tmp_path / "lora.yaml", GUIDE["training/finetune_c_3b_lora"][1])


def test_the_guide_s_own_text_loads(tmp_path):
    """The YAML as the guide prints it: flow lists with bare ratios, comments, a commented token."""
    path = tmp_path / "guide.yaml"
    path.write_text("""
experiment_id: stage_c_3b_controlnet_base
checkpoint_path: /path/to/checkpoint
output_path: /path/to/output
model_version: 3.6B
lr: 1.0e-4
batch_size: 256
image_size: 768
multi_aspect_ratio: [1/1, 1/2, 9/16]
updates: 500000
use_fsdp: False
ema_start_iters: 5000
ema_iters: 100
ema_beta: 0.9
webdataset_path:
- s3://path/to/your/first/dataset/on/s3
- file:/path/to/your/local/dataset.tar
dataset_filters:
- ['aesthetic_score', 'lambda s: s > 4.5']
- ['nsfw_probability', 'lambda s: s < 0.01']
module_filters: ['.attn']
rank: 4
train_tokens:
# - ['^snail', null] # token starts with "snail" -> "snail" & "snails", don't need to be reinitialized
- ['[fernando]', '^dog</w>'] # custom token [snail], initialize as avg of snail & snails
""")
    config = load_config(LoraConfig, ["--config", str(path), "--train_tokens", "[['^snail', null]]"])
    assert config.multi_aspect_ratio == ["1/1", "1/2", "9/16"]
    assert config.dataset_filters[0] == ["aesthetic_score", "lambda s: s > 4.5"]
    assert config.train_tokens == [["^snail", None]]
    assert (config.ema_start_iters, config.ema_iters, config.ema_beta) == (5000, 100, 0.9)
    assert (config.lr, config.model_version) == (1e-4, "3.6B")


def test_command_line_wins_and_is_typed(lora):
    config = load_config(LoraConfig, [
        "--config", lora, "--lr", "1e-5", "--rank=16", "--use_dora", "--check", "--train_tokens", "null",
        "--validation_prompts", "[a red apple, 'a cat: asleep']", "--adam_betas", "[0.9, 0.98]",
        "--dataset_filters", "[['score', 'lambda s: s > 4.5']]", "--caption_dropout", "0", "--webdataset_path=a.tar",
    ])  # fmt: skip
    assert (config.lr, config.rank, config.use_dora, config.check, config.train_tokens) == (1e-5, 16, True, True, None)
    assert config.validation_prompts == ["a red apple", "a cat: asleep"]
    assert config.adam_betas == (0.9, 0.98)
    assert config.webdataset_path == "a.tar"
    assert config.caption_dropout == 0.0


def test_one_entry_of_a_mapping_can_be_set(tmp_path):
    path = write(tmp_path / "c.yaml", GUIDE["training/controlnet_c_3b_identity"][1])
    config = load_config(ControlNetConfig, [path, "--controlnet_filter_params.p_drop", "0.5"])
    assert config.controlnet_filter_params == {"max_faces": 4, "p_drop": 0.5, "p_full": 0.3}


def test_absent_keys_take_their_meaning_from_others(lora, tmp_path):
    config = load_config(LoraConfig, [lora])
    assert (config.tracker, config.crop, config.lora_alpha) == ("wandb", "random", 4)
    assert (config.prediction_type, config.loss_weight, config.ema_beta) == ("epsilon", "p2", None)
    config = load_config(
        LoraConfig, [lora, "--multi_aspect_ratio", "null", "--wandb_project", "null", "--ema_beta=.9"]
    )
    assert (config.crop, config.tracker, config.ema_start_iters, config.ema_iters) == ("smart", "none", 0, 1)
    config = load_config(TextToImageConfig, [write(tmp_path / "v.yaml", GUIDE["training/finetune_c_3b_v"][1])])
    assert (config.prediction_type, config.loss_weight) == ("v_prediction", "adaptive")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rnk", "4"], "command line: unknown key 'rnk' (value 4); nearest: 'rank'"),
        (["--learning_rate", "1"], "here it is called 'lr'"),
        (["--controlnet_filter", "CannyFilter"], "it belongs to ControlNetConfig, not to LoraConfig"),
        (["--rank", "four"], "rank: 'four' is not allowed; rank takes whole number"),
        (["--rank", "2.5"], "rank: 2.5 is not allowed; rank takes whole number"),
        (["--updates", "True"], "updates: True is not allowed; updates takes whole number"),
        (["--rank", "0"], "rank: 0 must be at least 1"),
        (["--model_version", "3.5B"], "3.6B | 1B | embedded; nearest: '3.6B'"),
        (["--dtype", "bf16"], "dtype takes float32 | bfloat16 | float16"),
        (["--batch_size", "30"], "batch_size: 30 must be a multiple of grad_accum_steps 4; nearest: 32"),
        (["--lr", ".nan"], "lr: nan must be a finite number"),
        (["--lr", "-1"], "lr: -1.0 must be at least 0"),
        (["--caption_dropout", "5"], "caption_dropout: 5.0 must lie in [0, 1]"),
        (["--train_tokens", "[[]]"], "entry [] must be a pair as ['[new]', '^dog</w>'] or ['^snail', null]"),
        (["--train_tokens", "[['[]', '^dog']]"], "must be a pair as"),
        (["--train_tokens", "[['', null]]"], "must be a pair as"),
        (["--train_tokens", "[['[a]', '']]"], "must be a pair as"),
        (["--train_tokens", "[['[a]', '^(dog']]"], "pattern '^(dog' is not a regular expression"),
        (["--train_tokens", "['[a]']"], "train_tokens takes list of list of text or null"),
        (["--module_filters", "[]"], "must be a list of parts of layer names, as ['.attn']"),
        (["--multi_aspect_ratio", "['16:9']"], "entry '16:9' must be two whole numbers, as '3/4'"),
        (["--dataset_filters", "[[score]]"], "must be a key and a condition"),
        (["--webdataset_path", "null"], "or dataset_name must be set"),
        (["--model_version", "null"], "or pretrained_model_name_or_path must be set"),
        (["--ema_iters", "5"], "ema_iters: 5 needs ema_beta"),
        (["--edm_objective", "--prediction_type", "epsilon"], "contradicts edm_objective: True"),
        (["--adaptive_loss_weight", "--loss_weight", "p2"], "contradicts adaptive_loss_weight: True"),
        (["--tracker", "wandb", "--wandb_project", "null"], "tracker: 'wandb' needs wandb_project"),
        (["--rank"], "--rank has no value; set it as `--key value`"),
        (["other.yaml"], "'other.yaml' is neither a `--key` nor the config file"),
        (["--seed", "${nothing}"], "seed"),
    ],
)
def test_bad_values_are_one_line_with_the_remedy(lora, arguments, message):
    with pytest.raises(ConfigError) as caught:
        load_config(LoraConfig, [lora, *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_value_in_a_file_names_the_file(tmp_path):
    values = {**GUIDE["training/finetune_c_3b_lora"][1], "rank": 0}
    path = write(tmp_path / "mine.yaml", values)
    with pytest.raises(ConfigError, match=r"mine.yaml: rank: 0 must be at least 1"):
        load_config(LoraConfig, [path])


@pytest.mark.parametrize("key", ["experiment_id", "updates", "batch_size", "image_size"])
def test_missing_key_is_named_with_its_meaning(tmp_path, key):
    values = {k: v for k, v in GUIDE["training/finetune_c_3b_lora"][1].items() if k != key}
    with pytest.raises(ConfigError, match=f"LoraConfig: missing {key}; set {key}: .*[.]"):
        load_config(LoraConfig, [write(tmp_path / "c.yaml", values)])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not readable as YAML"), ("- a\n- b", "must be lines of the form"), ("a: 1\na: 2", "duplicate key a")],
)
def test_broken_file(tmp_path, text, message):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(LoraConfig, [str(tmp_path / "broken.yaml")])
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest(lora):
    with pytest.raises(ConfigError, match=r"no such file; nearest: 'lora\.yaml'"):
        load_config(LoraConfig, [lora.replace("lora.yaml", "lorra.yaml")])


def test_main_prints_one_line_and_exits_with_2(lora):
    program = (
        "import sys; from stable_cascade.config import *\n"
        "run_main(lambda: load_config(LoraConfig))"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, lora, "--rank", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: command line: rank: 0 must be at least 1\n"


@pytest.mark.parametrize("cls", TRAINERS)
def test_every_key_has_its_line(cls, capsys):
    lines, text = documentation(cls), help_text(cls)
    for key in cls.__dataclass_fields__:
        assert lines[key].endswith((".", "`.")), key
        assert "\n" not in lines[key]
        assert f"  --{key}  " in text
    with pytest.raises(SystemExit) as caught:
        load_config(cls, ["--help"])
    assert caught.value.code == 0
    assert "--config" in capsys.readouterr().out


def test_reference_page_has_every_key_once_per_section():
    page = reference(TRAINERS)
    for cls in TRAINERS:
        for key in cls.__dataclass_fields__:
            assert f"| `{key}` |" in page
    assert page.count("| `experiment_id` |") == 1


@dataclass
class OneMore(TrainingSettings):
    """A config with one key of its own."""

    sharpness: float | None = setting(0.5, above=0, at_most=1, resume="free", card=False)
    """How sharp."""
    odd: int = setting(1, check=lambda value: None if value % 2 else "must be odd", at_least=1)
    """A number."""
    folder: str | None = setting(None, path=True)
    """A folder."""


def test_a_new_key_is_one_field(monkeypatch, tmp_path):
    required = ["--experiment_id=a", "--checkpoint_path=r", "--output_path=o", "--updates=1", "--batch_size=1"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(OneMore, [*required, "--folder=~/x"]).folder == str(tmp_path / "x")
    for argument, message in [
        ("--sharpness=0", "sharpness: 0.0 must lie in (0, 1]"),
        ("--odd=2", "odd: 2 must be odd"),
        ("--odd=0", "odd: 0 must be at least 1"),
        ("--sharpness=x", "sharpness takes number in (0, 1]"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(OneMore, [*required, argument])
        assert message in str(caught.value)
    assert "  --sharpness  number in (0, 1]  (default 0.5)\n      How sharp." in help_text(OneMore)
    assert "| `sharpness` | number in (0, 1] | (default 0.5) | How sharp. | yes |" in reference([OneMore])
    assert keys_where([OneMore], resume="free", card=False) >= {"sharpness", "save_every"}
    assert not keys_where([OneMore], resume="free") & {"odd", "lr"}
