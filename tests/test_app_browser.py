"""The page in headless Chromium: what is typed, pressed, uploaded and drawn, and what is seen of it.

Nothing may leave this machine: neither the browser's requests nor the server's connections.
"""

import io
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stable_cascade.drawing import read_drawing
from tests.drawing_parts import make_controlnet, make_lora

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.xdist_group("browser"),  # one server and one browser, where xdist distributes by group
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (the extra 'app')"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed (the extra 'test')"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"),
]
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip
ROOT = Path(__file__).parents[1]
# The command, with a note of every host that it looks up or connects to.
SERVER = """
import json, sys

notes = open(sys.argv[1], "a", buffering=1)


def note(event, arguments):
    if event == "socket.getaddrinfo":
        print(json.dumps(str(arguments[0])), file=notes)
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        print(json.dumps(str(arguments[1][0])), file=notes)


sys.addaudithook(note)
from stable_cascade.cli.main import main

sys.exit(main(sys.argv[2:]))
"""
APPLE = "red apple, flat style, on a light blue background"
PANDA = "panda, noto style, on a yellow background"


def is_local(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    circle((64, 64), "tomato").save(folder / "circle.png")
    circle((64, 64), "tomato", place=(4, 4, 30, 30)).save(folder / "small.png")
    (folder / "notes.txt").write_text("these are notes")
    (folder / "notes.png").write_text("these are notes, called an image")
    (folder / "loras").mkdir()
    make_lora(folder / "loras" / "strong.safetensors")
    make_controlnet(folder / "canny")
    return folder


@pytest.fixture(scope="module")
def connections(tmp_path_factory):
    """A file that lists every host that the server connects to or looks up, one JSON string a line."""
    return tmp_path_factory.mktemp("server") / "connections.jsonl"


@contextmanager
def served(connections, folder, *arguments, end=signal.SIGINT):
    """The address of the real command, in a process of its own, which leaves nothing behind when it ends."""
    command = [sys.executable, "-c", SERVER, connections, "app", "--port", "0", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline()).group()
            assert list(folder.glob("stable-cascade-page-*"))
            process.send_signal(end)
            rest, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, rest) == (0, "")
    assert list(folder.glob("stable-cascade-page-*")) == []


@pytest.fixture(scope="module")
def url(files, connections):
    options = ("--lora-dir", files / "loras", "--controlnet", files / "canny", "--max-upload-megapixels", "1")
    with served(connections, connections.parent, *options) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, url):
    """A browser that has never been here, with the page open; afterwards: it asked nobody else."""
    context = chromium.new_context(viewport={"width": 1360, "height": 1300})
    context.set_default_timeout(60_000)
    opened, asked, said = context.new_page(), [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: said.append(message.text))
    opened.goto(url)
    opened.get_by_role("button", name="Draw", exact=True).wait_for()
    opened.get_by_label("a new seed for every drawing").uncheck()
    yield opened
    others = [
        one for one in asked if urlsplit(one).scheme in ("http", "https") and not is_local(urlsplit(one).hostname)
    ]
    assert len(asked) > 5
    assert others == []
    assert [text for text in said if "Content Security Policy" in text] == []  # nor would it have, if it were let
    assert "Traceback" not in opened.content()
    context.close()


def circle(size, colour, place=None):
    image = Image.new("RGB", size, "lightblue")
    ImageDraw.Draw(image).ellipse(place or (12, 12, 52, 52), colour)
    return image


def line(page):
    return page.locator("#line").inner_text()


def draw(page):
    """Presses, waits, and gives the image that is then seen."""
    before = page.locator("#history img").count()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#line p:not(.busy)", has_text=" s").wait_for()
    page.locator("#history img").nth(before).wait_for()
    for _ in range(100):  # until the last rough image has given way to the finished one, which carries its settings
        image = seen(page, "drawn")
        if getattr(Image.open(io.BytesIO(image)), "text", None):
            return image
        page.wait_for_timeout(100)
    raise AssertionError("the rough image never gave way to the finished one")


