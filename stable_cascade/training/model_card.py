"""The model card of an export: what it is, what it was trained from and on, its settings, and how to use it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from stable_cascade.components import NETWORKS
from stable_cascade.config import TRAINERS, keys_where
from stable_cascade.config.rules import places_of
from stable_cascade.files.json_files import read_json
from stable_cascade.redaction import bare_address, redacted
from stable_cascade.training.sheets import sheet_images

CARD, SAMPLES = "README.md", "samples"
RELEASED_LICENCE = "https://huggingface.co/stabilityai/stable-cascade/blob/main/LICENSE"
_TITLES = {
    "lora": "LoRA for Stage C of Stable Cascade",
    "tokens": "learned tokens for Stable Cascade",
    "controlnet": "ControlNet for Stable Cascade",
    "text_encoder": "text encoder of Stable Cascade",
}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ export.title }}
{%- if version %}, {{ version }} version{% endif %}
{%- if steps %}, trained for {{ "{:,}".format(steps) }} steps of {{ batch_size }} images{% endif %}.
{%- if base.name %}

Base: {{ "the embedded cascade of the package" if base.embedded else base.name }}.
{%- elif trained %}

Base: none, the weights were newly initialised.
{%- endif %}
{%- if export.tokens %}

Trigger tokens: `{{ export.tokens | join("`, `") }}`.
{%- endif %}
{%- if sheet %}

## Samples

![the last preview sheet of the training]({{ sheet }})
{%- endif %}

## How to use

```python
import torch
from stable_cascade import StableCascadePipeline
{%- for part in parts %}, {{ networks[part].cls }}{% endfor %}
{%- if base.embedded %}
from stable_cascade.embedded import embedded_path
{%- endif %}
{% for part in parts %}
{{ part }} = {{ networks[part].cls }}.from_pretrained("{{ repo }}", subfolder="{{ part }}"{{ dtype }})
{%- endfor %}
{%- if draws %}
pipeline = StableCascadePipeline.from_pretrained({{ cascade }}
{%- for part in parts %}, {{ part }}={{ part }}{% endfor %}{{ dtype }})
{%- if not base.embedded %}
pipeline.to("cuda")
{%- endif %}
{%- if "lora" in export.kinds %}
pipeline.load_lora_weights("{{ repo }}")
{%- elif "tokens" in export.kinds %}
pipeline.load_textual_inversion("{{ repo }}")
{%- endif %}
image = pipeline({{ prompt }}, generator=torch.Generator().manual_seed(0)).images[0]
image.save("image.png")
{%- endif %}
```
{%- if "controlnet" in parts %}

The package's page on ControlNets shows how to draw with it.
{%- endif %}
{%- if places %}

## Data
{% for place in places %}
- `{{ place }}`
{%- endfor %}
{%- for place in regularization %}
- `{{ place }}` (regularisation)
{%- endfor %}

Images of {{ image_size }} px{% if ratios %}, aspect ratios {{ ratios | join(", ") }}{% endif %}.
{%- endif %}
{%- if settings %}

## Training

{{ fence }}yaml
{{ settings }}{{ fence }}
{%- endif %}
{%- if base.released %}

## Licence

A derivative of the released Stable Cascade weights, and so bound by their \
[non-commercial research community licence]({{ licence }}).
{%- elif base.embedded and base.name %}

## Licence

The embedded cascade it was trained from is under Apache-2.0; the data has its own licence.
{%- endif %}
"""


@dataclass(frozen=True)
class Export:
    """What an exported folder holds: kinds by the files that say so, and the trigger tokens."""

    kinds: tuple[str, ...]
    tokens: tuple[str, ...]

    @property
    def title(self) -> str:
        """The kinds as words."""
        names = [_TITLES.get(kind) or f"{NETWORKS[kind].title} of Stable Cascade" for kind in self.kinds]
        text = " and ".join(names)
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Base:
    """What the model was trained from: the cascade's hub name, or a local one, or none."""

    cascade: str | None
    name: str | None
    released: bool
    embedded: bool


