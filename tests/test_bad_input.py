"""Bad input, through every door: the call, the command, the page's uploads. Each is one line that says what to do.

Every row is (what is wrong, what the message has to contain): the offending argument or file, its value, and what is
allowed. Rows of one kind of mistake stand together, so that the table reads as documentation.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stable_cascade import (
    StableCascadeControlNet,
    StableCascadeDecoder,
    StableCascadePipeline,
    StableCascadePreviewer,
    StableCascadePrior,
    StableCascadeVQGAN,
)
from stable_cascade.adapters import load_lora
from stable_cascade.cli.main import main
from stable_cascade.data.images import decode_image, image_size
from stable_cascade.drawing import Drawing, read_drawing, read_image
from stable_cascade.embedded import embedded_path
from stable_cascade.files import describe
from tests.drawing_parts import checkered, half_mask, make_controlnet, make_lora, png_of_size
from tests.fuzzing_images import bomb
from tests.tiny_cascade import tiny_parts
from tests.tiny_pipelines import cascade, reconstruction_pipeline, tiny_controlnet

MEGAPIXELS_100 = (10_000, 10_000)
WEIGHTS = Path(embedded_path()) / "previewer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with sound and unsound files of every kind."""
    folder = tmp_path_factory.mktemp("bad")
    checkered().save(folder / "photo.png")
    half_mask(folder)
    whole = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.png").write_bytes(whole[:60] + bytes([whole[60] ^ 64]) + whole[61:])
    (folder / "text.png").write_text("not an image")
    (folder / "huge.png").write_bytes(bomb(*MEGAPIXELS_100, colour=3, depth=1))
    (folder / "claims.png").write_bytes(png_of_size(2**31 - 1, 2**31 - 1))
    (folder / "image.safetensors").write_bytes(whole)
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "cut.safetensors").write_bytes(WEIGHTS.read_bytes()[:1000])
    (folder / "empty.txt").write_text("\n\n")
    (folder / "folder").mkdir()
    make_lora(folder / "lora.safetensors")
    make_lora(folder / "lora_3.6B.safetensors", width=2048)
    make_lora(folder / "lora_1B.safetensors", width=1536)
    make_lora(folder / "lora_77.safetensors", width=77)
    save_file({"unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(2, 2)}, folder / "half_lora.safetensors")
    make_controlnet(folder / "canny")
    make_controlnet(folder / "colours", channels=3, filter="SRPixelFilter")
    save_file(tiny_controlnet().to_original(), folder / "controlnet.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return cascade(controlnet=tiny_controlnet(1))


def refusal(call) -> str:
    """The message of the error that a call ends with."""
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def check(message: str, *words: str) -> None:
    assert len(message.splitlines()) == 1, message
    assert message.isprintable(), message
    assert len(message) < 500, message
    assert all(word in message for word in words), message


# --- the call

CALLS = {
    "empty prompt list": ({"prompt": []}, "prompt is an empty list; give at least one, '' for no text"),
    "no prompt at all": ({"prompt": None}, "prompt is missing; give prompt, or prompt_embeds"),
    "prompt of another kind": ({"prompt": 7}, "prompt is int; give a string or a list of strings"),
    "prompt list with a hole": ({"prompt": ["a", None]}, "prompt is list; give a string or a list of strings"),
    "empty negative list": ({"negative_prompt": []}, "negative_prompt is an empty list"),
    "too many negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
    "height 0": ({"height": 0}, "height 0 is not a multiple of 8 from 64 up; nearest: 64"),
    "width 0": ({"width": 0}, "width 0 is not a multiple of 8 from 64 up; nearest: 64"),
    "negative height": ({"height": -64}, "height -64 is not a multiple of 8 from 64 up; nearest: 64"),
    "odd width": ({"width": 100}, "width 100 is not a multiple of 8", "nearest: 96"),
    "width as text": ({"width": "64"}, "width '64' is not a multiple of 8"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps 0 is not a positive whole number"),
    "guidance that is no number": ({"prior_guidance_scale": float("nan")}, "guidance_scale nan is not a number"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt 0 is not a positive whole number"),
    "strength beyond 1": ({"image": "PHOTO", "strength": 1.5}, "strength 1.5 is outside [0, 1]"),
    "strength without an image": ({"strength": 0.5}, "strength is given without image"),
    "mask without an image": ({"mask_image": "MASK"}, "mask_image is given without image"),
    "mask of another size": ({"image": "PHOTO", "mask_image": "SMALL"}, "mask_image is 32 x 32", "image 64 x 64"),
    "image as text": ({"image": "photo.png"}, "image", "str"),
    "image of no size": ({"image": torch.zeros(3, 0, 64)}, "image"),
    "image that is too small": ({"image": torch.zeros(3, 8, 8)}, "image is 8 x 8", "64 is the smallest side"),
    "image with four channels": ({"image": torch.zeros(4, 64, 64)}, "image", "4"),
    "image of no numbers": ({"image": torch.full((3, 64, 64), float("nan"))},
                              "image has values from nan to nan", "[0, 1]"),
    "control image of 3 channels": ({"control_image": "PHOTO"}, "control_image has 3 channels", "takes 1", "filter"),
    "control tensor of 4 channels": ({"control_image": torch.zeros(4, 48, 48)}, "control_image has 4 channels",
                                     "takes 1"),
    "control image of no size": ({"control_image": torch.zeros(1, 0, 0)}, "control_image has no pixels"),
    "empty control list": ({"control_image": []}, "control_image is empty; give at least one image"),
    "control images for no image": ({"control_image": torch.zeros(2, 1, 48, 48)},
                                      "control_image has 2 rows for 1 images"),
    "generators for other images": ({"generator": []}, "generator is a list of 0 for 1 images"),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_calls(pipeline, what):
    images = {"PHOTO": checkered(), "MASK": Image.new("L", (64, 64)), "SMALL": Image.new("L", (32, 32))}
    arguments, *words = CALLS[what]
    given = {key: images.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()}
    check(refusal(lambda: pipeline(**{"prompt": "a fox", **given})), *words)


def test_control_image_without_a_controlnet():
    message = refusal(lambda: cascade()("a fox", control_image=checkered()))
    check(message, "control_image needs a controlnet, and this pipeline has none; load it with controlnet=")


def test_controlnet_of_another_prior():
    pipeline = cascade(controlnet=tiny_controlnet(1, projection_channels=24))
    message = refusal(lambda: pipeline("a fox", control_image=Image.new("L", (48, 48))))
    check(message, "controlnet is for a prior 24 wide, this one is 16 wide; load one trained for it")


def test_reconstruction():
    pipeline = reconstruction_pipeline()
    check(refusal(lambda: pipeline(checkered(), height=0)), "height 0 is not a multiple of 8 from 64 up")
    check(refusal(lambda: pipeline([])), "images")
    check(refusal(lambda: pipeline(checkered(), [])), "prompt is an empty list; give at least one")
    check(refusal(lambda: pipeline("photo.png")), "images", "str")


# --- files given to the call

FILES = {
    "an image as a prior": (lambda file: StableCascadePrior.from_single_file(file("image.safetensors")),
                             "image.safetensors' is a PNG image, no weights"),
    "a web page as a decoder": (lambda file: StableCascadeDecoder.from_single_file(file("page.safetensors")),
                                "page.safetensors' is a web page", "download the file itself"),
    "a previewer as a prior": (lambda file: StableCascadePrior.from_single_file(WEIGHTS),
                               "diffusion_pytorch_model.safetensors': this is the previewer", "not the prior"),
    "a LoRA as a VQGAN": (lambda file: StableCascadeVQGAN.from_single_file(file("lora.safetensors")),
                          "lora.safetensors': this is a LoRA in peft format, rank 2", "not the VQGAN (Stage A)"),
    "half a file": (lambda file: StableCascadePreviewer.from_single_file(file("cut.safetensors")),
                    "cut.safetensors' is damaged"),
    "no file": (lambda file: StableCascadePrior.from_single_file(file("none.safetensors")),
                "none.safetensors' does not exist"),
    "a folder as a file": (lambda file: StableCascadePrior.from_single_file(file("folder")), "folder' is a folder"),
    "a file as a pipeline": (lambda file: StableCascadePipeline.from_pretrained(file("lora.safetensors")),
                             "lora.safetensors' is"),
    "an empty folder as a pipeline": (lambda file: StableCascadePipeline.from_pretrained(file("folder")), "folder'"),
    "a network as a LoRA": (lambda file: cascade().load_lora_weights(WEIGHTS), "diffusion_pytorch_model.safetensors'",
                            "lora_A.weight"),
    "an image as a LoRA": (lambda file: cascade().load_lora_weights(file("photo.png")),
                            "photo.png' is a PNG image"),
    "half a LoRA": (lambda file: cascade().load_lora_weights(file("half_lora.safetensors")),
                    "half_lora.safetensors' has 'unet.down_blocks.0.to_q.lora_A.weight' and lacks its lora_B"),
    "a LoRA as learned tokens": (lambda file: cascade().load_textual_inversion(file("lora.safetensors")),
                                 "lora.safetensors"),
    "a LoRA of the 3.6B": (lambda file: embedded_lora(file("lora_3.6B.safetensors")), "lora_3.6B.safetensors",
                           "was trained for a prior of width 2048 (3.6B); this one has width 128 (embedded)"),
    "a LoRA of the 1B": (lambda file: embedded_lora(file("lora_1B.safetensors")), "lora_1B.safetensors",
                         "was trained for a prior of width 1536 (1B); this one has width 128 (embedded)"),
    "a LoRA of no known size": (lambda file: embedded_lora(file("lora_77.safetensors")), "lora_77.safetensors",
                                "was trained for a prior of width 77; this one has width 128 (embedded)"),
    "a LoRA as a ControlNet": (lambda file: StableCascadeControlNet.from_single_file(file("lora.safetensors")),
                               "lora.safetensors': this is a LoRA in peft format", "not the ControlNet; give it to"),
    "an image cut short": (lambda file: read_image(file("cut.png")), "cut.png' is damaged", "another copy"),
    "an image with a wrong bit": (lambda file: read_image(file("flipped.png")), "flipped.png' is damaged"),
    "text as an image": (lambda file: read_image(file("text.png")), "text.png' is no image that can be read",
                          "PNG"),
    "weights as an image": (lambda file: read_image(WEIGHTS), "diffusion_pytorch_model.safetensors' is no image"),
    "100 megapixels": (lambda file: read_image(file("huge.png")), "huge.png' is 10000 x 10000", "at most 64",
                       "shrink it first"),
    "quintillions of pixels": (lambda file: read_image(file("claims.png")),
                               "claims.png' has more than 64 megapixels"),
    "a photo that nobody drew": (lambda file: read_drawing(file("photo.png")), "photo.png' carries no settings"),
    "an image inspected": (lambda file: describe(file("photo.png")), "photo.png' is a PNG image, no weights"),
    "half a file inspected": (lambda file: describe(file("cut.safetensors")), "cut.safetensors' is damaged"),
}  # fmt: skip


def embedded_lora(path):
    with torch.device("meta"):
        prior = StableCascadePrior.from_config(StableCascadePrior.load_config(embedded_path(), subfolder="prior"))
    load_lora(prior, path)


@pytest.mark.parametrize("what", FILES)
def test_files(place, what):
    call, *words = FILES[what]
    check(refusal(lambda: call(lambda name: place / name)), *words)


def test_images_of_a_training(place):
    """They have no name there; the shard's sample is named by what reads it."""
    for name, words in {
        "cut.png": "cannot decode",
        "flipped.png": "cannot decode",
        "text.png": "cannot decode: UnidentifiedImageError",
        "huge.png": "10000 x 10000 pixels are more than 64,000,000; shrink the image",
        "claims.png": "cannot decode",
    }.items():
        check(refusal(lambda name=name: decode_image((place / name).read_bytes())), words)
    check(refusal(lambda: image_size((place / "text.png").read_bytes())), "no readable image")


# --- the command

COMMANDS = {
    "size 0": ("generate a --height 0", "height 0 is not a multiple of 8 from 64 to 8192; nearest: 64"),
    "width 0": ("img2img a --image photo.png --width 0", "width 0 is not a multiple of 8 from 64 to 8192"),
    "no prompt": ("generate", "no prompt is given; give PROMPT, '' for none, or --prompts-file"),
    "no prompts in a file": ("generate --prompts-file empty.txt", "--prompts-file 'empty.txt' has no prompt"),
    "an image of prompts": ("generate --prompts-file photo.png", "'photo.png' is neither UTF-8 nor UTF-16"),
    "no steps": ("generate a --steps 0", "prior_num_inference_steps 0 is not a whole number from 1 to 1000"),
    "no images": ("generate a --count 0", "count 0 is not a whole number from 1 to 10000"),
    "a LoRA of the 3.6B": ("generate a --lora lora_3.6B.safetensors",
                           "lora_3.6B.safetensors' was trained for a prior of "
                           "width 2048 (3.6B); this one has width 128 (embedded)"),
    "a network as a LoRA": ("generate a --lora WEIGHTS", "diffusion_pytorch_model.safetensors' is the previewer",
                            "give a LoRA's file"),
    "an image as a LoRA": ("generate a --lora photo.png", "photo.png' is a PNG image"),
    "a LoRA as a model": ("generate a --model lora.safetensors", "lora.safetensors"),
    "an image as a model": ("generate a --model photo.png", "photo.png"),
    "a folder without a model": ("generate a --model folder", "folder"),
    "control image of 3 channels": ("control a --controlnet canny --image photo.png --filtered",
                                      "control image for 'canny' has 3 channels, its ControlNet takes 1", "filter"),
    "control image of 1 channel": ("control a --controlnet colours --image mask.png --filtered",
                                     "has 1 channels, its ControlNet takes 3"),
    "a LoRA as a ControlNet": ("control a --controlnet lora.safetensors --image photo.png", "lora.safetensors"),
    "no control image": ("control a --controlnet canny", "canny", "has no image to look at; give it one"),
    "an image cut short": ("img2img a --image cut.png", "image 'cut.png' is damaged", "another copy"),
    "an image with a wrong bit": ("reconstruct flipped.png", "image 'flipped.png' is damaged"),
    "a mask cut short": ("inpaint a --image photo.png --mask cut.png", "image 'cut.png' is damaged"),
    "a reference cut short": ("variation --image cut.png", "image 'cut.png' is damaged"),
    "a control image cut short": ("control a --controlnet canny --image cut.png", "image 'cut.png' is damaged"),
    "text as an image": ("img2img a --image text.png",
                          "image 'text.png' is no image that can be read; give one of PNG"),
    "100 megapixels": ("img2img a --image huge.png",
                       "image 'huge.png' is 10000 x 10000, 100 megapixels; at most 64"),
    "100 megapixels of mask": ("inpaint a --image photo.png --mask huge.png", "huge.png", "100 megapixels"),
    "100 megapixels rebuilt": ("reconstruct huge.png", "huge.png", "100 megapixels"),
    "quintillions of pixels": ("reconstruct claims.png", "claims.png", "megapixels"),
    "no image": ("img2img a --image none.png", "none.png' does not exist; give"),
    "a photo that nobody drew": ("generate --from-image photo.png", "photo.png' carries no settings"),
    "weights drawn again": ("generate --from-image WEIGHTS", "is no PNG; settings are kept in PNG files only"),
    "an image inspected": ("inspect photo.png", "photo.png' is a PNG image, no weights"),
    "a web page inspected": ("inspect page.safetensors", "page.safetensors' is a web page"),
    "half a file inspected": ("inspect cut.safetensors", "cut.safetensors' is damaged"),
    "nothing inspected": ("inspect none.safetensors", "none.safetensors' does not exist"),
    "an image converted": ("convert photo.png out.safetensors --to kohya", "photo.png' is a PNG image, no weights"),
    "a LoRA converted to no format": ("convert lora.safetensors out.safetensors --to kohia", "kohia",
                                      "nearest: 'kohya'"),
    "half a LoRA converted": ("convert half_lora.safetensors out.safetensors --to kohya", "half_lora.safetensors"),
    "half a file converted": ("convert cut.safetensors out.safetensors --to original", "cut.safetensors' is damaged"),
    "no folder of images": ("prepare none shards", "none"),
}  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
def test_commands(place, monkeypatch, capsys, what):
    """Exit status 2 and one line; nothing is drawn or written."""
    monkeypatch.chdir(place)
    command, *words = COMMANDS[what]
    before = {path.name for path in place.iterdir()}
    assert main([str(WEIGHTS) if word == "WEIGHTS" else word for word in command.split()]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    line = printed.err.splitlines()[-1]
    assert line.startswith(f"stable-cascade {command.split()[0]}: error: ")
    assert "Traceback" not in printed.err
    check(line, *words)
    assert {path.name for path in place.iterdir()} - before <= {"outputs", "shards"}
    assert not list(place.glob("outputs/*"))


def test_json_tells_the_error(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["reconstruct", "cut.png", "--json"]) == 2
    assert "image 'cut.png' is damaged" in json.loads(capsys.readouterr().out)["error"]


def test_prepare_counts_broken_images(place, tmp_path, capsys):
    """Broken images among good ones are left out and counted; too many of them are an error."""
    source = tmp_path / "images"
    source.mkdir()
    for number in range(4):
        checkered(shift=number).save(source / f"{number}.png")
    for name in ("cut.png", "text.png", "huge.png", "claims.png"):
        (source / name).write_bytes((place / name).read_bytes())
    words = ["prepare", str(source), str(tmp_path / "shards"), "--allow-missing-captions"]
    assert main([*words, "--max-broken-share", "0.6"]) == 0
    told = capsys.readouterr()
    assert "4" in told.out
    assert main([*words, "--overwrite"]) == 2
    check(capsys.readouterr().err.splitlines()[-1], "broken", "max_broken_share 0.1")


# --- the page

UPLOADS = {
    "cut.png": ("image 'cut.png' is damaged", "another copy"),
    "flipped.png": ("image 'flipped.png' is damaged",),
    "text.png": ("image 'text.png' is no image that can be read; give one of PNG",),
    "huge.png": ("image 'huge.png' is 10000 x 10000, 100 megapixels; at most 32 are read, shrink it first",),
    "claims.png": ("image 'claims.png' has more than 32 megapixels; shrink it first",),
    "lora.safetensors": ("image 'lora.safetensors' is no image",),
    "none.png": ("image 'none.png' is no longer there; upload it again",),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads(place, name):
    """An upload is named as its owner knows it, not by where it lies."""
    from stable_cascade.app.uploads import read_upload

    message = refusal(lambda: read_upload(str(place / name), largest=32))
    check(message, *UPLOADS[name])
    assert str(place) not in message


DRAWINGS = {
    "size 0": ({"height": 0}, "height 0 is not a multiple of 8 from 64 to 8192; nearest: 64"),
    "no task": ({"task": "paint"}, "task 'paint' is not one of generate, variation"),
    "a prompt list": ({"prompt": []}, "prompt [] is a list; expected str"),
    "no model": ({"model": ""}, "model is empty; give a file, a folder or a name"),
}


@pytest.mark.parametrize("what", DRAWINGS)
def test_drawings(what):
    settings, *words = DRAWINGS[what]
    check(refusal(lambda: Drawing(**settings)), *words)


def test_a_refused_lora_leaves_the_pipeline_as_it_was(place):
    """What was refused changes nothing: the same image as before, bit by bit, and another LoRA still loads."""
    pipeline = cascade(**tiny_parts())  # its own networks: they keep the LoRA that fits

    def draw() -> torch.Tensor:
        steps = {"prior_num_inference_steps": 1, "num_inference_steps": 1, "output_type": "pt"}
        return pipeline("a fox", generator=torch.Generator().manual_seed(0), **steps).images

    before = draw()
    for name in ("lora_3.6B.safetensors", "half_lora.safetensors", "photo.png", "cut.safetensors"):
        refusal(lambda name=name: pipeline.load_lora_weights(place / name))
    assert torch.equal(draw(), before)
    make_lora(place / "fits.safetensors", width=16)
    pipeline.load_lora_weights(place / "fits.safetensors")
    (place / "fits.safetensors").unlink()
    assert not torch.equal(draw(), before)
