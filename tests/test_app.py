"""The page without a browser: what its widgets ask for, what it refuses, how it draws, stops and remembers."""

import asyncio
import socket
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stable_cascade.app.actions import Known, settings_of, wish
from stable_cascade.app.form import (
    FIELDS,
    OWN_FILTER,
    Form,
    History,
    chosen,
    controlnet_paths,
    lora_files,
    name_of,
    read_form,
    values_of,
    with_newest,
)
from stable_cascade.app.options import PageSettings, is_loopback
from stable_cascade.app.serving import OPEN_TO_OTHERS, Guard, address, bound
from stable_cascade.app.studio import Run, Step, Stopped, Studio
from stable_cascade.app.uploads import check_payload, drawn_mask, read_settings, read_upload
from stable_cascade.cli.main import main
from stable_cascade.drawing import Drawing, Drawn, Session, read_drawing, save_image
from stable_cascade.drawing.files import decibels
from stable_cascade.drawing.request import STRENGTHS

QUICK = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "new_seed": False}


def emoji(size=(64, 64), colour="tomato"):
    image = Image.new("RGB", size, "lightblue")
    ImageDraw.Draw(image).ellipse((size[0] // 5, size[1] // 5, size[0] * 4 // 5, size[1] * 4 // 5), colour)
    return image


def read(path, mode="RGB"):
    return read_upload(path, mode=mode, largest=32)


@pytest.fixture
def photo(tmp_path):
    emoji().save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def known(tmp_path):
    """One LoRA and one ControlNet to choose; that they can be loaded is checked by the session, not by the form."""
    (tmp_path / "loras" / "style").mkdir(parents=True)
    for name in ("flat.safetensors", "style/pytorch_lora_weights.safetensors"):
        (tmp_path / "loras" / name).write_bytes(b"")
    (tmp_path / "canny").mkdir()
    return Known(read, lora_files(tmp_path / "loras"), controlnet_paths([tmp_path / "canny"]), ("CannyFilter",))


@pytest.fixture
def edited(tmp_path, photo):
    """An image in the editor with a square drawn over it, and one with nothing."""
    layer = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    layer.save(tmp_path / "nothing.png")
    ImageDraw.Draw(layer).rectangle((8, 16, 23, 47), (255, 45, 149, 255))
    ImageDraw.Draw(layer).rectangle((40, 40, 50, 50), (255, 45, 149, 90))
    layer.save(tmp_path / "layer.png")
    value = {"background": photo, "layers": [str(tmp_path / "layer.png")], "composite": None}
    return value, {**value, "layers": [str(tmp_path / "nothing.png")]}


@pytest.fixture(scope="module")
def session():
    return Session("embedded")


@pytest.fixture
def studio(session, tmp_path):
    return Studio(session, PageSettings(), tmp_path / "page")


# --- what it is started with


@pytest.mark.parametrize(
    "values, message",
    [
        ({"port": 70000}, "--port 70000"),
        ({"port": -1}, "--port -1"),
        ({"lora_dir": Path("nowhere")}, "--lora-dir 'nowhere'"),
        ({"controlnets": (Path("nowhere"),)}, "--controlnet 'nowhere'"),
        ({"max_upload_megapixels": 0.0}, "--max-upload-megapixels 0"),
        ({"max_upload_megapixels": float("nan")}, "--max-upload-megapixels nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        PageSettings(**values)
    assert "\n" not in str(caught.value)


def test_the_page_is_for_this_machine_unless_told_otherwise():
    assert PageSettings().only_this_machine
    assert PageSettings().host == "127.0.0.1"
    assert not PageSettings(host="0.0.0.0").only_this_machine
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"))
    assert not any(
        is_loopback(host) for host in ("", "0.0.0.0", "::", "192.168.1.2", "evil.example", "localhost.evil")
    )
    assert "no password" in OPEN_TO_OTHERS.format(host="0.0.0.0")


def test_bytes_of_an_upload_follow_from_its_megapixels():
    assert PageSettings(max_upload_megapixels=32).max_upload_bytes == 128_000_000
    assert PageSettings(max_upload_megapixels=0.01).max_upload_bytes == 4 * 2**20


# --- files to choose from


def test_loras_are_the_safetensors_of_the_folder_and_nothing_outside(tmp_path):
    folder, outside = tmp_path / "loras", tmp_path / "secret.safetensors"
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("z.safetensors", "a/x.safetensors", "a/b/pytorch_lora_weights.safetensors", "evil.pt", "a/notes.txt"):
        (folder / name).write_bytes(b"")
    (folder / "a" / "learned_embeds.safetensors").write_bytes(b"")
    outside.write_bytes(b"")
    (folder / "link.safetensors").symlink_to(outside)
    assert list(lora_files(folder)) == ["a/b", "a/x.safetensors", "z.safetensors"]
    assert lora_files(None) == {}


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "x", 3, ["flat.safetensors"]])
def test_a_name_that_is_not_offered_is_refused(known, name):
    with pytest.raises(ValueError, match="is not among the files the page was started with"):
        chosen("LoRA", name, known.loras)


def test_controlnets_have_names_that_tell_them_apart(tmp_path):
    paths = [tmp_path / "canny" / "final", tmp_path / "pose" / "final", tmp_path / "qr"]
    assert list(controlnet_paths(paths)) == ["canny/final", "pose/final", "qr"]


def test_a_lora_of_another_machine_is_found_by_its_name(known):
    assert name_of("/elsewhere/flat.safetensors", known.loras) == "flat.safetensors"
    assert name_of("/elsewhere/other.safetensors", known.loras) is None


# --- the form


def test_a_form_is_the_values_in_order():
    values = [getattr(Form(), name) for name in FIELDS]
    assert read_form(values) == Form()
    with pytest.raises(ValueError):
        read_form(values[:-1])


def test_what_nobody_changes_is_what_a_drawing_has(photo):
    known = Known(read)
    assert wish(Form(), known).drawing == Drawing()
    started = wish(Form(task="img2img", image=photo), known).drawing
    assert started.strength == STRENGTHS["img2img"]


def test_text_to_image_asks_for_what_the_widgets_say(known):
    form = Form(
        prompt="a (red:1.2) apple", negative_prompt="blue", weighted=True, width=128.0, height=64, seed=7, count=3,
        prior_num_inference_steps=12, prior_guidance_scale=3, num_inference_steps=6, sampler="ddim", shift=1.5,
        guidance_start=0.2, guidance_end=0.9, lora_2="flat.safetensors", lora_weight_2=0.5, lora_3="style",
    )  # fmt: skip
    asked = wish(form, known)
    drawing = asked.drawing
    assert asked.count == 3
    assert (drawing.width, drawing.height, drawing.seed, type(drawing.width)) == (128, 64, 7, int)
    assert (drawing.prompt, drawing.negative_prompt, drawing.weighted) == ("a (red:1.2) apple", "blue", True)
    assert (drawing.prior_num_inference_steps, drawing.num_inference_steps) == (12, 6)
    assert (drawing.sampler, drawing.shift, drawing.guidance_interval) == ("ddim", 1.5, (0.2, 0.9))
    assert [(Path(lora.path).name, lora.weight) for lora in drawing.loras] == [
        ("flat.safetensors", 0.5), ("pytorch_lora_weights.safetensors", 1.0)
    ]  # fmt: skip


def test_empty_sides_are_left_to_the_model(known):
    assert (wish(Form(), known).drawing.width, wish(Form(), known).drawing.height) == (None, None)


def test_each_task_takes_its_own_images(known, photo, edited):
    image = wish(Form(task="img2img", image=photo, strength=0.3, reconstructed=photo), known)
    assert (image.drawing.strength, image.images.image.size) == (0.3, (64, 64))
    assert image.drawing.image.path == "photo.png"
    assert len(image.drawing.image.sha256) == 64
    several = wish(Form(task="variation", reference_1=photo, reference_3=photo, reference_weight_3=0.5), known)
    assert several.drawing.image_weights == (1.0, 0.5)
    assert len(several.images.images) == 2
    painted = wish(Form(task="inpaint", edited=edited[0], inpaint_strength=0.8), known)
    assert painted.drawing.strength == 0.8
    assert painted.images.mask_image.getbbox() == (8, 16, 24, 48)
    form = Form(task="control", controlnet="canny", control_image=photo, control_filter="CannyFilter", control_end=0.5)
    controlled = wish(form, known)
    choice = controlled.drawing.controlnets[0]
    assert (Path(choice.path).name, choice.filter, choice.end) == ("canny", "CannyFilter", 0.5)
    assert len(controlled.images.control_images) == 1
    rebuilt = wish(
        Form(task="reconstruct", reconstructed=photo, prompt="x", count=5, lora_1="flat.safetensors"), known
    )
    assert (rebuilt.count, rebuilt.drawing.prompt, rebuilt.drawing.loras) == (1, "", ())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"height": 63}, "height 63 is not a multiple of 8"),
        ({"width": 10**6}, "width 1000000 is not a multiple of 8"),
        ({"width": "wide"}, "width 'wide' is not a number"),
        ({"seed": None}, "seed is empty and is not a number"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed '1.5' is not a whole number"),
        ({"count": 0}, "number of images 0"),
        ({"count": 1000}, "number of images 1000"),
        ({"prompt": ["a"]}, "is not text"),
        ({"prompt": "a" * 30000}, "prompt has 30,000 characters"),
        ({"task": "train"}, "task 'train' is not one of"),
        ({"sampler": "euler"}, "sampler 'euler' is not one of"),
        ({"shift": "much"}, "shift 'much' is not a number"),
        ({"prior_guidance_scale": float("nan")}, "guidance of Stage C 'nan' is not a number"),
        ({"guidance_start": 1.0, "guidance_end": 0.5}, "guidance_interval"),
        ({"lora_1": "flat.safetensors", "lora_weight_1": "strong"}, "weight of LoRA flat.safetensors 'strong'"),
        ({"lora_1": "flat.safetensors", "lora_2": "flat.safetensors"}, "twice"),
        ({"lora_1": "../flat.safetensors"}, "LoRA '../flat.safetensors' is not among the files"),
        ({"task": "img2img"}, "image-to-image needs an image"),
        ({"task": "variation"}, "variation needs an image"),
        ({"task": "inpaint"}, "inpaint needs an image"),
        ({"task": "reconstruct"}, "reconstruction needs an image"),
        ({"task": "control"}, "control needs a ControlNet"),
        ({"task": "control", "controlnet": "canny"}, "control needs an image"),
    ],
)
def test_a_value_that_means_nothing_is_one_line(known, values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        wish(Form(**values), known)
    assert "\n" not in str(caught.value)


def test_weights_of_images_are_numbers(known, photo):
    with pytest.raises(ValueError, match="weight of a reference image 'heavy' is not a number"):
        wish(Form(task="variation", reference_1=photo, reference_weight_1="heavy"), known)


def test_a_filter_that_is_not_offered_is_no_import(known, photo):
    """`package.module:Class` names any class; from a browser it is refused before anything is looked up."""
    form = Form(task="control", controlnet="canny", control_image=photo, control_filter="antigravity:fly")
    with pytest.raises(ValueError, match="control filter 'antigravity:fly' is not one of CannyFilter"):
        wish(form, known)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"width": 128, "height": 64, "seed": 2**40, "sampler": "lcm", "shift": 2.5, "weighted": True, "preview": True},
        {"lora_1": "flat.safetensors", "lora_weight_1": -0.5, "lora_4": "style", "negative_prompt": "x"},
        {"task": "img2img", "strength": 0.25},
        {"task": "variation", "reference_weight_1": 1.5},
        {"task": "control", "controlnet": "canny", "control_scale": 0.5, "control_start": 0.1, "control_end": 0.9},
    ],
)
def test_settings_that_come_back_ask_for_the_same_drawing(known, photo, values):
    files = {"image": photo, "reference_1": photo, "control_image": photo}
    drawing = wish(Form(**values, **files), known).drawing
    back, missing = settings_of(Drawing.from_json(drawing.to_json()), known)
    assert missing == []
    assert wish(Form(**back, **files), known).drawing == drawing


