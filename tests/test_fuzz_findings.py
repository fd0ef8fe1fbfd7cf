"""What damaged input has broken once: each of these was a crash, a hang, gigabytes, or a message that said nothing."""

from __future__ import annotations

import io
import json
import resource
import time
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stable_cascade import StableCascadeControlNet, StableCascadePipeline, StableCascadePreviewer, StableCascadePrior
from stable_cascade.adapters import load_lora, read_learned_embeds
from stable_cascade.adapters.injection import tuner_layers
from stable_cascade.cli.main import main
from stable_cascade.config import DecoderConfig, load_config
from stable_cascade.controls import make_filter
from stable_cascade.data.images import decode_image
from stable_cascade.files import describe, from_original
from stable_cascade.files.json_files import check_sizes, read_config
from stable_cascade.wording import brief, quoted
from tests.fuzzing_folders import sound_folder
from tests.fuzzing_headers import file_of
from tests.fuzzing_images import bomb
from tests.tiny_cascade import PRIOR, tiny_parts, tiny_prior

PREVIEWER = {"in_channels": 4, "hidden_channels": 4, "out_channels": 3}


def refused(call, *words: str) -> str:
    """The message of a ValueError, checked: one printable line, quick, and with these words in it."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    assert all(word in message for word in words), message
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
    return message


def test_a_type_of_a_megabyte_is_not_quoted(tmp_path):
    header = json.dumps({"w": {"dtype": "F" * 10**6, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "long.safetensors").write_bytes(file_of(header, bytes(4)))
    call = lambda: StableCascadePreviewer.from_single_file(tmp_path / "long.safetensors", config=PREVIEWER)  # noqa: E731
    refused(call, "long.safetensors' is damaged in its header: tensor 'w'")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "x" * 1000, "", "\u202egnp"])
def test_names_that_nobody_could_print(tmp_path, name):
    save_file({name: torch.zeros(1)}, tmp_path / "names.safetensors")
    call = lambda: StableCascadePreviewer.from_single_file(tmp_path / "names.safetensors", config=PREVIEWER)  # noqa: E731
    refused(call, "names.safetensors", "names have 1 to 300 printable characters")
    refused(lambda: describe(tmp_path / "names.safetensors"), "names.safetensors")


def test_whole_numbers_for_weights():
    weights = {name: value.long() for name, value in tiny_prior().to_original().items()}
    message = refused(lambda: StableCascadePrior.from_single_file(weights, config=PRIOR), "state dict", "is int64")
    assert "bfloat16" in message


def test_a_joined_weight_without_rows():
    for value in (torch.zeros(()), torch.zeros(0, 4)):
        refused(lambda value=value: from_original({"a.attention.attn.in_proj_bias": value}, "prior"), "has 0 rows")


def test_two_names_for_one_weight():
    weights = {"clip_mapper.bias": torch.zeros(1), "clip_txt_pooled_mapper.bias": torch.zeros(1)}
    refused(lambda: from_original(weights, "decoder"), "under another name too; remove one of them")


@pytest.mark.parametrize(
    "text", ["null", "[", "3", '{"config": 3}', '{"config": {"blocks": [1000000000]}}', "[" * 10**5]
)
def test_descriptions_of_controlnets(tmp_path, text):
    path = tmp_path / "control.safetensors"
    save_file({"projections.0.0.weight": torch.zeros(1)}, path, {"stable_cascade_controlnet": text})
    refused(lambda: StableCascadeControlNet.from_single_file(path), "control.safetensors")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("vqgan/config.json", {"num_vq_embeddings": 10**12}),
        ("vqgan/config.json", {"bottleneck_blocks": 10**6}),
        ("prior/config.json", {"down_num_layers_per_block": [10**9, 1]}),
        ("prior/config.json", {"block_out_channels": "many"}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("semantic_encoder/config.json", {"image_mean": None}),
        ("scheduler/scheduler_config.json", {"shift": {}}),
        ("tokenizer/tokenizer_config.json", {"bos_token": []}),
        ("model_index.json", None),
    ],
)
def test_configs_of_folders(tmp_path, file, changes):
    """Sizes that nobody could build took all memory; everything else was an error of some library's own."""
    name = file.split("/")[0]
    for entry in sound_folder().iterdir():
        if entry.name != name:
            (tmp_path / entry.name).symlink_to(entry)
    if changes is None:
        (tmp_path / file).write_text("[" * 10**5)
    else:
        (tmp_path / name).mkdir()
        for entry in (sound_folder() / name).iterdir():
            (tmp_path / name / entry.name).write_bytes(entry.read_bytes())
        values = json.loads((tmp_path / file).read_text()) | changes
        (tmp_path / file).write_text(json.dumps(values))
    given = {key: part for key, part in tiny_parts().items() if key != name}
    refused(lambda: StableCascadePipeline.from_pretrained(tmp_path, **given), name)