def seen(page, name):
    """The file behind an image on the page."""
    source = page.locator(f"#{name} img").get_attribute("src")
    answer = page.request.get(source)
    assert answer.ok
    return answer.body()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def upload(page, name, path):
    page.locator(f"#{name} input[type=file]").first.set_input_files(path)
    page.locator(f"#{name} img").wait_for()


def message(page):
    """The message that is shown, which then is closed."""
    toast = page.get_by_test_id("toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    page.get_by_test_id("toast-close").first.click()
    toast.wait_for(state="detached")
    return text


def test_a_prompt_becomes_an_image_and_another_prompt_another(page, tmp_path):
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    apple = draw(page)
    assert pixels(apple).shape == (64, 64, 3)
    assert pixels(apple).std() > 20
    page.get_by_label("Prompt", exact=True).fill(PANDA)
    panda = draw(page)
    assert pixels(panda).std() > 20
    assert np.abs(pixels(apple) - pixels(panda)).mean() > 20
    # What is downloaded is the file with its settings.
    with page.expect_download() as download:
        page.locator("#drawn").get_by_label("Download").click()
    download.value.save_as(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes() == panda
    assert (read_drawing(tmp_path / "drawn.png").prompt, read_drawing(tmp_path / "drawn.png").seed) == (PANDA, 0)
    # The history brings settings and image back.
    page.locator("#seed input").fill("77")
    page.locator("#history button img").nth(1).click()
    page.get_by_text("settings restored").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == APPLE
    assert page.locator("#seed input").input_value() == "0"
    assert seen(page, "drawn") == apple
    assert (pixels(draw(page)) == pixels(apple)).all()
    # It outlives the page in the browser, and a file dropped on the page does the same.
    page.reload()
    page.locator("#history img").nth(2).wait_for()
    page.locator("#settings_file input[type=file]").set_input_files(tmp_path / "drawn.png")
    page.get_by_text("settings restored").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == PANDA


def test_a_drawing_is_watched_and_stopped(page):
    page.get_by_text("Sampling", exact=True).click()
    page.wait_for_timeout(1000)  # what the accordion holds is made now, and would take back what is written at once
    page.locator("#prior_steps input[type=number]").fill("60")
    page.locator("#count input").fill("16")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#line", has_text=re.compile(r"image 1 of 16 · Stage C · step \d+ of 60")).wait_for()
    page.locator("#drawn img").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#line", has_text=re.compile(r"stopped · \d+ images? finished")).wait_for()
    page.locator("#prior_steps input[type=number]").fill("5")
    page.locator("#count input").fill("1")
    assert pixels(draw(page)).std() > 20
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("nothing is being drawn").wait_for()


def test_a_wrong_input_is_a_message(page, files):
    page.locator("#height input").fill("63")
    page.get_by_role("button", name="Draw", exact=True).click()
    assert "height 63 is not a multiple of 8 from 64 to 8192; nearest: 64" in message(page)
    assert "height 63 is not a multiple of 8" in line(page)
    page.locator("#height input").fill("0")
    tab(page, "Image to image")
    page.get_by_role("button", name="Draw", exact=True).click()
    assert "image-to-image needs an image; upload one" in message(page)
    page.locator("#image input[type=file]").first.set_input_files(files / "notes.png")
    page.get_by_role("button", name="Draw", exact=True).click()
    assert "'notes.png' is no image that can be read" in message(page)
    page.locator("#settings_file input[type=file]").set_input_files(files / "circle.png")
    assert "'circle.png' carries no settings" in message(page)


def test_image_to_image_starts_from_the_upload(page, files):
    tab(page, "Image to image")
    upload(page, "image", files / "circle.png")
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    strength = page.get_by_label("number input for Strength").first
    strength.fill("0")
    near = pixels(draw(page))
    strength.fill("1")
    far = pixels(draw(page))
    original = pixels((files / "circle.png").read_bytes())
    assert far.std() > 20
    assert np.abs(near - original).mean() < np.abs(far - original).mean()


def test_the_control_image_is_live_and_guides(page, files):
    tab(page, "Control")
    upload(page, "control_image", files / "circle.png")
    page.locator("#control_preview img").wait_for()
    first = seen(page, "control_preview")
    assert pixels(first).max() > 200
    source = page.locator("#control_preview img").get_attribute("src")
    page.locator("#control_image").get_by_label(re.compile("Clear|Remove")).click()
    page.locator("#control_preview img").wait_for(state="detached")
    upload(page, "control_image", files / "small.png")
    page.locator(f"#control_preview img:not([src='{source}'])").wait_for()
    second = seen(page, "control_preview")
    assert np.abs(pixels(first) - pixels(second)).mean() > 1
    assert pixels(draw(page)).std() > 20


@pytest.mark.slow
def test_reconstruction_is_seen_side_by_side(page, files):
    tab(page, "Reconstruct")
    upload(page, "reconstructed", files / "circle.png")
    result = draw(page)
    assert re.search(r"PSNR \d+\.\d dB", line(page))
    assert np.abs(pixels(seen(page, "original")) - pixels((files / "circle.png").read_bytes())).max() == 0
    assert np.abs(pixels(result) - pixels(seen(page, "original"))).mean() < 60


@pytest.mark.slow
def test_inpainting_keeps_what_is_not_drawn_over(page, files):
    tab(page, "Inpaint")
    editor = page.locator("#edited")
    editor.get_by_text(re.compile(r"^\d\d%$")).wait_for()  # its canvas is there
    editor.locator("input[type=file]").first.set_input_files(files / "circle.png")
    editor.get_by_text(re.compile(r"[2-9]\d\d%")).wait_for()  # the small image is there, enlarged
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Draw", exact=True).click()
    assert "the mask is empty; draw over what is to be painted anew" in message(page)
    box = editor.locator("canvas").last.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    page.get_by_label("Prompt", exact=True).fill("sailboat, flat style, on a yellow background")
    changed = np.abs(pixels(draw(page)) - pixels((files / "circle.png").read_bytes())).max(axis=2)
    assert changed[:6].max() <= 2  # the top is as it was
    assert changed[26:38, 26:38].mean() > 5


@pytest.mark.slow
def test_a_lora_and_a_reference_image_change_the_image(page, files):
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    plain = pixels(draw(page))
    page.get_by_label("LoRA 1", exact=True).click()
    page.get_by_role("option", name="strong.safetensors").click()
    with_lora = pixels(draw(page))
    assert np.abs(plain - with_lora).mean() > 0.5
    page.get_by_label("number input for Weight of LoRA 1").fill("0")
    assert (pixels(draw(page)) == plain).all()
    tab(page, "Variation")
    upload(page, "reference_1", files / "circle.png")
    page.get_by_label("Prompt", exact=True).fill("")
    assert pixels(draw(page)).std() > 10


def test_the_server_asked_nobody_either(url, connections):
    hosts = [json.loads(line) for line in connections.read_text().splitlines()]
    assert [host for host in hosts if not is_local(host)] == []


def test_a_request_cannot_make_the_server_fetch_or_serve_other_files(url, files):
    paths = (
        "file=http://127.0.0.1:1/x",
        f"file={files / 'notes.txt'}",
        "file=/etc/passwd",
        "proxy=http://a.hf.space/",
    )
    assert [status(f"{url}gradio_api/{path}") for path in paths] == [404, 403, 403, 404]
    assert status(f"{url}gradio_api/upload", b"0", {"Content-Length": str(6 * 2**20)}) == 413


def status(address, body=None, headers=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers or {}), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_an_ended_process_leaves_nothing_behind(connections, tmp_path):
    with served(connections, tmp_path, end=signal.SIGTERM) as address:
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert b"Stable Cascade" in answer.read()
            assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
