"""The drawing commands: PNG files that are drawn again bit by bit, JSON for scripts, one line for every mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from stable_cascade.cli.drawing import drawings_of
from stable_cascade.cli.drawing_options import parse_choice
from stable_cascade.cli.main import main, make_parser
from stable_cascade.drawing import ControlChoice, Drawing, Drawn, InputFile, LoraChoice, read_drawing, save_image
from tests.drawing_parts import checkered, half_mask, make_controlnet, make_lora, png_of_size, same, saved

FAST = ("--steps", "2", "--decoder-steps", "1")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Commands run in an empty folder, with a photo."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    return tmp_path


def run(capsys, *words):
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def drawn(capsys, *words):
    """What `--json` says."""
    status, out, err = run(capsys, *words, *(FAST[2:] if words[0] == "reconstruct" else FAST), "--json")
    assert status == 0, err
    return json.loads(out)


def refused(capsys, *words):
    """The one line of an error, which `--json` prints too; nothing was written."""
    status, out, err = run(capsys, *words, "--json")
    assert status == 2
    error = json.loads(out)["error"]
    assert list(json.loads(out)) == ["error"]
    assert "\n" not in error
    assert error in err
    assert not list(Path().glob("outputs/*.png"))
    return error


def asked(*words):
    """The drawings that a command would make."""
    return drawings_of(vars(make_parser().parse_args([str(word) for word in words])))


def images(said):
    return [Image.open(image["path"]) for image in said["images"]]


def test_generate_writes_an_image_per_seed_and_prompt_and_a_sheet(capsys):
    words = ("generate", "red apple, flat style", "panda", "--count", 2, "--seed", 3, "--sheet", "sheet.png")
    said = drawn(capsys, *words, "--live", "live.png")
    names = [Path(image["path"]).name for image in said["images"]]
    assert names == ["00003-red-apple-flat-style.png", "00004-red-apple-flat-style.png", "00003-panda.png",
                     "00004-panda.png"]  # fmt: skip
    assert [image["seed"] for image in said["images"]] == [3, 4, 3, 4]
    assert all(image["seconds"] > 0 for image in said["images"])
    assert said["images"][0]["settings"] == read_drawing(said["images"][0]["path"]).to_json()
    assert Image.open(said["sheet"]).size == (128, 128)
    assert Image.open("live.png").size == (48, 48)
    assert same(Image.open(said["sheet"]).crop((0, 0, 64, 64)), images(said)[0])

    # The second image again, by its seed; nothing is overwritten.
    again = drawn(capsys, "generate", "panda", "--seed", 4)
    assert Path(again["images"][0]["path"]).name == "00004-panda-2.png"
    assert same(images(again)[0], images(said)[3])


def plans(folder):
    """Command lines of every kind, on files with relative names."""
    make_lora(folder / "my_lora.safetensors")
    make_controlnet(folder / "cn")
    half_mask(folder)
    control = ("--controlnet", "cn:0.8:0:0.9")
    return {
        "generate": ("generate", "red apple", "--guidance-interval", 0.2, 0.9, "--sampler", "ddim", "--shift", 1.5),
        "lora": ("generate", "red (apple:1.3)", "--weighted", "--lora", "my_lora.safetensors:0.5", "--negative", "x"),
        "variation": ("variation", "--image", "photo.png:0.5", "--image", "mask.png"),
        "img2img": (
            "img2img",
            "panda",
            "--image",
            "photo.png",
            "--strength",
            0.5,
            "--reference",
            "mask.png",
            *control,
        ),
        "inpaint": ("inpaint", "panda", "--image", "photo.png", "--mask", "mask.png", "--height", 72),
        "outpaint": ("inpaint", "panda", "--image", "photo.png", "--outpaint", "16,0,16,8"),
        "control": ("control", "panda", *control, "--image", "photo.png", "--show-control", "edges.png"),
        "reconstruct": ("reconstruct", "photo.png", "mask.png", "--prompt", "squares"),
        "preview": ("generate", "red apple", "--preview"),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("lora", "img2img", "inpaint", "control"),
        pytest.param(("generate", "variation", "outpaint", "reconstruct", "preview"), marks=pytest.mark.slow),
    ],
)
def test_an_image_is_drawn_again_bit_by_bit(capsys, here, names):
    seen = set()
    for name in names:
        words = plans(here)[name]
        said = drawn(capsys, *words, "--seed", 11)
        first = said["images"][0]
        assert str(here) not in Path(first["path"]).read_bytes().decode("latin-1"), name
        status, out, err = run(capsys, words[0], "--from-image", first["path"])
        assert status == 0, err
        again = Image.open(out.split("  ")[0].strip())
        assert same(again, images(said)[0]), name
        seen.add(again.tobytes())
    assert len(seen) == len(names)


def test_options_beside_from_image_change_what_they_name(capsys, here):
    words = plans(here)["lora"]
    path = drawn(capsys, *words)["images"][0]["path"]
    known = read_drawing(path)
    status, out, _ = run(capsys, "generate", "--from-image", path, "--seed", 5, "--no-lora", "--no-weighted")
    assert status == 0
    changed = read_drawing(out.strip())
    assert (changed.seed, changed.loras, changed.weighted) == (5, (), False)
    differing = {name for name, value in changed.to_json().items() if value != known.to_json()[name]}
    assert differing == {"seed", "loras", "weighted"}
    (other,) = asked("generate", "panda", "--from-image", path)
    assert other == replace(known, prompt="panda")


def test_a_changed_or_missing_file_is_named(capsys, here):
    path = drawn(capsys, *plans(here)["lora"])["images"][0]["path"]
    make_lora(here / "my_lora.safetensors", seed=1)
    status, _, err = run(capsys, "generate", "--from-image", path)
    assert status == 2
    assert "lora 'my_lora.safetensors' is not the file that the image was drawn with" in err
    assert run(capsys, "generate", "--from-image", path, "--allow-changed-files")[0] == 0
    (here / "my_lora.safetensors").unlink()
    status, _, err = run(capsys, "generate", "--from-image", path, "--allow-changed-files")
    assert "lora 'my_lora.safetensors' does not exist" in err
    status, _, err = run(capsys, "img2img", "--from-image", path)
    assert "was drawn by generate; run: stable-cascade generate --from-image" in err


def test_reconstruct_says_how_near_it_is(capsys):
    said = drawn(capsys, "reconstruct", "photo.png", "--sheet", "sheet.png")
    assert Path(said["images"][0]["path"]).name == "00000-photo.png"
    assert 0 < said["images"][0]["psnr"] < 60
    assert same(Image.open(said["sheet"]).crop((0, 0, 64, 64)), checkered())
    status, out, _ = run(capsys, "reconstruct", "photo.png", *FAST[2:])
    assert status == 0
    assert out.strip().endswith(f"PSNR {said['images'][0]['psnr']:.1f} dB")


def test_every_option_reaches_its_setting():
    words = (
        "img2img", "red apple", "--model", "m", "--lite", "--variant", "bf16", "--dtype", "float16",
        "--negative", "no", "--weighted", "--seed", 5, "--height", 72, "--width", 80, "--steps", 3, "--guidance", 2.5,
        "--decoder-steps", 4, "--decoder-guidance", 1.5, "--rescale", 0.1, "--guidance-interval", 0.2, 0.8,
        "--sampler", "lcm", "--shift", 1.5, "--strength", 0.4, "--preview", "--lora", "a", "--lora", "b:0.5",
        "--image", "p.png", "--reference", "r.png:0.7", "--reference", "s.png", "--controlnet", "c:0.5:0.1:0.9",
        "--controlnet", "d", "--control-image", "e.png", "--control-image", "f.png", "--filtered",
        "--filter", "CannyFilter", "--cache-interval", 3,
    )  # fmt: skip
    (drawing,) = asked(*words)
    assert drawing == Drawing(
        task="img2img", prompt="red apple", model="m", lite=True, variant="bf16", dtype="float16",
        negative_prompt="no", weighted=True, seed=5, height=72, width=80, prior_num_inference_steps=3,
        prior_guidance_scale=2.5, num_inference_steps=4, decoder_guidance_scale=1.5, guidance_rescale=0.1,
        guidance_interval=(0.2, 0.8), sampler="lcm", shift=1.5, strength=0.4, preview=True, cache_interval=3,
        loras=(LoraChoice("a"), LoraChoice("b", 0.5)), image=InputFile("p.png"),
        images=(InputFile("r.png"), InputFile("s.png")), image_weights=(0.7, 1.0),
        controlnets=(ControlChoice("c", InputFile("e.png"), 0.5, 0.1, 0.9, True, "CannyFilter"),
                     ControlChoice("d", InputFile("f.png"), filtered=True, filter="CannyFilter")),
    )  # fmt: skip
    (drawing,) = asked("inpaint", "--image", "p.png", "--outpaint", "8,0,16,0")
    assert (drawing.outpaint, drawing.image, drawing.mask_image) == ((8, 0, 16, 0), InputFile("p.png"), None)
    (drawing,) = asked("control", "--controlnet", "c", "--controlnet", "d", "--image", "p.png")
    assert [choice.image for choice in drawing.controlnets] == [InputFile("p.png")] * 2


def test_prompts_come_from_a_file(here):
    (here / "prompts.txt").write_text("red apple\n\n  panda  \n", encoding="utf-8")
    assert [one.prompt for one in asked("generate", "--prompts-file", "prompts.txt")] == ["red apple", "panda"]


def test_mistakes_are_one_line_before_the_model_is_loaded(capsys, here):
    (here / "empty.txt").write_text("\n \n")
    (here / "text.png").write_text("this is no image")
    (here / "cut.png").write_bytes((here / "photo.png").read_bytes()[:-60])
    (here / "huge.png").write_bytes(png_of_size(10_000, 10_000))
    (here / "notes.safetensors").write_text("no weights")
    make_lora(here / "a.safetensors")
    make_controlnet(here / "cn")
    (here / "network.safetensors").write_bytes(
        (here / "cn/controlnet/diffusion_pytorch_model.safetensors").read_bytes()
    )
    for said, *words in (
        ("no prompt is given; give PROMPT", "generate"),
        ("--prompts-file 'empty.txt' has no prompt; write one per line", "generate", "--prompts-file", "empty.txt"),
        ("'none.txt' does not exist", "generate", "--prompts-file", "none.txt"),
        ("PROMPT and --prompts-file are both given", "generate", "x", "--prompts-file", "empty.txt"),
        ("width 0 is not a multiple of 8 from 64", "generate", "x", "--width", "0"),
        ("count 0 is not a whole number", "generate", "x", "--count", "0"),
        ("lora 'none' does not exist", "generate", "x", "--lora", "none:0.5"),
        ("'notes.safetensors' is damaged or no safetensors file", "generate", "x", "--lora", "notes.safetensors"),
        ("'text.png' is damaged or no safetensors file", "generate", "x", "--lora", "text.png"),
        ("'photo.png' is a PNG image, no weights", "generate", "x", "--lora", "photo.png"),
        ("'network.safetensors' is the ControlNet", "generate", "x", "--lora", "network.safetensors"),
        ("has no path before the colon", "generate", "x", "--lora", ":0.5"),
        ("task img2img needs an image and none is known", "img2img", "x"),
        ("image 'none.png' does not exist", "img2img", "x", "--image", "none.png"),
        ("image 'text.png' is no image that can be read", "img2img", "x", "--image", "text.png"),
        ("is 10000 x 10000, 100 megapixels; at most 64 are read", "img2img", "x", "--image", "huge.png"),
        ("image 'cut.png' is damaged", "img2img", "x", "--image", "cut.png"),
        ("strength 2.0 is not a number from 0 to 1", "img2img", "x", "--image", "photo.png", "--strength", "2"),
        ("task inpaint needs a mask", "inpaint", "x", "--image", "photo.png"),
        ("--outpaint 1,2 is not LEFT,TOP", "inpaint", "x", "--image", "photo.png", "--outpaint", "1,2"),
        ("task control needs a ControlNet", "control", "x"),
        ("no ControlNet; add --controlnet", "control", "x", "--image", "photo.png"),
        ("has no image to look at", "control", "x", "--controlnet", "cn"),
        ("controlnet '.' has no config.json", "control", "x", "--controlnet", ".", "--image", "photo.png"),
        ("has 3 channels, its ControlNet takes 1", "control", "x", "--controlnet", "cn", "--image", "photo.png",
         "--filtered"),
        ("wants the filter 'CanyFilter', which is not one of", "control", "x", "--controlnet", "cn", "--image",
         "photo.png", "--filter", "CanyFilter"),
        ("task variation needs reference images", "variation"),
        ("no image is given; name FILE", "reconstruct"),
        ("carries no settings", "generate", "--from-image", "photo.png"),
        ("ends in no .png", "generate", "x", "--sheet", "sheet.txt"),
        ("cannot be a folder: it is a file", "generate", "x", "--output", "empty.txt"),
        ("'new.jpg': images are PNG files", "generate", "x", "--output", "new.jpg"),
        ("is no folder and no Hub name", "generate", "x", "--model", "nowhere"),
        ("invalid choice: 'euler'", "generate", "x", "--sampler", "euler"),
        ("argument --seed: invalid int value: 'one'", "generate", "x", "--seed", "one"),
        ("--live shows Stage C, which reconstruct does not run", "reconstruct", "photo.png", "--live", "live.png"),
    ):  # fmt: skip
        assert said in refused(capsys, *words)


def test_a_lora_of_another_size_names_both(capsys, here):
    make_lora(here / "wide.safetensors", width=2048)
    assert "was trained for a prior of width 2048 (3.6B)" in refused(
        capsys, "generate", "x", "--lora", "wide.safetensors"
    )


def test_an_image_with_a_credential_asks_for_it_again(capsys):
    path = save_image(Drawn(checkered(), Drawing(prompt="apple with token=abcdef")), "secret.png")
    assert b"abcdef" not in path.read_bytes()
    status, _, err = run(capsys, "generate", "--from-image", path)
    assert status == 2
    assert "does not hold its prompt, which had a credential in it; give it again" in err
    (other,) = asked("generate", "red apple", "--from-image", path)
    assert other.prompt == "red apple"


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("my_lora", 1, ("my_lora", [])),
        ("my_lora:0.8", 1, ("my_lora", [0.8])),
        ("photo.png:0.8", 1, ("photo.png", [0.8])),
        ("C:\\loras\\x", 1, ("C:\\loras\\x", [])),
        ("cn:0.5:0:0.25", 3, ("cn", [0.5, 0.0, 0.25])),
        ("cn:1:2:3:4", 3, ("cn:1", [2.0, 3.0, 4.0])),
        ("photo:1", 1, ("photo:1", [])),
    ],
)
def test_numbers_behind_a_path(here, text, most, expected):
    (here / "photo:1").touch()
    assert parse_choice(text, "--lora", most) == expected


def test_output_names_the_image(tmp_path, monkeypatch):
    """One image gets the name, several a number each, and none that is there is overwritten."""
    from stable_cascade.cli import drawing

    def save(drawn, path):
        path.write_text(drawn)
        return path

    monkeypatch.setattr("stable_cascade.drawing.png.save_image", save)
    wanted = tmp_path / "deep/apple.png"
    drawing.check_targets({"output": wanted})
    assert drawing.new_path(wanted, "a", None) == wanted
    assert drawing.new_path(wanted, "b", None).name == "apple-2.png"
    assert [drawing.new_path(wanted, "c", number).name for number in range(2)] == ["apple-0.png", "apple-1.png"]
    assert wanted.read_text() == "a"
