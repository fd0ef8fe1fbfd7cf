"""How the page looks: the widgets, their labels, and what they hold at first."""

from __future__ import annotations

import asyncio
import html
from pathlib import Path
from typing import Any

import gradio as gr

from stable_cascade.diffusion.guidance import GUIDANCES
from stable_cascade.diffusion.samplers import SAMPLERS

from .events import connect, messages
from .form import AUTOMATIC, LORAS, NONE, OWN_FILTER, REFERENCES, Form
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
    # Inputs on the left, results on the right.
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
        # The open tab is the task; its name travels with the form.
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
    # The image beside its original, where it has one.
    with gr.Row():
        widgets["original"] = gr.Image(
            label="Original", visible=False, interactive=False, height=440, format="png", buttons=["fullscreen"],
            min_width=200, elem_id="original",
        )  # fmt: skip
        widgets["drawn"] = gr.Image(
            label="Image", interactive=False, height=440, format="png", buttons=["download", "fullscreen"],
            min_width=200, elem_id="drawn",
        )  # fmt: skip
    # What is going on, and what was drawn so far.
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


FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "monospace"]
CSS = """
.heading { display: flex; align-items: baseline; gap: 1rem; flex-wrap: wrap; padding: 0.2rem 0; }
.heading h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.heading span, .hint { color: var(--body-text-color-subdued); font-size: 0.9rem; margin: 0; }
.line { min-height: 1.4rem; margin: 0; font-variant-numeric: tabular-nums; }
.line.busy { color: var(--primary-600); }
.line.refused { color: var(--error-text-color, #b91c1c); }
.upload-image img, #drawn img, #original img, #control_preview img {
    width: 100%; height: 100%; object-fit: contain;
}
#control_preview .image-container, #control_image .image-container { padding-top: 1.7rem; }
.html-container:has(> .prose > .hint), .html-container:has(> .prose > .line) { padding: 0 0.25rem; }
#history .grid-wrap { min-height: 6rem; max-height: 16rem; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); grid-auto-rows: auto; }
#history .gallery-item { aspect-ratio: 1; }
#settings_file .wrap { flex-direction: row; gap: 0.5rem; font-size: 0.9rem; min-height: 0; padding: 0; }
#settings_file .icon-wrap { display: none; }
"""
TABS = {
    "generate": "Text",
    "img2img": "Image to image",
    "variation": "Variation",
    "inpaint": "Inpaint",
    "control": "Control",
    "reconstruct": "Reconstruct",
}
FIRST = Form()
BRUSH = ("#ff2d95", 0.7)
"""Colour and opacity, so that the image is seen below; the mask is what is covered by half at least."""


def theme() -> gr.themes.Base:
    """Gradio's own look in this machine's fonts: a font from elsewhere would be a request to elsewhere."""
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONOSPACE)


def hint(text: str) -> gr.HTML:
    """A line of help; `text` is HTML, and ours."""
    return gr.HTML(f'<p class="hint">{text}</p>', padding=False)


def task_tabs(widgets: dict[str, Any], studio: Studio) -> None:
    """One tab for each task, with what that task alone needs."""
    build = {
        "generate": _generate,
        "img2img": _image_to_image,
        "variation": _variation,
        "inpaint": _inpaint,
        "control": _control,
        "reconstruct": _reconstruct,
    }
    widgets["tab"] = {}
    with gr.Tabs(selected=FIRST.task) as widgets["tabs"]:
        for name, label in TABS.items():
            with gr.Tab(label, id=name, elem_id=f"tab-{name}") as widgets["tab"][name]:
                build[name](widgets, studio)


def _generate(widgets: dict[str, Any], studio: Studio) -> None:
    hint("An image from the words above.")


def uploaded_image(label: str, name: str, **options: Any) -> gr.Image:
    """An upload. Gradio hands its path on and leaves the file as it is."""
    settings = {"height": 260, "buttons": ["fullscreen"], "sources": ["upload", "clipboard"], **options}
    return gr.Image(
        label=label, type="filepath", image_mode=None, elem_id=name, elem_classes="upload-image", **settings
    )


