"""What can be set on the page, in the order in which the widgets' values arrive, and the files to choose from."""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stable_cascade.drawing import Drawing, Drawn, save_image
from stable_cascade.drawing.png import slug
from stable_cascade.drawing.request import STRENGTHS, ControlChoice, LoraChoice
from stable_cascade.wording import quoted

NONE = "none"
MOST_LORAS = 500
REFERENCES = 3
LORAS = 4
OWN_FILTER = "the ControlNet's own"
AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Form:
    """The values of the widgets, as the browser sends them: nothing of it is checked yet.

    What nobody changes is as in a new `Drawing`. Images are paths of uploaded files, or None. A side or shift of 0
    is left to the image or the model.
    """

    task: Any = Drawing.task
    prompt: Any = Drawing.prompt
    negative_prompt: Any = Drawing.negative_prompt
    weighted: Any = Drawing.weighted
    width: Any = 0
    height: Any = 0
    seed: Any = Drawing.seed
    new_seed: Any = True
    count: Any = 1
    prior_num_inference_steps: Any = Drawing.prior_num_inference_steps
    prior_guidance_scale: Any = Drawing.prior_guidance_scale
    num_inference_steps: Any = Drawing.num_inference_steps
    decoder_guidance_scale: Any = Drawing.decoder_guidance_scale
    guidance_method: Any = Drawing.guidance_method
    guidance_rescale: Any = Drawing.guidance_rescale
    cache_interval: Any = Drawing.cache_interval
    guidance_start: Any = Drawing.guidance_interval[0]
    guidance_end: Any = Drawing.guidance_interval[1]
    sampler: Any = AUTOMATIC
    shift: Any = 0
    preview: Any = Drawing.preview
    image: Any = None
    strength: Any = STRENGTHS["img2img"]
    reference_1: Any = None
    reference_2: Any = None
    reference_3: Any = None
    reference_weight_1: Any = 1.0
    reference_weight_2: Any = 1.0
    reference_weight_3: Any = 1.0
    edited: Any = None
    inpaint_strength: Any = STRENGTHS["inpaint"]
    controlnet: Any = NONE
    control_image: Any = None
    control_filter: Any = OWN_FILTER
    control_filtered: Any = ControlChoice.filtered
    control_scale: Any = ControlChoice.scale
    control_start: Any = ControlChoice.start
    control_end: Any = ControlChoice.end
    lora_1: Any = NONE
    lora_2: Any = NONE
    lora_3: Any = NONE
    lora_4: Any = NONE
    lora_weight_1: Any = LoraChoice.weight
    lora_weight_2: Any = LoraChoice.weight
    lora_weight_3: Any = LoraChoice.weight
    lora_weight_4: Any = LoraChoice.weight
    reconstructed: Any = None

    def numbered(self, name: str, count: int) -> list[Any]:
        """The values of `name_1` to `name_<count>`."""
        return [getattr(self, f"{name}_{number}") for number in range(1, count + 1)]


FIELDS = tuple(field.name for field in fields(Form))


def read_form(values: Any) -> Form:
    """The form of values that come in the order of `FIELDS`."""
    return Form(**dict(zip(FIELDS, values, strict=True)))


def lora_files(folder: Path | None) -> dict[str, Path]:
    """Name -> file of every .safetensors in the folder and its subfolders, sorted; links that lead out are left out.

    Learned tokens that lie beside a LoRA (`learned_embeds.safetensors`) come with it and are no choice.
    """
    if folder is None:
        return {}
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.name == "learned_embeds.safetensors" or not path.is_file() or not path.resolve().is_relative_to(root):
            continue
        found[_lora_name(path.relative_to(folder))] = path
        if len(found) == MOST_LORAS:
            break
    return found


def controlnet_paths(paths: Iterable[Path]) -> dict[str, Path]:
    """Name -> path, each name as short a tail of the path as tells it from the others."""
    return {_tail(path, list(paths)): path for path in paths}