def test_what_cannot_be_restored_is_said(known, photo):
    form = Form(task="control", controlnet="canny", control_image=photo, lora_1="flat.safetensors")
    values, missing = settings_of(wish(form, known).drawing, Known(read))
    assert (values["controlnet"], values["lora_1"], values["control_filter"]) == ("none", "none", OWN_FILTER)
    assert missing == ["LoRA flat.safetensors is not in --lora-dir", "ControlNet canny is not among --controlnet"]
    values, missing = settings_of(replace(wish(form, known).drawing, cache_interval=2), known)
    assert (values["cache_interval"], missing) == (2, [])


# --- masks and uploads


def test_the_mask_is_what_covers_at_least_by_half(edited):
    background, mask = drawn_mask(edited[0], read)
    expected = np.zeros((64, 64), np.uint8)
    expected[16:48, 8:24] = 255  # the other square is too faint
    assert background.size == (64, 64)
    assert (np.asarray(mask) == expected).all()


def test_several_layers_are_one_mask(edited, tmp_path):
    second = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(second).rectangle((60, 60, 63, 63), "white")
    second.save(tmp_path / "second.png")
    value = {**edited[0], "layers": [*edited[0]["layers"], str(tmp_path / "second.png")]}
    assert drawn_mask(value, read)[1].getbbox() == (8, 16, 64, 64)