def write_model_card(folder: Path, settings: Mapping[str, Any], repo: str) -> Path:
    """Write README.md and the images it shows into an exported folder; returns the card's path.

    Args:
        settings: the training's config as a mapping; empty when nothing is known.

    Raises:
        ValueError: the folder holds no model, or the hub's library refuses the card's metadata.
    """
    import yaml
    from huggingface_hub import ModelCard

    export, base = read_export(folder), read_base(settings)
    samples = _write_samples(folder, settings)
    known = public_settings(settings)

    # The code shows a prompt that the model was validated with, one with the trigger token where there is one.
    token = export.tokens[0] if export.tokens else ""
    prompts = [prompt for prompt in settings.get("validation_prompts") or () if token in prompt]
    prompt = prompts[0] if prompts else f"an image of {token}" if token else "an image"
    parts = [kind for kind in export.kinds if kind in NETWORKS]
    cascade = "embedded_path()" if base.embedded else f'"{base.cascade or "PATH OR HUB NAME OF THE CASCADE"}"'

    # The data and the settings; the fence is longer than any run of backticks within it.
    sets = {key: places_of(known.get(key)) for key in ("webdataset_path", "dataset_name", "regularization_path")}
    text = yaml.safe_dump(dict(known), sort_keys=False, allow_unicode=True) if known else ""
    longest = max(map(len, re.findall("`+", text)), default=0)

    card = ModelCard.from_template(
        _metadata(export, base, samples, repo),
        template_str=TEMPLATE,
        name=repo.split("/")[-1],
        version=None if settings.get("model_version") == "embedded" else settings.get("model_version"),
        steps=settings.get("updates"),
        batch_size=settings.get("batch_size"),
        export=export,
        base=base,
        trained=bool(settings),
        sheet=samples[0][0] if samples else None,
        networks=NETWORKS,
        parts=parts,
        draws=set(parts) <= {"prior", "decoder", "vqgan"},
        repo=repo,
        cascade=cascade,
        dtype="" if base.embedded else ", torch_dtype=torch.bfloat16",
        prompt=json.dumps(prompt, ensure_ascii=False),
        places=sets["webdataset_path"] + sets["dataset_name"],
        regularization=sets["regularization_path"],
        image_size=known.get("image_size"),
        ratios=known.get("multi_aspect_ratio"),
        settings=text,
        fence="`" * max(3, longest + 1),
        licence=RELEASED_LICENCE,
    )
    path = folder / CARD
    path.write_text(redacted(str(card)).rstrip("\n") + "\n", encoding="utf-8")
    return path


def read_export(folder: Path) -> Export:
    """The kinds of model in a folder, from its files alone.

    Raises:
        ValueError: there are none.
    """
    # A LoRA, learned tokens.
    kinds = ["lora"] if (folder / "pytorch_lora_weights.safetensors").is_file() else []
    tokens: tuple[str, ...] = ()
    learned = folder / "learned_embeds.safetensors"
    if learned.is_file():
        from safetensors import safe_open

        with safe_open(learned, framework="pt") as file:
            tokens = tuple(file.keys())
        kinds = kinds or ["tokens"]
    # Whole networks, by the class in their config.
    classes = {part.cls: kind for kind, part in NETWORKS.items()}
    for description in [folder / "config.json", *sorted(folder.glob("*/config.json"))]:
        if description.is_file():
            values = read_json(description)
            kind = classes.get(str(values.get("_class_name")), "")
            if not kind and "CLIP" in str(values.get("architectures")):
                kind = "text_encoder"
            kinds += [kind] if kind and kind not in kinds else []
    if not kinds:
        raise ValueError(f"'{folder}' holds no exported model; name the folder final/ of a training, or an export/")
    return Export(tuple(kinds), tokens)


