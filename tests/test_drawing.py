"""Drawings: checked settings, images within bounds, and PNG files that say how they were drawn."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_cascade.drawing import (
    ControlChoice,
    Drawing,
    Drawn,
    InputFile,
    LoraChoice,
    read_drawing,
    read_image,
    read_record,
    save_image,
)
from stable_cascade.drawing.files import decibels
from stable_cascade.drawing.png import describe, parameters, slug
from stable_cascade.drawing.request import STRENGTHS
from tests.drawing_parts import checkered, png_of_size, same, saved

SUM = "0" * 64
FULL = Drawing(
    task="inpaint", prompt="red apple", negative_prompt="blurry", weighted=True, seed=7, height=64, width=128,
    prior_num_inference_steps=3, prior_guidance_scale=2.5, num_inference_steps=2, decoder_guidance_scale=1.0,
    guidance_method="apg", guidance_rescale=0.5, guidance_interval=(0.1, 0.9), cache_interval=2, sampler="ddim",
    guide_prior="small", shift=1.5, strength=0.5,
    loras=(LoraChoice("my_lora", 0.8, SUM),), image=InputFile("photo.png", SUM), mask_image=InputFile("mask.png"),
    images=(InputFile("a.png"), InputFile("b.png")), image_weights=(1.0, 0.5), preview=True, variant="bf16",
    controlnets=(ControlChoice("canny", InputFile("photo.png"), 0.7, 0.0, 0.6, True, "CannyFilter", SUM),),
)  # fmt: skip


# Settings


def test_a_drawing_goes_through_json():
    assert Drawing.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    assert Drawing.from_json({}) == Drawing()
    values = FULL.to_json()
    assert all(values[field.name] != Drawing().to_json()[field.name] for field in fields(Drawing)
               if field.name not in ("model", "lite", "dtype", "outpaint"))  # fmt: skip


def test_a_list_is_kept_as_the_pair_that_comes_back_from_json():
    drawing = Drawing(guidance_interval=[0.2, 1.0])
    assert drawing == Drawing(guidance_interval=(0.2, 1.0)) == Drawing.from_json(drawing.to_json())


def test_its_lists_are_those_of_the_parts_below():
    from stable_cascade.pipelines import source

    assert STRENGTHS == {"img2img": source.STRENGTH, "inpaint": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "paint"}, "task 'paint' is not one of generate, variation"),
        ({"width": 0}, "width 0 is not a multiple of 8 from 64 to 8192; nearest: 64"),
        ({"height": 100}, "height 100 is not a multiple of 8 from 64 to 8192; nearest: 96"),
        ({"height": True}, "height True is not a multiple of 8"),
        ({"width": 10**6}, "nearest: 8192"),
        ({"width": 10**400}, "nearest: 8192"),
        ({"shift": 10**400}, "is not a number from 0.01"),
        ({"seed": -1}, "seed -1 is not a whole number from 0"),
        ({"seed": 1.5}, "seed 1.5 is not a whole number"),
        ({"prior_num_inference_steps": 0}, "prior_num_inference_steps 0 is not a whole number from 1 to 1000"),
        ({"prior_guidance_scale": float("nan")}, "prior_guidance_scale nan is not a number from 0"),
        ({"guidance_rescale": 2}, "guidance_rescale 2 is not a number from 0 to 1"),
        ({"cache_interval": 0}, "cache_interval 0 is not"),
        ({"guidance_interval": (0.8, 0.2)}, "the first must not be above the second"),
        ({"guidance_interval": 1}, "guidance_interval 1 is not two numbers"),
        ({"sampler": "euler"}, "sampler 'euler' is not one of ddpm, ddim, "),
        ({"shift": 0}, "shift 0 is not a number from 0.01"),
        ({"strength": 1.01}, "strength 1.01 is not a number from 0 to 1"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32"),
        ({"model": ""}, "model is empty"),
        ({"prompt": None}, "prompt None is a NoneType; expected str"),
        ({"prompt": "x" * 20_001}, "prompt has 20,001 characters; at most 20,000"),
        ({"prompt": "a\0b"}, "prompt holds a zero character"),
        ({"prompt": "a\ud800"}, "prompt holds half a character at place 1"),
        ({"model": "a\0b"}, "is no path"),
        ({"model": "a" * 5000}, "is no path, of at most 4096 characters"),
        ({"weighted": 1}, "weighted 1 is a int; expected bool"),
        ({"loras": ("my_lora",)}, "loras 'my_lora' is a str; expected LoraChoice"),
        ({"loras": [LoraChoice("a")]}, "loras is not a tuple"),
        ({"loras": (LoraChoice("a"), LoraChoice("a", 2))}, "loras name 'a' twice"),
        ({"image": "photo.png"}, "image 'photo.png' is a str; expected InputFile"),
        ({"image_weights": (1, "x")}, "image_weights 'x' is not a number"),
        ({"outpaint": (8, 8, 8)}, "outpaint (8, 8, 8) is not left, top, right, bottom"),
        ({"outpaint": (0, 0, 0, 0)}, "adds nothing"),
        ({"outpaint": (8, 0, 0, 0), "mask_image": InputFile("m.png")}, "mask_image and outpaint are both given"),
    ],
)
def test_a_setting_that_means_nothing_is_one_line(changes, said):
    with pytest.raises(ValueError) as caught:
        Drawing(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "drawing is a list; expected an object"),
        ({"prompts": "x"}, "unknown setting 'prompts'; nearest: 'prompt'"),
        ({"loras": "my_lora"}, "loras is not a list of at most 64 entries"),
        ({"loras": [{"weight": 1}]}, "loras has an entry without a path"),
        ({"loras": [{"path": "a", "sha256": "12"}]}, "is not a SHA-256 sum"),
        ({"loras": [{"path": "a"}] * 65}, "at most 64 entries"),
        ({"image": "photo.png"}, "image is a str; expected an object"),
        ({"controlnets": [{"path": "c", "image": {"file": "x"}}]}, "unknown setting 'file'"),
        ({"controlnets": [{"path": "c", "end": 7}]}, "controlnet start and end 7 is not a number from 0 to 1"),
        ({"seed": "a\n\x1b[31m" * 99}, "is not a whole number"),
    ],
)
def test_json_from_elsewhere_is_refused_in_one_line(values, said):
    with pytest.raises(ValueError) as caught:
        Drawing.from_json(values)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


# Image files


def test_an_image_is_read_as_it_is(tmp_path):
    assert same(read_image(saved(tmp_path)), checkered())
    assert same(read_image((tmp_path / "photo.png").read_bytes()), checkered())


def test_an_image_is_upright_and_on_paper(tmp_path):
    turned, path = checkered(64, 32), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[274] = 6
    turned.save(path, exif=exif)
    assert read_image(path).size == (32, 64)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(path)
    assert read_image(path).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(path, mode="L", paper="black").getpixel((0, 0)) == 0
    assert read_image(path, mode=None).mode == "RGBA"


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(path)
    assert read_image(path).getpixel((0, 0)) == (128, 128, 128)
    assert read_image(path, mode=None).mode == "L"


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path, caplog):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)
    assert "is an animation; its first frame is taken" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png_of_size(10_000, 10_000), "is 10000 x 10000, 100 megapixels; at most 64 are read"),
        (png_of_size(60_000, 60_000), "has more than 64 megapixels"),
        (png_of_size(64, 64), "is damaged"),
        (b"\x89PNG\r\n\x1a\nbroken", "is no image that can be read; give one of PNG, JPEG"),
        (b"just a text", "is no image that can be read"),
        (b"", "is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is no image that can be read"),
    ],
    ids=["100 megapixels", "a bomb", "no pixels", "no PNG", "a text", "nothing", "EPS"],
)
def test_what_is_no_image_is_one_line(tmp_path, content, said):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ValueError) as caught:
            read_image(source)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_cut_short_is_one_line(tmp_path):
    path = tmp_path / "photo.jpg"
    checkered(640, 640).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"photo\.jpg' is damaged: .*truncated"):
        read_image(path)


def test_an_image_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give an image file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a folder; give an image file"):
        read_image(tmp_path)


def test_a_large_image_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png_of_size(10_000, 10_000))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="100 megapixels"):
        read_image(path)


# What a PNG says about itself


def test_decibels_of_two_images():
    grey, lighter = (Image.new("RGB", (64, 64), (level,) * 3) for level in (100, 110))
    assert decibels(grey, lighter) == pytest.approx(20 * np.log10(255 / 10))
    assert decibels(grey, lighter.resize((32, 32))) == pytest.approx(20 * np.log10(255 / 10))
    assert decibels(grey, grey) == pytest.approx(120)


def drawn(**settings):
    return Drawn(checkered(), replace(FULL, **settings), 1.0, {"stable_cascade": "0.1.0", "torch": "2"})


def test_an_image_carries_its_settings(tmp_path):
    path = save_image(drawn(prompt="Ein Äpfel 苹果\n(two lines)"), tmp_path / "a.png")
    record = read_record(path)
    assert record.drawing == replace(FULL, prompt="Ein Äpfel 苹果\n(two lines)")
    assert record.made_with["torch"] == "2"
    assert read_drawing(path) == record.drawing
    with Image.open(path) as image:
        assert same(image.convert("RGB"), checkered())
        readable = image.info["parameters"]
    assert readable.startswith(
        "Ein Äpfel 苹果\n(two lines)\nNegative prompt: blurry\nSteps: 3+2, CFG scale: 2.5, Seed: 7"
    )
    assert "LoRA: my_lora:0.8" in readable


def test_an_image_is_never_overwritten(tmp_path):
    path = save_image(drawn(), tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists; images are never overwritten"):
        save_image(drawn(seed=8), path)
    assert path.read_bytes() == before


def test_names_of_images():
    assert slug("Red apple, (flat:1.2) style!") == "red-apple-flat-1-2-style"
    assert slug("Äpfel: ../../etc/passwd") == "apfel-etc-passwd"
    assert slug("a" * 99) == "a" * 40
    assert slug("one two " * 9) == "one-two-one-two-one-two-one-two-one-two"
    assert slug("苹果") == ""


def test_credentials_are_not_written_and_the_record_says_so(tmp_path):
    secret = "https://user:pass@host/x?signature=abcdef"
    path = save_image(drawn(model="hf_abcdefghijklmnopqrstuvwxyz", loras=(LoraChoice(secret),)), tmp_path / "a.png")
    data = path.read_bytes()
    assert not [word for word in (b"pass@", b"abcdef", b"hf_abc") if word in data]
    assert set(read_record(path).redacted) == {"model", "loras"}
    assert read_record(save_image(drawn(), tmp_path / "b.png")).redacted == ()


def test_the_record_holds_no_path_that_was_not_given():
    text = json.dumps(describe(FULL, {})) + parameters(FULL, {})
    assert "/" not in text.replace("0.7/", "")


def with_chunk(path, text, key="stable_cascade"):
    info = PngInfo()
    info.add_text(key, text)
    checkered(8, 8).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "its settings are damaged, they are no JSON"),
        ("[" * 100_000, "its settings are damaged, they are no JSON"),
        ("[]", "they are no JSON object"),
        ('{"format": 99, "drawing": {}}', "its settings have format 99, this version reads 1"),
        ('{"format": 1, "drawing": {"promt": 1}}', "unknown setting 'promt'; nearest: 'prompt'"),
        ('{"format": 1, "drawing": {"seed": 1e999}}', "seed inf is not a whole number"),
        ('{"format": 1, "drawing": {}, "redacted": ["x"]}', "'redacted' is no list of settings"),
        ('{"format": 1, "drawing": {}, "made_with": 3}', "they are no JSON object"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, text, said):
    with pytest.raises(ValueError) as caught:
        read_record(with_chunk(tmp_path / "a.png", text))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_what_carries_no_record_is_one_line(tmp_path):
    checkered().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="is no PNG; settings are kept in PNG files only"):
        read_record(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="carries no settings"):
        read_record(saved(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        read_record(tmp_path / "none.png")
    with pytest.raises(ValueError, match="carries no settings"):
        read_record(with_chunk(tmp_path / "long.png", "x" * (2**20 + 1)))
    path = save_image(drawn(), tmp_path / "b.png")
    data = bytearray(path.read_bytes())
    data[data.index(b"red apple")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a checksum before the pixels is wrong"):
        read_record(path)