def chosen(kind: str, name: object, known: Mapping[str, Path]) -> Path | None:
    """The path of a name; None for `none`.

    Raises:
        ValueError: a name that is not among the known ones.
    """
    if name in (None, "", NONE):
        return None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind} {quoted(name)} is not among the files the page was started with; choose it again")
    return known[name]


def name_of(path: str, known: Mapping[str, Path]) -> str | None:
    """The name under which a path is known, or a file of the same name where that is only one; None without."""
    same = [name for name, place in known.items() if str(place) == path]
    alike = [name for name, place in known.items() if place.name == Path(path).name]
    if same:
        return same[0]
    return alike[0] if len(alike) == 1 else None


def _lora_name(path: Path) -> str:
    """Diffusers' folders hold one file of always the same name; the folder's says more."""
    if path.name == "pytorch_lora_weights.safetensors" and path.parent != Path():
        return path.parent.as_posix()
    return path.as_posix()


def _tail(path: Path, paths: Sequence[Path]) -> str:
    parts = path.parts
    for length in range(1, len(parts) + 1):
        tail = parts[-length:]
        if sum(other.parts[-length:] == tail for other in paths) == 1:
            return "/".join(tail)
    return str(path)


MOST_SHOWN = 48
MOST_KEPT = 2000
_NAME = re.compile(r"[\w-]{1,60}-[0-9a-f]{16}\.png")
_IMAGES = ("image", "reference_1", "reference_2", "reference_3", "control_image", "reconstructed")


@dataclass(frozen=True)
class Entry:
    """A drawn image, and the widgets' values that it was asked for with, its own seed among them."""

    path: Path
    drawing: Drawing
    form: Form


class History:
    """The drawn images by name.

    A name cannot be guessed, so that whoever has it is who drew the image: that is how several people at one page
    see only their own.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, drawn: Drawn, form: Form) -> str:
        """The name of the new file; the oldest one goes when there are too many."""
        words = slug(drawn.drawing.prompt, 32) or drawn.drawing.task
        name = f"{words}-{drawn.drawing.seed}-{secrets.token_hex(8)}.png"
        path = save_image(drawn, self.folder / name)
        kept = replace(form, seed=drawn.drawing.seed, new_seed=False, count=1)
        with self._lock:
            self._entries[name] = Entry(path, drawn.drawing, kept)
            while len(self._entries) > MOST_KEPT:
                _, oldest = self._entries.popitem(last=False)
                oldest.path.unlink(missing_ok=True)
        return name

    def entries(self, names: Any) -> list[Entry]:
        """Those of the named images that are still there, in this order; what a browser made up is passed over."""
        return [entry for entry in map(self._entry, known_names(names)) if entry is not None]

    def entry(self, name: str) -> Entry:
        """The named image.

        Raises:
            ValueError: there is none, or no longer.
        """
        found = self._entry(name)
        if found is None:
            raise ValueError("this image is no longer there; the page keeps images while it runs")
        return found

    def _entry(self, name: str) -> Entry | None:
        entry = self._entries.get(name)
        return entry if entry is not None and entry.path.is_file() else None


def with_newest(names: Any, newest: Iterable[str]) -> list[str]:
    """The names with the newest first, as many as are shown."""
    return [*reversed(list(newest)), *known_names(names)][:MOST_SHOWN]


def known_names(names: Any) -> list[str]:
    """Those of the names that could be ours."""
    given = names if isinstance(names, list) else []
    return [name for name in given[:MOST_SHOWN] if isinstance(name, str) and _NAME.fullmatch(name)]


def values_of(entry: Entry) -> tuple[dict[str, Any], list[str]]:
    """The widgets' values of an entry, its images among them, and which of those are no longer there."""
    values = {field.name: getattr(entry.form, field.name) for field in fields(Form)}
    lost = [name for name in _IMAGES if values[name] and not Path(values[name]).is_file()]
    values |= dict.fromkeys(lost)
    edited = values["edited"] or {}
    files = [path for path in (edited.get("background"), *(edited.get("layers") or ())) if path]
    if not all(Path(path).is_file() for path in files):
        values["edited"] = None
        lost.append("edited")
    return values, ["its input image is no longer there; upload it again"] if lost else []
