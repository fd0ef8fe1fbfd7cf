"""The model card of an export: what it is, what it was made from, with which settings, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from stable_cascade.config import TRAINERS, keys_where
from stable_cascade.formats.json_files import read_json
from stable_cascade.redaction import bare_address, redacted
from stable_cascade.training.card_usage import usage
from stable_cascade.training.sheets import sheet_pictures

CARD, SAMPLES = "README.md", "samples"
RELEASED_LICENCE = "https://huggingface.co/stabilityai/stable-cascade/blob/main/LICENSE"
_PARTS = {
    "StableCascadePrior": "prior", "StableCascadeDecoder": "decoder", "StableCascadeVQGAN": "vqgan",
    "StableCascadeControlNet": "controlnet", "StableCascadeImageEncoder": "semantic_encoder",
    "StableCascadePreviewer": "previewer",
}  # fmt: skip
_TITLES = {
    "lora": "LoRA for Stage C of Stable Cascade", "tokens": "Learned tokens for Stable Cascade",
    "controlnet": "ControlNet for Stable Cascade", "prior": "Stage C (prior) of Stable Cascade",
    "decoder": "Stage B (decoder) of Stable Cascade", "vqgan": "Stage A (VQGAN) of Stable Cascade",
    "semantic_encoder": "image encoder of Stable Cascade", "previewer": "previewer of Stable Cascade",
    "text_encoder": "text encoder of Stable Cascade",
}  # fmt: skip


@dataclass(frozen=True)
class Export:
    """What an exported folder holds: kinds by the files that say so, and the trigger tokens."""

    kinds: tuple[str, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Base:
    """What the model was made from: the cascade's hub name, or a local one, or none."""

    cascade: str | None
    name: str | None
    released: bool
    embedded: bool


def write_model_card(folder: Path, settings: Mapping[str, Any], repo: str) -> Path:
    """Write README.md and the pictures it shows into an exported folder; returns the card's path.

    Args:
        settings: the training's config as a mapping; empty when nothing is known.

    Raises:
        ValueError: the folder holds no model.
    """
    export, base = read_export(folder), read_base(settings)
    samples = _write_samples(folder, settings)
    known = public_settings(settings)
    token = export.tokens[0] if export.tokens else ""
    prompts = [prompt for prompt in settings.get("validation_prompts") or () if token in prompt]
    prompt = prompts[0] if prompts else f"a picture of {token}" if token else "a picture"
    sections = [
        f"# {repo.split('/')[-1]}",
        _what(export, settings, base),
        _pictures(samples),
        "## How to use\n\n" + usage(export.kinds, repo, base.cascade, base.embedded, prompt),
        _data(known),
        _config(known),
        _licence(base),
    ]
    text = f"---\n{_front_matter(export, base, samples, repo)}---\n\n" + "\n\n".join(part for part in sections if part)
    path = folder / CARD
    path.write_text(redacted(text) + "\n", encoding="utf-8")
    return path


def read_export(folder: Path) -> Export:
    """The kinds of model in a folder, from its files alone.

    Raises:
        ValueError: there are none.
    """
    kinds = ["lora"] if (folder / "pytorch_lora_weights.safetensors").is_file() else []
    tokens: tuple[str, ...] = ()
    learned = folder / "learned_embeds.safetensors"
    if learned.is_file():
        from safetensors import safe_open

        with safe_open(learned, framework="pt") as file:
            tokens = tuple(file.keys())
        kinds = kinds or ["tokens"]
    for description in [folder / "config.json", *sorted(folder.glob("*/config.json"))]:
        if description.is_file():
            values = read_json(description)
            kind = _PARTS.get(str(values.get("_class_name")), "")
            if not kind and "CLIP" in str(values.get("architectures")):
                kind = "text_encoder"
            kinds += [kind] if kind and kind not in kinds else []
    if not kinds:
        raise ValueError(f"'{folder}' holds no exported model; name the folder final/ of a training, or an export/")
    return Export(tuple(kinds), tokens)


