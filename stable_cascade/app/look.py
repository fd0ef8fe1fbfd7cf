"""The look of the page: colours, this machine's own fonts, a few lines of CSS."""

from __future__ import annotations

import gradio as gr

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "monospace"]
CSS = """
.heading { display: flex; align-items: baseline; gap: 1rem; flex-wrap: wrap; padding: 0.2rem 0; }
.heading h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.heading span, .hint { color: var(--body-text-color-subdued); font-size: 0.9rem; margin: 0; }
.line { min-height: 1.4rem; margin: 0; font-variant-numeric: tabular-nums; }
.line.busy { color: var(--primary-600); }
.line.refused { color: var(--error-text-color, #b91c1c); }
.upload-picture img, #picture img, #original img, #control_preview img {
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


def theme() -> gr.themes.Base:
    """Gradio's own look in this machine's fonts: a font from elsewhere would be a request to elsewhere."""
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONOSPACE)


def hint(text: str) -> gr.HTML:
    """A line of help; `text` is HTML, and ours."""
    return gr.HTML(f'<p class="hint">{text}</p>', padding=False)
