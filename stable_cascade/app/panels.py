"""What every task shares: buttons, size and seed, LoRAs, sampling."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_cascade.diffusion.guidance import GUIDANCES
from stable_cascade.diffusion.samplers import SAMPLERS

from .choices import NONE
from .form import AUTOMATIC, LORAS, Form
from .look import hint
from .studio import Studio

FIRST = Form()


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
        widgets["count"] = gr.Number(
            FIRST.count, label="Pictures", info="seeds in a row", min_width=90, elem_id="count"
        )
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
        widgets["negative_prompt"] = gr.Textbox(
            label="Negative prompt", placeholder="What should not be in the picture?", max_length=20_000
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
            widgets["guidance_start"] = gr.Slider(
                0, 1, FIRST.guidance_start, step=0.05, label="Guidance from", info="time, 0 is clean"
            )
            widgets["guidance_end"] = gr.Slider(
                0, 1, FIRST.guidance_end, step=0.05, label="Guidance to", info="time, 1 is noise"
            )
        widgets["weighted"] = gr.Checkbox(FIRST.weighted, label="read weights in the prompt, as in (apple:1.3)")
        widgets["preview"] = gr.Checkbox(FIRST.preview, label="draft: show Stage C's rough picture and stop there")
