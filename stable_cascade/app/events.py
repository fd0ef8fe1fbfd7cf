"""What happens when something on the page is pressed: values in, updates of the widgets out, errors as messages."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from .actions import random_seed
from .form import FIELDS, LORAS, NONE, Form, lora_files, read_form, with_newest
from .studio import Progress, Studio

logger = logging.getLogger(__name__)

ONE_AT_A_TIME = {"concurrency_id": "cascade", "concurrency_limit": 1}
Widgets = Mapping[str, Any]


def connect(page: gr.Blocks, widgets: Widgets, studio: Studio) -> None:
    """Joins the widgets and the studio."""
    # Draw and stop.
    form = [widgets[name] for name in FIELDS]
    seen = [widgets[name] for name in ("line", "drawn", "original", "seed", "names", "history")]
    start = {
        "fn": drawing(studio, widgets), "inputs": [*form, widgets["names"]], "outputs": seen,
        "show_progress": "hidden", **ONE_AT_A_TIME,
    }  # fmt: skip
    widgets["draw"].click(**start)
    widgets["prompt"].submit(**start)
    widgets["stop"].click(stopping(studio), outputs=widgets["line"], show_progress="hidden", concurrency_limit=None)
    widgets["random"].click(_random_seed, outputs=[widgets["seed"], widgets["new_seed"]], show_progress="hidden")
    # The history, and settings from a PNG.
    page.load(_shown_again(studio), widgets["names"], widgets["history"], show_progress="hidden")
    restored = [*form, widgets["tabs"], widgets["line"], widgets["drawn"], widgets["original"]]
    widgets["history"].select(restoring(studio, widgets), widgets["names"], restored, show_progress="hidden")
    widgets["settings_file"].upload(
        restoring_file(studio, widgets), widgets["settings_file"], restored, show_progress="hidden"
    )
    # Control images and LoRAs.
    _connect_control(widgets, studio)
    slots = [widgets[f"lora_{number}"] for number in range(1, LORAS + 1)]
    widgets["refresh"].click(_refreshed(studio), outputs=[*slots, *widgets["lora_rows"]], show_progress="hidden")


def _connect_control(widgets: Widgets, studio: Studio) -> None:
    """Shows the control image anew as soon as its image or filter changes."""
    names = ("control_image", "controlnet", "control_filter", "control_filtered")
    for name in names:
        widgets[name].change(
            showing_control(studio, names), [widgets[one] for one in names], widgets["control_preview"],
            show_progress="hidden", trigger_mode="always_last", **ONE_AT_A_TIME,
        )  # fmt: skip


@contextmanager
def messages(what: str) -> Iterator[None]:
    """Turns a refusal into the same line on the page; the trace of anything else goes to the log only."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise refusal(str(error)) from None
    except Exception as error:
        logger.exception("%s failed", what)
        kind = type(error).__name__
        raise refusal(f"{what} failed ({kind}); what happened is in the program's output") from None


def refusal(text: str) -> gr.Error:
    """A message that the page shows. The page would read tags in it, and a file may bring some along."""
    return gr.Error(html.escape(text), duration=12, title="This cannot be done", print_exception=False)


def said(text: str, how: str = "") -> str:
    """The line below the image; `how` is busy or refused."""
    return f'<p class="line {how}" role="status">{html.escape(text)}</p>'


def drawing(studio: Studio, widgets: Widgets) -> Callable[..., Iterator[dict[Any, Any]]]:
    """The form and the names of the history -> what there is to see, step by step."""

    def draw(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        # Say at once that something happens, then show every step.
        *fields, names = values
        yield {widgets["line"]: said("starting", "busy")}
        shown, last = 0, None
        try:
            with messages("the drawing"):
                for now in studio.draw(read_form(fields), _visitor(request)):
                    last = now
                    yield _seen(widgets, studio, now, with_newest(names, now.finished), len(now.finished) > shown)
                    shown = len(now.finished)
        except gr.Error as error:
            yield {widgets["line"]: said(html.unescape(error.message), "refused")}
            raise
        if last is not None:
            yield {widgets["line"]: said(last.line)}

    return draw


def _seen(widgets: Widgets, studio: Studio, now: Progress, names: list[str], more: bool) -> dict[Any, Any]:
    """The updates that show a state of the drawing."""
    updates: dict[Any, Any] = {widgets["line"]: said(now.line, "busy"), widgets["seed"]: now.seed}
    if now.image is not None:
        updates[widgets["drawn"]] = now.image
    updates[widgets["original"]] = gr.update(value=now.original, visible=now.original is not None)
    if more:
        updates |= {widgets["names"]: names, widgets["history"]: gallery(studio, names)}
    return updates


def gallery(studio: Studio, names: Any) -> list[str]:
    """The files of the history."""
    return [str(entry.path) for entry in studio.history.entries(names)]


def stopping(studio: Studio) -> Callable[[gr.Request], str]:
    """Ends the drawing of whoever presses."""

    def stop(request: gr.Request) -> str:
        return said("stopping", "busy") if studio.stop(_visitor(request)) else said("nothing is being drawn")

    return stop


def restoring(studio: Studio, widgets: Widgets) -> Callable[..., dict[Any, Any]]:
    """An image of the history was pressed: its settings are back."""

    def restore(names: Any, event: gr.SelectData) -> dict[Any, Any]:
        with messages("bringing the settings back"):
            entries = studio.history.entries(names)
            if not isinstance(event.index, int) or not 0 <= event.index < len(entries):
                raise ValueError("this image is no longer there; the page keeps images while it runs")
            values, notes, path = studio.restored(entries[event.index].path.name)
            return {**_set(widgets, values, notes), widgets["drawn"]: path}

    return restore


def restoring_file(studio: Studio, widgets: Widgets) -> Callable[..., dict[Any, Any]]:
    """A PNG was dropped: the settings that it carries are set."""

    def restore(path: str | None) -> dict[Any, Any]:
        with messages("reading the settings"):
            if path is None:
                raise ValueError("drop a PNG that was drawn here")
            values, notes = studio.restored_from(path)
            return _set(widgets, values, notes)

    return restore


def _set(widgets: Widgets, values: Mapping[str, Any], notes: list[str]) -> dict[Any, Any]:
    updates = {widgets[name]: gr.update(value=value) for name, value in values.items()}
    line = "; ".join(["settings restored", *notes])
    return {
        **updates,
        widgets["tabs"]: gr.update(selected=values["task"]),
        widgets["line"]: said(line),
        widgets["original"]: gr.update(value=None, visible=False),
    }


def showing_control(studio: Studio, names: Sequence[str]) -> Callable[..., Any]:
    """The values of these fields of the form -> the control image."""

    def show(*values: Any) -> Any:
        with messages("the control image"):
            return studio.control_image(Form(**dict(zip(names, values, strict=True))))

    return show


def _random_seed() -> tuple[int, bool]:
    return random_seed(), False


def _shown_again(studio: Studio) -> Callable[[Any], Any]:
    def show(names: Any) -> Any:
        return gallery(studio, names)

    return show


def _refreshed(studio: Studio) -> Callable[[], list[Any]]:
    def refresh() -> list[Any]:
        names = list(lora_files(studio.settings.lora_dir))
        shown = [gr.update(visible=number < len(names)) for number in range(LORAS)]
        return [*[gr.update(choices=[NONE, *names])] * LORAS, *shown]

    return refresh


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)
