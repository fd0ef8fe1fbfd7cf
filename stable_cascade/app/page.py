"""How the page looks: the widgets, their labels, and what they hold at first."""

from __future__ import annotations

import asyncio
import html
from pathlib import Path
from typing import Any

import gradio as gr

from .events import connect, messages
from .panels import FIRST, buttons, hint, lora_picker, sampling_settings, size_and_seed, task_tabs
from .studio import Studio
from .uploads import check_payload, uploaded_files

EMBEDDED_PROMPTS = (
    "red apple, flat style, on a light blue background",
    "panda, noto style, on a yellow background",
    "rocket, noto style, on a light blue background",
    "cactus, noto style, on a pink background",
)


class Page(gr.Blocks):
    """Gradio's page, whose uploads are looked at before Gradio opens them."""

    studio: Studio
    looked_at: set[str]

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> Any:
        """The values for an event's function.

        Raises:
            gr.Error: an upload is no image or too large, or a field holds what it cannot hold.
        """
        with messages("reading the form"):
            check_payload(inputs, self.studio.folder)
            for widget, value in zip(block_fn.inputs, inputs, strict=False):
                if isinstance(widget, (gr.Image, gr.ImageEditor)):
                    await asyncio.to_thread(self._look_at, value)
            return await super().preprocess_data(block_fn, inputs, *rest, **named)

    def _look_at(self, value: Any) -> None:
        """Decodes new images once, within bounds; a file's folder is named after its content."""
        for path in [file["path"] for file in uploaded_files(value) if file.get("path")]:
            if path not in self.looked_at:
                self.studio.read(path)
                self.looked_at.add(path)


def make_page(studio: Studio) -> Page:
    """The page, ready to be served."""
    widgets: dict[str, Any] = {}
    with Page(title="Stable Cascade", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        page.studio, page.looked_at = studio, set()
        gr.HTML(_heading(studio), padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=420):
                _prompt(widgets, studio)
                task_tabs(widgets, studio)
                buttons(widgets)
                size_and_seed(widgets)
                lora_picker(widgets, studio)
                sampling_settings(widgets)
            with gr.Column(scale=5, min_width=420):
                _results(widgets)
        widgets["task"] = gr.Textbox(FIRST.task, visible="hidden", elem_id="task")
        for name, tab in widgets.pop("tab").items():
            tab.select(None, js=f"() => '{name}'", outputs=widgets["task"])
        connect(page, widgets, studio)
    return page.queue(max_size=32)


def _heading(studio: Studio) -> str:
    session = studio.session
    name = "embedded cascade" if session.model == "embedded" else Path(session.model).name
    facts = f"{name} · {studio.side} px · {session.dtype} on {session.device}"
    return f'<div class="heading"><h1>Stable Cascade</h1><span>{html.escape(facts)}</span></div>'


def _prompt(widgets: dict[str, Any], studio: Studio) -> None:
    embedded = studio.session.model == "embedded"
    widgets["prompt"] = gr.Textbox(
        EMBEDDED_PROMPTS[0] if embedded else "", label="Prompt", lines=2, max_length=20_000, elem_id="prompt",
        placeholder="What should be in the image?", autofocus=True,
    )  # fmt: skip
    if embedded:
        gr.Examples(
            [[prompt] for prompt in EMBEDDED_PROMPTS], widgets["prompt"], label="It draws emoji, for example",
            example_labels=[prompt.split(",")[0] for prompt in EMBEDDED_PROMPTS], api_visibility="private",
        )  # fmt: skip


def _results(widgets: dict[str, Any]) -> None:
    with gr.Row():
        widgets["original"] = gr.Image(
            label="Original", visible=False, interactive=False, height=440, format="png", buttons=["fullscreen"],
            min_width=200, elem_id="original",
        )  # fmt: skip
        widgets["drawn"] = gr.Image(
            label="Image", interactive=False, height=440, format="png", buttons=["download", "fullscreen"],
            min_width=200, elem_id="drawn",
        )  # fmt: skip
    widgets["line"] = gr.HTML("", elem_id="line", padding=False)
    widgets["names"] = gr.BrowserState([], storage_key="stable-cascade-images")
    hint("Drawn so far; press an image to get its settings back.")
    widgets["history"] = gr.Gallery(
        show_label=False, columns=7, object_fit="cover", allow_preview=False, interactive=False, buttons=[],
        format="png", fit_columns=False, elem_id="history",
    )  # fmt: skip
    hint("Or drop a PNG that was drawn here:")
    widgets["settings_file"] = gr.File(
        show_label=False, file_types=[".png"], height=70, elem_id="settings_file",
    )  # fmt: skip