def read_base(settings: Mapping[str, Any]) -> Base:
    """Where the untrained model came from, as far as the settings tell."""
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
    """The settings that describe the model, without credentials, and without folders of the machine it was made on."""
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
    """Put the newest sheet and the pictures of its last row into the folder; names and prompts, the sheet first."""
    import shutil

    place = Path(str(settings.get("output_path", ""))) / str(settings.get("experiment_id", ""))
    sheets = sorted(place.glob("step-*.png")) if settings.get("experiment_id") else []
    if not sheets:
        return []
    (folder / SAMPLES).mkdir(exist_ok=True)
    shutil.copyfile(sheets[-1], folder / SAMPLES / "sheet.png")
    written = [(f"{SAMPLES}/sheet.png", "")]
    pictures = sheet_pictures(sheets[-1])
    last = [found for found in pictures if found.row == pictures[-1].row]
    for number, found in enumerate(last):
        name = f"{SAMPLES}/{number:02}.png"
        found.picture.save(folder / name)
        written.append((name, found.caption))
    return written


def _front_matter(export: Export, base: Base, samples: list[tuple[str, str]], repo: str) -> str:
    """The YAML that the hub reads."""
    import yaml

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
    values["tags"] = ["stable-cascade", "text-to-image", *export.kinds]
    if export.tokens:
        values["instance_prompt"] = ", ".join(export.tokens)
    shown = [{"text": prompt or repo, "output": {"url": name}} for name, prompt in samples[1:]]
    if shown:
        values["widget"] = shown
    return redacted(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _what(export: Export, settings: Mapping[str, Any], base: Base) -> str:
    """The first paragraph."""
    title = " and ".join(_TITLES[kind] for kind in export.kinds)
    text = f"{title[0].upper()}{title[1:]}"
    if settings.get("model_version") not in (None, "embedded"):
        text += f", {settings['model_version']} version"
    if settings.get("updates"):
        text += f", trained for {settings['updates']:,} steps of {settings.get('batch_size')} pictures"
    lines = [text + "."]
    if base.name:
        lines.append(f"Base: {'the embedded cascade of the package' if base.embedded else base.name}.")
    elif settings:
        lines.append("Base: none, the weights were newly initialised.")
    if export.tokens:
        lines.append(f"Trigger tokens: {', '.join(f'`{token}`' for token in export.tokens)}.")
    return "\n\n".join(lines)


def _pictures(samples: list[tuple[str, str]]) -> str:
    return f"## Samples\n\n![the last preview sheet of the training]({samples[0][0]})" if samples else ""


def _data(known: Mapping[str, Any]) -> str:
    """The pictures it was trained on."""
    lines = []
    for key in ("webdataset_path", "dataset_name", "regularization_path"):
        value = known.get(key)
        places = value if isinstance(value, list) else [value] if value else []
        lines += [f"- `{place}`{' (regularisation)' if key == 'regularization_path' else ''}" for place in places]
    if not lines:
        return ""
    ratios = f", aspect ratios {', '.join(known['multi_aspect_ratio'])}" if known.get("multi_aspect_ratio") else ""
    return "## Data\n\n" + "\n".join(lines) + f"\n\nPictures of {known.get('image_size')} px{ratios}."


def _config(known: Mapping[str, Any]) -> str:
    """The training's settings."""
    import yaml

    if not known:
        return ""
    return f"## Training\n\n```yaml\n{yaml.safe_dump(dict(known), sort_keys=False, allow_unicode=True)}```"


def _licence(base: Base) -> str:
    if base.released:
        return (
            "## Licence\n\nA derivative of the released Stable Cascade weights, and so bound by their "
            f"[non-commercial research community licence]({RELEASED_LICENCE})."
        )
    if base.embedded and base.name:
        return "## Licence\n\nThe embedded cascade it was made from is under Apache-2.0; the data has its own licence."
    return ""
