"""Filters by name: the guide's, a user's own, and what is refused before anything is loaded."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stable_cascade.controls import check_filter, filter_names, make_filter
from stable_cascade.models import StableCascadeControlNet

ROOT = Path(__file__).resolve().parents[1]
# The filters of the guide's configs: name, parameters -> channels.
GUIDE = [
    ("CannyFilter", {"resize": 224}, 1),
    ("InpaintFilter", {"thresold": [0.04, 0.4], "p_outpaint": 0.4}, 4),
    ("IdentityFilter", {"max_faces": 4, "p_drop": 0.05, "p_full": 0.3}, 512),
    ("IdentityFilter", {"max_faces": 4, "p_drop": 0.0, "p_full": 0.0}, 512),
    ("SREffnetFilter", {"scale_factor": 0.5}, 16),
]


class Brightness:
    channels = 1

    def __call__(self, pixels, generators=None):
        return pixels.mean(dim=1, keepdim=True)


class Latents(Brightness):
    channels = 16

    def __init__(self, gain, *, encode=None):
        self.gain, self.encode = gain, encode


class NoChannels:
    def __call__(self, pixels, generators=None):
        return pixels


class NoCall:
    channels = 3


class WrongCount(Brightness):
    channels = 2


class Failing(Brightness):
    def __call__(self, pixels, generators=None):
        raise RuntimeError("out of ink")


class NoTensor(Brightness):
    def __call__(self, pixels, generators=None):
        return None


HERE = "tests.test_controls_registry"


@pytest.mark.parametrize("name, params, channels", GUIDE)
def test_the_guides_filters_are_made_without_packages_or_weights(name, params, channels):
    control_filter = make_filter(name, params)
    assert control_filter.channels == channels
    assert name in filter_names()


@pytest.mark.parametrize(
    "name, params",
    [("CannyFilter", {}), ("QRFilter", {}), ("SRPixelFilter", {}), ("InpaintFilter", {}), ("SoftEdgeFilter", {})],
)
def test_a_controlnet_takes_what_the_filter_gives(name, params):
    control_filter = make_filter(name, params)
    small = {
        "stem_width": 8, "block_types": ["fused", "fused"], "widths": [8, 8], "depths": [1, 1], "strides": [1, 2],
        "expansions": [1, 2], "head_width": 16,
    }  # fmt: skip
    network = StableCascadeControlNet(control_filter.channels, 16, [0, 2], "effnet", small)
    residuals = network(control_filter(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))))
    assert [residual is None for residual in residuals] == [False, True, False]
    assert residuals[0].abs().max() == 0, "an untrained ControlNet changes nothing"


def test_a_trial_call_gives_the_size_of_the_control():
    assert check_filter(make_filter("CannyFilter")) == (64, 64)
    assert check_filter(make_filter("IdentityFilter", {"embedder": "cascade"}), size=96) == (3, 3)


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("CanyFilter", {}, r"controlnet_filter 'CanyFilter' is unknown; nearest: 'CannyFilter'; known: .*QRFilter"),
        ("cannyfilter", {}, r"nearest: 'CannyFilter'"),
        ("", {}, r"controlnet_filter is ''; allowed: .*'package.module:Class'"),
        ("PidiFilter", {}, r"use SoftEdgeFilter, or ControlNetAuxFilter"),
        (
            "CannyFilter",
            {"rezise": 224},
            r"controlnet_filter_params 'rezise' is unknown to CannyFilter; nearest: 'resize'",
        ),
        ("SRPixelFilter", {"radius": 1}, r"'radius' is unknown to SRPixelFilter; .*known: scale_factor"),
        ("SREffnetFilter", {"encode": 1}, r"holds 'encode', which SREffnetFilter is given by the program"),
        ("CannyFilter", {"resize": "224"}, r"resize is '224'; allowed: a whole number from 8 to 8192 or null"),
        ("CannyFilter", {"low": 300}, r"high is 200; allowed: a number in \[300"),
        ("InpaintFilter", {"thresold": [0.4, 0.04]}, r"threshold is \[0.4, 0.04\]; allowed: \[low, high\]"),
        ("InpaintFilter", {"thresold": [0.1, 0.2], "threshold": [0.1, 0.2]}, r"threshold and thresold"),
        ("InpaintFilter", {"threshold": 0.4}, r"threshold is 0.4; allowed: \[low, high\]"),
        ("InpaintFilter", {"p_outpaint": 2}, r"p_outpaint is 2; allowed"),
        ("InpaintFilter", {"p_saliency": 0.9, "p_strokes": 0.3}, r"add up to more than 1"),
        ("SREffnetFilter", {"scale_factor": 2}, r"scale_factor is 2; allowed: a number in \[0.01, 1\]"),
        ("QRFilter", {"dilation_kernels": [4]}, r"dilation_kernels is \[4\]; allowed: a list of odd numbers"),
        ("SoftEdgeFilter", {"threshold": "high"}, r"threshold is 'high'"),
        ("ControlNetAuxFilter", {}, r"controlnet_filter_params lacks 'processor', which ControlNetAuxFilter requires"),
        ("ControlNetAuxFilter", {"processor": 3}, r"processor is 3; give a class's name"),
        ("ControlNetAuxFilter", {"processor": "HEDdetector", "channels": 2}, r"channels is 2; allowed: 1, 3"),
        ("no.such.module:Class", {}, r"module 'no.such.module' cannot be imported \(ModuleNotFoundError"),
        (f"{HERE}:Brightnes", {}, r"has no 'Brightnes'; nearest: 'Brightness'"),
        (f"{HERE}:", {}, r"has no ''"),
        (f"{HERE}:ROOT", {}, r"not a class"),
        (f"{HERE}:NoChannels", {}, r"has channels None; set `channels`"),
        (f"{HERE}:NoCall", {}, r"cannot be called; define __call__\(self, pixels, generators=None\)"),
        (f"{HERE}:Latents", {}, r"lacks 'gain', which Latents requires"),
        (f"{HERE}:Brightness", {"gain": 1}, r"'gain' is unknown to Brightness; it takes none"),
    ],
)
def test_refusals_before_anything_is_loaded(name, params, message):
    with pytest.raises(ValueError, match=message) as error:
        make_filter(name, params)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("WrongCount", r"WrongCount gave \(1, 1, 64, 64\); expected \(1, 2, h, w\)"),
        ("Failing", r"Failing failed on a grey image: RuntimeError: out of ink"),
        ("NoTensor", r"NoTensor gave NoneType; expected \(1, 1, h, w\)"),
    ],
)
def test_a_trial_call_finds_what_a_filter_gets_wrong(name, message):
    with pytest.raises(ValueError, match=message):
        check_filter(make_filter(f"{HERE}:{name}"))


def test_own_class_by_module_and_the_encoder_where_it_asks_for_one():
    def encode(pixels):
        return pixels

    assert make_filter(f"{HERE}:Brightness", {}, encode=encode).channels == 1
    assert make_filter(f"{HERE}:Latents", {"gain": 2}, encode=encode).encode is encode


def test_wrong_images_and_generators_are_refused():
    control_filter = make_filter("QRFilter")
    for pixels in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "x"):
        with pytest.raises(ValueError, match=r"RGB images \(batch, 3, height, width\)"):
            control_filter(pixels)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        control_filter(torch.zeros(2, 3, 8, 8), [torch.Generator()])
    with pytest.raises(ValueError, match=r"masks has shape \(1, 1, 4, 4\); expected \(2, 1, 8, 8\)"):
        make_filter("InpaintFilter")(torch.zeros(2, 3, 8, 8), masks=torch.zeros(1, 1, 4, 4))


def install(folder: Path, name: str, module: str, source: str, line: str) -> None:
    """A package as pip leaves it: a module and a dist-info with an entry point."""
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[stable_cascade.controls]\n{line}\n")


GREY = """
    class Grey:
        channels = 1

        def __init__(self, level=0.5):
            self.level = level

        def __call__(self, pixels, generators=None):
            return 0 * pixels[:, :1] + self.level