@pytest.mark.parametrize("name", ["image_encoder", "text_encoder", "prior"])
def test_a_network_without_its_config(tmp_path, name):
    """transformers builds its own default then, with hundreds of megabytes, before the weights do not fit."""
    for entry in sound_folder().iterdir():
        if entry.name != name:
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / name).mkdir()
    for entry in (sound_folder() / name).glob("*.safetensors"):
        (tmp_path / name / entry.name).symlink_to(entry)
    given = {key: part for key, part in tiny_parts().items() if key != name}
    refused(lambda: StableCascadePipeline.from_pretrained(tmp_path, **given), f"{name}'", "it has no config.json")


def test_configs_nest_and_list_within_bounds(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' * 30 + "1" + "}" * 30)
    refused(lambda: read_config(tmp_path / "config.json"), "config.json", "nested")
    refused(lambda: check_sizes({"widths": [1] * 2000}, "it"), "'widths' holds 2,000 entries")
    check_sizes({"vocab_size": 49408, "blocks": [0, 4, 63], "nested": {"list": [[1, 2], "x", None]}}, "it")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({}, "are none"),
        ({"[fox]": torch.zeros(3, 8)}, "(3, 8) float32 for '[fox]'; one row"),
        ({"[fox]": torch.zeros(8, dtype=torch.int64)}, "int64"),
        ({"[fox]": torch.full((8,), float("nan"))}, "not finite"),
        ({"clip_g": torch.zeros(2, 8)}, "do not name their token"),
    ],
)
def test_learned_tokens(tmp_path, rows, words):
    save_file(rows, tmp_path / "embeds.safetensors")
    refused(lambda: read_learned_embeds(tmp_path / "embeds.safetensors"), "embeds.safetensors", words)
    (tmp_path / "embeds.safetensors").write_bytes(b"\0" * 50)
    refused(lambda: read_learned_embeds(tmp_path / "embeds.safetensors"), "embeds.safetensors")


def test_small_files_of_large_images():
    """Some kilobytes took more than a gigabyte."""
    refused(lambda: decode_image(bomb(100_001, 1000, 0, 1)), "100001 x 1000 pixels are more than 64,000,000")