def test_an_empty_mask_and_an_empty_canvas_are_refused(edited):
    with pytest.raises(ValueError, match="the mask is empty"):
        drawn_mask(edited[1], read)
    with pytest.raises(ValueError, match="inpaint needs an image"):
        drawn_mask({**edited[0], "background": edited[1]["layers"][0]}, read)
    with pytest.raises(ValueError, match="inpaint needs an image"):
        drawn_mask(None, read)


def huge_png(path):
    """A PNG whose header says 10,000 x 10,000; it has no pixels."""
    data = bytearray()
    emoji().save(path)
    data += path.read_bytes()
    import zlib

    data[16:24] = (10_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def test_uploads_that_are_no_images_or_too_large_are_one_line(tmp_path):
    (tmp_path / "notes.png").write_text("these are notes")
    (tmp_path / "page.ps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    huge_png(tmp_path / "huge.png")
    for name, message in (("notes.png", "no image"), ("page.ps", "no image"), ("huge.png", "megapixels")):
        with pytest.raises(ValueError, match=message) as caught:
            read(str(tmp_path / name))
        assert f"'{name}'" in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'gone.png' is no longer there"):
        read(str(tmp_path / "gone.png"))


def test_settings_are_read_from_pngs_that_have_them(tmp_path, photo):
    deep = tmp_path / ("x" * 100) / "its photo.png"  # an upload lies in a folder with a long name
    deep.parent.mkdir()
    deep.write_bytes(Path(photo).read_bytes())
    with pytest.raises(ValueError, match=r"^image 'its photo\.png' carries no settings"):
        read_settings(str(deep))
    save_image(Drawn(emoji(), Drawing(prompt="red apple", seed=9)), tmp_path / "drawn.png")
    assert read_settings(str(tmp_path / "drawn.png")) == Drawing(prompt="red apple", seed=9)


@pytest.mark.parametrize(
    "payload",
    [
        {"path": "http://169.254.169.254/latest/meta-data", "meta": {"_type": "gradio.FileData"}},
        [1, {"layers": [{"path": "HTTPS://example.com/a.png"}]}],
        {"path": None, "url": "data:image/svg+xml;base64,AAAA"},
        {"path": "/etc/passwd"},
        {"background": {"path": "{folder}/../secret.png"}},
        {"path": 3},
    ],
)
def test_a_request_cannot_name_an_address_or_another_file(tmp_path, payload):
    folder = tmp_path / "page"
    folder.mkdir()
    if "background" in payload:
        payload = {"background": {"path": f"{folder}/../secret.png"}}
    with pytest.raises(ValueError, match="is not taken; upload it"):
        check_payload(["prompt", payload], folder)


def test_a_request_can_name_what_was_uploaded(tmp_path):
    file = {"path": str(tmp_path / "abc" / "photo.png"), "url": "http://127.0.0.1:7860/file=x", "orig_name": "p.png"}
    check_payload(["a prompt with https://example.com in it", {"background": file, "layers": [file]}, None], tmp_path)


# --- a drawing at work


def test_a_run_tells_steps_and_results_in_order():
    def work(on_step):
        for step in (1, 2):
            on_step("prior", step, 2, None)
        yield "image"

    news = list(Run(work).news())
    assert news[-1] == "image"
    assert [one.step for one in news if isinstance(one, Step)] in ([1, 2], [2])


def test_steps_that_nobody_looked_at_are_passed_over():
    done = threading.Event()

    def work(on_step):
        for step in range(1, 101):
            on_step("prior", step, 100, None)
        done.set()
        yield "image"

    news = Run(work).news()
    seen = [next(news)]
    done.wait(5)
    seen += list(news)
    assert len(seen) < 60
    assert seen[-1] == "image"
    assert seen[-2].step == 100


def test_a_stopped_run_ends_at_its_next_step():
    taken, go_on = [], threading.Event()

    def work(on_step):
        for step in range(1, 1000):
            on_step("prior", step, 1000, None)
            taken.append(step)
            go_on.wait(5)
        yield "never"

    run = Run(work)
    news = run.news()
    next(news)
    run.stop()
    go_on.set()
    with pytest.raises(Stopped):
        list(news)
    assert len(taken) == 1


def test_leaving_a_run_stops_it_and_waits():
    """Of a work that is faster than its reader, which must come to a word all the same."""
    most, taken, over = 10**6, [], threading.Event()

    def work(on_step):
        try:
            for step in range(1, most):
                on_step("prior", step, most, None)
                taken.append(step)
        finally:
            over.set()
        yield

    news = Run(work).news()
    next(news)
    news.close()
    assert over.is_set()
    assert len(taken) < most - 1


def test_an_error_of_the_work_reaches_the_reader():
    def work(on_step):
        yield "first"
        raise ValueError("height 63")

    news = Run(work).news()
    assert next(news) == "first"
    with pytest.raises(ValueError, match="height 63"):
        next(news)


# --- history


def test_the_history_keeps_pngs_that_carry_their_settings(tmp_path):
    history = History(tmp_path / "images")
    drawing = Drawing(prompt="Red apple, flat!", seed=5)
    name = history.keep(Drawn(emoji(), drawing), Form(prompt="Red apple, flat!", seed=3, count=4))
    entry = history.entry(name)
    assert name.startswith("red-apple-flat-5-")
    assert read_drawing(entry.path) == drawing
    values, notes = values_of(entry)
    assert (values["seed"], values["count"], values["new_seed"], notes) == (5, 1, False, [])
    assert with_newest([name], ["a-0123456789abcdef.png"]) == ["a-0123456789abcdef.png", name]


def test_names_that_a_browser_made_up_show_nothing(tmp_path):
    history = History(tmp_path / "images")
    name = history.keep(Drawn(emoji(), Drawing()), Form())
    made_up = ["../../etc/passwd", f"x-{'0' * 16}.png", 3, None, name]
    assert [entry.path.name for entry in history.entries(made_up)] == [name]
    assert history.entries("not a list") == []
    history.entry(name).path.unlink()
    assert history.entries([name]) == []
    with pytest.raises(ValueError, match="no longer there"):
        history.entry(name)


def test_lost_inputs_are_said_when_settings_come_back(tmp_path, photo):
    history = History(tmp_path / "images")
    kept = history.keep(Drawn(emoji(), Drawing(task="img2img")), Form(task="img2img", image=photo))
    assert values_of(history.entry(kept))[0]["image"] == photo
    Path(photo).unlink()
    values, notes = values_of(history.entry(kept))
    assert values["image"] is None
    assert notes == ["its input image is no longer there; upload it again"]


# --- the studio draws


def pixels(progress):
    return np.asarray(Image.open(progress.image))


def test_drawing_is_told_step_by_step_and_kept(studio):
    form = Form(prompt="red apple, flat style, on a light blue background", seed=3, count=2, **QUICK)
    told = list(studio.draw(form, "me"))
    lines = [progress.line for progress in told]
    assert any("Stage C · step" in line and "image 1 of 2" in line for line in lines)
    assert any(isinstance(progress.image, Image.Image) for progress in told)
    assert told[-1].finished == tuple(entry.path.name for entry in studio.history.entries(list(told[-1].finished)))
    assert [read_drawing(studio.history.entry(name).path).seed for name in told[-1].finished] == [3, 4]
    assert pixels(told[-1]).std() > 10
    assert "64 x 64" in lines[-1]


def test_stopping_leaves_the_session_as_it_was(studio):
    form = Form(prompt="red apple, flat style, on a light blue background", seed=3, **QUICK)
    before = pixels(list(studio.draw(form, "me"))[-1])
    drawing = studio.draw(replace(form, prior_num_inference_steps=60, count=16), "me")
    next(drawing)
    assert not studio.stop("somebody else")
    assert studio.stop("me")
    last = list(drawing)[-1]
    assert last.line.startswith("stopped · ")
    assert len(last.finished) < 16
    assert not studio.stop("me")
    assert (pixels(list(studio.draw(form, "me"))[-1]) == before).all()


def test_a_new_seed_is_shown(studio):
    told = list(studio.draw(Form(**{**QUICK, "new_seed": True}, preview=True, seed=1), "me"))
    assert told[-1].seed != 1
    assert read_drawing(told[-1].image).seed == told[-1].seed


def test_a_reconstruction_is_shown_beside_the_original(studio, photo):
    last = list(studio.draw(Form(task="reconstruct", reconstructed=photo, **QUICK), "me"))[-1]
    assert last.original.size == (64, 64)
    found = decibels(Image.open(last.image), last.original)
    assert f"PSNR {found:.1f} dB" in last.line
    assert found > 8


def test_the_control_image_follows_image_and_filter(studio, photo, tmp_path):
    assert studio.control_image(Form()) is None
    soft = studio.control_image(Form(control_image=photo, control_filter="SoftEdgeFilter"))
    assert soft.size == (64, 64)
    assert np.asarray(soft).std() > 10
    emoji((128, 64), "lightblue").save(tmp_path / "even.png")
    even = studio.control_image(Form(control_image=str(tmp_path / "even.png"), control_filter="SoftEdgeFilter"))
    assert np.asarray(even).max() < 20
    ready = studio.control_image(Form(control_image=photo, control_filter="SoftEdgeFilter", control_filtered=True))
    assert (np.asarray(ready) == np.asarray(emoji())).all()


def test_settings_come_back_from_history_and_file(studio, photo):
    form = Form(task="img2img", image=photo, prompt="red apple, flat style", seed=8, strength=0.4, **QUICK)
    last = list(studio.draw(form, "me"))[-1]
    values, notes, path = studio.restored(last.finished[0])
    assert Form(**values) == form
    assert (notes, path) == ([], last.image)
    values, notes = studio.restored_from(str(path))
    assert (values["task"], values["strength"], values["seed"]) == ("img2img", 0.4, 8)
    assert "image" not in values  # a file may say anything about where images lie
    assert notes == ["choose its input image again"]


# --- the guard


def asked(method, path, *, headers=(), only_this_machine=True, most_bytes=1000):
    """Status, headers and whether the guarded application was reached."""
    sent, reached = [], []

    async def application(scope, receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    guard = Guard(application, most_bytes=most_bytes, only_this_machine=only_this_machine)
    given = [(b"host", b"127.0.0.1:7860"), *headers]
    asyncio.run(guard({"type": "http", "method": method, "path": path, "headers": given}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), bool(reached)


LENGTH = ((b"content-length", b"10"),)


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", "/theme.css"),
        ("GET", "/assets/index.js"),
        ("GET", "/gradio_api/queue/data"),
        ("GET", "/gradio_api/file=/tmp/page/image.png"),
        ("GET", "/gradio_api/heartbeat/abc123"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/upload"),
    ],
)
def test_what_the_page_needs_gets_through_with_the_policy(method, path):
    status, headers, reached = asked(method, path, headers=LENGTH)
    assert (status, reached) == (200, True)
    assert b"connect-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/gradio_api/proxy=https://example.hf.space/x"),
        ("GET", "/gradio_api/file=https://example.com/x"),
        ("GET", "/gradio_api/file=HTTP://example.com/x"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/draw"),
        ("POST", "/login"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/docs"),
        ("PUT", "/gradio_api/upload"),
        ("DELETE", "/"),
    ],
)
def test_the_rest_of_gradio_is_not_there(method, path):
    status, _, reached = asked(method, path, headers=LENGTH)
    assert (status, reached) == (404, False)


def test_bodies_are_bounded():
    assert asked("POST", "/gradio_api/upload", headers=((b"content-length", b"1000"),))[0] == 200
    assert asked("POST", "/gradio_api/upload", headers=((b"content-length", b"1001"),))[0] == 413
    assert asked("POST", "/gradio_api/upload", headers=((b"content-length", b"1e3"),))[0] == 411
    assert asked("POST", "/gradio_api/upload")[0] == 411


def test_a_page_elsewhere_cannot_use_this_one_through_a_browser():
    async def answer():
        sent = []

        async def send(message):
            sent.append(message)

        guard = Guard(None, most_bytes=1, only_this_machine=True)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"evil.example:7860")]}
        await guard(scope, None, send)
        await guard({**scope, "headers": []}, None, send)
        await guard({"type": "websocket"}, None, send)
        return sent

    sent = asyncio.run(answer())
    assert [message.get("status") for message in sent] == [403, None, 403, None, None]
    assert sent[-1]["type"] == "websocket.close"
    other = ((b"host", b"evil.example"),)
    assert asked("GET", "/", headers=other, only_this_machine=False)[0] == 200


# --- the command


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"--port {port}: Address already in use; choose another" in lines[0]


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--port", "0"]) == 2
    assert "pip install 'stable-cascade[app]'" in capsys.readouterr().err


def test_a_wrong_folder_is_one_line(capsys):
    assert main(["app", "--lora-dir", "nowhere"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .endswith("--lora-dir 'nowhere' is no folder; give one with .safetensors files")
    )


def test_addresses():
    with bound("127.0.0.1", 0) as listening:
        assert address("127.0.0.1", listening) == f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert address("::1", listening).startswith("http://[::1]:")
    with pytest.raises(ValueError, match=r"--host 203\.0\.113\.1 --port 0"):
        bound("203.0.113.1", 0)