def read_base(settings: Mapping[str, Any]) -> Base:
    """Where the untrained model came from, as far as the settings say."""
    place = settings.get("pretrained_model_name_or_path")
    version = settings.get("model_version")
    embedded = "embedded" in (place, version)
    own = settings.get("generator_checkpoint_path")
    hub = place if place and _is_hub_name(place) else None
    released = not embedded and version in ("3.6B", "1B", "3B", "700M")
    cascade = hub or ("stabilityai/stable-cascade" if released else None)
    if own == "scratch":
        return Base(cascade, None, False, embedded)
    shown = public_place(place) if place else "the released Stable Cascade" if released else None
    return Base(cascade, shown, released or str(hub).startswith("stabilityai/stable-cascade"), embedded)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that describe the model, without credentials and folders of the machine it was trained on."""
    hidden = keys_where(TRAINERS, card=False)
    return {key: _public(value) for key, value in settings.items() if key not in hidden and value is not None}


def public_place(place: str) -> str:
    """An address without credentials, a relative path or hub name as it is, of any other path the last name."""
    if "://" in place and not place.startswith("file:"):
        return bare_address(place)
    path = place.removeprefix("file://").removeprefix("file:")
    if path.startswith(("/", "~", "..")) or PureWindowsPath(path).is_absolute():
        return PureWindowsPath(path).name or path
    return path


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The config that a run wrote beside its checkpoints, found from final/ or export/; empty when there is none."""
    import yaml

    places = [folder.parent / "config.yaml", *sorted(folder.parent.glob("step-*/config.yaml"), reverse=True)]
    for place in places:
        if place.is_file():
            return yaml.safe_load(place.read_text(encoding="utf-8"))
    return {}


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return public_place(value) if _looks_like_a_place(value) else value
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in redacted(value).items()}
    return value


def _looks_like_a_place(value: str) -> bool:
    return "://" in value or value.startswith(("/", "~", "..", "file:")) or PureWindowsPath(value).is_absolute()


def _is_hub_name(place: str) -> bool:
    """Whether this names a hub repository rather than a folder."""
    return (
        place.count("/") == 1
        and not _looks_like_a_place(place)
        and not place.startswith(".")
        and (not Path(place).exists())
    )


def _write_samples(folder: Path, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Put the newest sheet and the images of its last row into the folder; names and prompts, the sheet first."""
    place = Path(str(settings.get("output_path", ""))) / str(settings.get("experiment_id", ""))
    sheets = sorted(place.glob("step-*.png")) if settings.get("experiment_id") else []
    if not sheets:
        return []
    (folder / SAMPLES).mkdir(exist_ok=True)
    shutil.copyfile(sheets[-1], folder / SAMPLES / "sheet.png")
    written = [(f"{SAMPLES}/sheet.png", "")]
    images = sheet_images(sheets[-1])
    last = [found for found in images if found.row == images[-1].row]
    for number, found in enumerate(last):
        name = f"{SAMPLES}/{number:02}.png"
        found.image.save(folder / name)
        written.append((name, found.caption))
    return written


def _metadata(export: Export, base: Base, samples: list[tuple[str, str]], repo: str) -> Any:
    """What the hub reads: licence, base, tags, and the images that the page of the model shows."""
    from huggingface_hub import ModelCardData

    # The licence is that of the base.
    adapter = export.kinds[0] in ("lora", "tokens", "controlnet")
    values: dict[str, Any] = {"library_name": "stable-cascade", "pipeline_tag": "text-to-image"}
    if base.released:
        values |= {
            "license": "other", "license_name": "stable-cascade-nc-community", "license_link": RELEASED_LICENCE,
        }  # fmt: skip
    elif base.embedded and base.name:
        values["license"] = "apache-2.0"
    if base.name and base.cascade:
        values |= {"base_model": base.cascade, "base_model_relation": "adapter" if adapter else "finetune"}
    # What the Hub shows: tags, trigger words, samples.
    values["tags"] = ["stable-cascade", "text-to-image", *export.kinds]
    if export.tokens:
        values["instance_prompt"] = ", ".join(export.tokens)
    shown = [{"text": prompt or repo, "output": {"url": name}} for name, prompt in samples[1:]]
    if shown:
        values["widget"] = shown
    return ModelCardData(**values)
