"""What the page does, without Gradio: draws step by step, stops, shows control images, brings settings back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from stable_cascade.drawing.files import decibels

from .actions import Known, Wish, described, filter_name, random_seed, settings_of, upload, wish
from .form import NONE, Form, History, controlnet_paths, lora_files, values_of
from .options import PageSettings
from .uploads import read_settings, read_upload

if TYPE_CHECKING:
    from stable_cascade.drawing import Session


PAUSE = 0.1
"""Seconds between two steps that are shown; more of them nobody sees, and each costs the browser a request."""
_STAGES = {"prior": "Stage C", "decoder": "Stage B"}


@dataclass(frozen=True)
class Progress:
    """What there is to see now: a line, an image (rough, or a finished file), what was finished so far."""

    line: str
    seed: int
    image: Image.Image | Path | None = None
    original: Image.Image | None = None
    finished: tuple[str, ...] = ()


class Studio:
    """One model, and what is drawn with it.

    Args:
        session: of the model; one drawing at a time.
        settings: of the page.
        folder: for images, gone when the page ends.
    """

    def __init__(self, session: Session, settings: PageSettings, folder: Path) -> None:
        self.session, self.settings, self.folder = session, settings, folder
        self.history = History(folder / "images")
        self.controlnets = controlnet_paths(settings.controlnets)
        self._running: dict[str, Run] = {}

    @property
    def side(self) -> int:
        """The side of a square image that the model was trained on."""
        from stable_cascade.pipelines.call import default_side

        return default_side(self.session.pipeline.config["resolution_multiple"])

    def known(self) -> Known:
        """What can be chosen now; LoRAs that were added meanwhile are among it."""
        from stable_cascade.controls import filter_names

        return Known(self.read, lora_files(self.settings.lora_dir), self.controlnets, tuple(filter_names()))

    def read(self, path: str, mode: str | None = "RGB") -> Image.Image:
        """An uploaded image."""
        return read_upload(path, mode=mode, largest=self.settings.max_upload_megapixels)

    def draw(self, form: Form, visitor: str) -> Iterator[Progress]:
        """Draws what the form asks for; yields its progress, and keeps every image as soon as it is done.

        Args:
            visitor: who asks; `stop` with the same name ends it.

        Raises:
            ValueError: the form asks for something that cannot be drawn.
        """
        # Start the drawing in a thread of its own.
        if form.new_seed:
            form = replace(form, seed=random_seed())
        asked = wish(form, self.known(), self.session.drawing)
        run = Run(lambda on_step: self._each(asked, on_step))
        self._running[visitor] = run
        now, sent = Progress("starting", asked.drawing.seed), 0.0
        try:
            # Pass on its news, not more often than a browser can show them.
            for news in run.news():
                if isinstance(news, Step) and time.monotonic() - sent < PAUSE:
                    continue
                now, sent = self._progress(now, news, asked, form), time.monotonic()
                yield now
        except Stopped:
            yield replace(now, line=f"stopped · {_images(len(now.finished))} finished")
        finally:
            self._running.pop(visitor, None)

    def stop(self, visitor: str) -> bool:
        """Ends the visitor's drawing at its next step; False when there is none."""
        run = self._running.get(visitor)
        if run is not None:
            run.stop()
        return run is not None

    def control_image(self, form: Form) -> Image.Image | None:
        """What the ControlNet will be shown, or without one what the chosen filter makes; None without an image."""
        if not form.control_image:
            return None
        known = self.known()
        if form.controlnet not in (None, NONE):
            asked = wish(replace(form, task="control", seed=0, count=1), known, self.session.drawing)
            return self.session.control_images(asked.drawing, asked.images)[0]
        name = filter_name(form, known)
        image, _ = upload("control", form.control_image, known)
        if name is None or form.control_filtered:
            return image
        return filtered(image, name, self.side)

    def restored(self, name: str) -> tuple[dict[str, Any], list[str], Path]:
        """The widgets' values of an image of the history, what could not be restored, and the image."""
        entry = self.history.entry(name)
        values, notes = values_of(entry)
        return values, notes, entry.path

    def restored_from(self, path: str) -> tuple[dict[str, Any], list[str]]:
        """The widgets' values that an uploaded PNG carries, and what could not be restored."""
        drawing = read_settings(path)
        values, notes = settings_of(drawing, self.known())
        if drawing.model != self.session.model:
            notes.append(f"it was drawn with the model {Path(drawing.model).name}")
        if drawing.task != "generate":
            notes.append("choose its input image again")
        return values, notes

    def _each(self, asked: Wish, on_step: Any) -> Iterator[Any]:
        if asked.drawing.task == "reconstruct":
            yield self.session.original(asked.drawing, asked.images)
        yield from self.session.each(asked.drawing, asked.images, count=asked.count, on_step=on_step)

    def _progress(self, now: Progress, news: Any, asked: Wish, form: Form) -> Progress:
        number = f"image {len(now.finished) + 1} of {asked.count} · " if asked.count > 1 else ""
        if isinstance(news, Image.Image):
            return replace(now, original=news)
        if isinstance(news, Step):
            line = f"{number}{_STAGES.get(news.stage, news.stage)} · step {news.step} of {news.total}"
            return replace(now, line=line, image=news.preview)
        name = self.history.keep(news, form)
        path = self.history.entry(name).path
        line = f"{described(news.drawing)} · {news.drawing.width} x {news.drawing.height} · {news.seconds:.1f} s"
        if now.original is not None:
            line = f"{line} · PSNR {decibels(news.image, now.original):.1f} dB"
        return replace(now, line=line, image=path, finished=(*now.finished, name))