"""


def test_a_filter_by_entry_point(tmp_path, monkeypatch):
    install(tmp_path, "grey-control", "grey_control", GREY, "GreyFilter = grey_control:Grey")
    monkeypatch.syspath_prepend(tmp_path)
    assert "GreyFilter" in filter_names()
    control_filter = make_filter("GreyFilter", {"level": 0.25})
    assert torch.all(control_filter(torch.ones(1, 3, 4, 4)) == 0.25)
    with pytest.raises(ValueError, match="nearest: 'GreyFilter'"):
        make_filter("GrayFilter")


def test_entry_points_that_cannot_be_used(tmp_path, monkeypatch):
    install(tmp_path, "a-control", "a_control", GREY, "AFilter = a_control:Gray\nCannyFilter = a_control:Grey")
    install(tmp_path, "b-control", "b_control", GREY, "BFilter = b_control:Grey")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'AFilter': its entry point 'a_control:Gray' cannot be loaded"):
        make_filter("AFilter")
    assert type(make_filter("CannyFilter")).__name__ == "CannyFilter", "a built-in name stays the built-in filter"
    install(tmp_path, "c-control", "c_control", GREY, "BFilter = c_control:Grey")
    with pytest.raises(ValueError, match="'BFilter' is registered twice"):
        filter_names()


# controlnet_aux


class Processor:
    """A processor with the interface of controlnet_aux, without weights."""

    def __init__(self):
        self.calls = []

    def to(self, device):
        self.device = device
        return self

    def __call__(self, image, detect_resolution=512, image_resolution=512, output_type="pil", gain=1, **options):
        self.calls.append((image.size, detect_resolution, image_resolution, output_type, gain))
        grey = image.convert("L").resize((image.width // 2, image.height // 2))
        return grey.point(lambda level: min(255, level * gain))


def test_a_processor_of_controlnet_aux():
    processor = Processor()
    params = {"processor": processor, "resolution": 256, "options": {"gain": 2}}
    pixels = torch.full((2, 3, 40, 60), 0.25)
    colours, grey = (make_filter("ControlNetAuxFilter", {**params, "channels": n})(pixels) for n in (3, 1))
    assert processor.calls == [((60, 40), 256, 256, "pil", 2)] * 4
    assert processor.device == torch.device("cpu")
    assert colours.shape == (2, 3, 40, 60)
    assert grey.shape == (2, 1, 40, 60)
    torch.testing.assert_close(grey, torch.full_like(grey, 128 / 255))


def test_a_processor_by_name(tmp_path, monkeypatch):
    source = "from tests.test_controls_registry import Processor\n\n\nclass TinyDetector(Processor):\n"
    source += (
        "    @classmethod\n    def from_pretrained(cls, folder):\n        made = cls()\n        made.folder = folder\n"
    )
    (tmp_path / "controlnet_aux.py").write_text(source + "        return made\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "controlnet_aux", raising=False)
    control_filter = make_filter("ControlNetAuxFilter", {"processor": "TinyDetector", "checkpoint": "weights"})
    assert check_filter(control_filter) == (64, 64)
    with pytest.raises(
        ValueError, match="processor 'TinyDetecter' is unknown to controlnet_aux; nearest: 'TinyDetector'"
    ):
        check_filter(make_filter("ControlNetAuxFilter", {"processor": "TinyDetecter"}))
    with pytest.raises(ValueError, match="'TinyDetector' has weights; give checkpoint"):
        check_filter(make_filter("ControlNetAuxFilter", {"processor": "TinyDetector", "checkpoint": None}))
    monkeypatch.delitem(sys.modules, "controlnet_aux")


def test_without_controlnet_aux_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(ValueError, match=r"needs controlnet_aux.*pip install 'stable-cascade\[controlnet_aux\]'"):
        check_filter(make_filter("ControlNetAuxFilter", {"processor": "HEDdetector"}))


def test_a_processor_that_returns_no_image_is_refused():
    def floats(image, **options):
        return torch.zeros(4, 4).numpy()

    with pytest.raises(ValueError, match=r"function returned \(4, 4, 3\) float32; expected an image of 8-bit levels"):
        check_filter(make_filter("ControlNetAuxFilter", {"processor": floats}))


# The documentation


def test_the_documented_filter_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "controls.md").read_text(encoding="utf-8")
    start = page.index("# my_filters.py")
    (tmp_path / "my_filters.py").write_text(page[start : page.index("```", start)])
    monkeypatch.syspath_prepend(tmp_path)
    control_filter = make_filter("my_filters:PosterFilter", {"levels": [2, 4]})
    assert check_filter(control_filter) == (64, 64)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = control_filter(pixels, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    again = control_filter(pixels[1:], [torch.Generator().manual_seed(2)])
    assert torch.equal(drawn[1:], again)
    assert len(control_filter(pixels).unique()) == 2


def test_every_filter_is_documented():
    page = (ROOT / "docs" / "controls.md").read_text(encoding="utf-8")
    assert not [name for name in filter_names() if f"`{name}" not in page]
