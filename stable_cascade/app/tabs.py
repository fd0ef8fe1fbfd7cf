"""One tab for each task, with what that task alone needs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .choices import NONE
from .form import OWN_FILTER, REFERENCES, Form
from .look import hint
from .studio import Studio

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
"""Colour and opacity, so that the picture is seen below; the mask is what is covered by half at least."""


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
    hint("A picture from the words above.")


def uploaded_picture(label: str, name: str, **options: Any) -> gr.Image:
    """An upload. Gradio hands its path on and leaves the file as it is."""
    settings = {"height": 260, "buttons": ["fullscreen"], "sources": ["upload", "clipboard"], **options}
    return gr.Image(
        label=label, type="filepath", image_mode=None, elem_id=name, elem_classes="upload-picture", **settings
    )


def _image_to_image(widgets: dict[str, Any], studio: Studio) -> None:
    widgets["image"] = uploaded_picture("Picture", "image")
    widgets["strength"] = gr.Slider(
        0, 1, FIRST.strength, step=0.05, label="Strength", info="0 keeps the picture, 1 keeps nothing of it"
    )


def _variation(widgets: dict[str, Any], studio: Studio) -> None:
    hint("New pictures in the manner of these. The weights say whose counts more; the prompt may stay empty.")
    with gr.Row():
        for number in range(1, REFERENCES + 1):
            with gr.Column(min_width=120):
                name = f"reference_{number}"
                widgets[name] = uploaded_picture(f"Picture {number}", name, height=170)
                weight = f"reference_weight_{number}"
                widgets[weight] = gr.Slider(0, 2, getattr(FIRST, weight), step=0.05, label="Weight")


def _inpaint(widgets: dict[str, Any], studio: Studio) -> None:
    brush = gr.Brush(default_size=max(6, studio.side // 14), colors=[BRUSH], default_color=BRUSH, color_mode="fixed")
    widgets["edited"] = gr.ImageEditor(
        label="Upload a picture, then draw over what is to be painted anew", type="filepath", format="png",
        sources=("upload", "clipboard"), layers=False, transforms=(), buttons=["fullscreen"], height=380,
        brush=brush, elem_id="edited",
    )  # fmt: skip
    widgets["inpaint_strength"] = gr.Slider(
        0, 1, FIRST.inpaint_strength, step=0.05, label="Strength", info="how far what is painted anew may go from it"
    )


def _control(widgets: dict[str, Any], studio: Studio) -> None:
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
        widgets["control_image"] = uploaded_picture("Picture to follow", "control_image", height=230)
        widgets["control_preview"] = gr.Image(
            label="What the ControlNet sees", interactive=False, height=230, format="png", buttons=["download"],
            elem_id="control_preview",
        )  # fmt: skip
    widgets["control_filtered"] = gr.Checkbox(
        FIRST.control_filtered, label="the picture is a control image already (use no filter)"
    )
    with gr.Row():
        widgets["control_scale"] = gr.Slider(0, 2, FIRST.control_scale, step=0.05, label="Scale", min_width=100)
        widgets["control_start"] = gr.Slider(0, 1, FIRST.control_start, step=0.05, label="Start", min_width=100)
        widgets["control_end"] = gr.Slider(0, 1, FIRST.control_end, step=0.05, label="End", min_width=100)


def _reconstruct(widgets: dict[str, Any], studio: Studio) -> None:
    hint(
        "What is left of a picture after the semantic latents: encoded, decoded by Stages B and A, and shown beside "
        "the original. The prompt is not used."
    )
    widgets["reconstructed"] = uploaded_picture("Picture", "reconstructed")