def filtered(image: Image.Image, name: str, side: int) -> Image.Image:
    """What a filter makes of an image whose shorter side is `side`, as an image to look at.

    Raises:
        ValueError: no such filter, or it needs a package or an encoder.
    """
    from stable_cascade.controls import make_filter, view_control
    from stable_cascade.data.images import resize_to_cover
    from stable_cascade.pipelines.call import to_images, to_pixels

    pixels = resize_to_cover(to_pixels(image)[0], (side, side))[None]
    return to_images(view_control(make_filter(name)(pixels)), "pil")[0]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


class Stopped(Exception):
    """Raised in the drawing's thread once it is asked to stop."""


@dataclass(frozen=True)
class Step:
    """One sampling step that is done."""

    stage: str
    step: int
    total: int
    preview: Image.Image | None


class Run:
    """Runs `work(on_step)` in a thread; `news()` gives its steps and what it yields.

    Args:
        work: takes an `on_step` to call after every step, and yields results.
    """

    def __init__(self, work: Callable[[Callable[..., None]], Iterable[Any]]) -> None:
        self._work = work
        self._stop = threading.Event()
        self._news: deque[Any] = deque()
        self._told = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def stop(self) -> None:
        """Ends the work at its next step."""
        self._stop.set()

    def news(self) -> Iterator[Any]:
        """Steps and results, the steps thinned out to the newest; ends when the work does.

        Leaving it early stops the work and waits for it, so that the next run finds the model free.

        Raises:
            Stopped: it was asked to stop.
            Exception: whatever the work raised.
        """
        self._thread.start()
        try:
            while not isinstance(one := self._next(), _End):
                yield one
            if one.error is not None:
                raise one.error
        finally:
            self.stop()
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for result in self._work(self._on_step):
                self._tell(result)
        except BaseException as raised:  # whatever it is, the reader gets it; a thread would only print it
            error = raised
        self._tell(_End(error))

    def _on_step(self, stage: str, step: int, total: int, preview: Image.Image | None = None) -> None:
        if self._stop.is_set():
            raise Stopped
        self._tell(Step(stage, step, total, preview))

    def _tell(self, one: Any) -> None:
        with self._told:
            if self._news and isinstance(one, Step) and isinstance(self._news[-1], Step):
                self._news[-1] = one  # nobody looked at the one before
            else:
                self._news.append(one)
            self._told.notify()

    def _next(self) -> Any:
        with self._told:
            self._told.wait_for(lambda: self._news)
            return self._news.popleft()


@dataclass(frozen=True)
class _End:
    error: BaseException | None