def test_images_that_another_program_would_read():
    """Pillow starts Ghostscript for PostScript."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    refused(lambda: decode_image(file.getvalue()), "cannot decode: UnidentifiedImageError")


@pytest.mark.parametrize(
    ("name", "params", "shape", "words"),
    [
        ("SoftEdgeFilter", {"resize": 100_000}, (1, 3, 8, 8),
         "resize is 100000; allowed: a whole number from 8 to 8192"),
        ("QRFilter", {"dilation_kernels": [100_001]}, (1, 3, 8, 8), "odd numbers up to 127"),
        ("SoftEdgeFilter", {}, (1, 3, 1, 20_000), "up to 100 times as long as wide, this one is 1 x 20000"),
        ("CannyFilter", {"resize": None}, (1, 3, 0, 8), "at least one pixel; got (1, 3, 0, 8)"),
        ("SoftEdgeFilter", {}, (0, 3, 8, 8), "at least one image"),
        ("x" * 10**5, {}, (1, 3, 8, 8), "is unknown"),
    ],
)  # fmt: skip
def test_filters(name, params, shape, words):
    refused(lambda: make_filter(name, params)(torch.zeros(shape), None), words)


def test_the_gradient_of_an_image_of_more_than_sixteen_megapixels():
    """torch.quantile takes no more than that."""
    from stable_cascade.controls.edges import _quantile

    values = torch.arange(2**24 + 2, dtype=torch.float32) / 2**24
    assert _quantile(values, 0.98) == pytest.approx(0.98, abs=1e-5)
    assert _quantile(values[:1000], 0.5) == float(values[:1000].quantile(0.5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: ${", "not readable as YAML"),
        ("lr: " + "9" * 400, "lr"),
        ("lr: " + "9" * 5000, "lr"),
        ("a: &x [b]\nc: &y [*x, *y]", "a part of it contains itself"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)),
         "more than 100,000 entries"),
        ("a: " + "x" * 2**20, "at most 1,048,576 are read"),
    ],
)  # fmt: skip
def test_configs(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    refused(lambda: load_config(DecoderConfig, [str(tmp_path / "config.yaml")]), "config.yaml", words)


def test_pickles_that_unpack(tmp_path):
    """A hundred kilobytes held a hundred million instructions, which took minutes."""
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"(" * 10**7)
    for call in (describe, lambda path: load_lora(tiny_prior(), path)):
        refused(lambda call=call: call(tmp_path / "packed.pt"), "packed.pt' has the compressed entry", "data.pkl")


def test_a_sound_pickle_is_read(tmp_path):
    model = StableCascadePreviewer(**PREVIEWER).eval()
    torch.save({"state_dict": model.to_original()}, tmp_path / "previewer.pt")
    with pytest.warns(UserWarning, match="pickle"):
        again = StableCascadePreviewer.from_single_file(tmp_path / "previewer.pt", config=PREVIEWER)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_vision_encoder_without_its_first_layer(tmp_path):
    save_file({"clip_l_vision.vision_model.post_layernorm.bias": torch.zeros(8)}, tmp_path / "clip.safetensors")
    assert describe(tmp_path / "clip.safetensors").component == "image_encoder"


PAIR = {"weights.0.lora_down": torch.zeros(2, 16), "weights.0.lora_up": torch.zeros(16, 2)}
LAYER = "prior.down_blocks.0.2.attention.to_q"
PEFT = {f"{LAYER}.lora_A.weight": torch.ones(2, 16), f"{LAYER}.lora_B.weight": torch.ones(16, 2)}


@pytest.mark.parametrize(
    "tensors",
    [
        {**PAIR, "weights.0.lora_down": torch.zeros(32)},
        {**PAIR, "embeddings.indices": torch.tensor([1])},
        {**PEFT, f"{LAYER}.lora_A.weight": torch.full((2, 16), float("nan"))},
        {**PEFT, f"{LAYER}.alpha": torch.tensor(float("inf"))},
        {**PEFT, f"{LAYER}.lora_A.weight": torch.zeros(0, 16), f"{LAYER}.lora_B.weight": torch.zeros(16, 0)},
        {**PEFT, f"{LAYER}.lora_B.weight": torch.ones(16, 3)},
        {**PEFT, f"{LAYER}.lora_A.weight": torch.ones(2, 16, dtype=torch.int64)},
        {f"{LAYER}.lora_magnitude_vector": torch.ones(16)},
        {"prior.a\nb.lora_A.weight": torch.zeros(2, 16), "prior.a\nb.lora_B.weight": torch.zeros(16, 2)},
    ],
)
def test_lora_files(tmp_path, tensors):
    """Refused before anything changes: no adapter is left in the network."""
    prior = tiny_prior()
    save_file(tensors, tmp_path / "odd.safetensors")
    refused(lambda: load_lora(prior, tmp_path / "odd.safetensors"), "odd.safetensors")
    assert not tuner_layers(prior)
    assert not getattr(prior, "peft_config", {})


def test_an_image_given_as_a_lora_is_called_an_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    refused(lambda: load_lora(tiny_prior(), tmp_path / "photo.png"), "photo.png' is a PNG image, no weights")


@pytest.mark.parametrize(
    "words", [("inspect", "x" * 5000), ("generate", "a", "--width", "9" * 3000), ("inspect", "a\nb")]
)
def test_commands_answer_in_one_line(capsys, words):
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stable-cascade {words[0]}: error: ")
    assert last.isprintable()
    assert len(last) < 500


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("  two \n lines\t", "two lines"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\ud800", "\\ud800"),
        ("\u202egnp", "\\u202egnp"),
        (ValueError("reason"), "reason"),
        ("日本語", "日本語"),
        (7, "7"),
    ],
)
def test_what_is_quoted(value, shown):
    assert brief(value) == shown
    assert quoted(value) == f"'{shown}'"


def test_long_text_keeps_its_ends():
    for text in ("a" * 50 + "b" * 10**6 + "c" * 50, "a" * 200 + "c" * 200):
        line = brief(text, 60)
        assert len(line) == 60
        assert line.startswith("aaaa")
        assert line.endswith("cccc")
        assert "…" in line