def _image_to_image(widgets: dict[str, Any], studio: Studio) -> None:
    widgets["image"] = uploaded_image("Image", "image")
    widgets["strength"] = gr.Slider(
        0, 1, FIRST.strength, step=0.05, label="Strength", info="0 keeps the image, 1 keeps nothing of it"
    )


def _variation(widgets: dict[str, Any], studio: Studio) -> None:
    hint("New images in the manner of these. The weights say whose counts more; the prompt may stay empty.")
    with gr.Row():
        for number in range(1, REFERENCES + 1):
            with gr.Column(min_width=120):
                name = f"reference_{number}"
                widgets[name] = uploaded_image(f"Image {number}", name, height=170)
                weight = f"reference_weight_{number}"
                widgets[weight] = gr.Slider(0, 2, getattr(FIRST, weight), step=0.05, label="Weight")


def _inpaint(widgets: dict[str, Any], studio: Studio) -> None:
    brush = gr.Brush(default_size=max(6, studio.side // 14), colors=[BRUSH], default_color=BRUSH, color_mode="fixed")
    widgets["edited"] = gr.ImageEditor(
        label="Upload an image, then draw over what is to be painted anew", type="filepath", format="png",
        sources=("upload", "clipboard"), layers=False, transforms=(), buttons=["fullscreen"], height=380,
        brush=brush, elem_id="edited",
    )  # fmt: skip
    widgets["inpaint_strength"] = gr.Slider(
        0, 1, FIRST.inpaint_strength, step=0.05, label="Strength", info="how far what is painted anew may go from it"
    )


def _control(widgets: dict[str, Any], studio: Studio) -> None:
    # The network and its filter.
    names = list(studio.controlnets)
    if not names:
        hint(
            "Start the page with <code>--controlnet FOLDER</code> to draw with a ControlNet. "
            "Filters can be tried without one."
        )
    with gr.Row():
        first = names[0] if names else NONE
        widgets["controlnet"] = gr.Dropdown([NONE, *names], value=first, label="ControlNet", elem_id="controlnet")
        filters = [OWN_FILTER, *studio.known().filters]
        own = OWN_FILTER if names else "SoftEdgeFilter"
        widgets["control_filter"] = gr.Dropdown(filters, value=own, label="Filter", elem_id="control_filter")
    with gr.Row():
        # The image, and what the filter makes of it.
        widgets["control_image"] = uploaded_image("Image to follow", "control_image", height=230)
        widgets["control_preview"] = gr.Image(
            label="What the ControlNet sees", interactive=False, height=230, format="png", buttons=["download"],
            elem_id="control_preview",
        )  # fmt: skip
    # How strongly, and when.
    widgets["control_filtered"] = gr.Checkbox(
        FIRST.control_filtered, label="the image is a control image already (use no filter)"
    )
    with gr.Row():
        widgets["control_scale"] = gr.Slider(0, 2, FIRST.control_scale, step=0.05, label="Scale", min_width=100)
        widgets["control_start"] = gr.Slider(0, 1, FIRST.control_start, step=0.05, label="Start", min_width=100)
        widgets["control_end"] = gr.Slider(0, 1, FIRST.control_end, step=0.05, label="End", min_width=100)


def _reconstruct(widgets: dict[str, Any], studio: Studio) -> None:
    hint(
        "What is left of an image after the semantic latents: encoded, decoded by Stages B and A, and shown beside "
        "the original. The prompt is not used."
    )
    widgets["reconstructed"] = uploaded_image("Image", "reconstructed")


def buttons(widgets: dict[str, Any]) -> None:
    """Draw, and stop."""
    with gr.Row():
        widgets["draw"] = gr.Button("Draw", variant="primary", size="lg", scale=4, elem_id="draw")
        widgets["stop"] = gr.Button("Stop", size="lg", scale=1, min_width=90, elem_id="stop")


def size_and_seed(widgets: dict[str, Any]) -> None:
    """How large, how many, and with which seed."""
    with gr.Row():
        for side in ("width", "height"):
            widgets[side] = gr.Number(
                getattr(FIRST, side), label=side.capitalize(), info="0 is automatic", step=8,
                min_width=90, elem_id=side,
            )  # fmt: skip
        widgets["count"] = gr.Number(FIRST.count, label="Images", info="seeds in a row", min_width=90, elem_id="count")
    with gr.Row(equal_height=True):
        widgets["seed"] = gr.Number(FIRST.seed, label="Seed", scale=2, min_width=120, elem_id="seed")
        with gr.Column(scale=3, min_width=180):
            widgets["new_seed"] = gr.Checkbox(
                FIRST.new_seed, label="a new seed for every drawing", container=False, elem_id="new_seed"
            )
            widgets["random"] = gr.Button("Random seed", size="sm", elem_id="random")


def lora_picker(widgets: dict[str, Any], studio: Studio) -> None:
    """Some of the files of --lora-dir, each with a weight."""
    names, given = list(studio.known().loras), studio.settings.lora_dir is not None
    with gr.Accordion("LoRA", open=bool(names)):
        if not given:
            hint("Start the page with <code>--lora-dir FOLDER</code> to choose from its .safetensors files.")
        # As many rows as there are files, up to the page's limit.
        widgets["lora_rows"] = []
        for number in range(1, LORAS + 1):
            with gr.Row(visible=number <= len(names)) as row:
                widgets[f"lora_{number}"] = gr.Dropdown(
                    [NONE, *names], value=NONE, label=f"LoRA {number}", min_width=160, elem_id=f"lora_{number}"
                )
                weight = f"lora_weight_{number}"
                widgets[weight] = gr.Slider(
                    -2, 2, getattr(FIRST, weight), step=0.05, label=f"Weight of LoRA {number}", min_width=160
                )
            widgets["lora_rows"].append(row)
        widgets["refresh"] = gr.Button("Look for new files", size="sm", visible=given)


def sampling_settings(widgets: dict[str, Any]) -> None:
    """What seldom needs to be changed."""
    with gr.Accordion("Sampling", open=False):
        # Prompts and steps.
        widgets["negative_prompt"] = gr.Textbox(
            label="Negative prompt", placeholder="What should not be in the image?", max_length=20_000
        )
        with gr.Row():
            widgets["prior_num_inference_steps"] = gr.Slider(
                1, 60, FIRST.prior_num_inference_steps, step=1, label="Steps of Stage C", elem_id="prior_steps"
            )
            widgets["prior_guidance_scale"] = gr.Slider(
                0, 15, FIRST.prior_guidance_scale, step=0.1, label="Guidance of Stage C", info="1 switches it off"
            )
        with gr.Row():
            widgets["num_inference_steps"] = gr.Slider(
                1, 30, FIRST.num_inference_steps, step=1, label="Steps of Stage B", elem_id="decoder_steps"
            )
            widgets["decoder_guidance_scale"] = gr.Slider(
                0, 5, FIRST.decoder_guidance_scale, step=0.1, label="Guidance of Stage B", info="1 switches it off"
            )
        with gr.Row():
            # The sampler and the choices of guidance.
            widgets["sampler"] = gr.Dropdown(
                [AUTOMATIC, *((sampler.title, name) for name, sampler in SAMPLERS.items())],
                value=FIRST.sampler, label="Sampler",
            )  # fmt: skip
            widgets["shift"] = gr.Number(FIRST.shift, label="Shift of Stage C", info="0 is automatic", step=0.1)
            widgets["guidance_rescale"] = gr.Slider(0, 1, FIRST.guidance_rescale, step=0.05, label="Guidance rescale")
        with gr.Row():
            widgets["guidance_method"] = gr.Dropdown(
                [(method.title, name) for name, method in GUIDANCES.items()],
                value=FIRST.guidance_method, label="Guidance",
            )  # fmt: skip
            widgets["cache_interval"] = gr.Slider(
                1, 4, FIRST.cache_interval, step=1, label="Whole steps", info="2: every second one, faster and rougher"
            )
        with gr.Row():
            # When guidance acts.
            widgets["guidance_start"] = gr.Slider(
                0, 1, FIRST.guidance_start, step=0.05, label="Guidance from", info="time, 0 is clean"
            )
            widgets["guidance_end"] = gr.Slider(
                0, 1, FIRST.guidance_end, step=0.05, label="Guidance to", info="time, 1 is noise"
            )
        widgets["weighted"] = gr.Checkbox(FIRST.weighted, label="read weights in the prompt, as in (apple:1.3)")
        widgets["preview"] = gr.Checkbox(FIRST.preview, label="draft: show Stage C's rough image and stop there")
