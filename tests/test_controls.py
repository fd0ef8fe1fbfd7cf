"""Control-image filters on real photographs: shapes, ranges, laws, and what they make of black, white and flips."""

import subprocess
import sys

import cv2
import pytest
import torch
from torch.nn import functional as F

from stable_cascade import StableCascadeSemanticEncoder
from stable_cascade.controls import check_filter, make_filter, view_control
from stable_cascade.diffusion.noise import sample_generators
from tests.tiny_cascade import ENCODER, seeded

SALIENCY = hasattr(cv2, "saliency")
needs_saliency = pytest.mark.skipif(
    not SALIENCY, reason="OpenCV lacks saliency; opencv-contrib-python-headless has it"
)
SIDE = 192
SEEDS = [7, 11, 13]


def photograph(name: str, side: int = SIDE) -> torch.Tensor:
    """A photograph that scikit-image ships, (1, 3, side, side)."""
    from skimage import data

    image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 255
    shorter = min(image.shape[-2:])
    return F.interpolate(image[..., :shorter, :shorter], size=side, mode="bilinear", antialias=True).clamp(0, 1)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    return torch.cat([photograph(name) for name in ("astronaut", "coffee", "rocket")])


def generators(seeds=SEEDS):
    return sample_generators(seeds, "control")


def image_encoder():
    """The real image encoder at a tiny size: latents of an eighth of the sides."""
    encoder = seeded(lambda: StableCascadeSemanticEncoder(**ENCODER)).eval().requires_grad_(False)
    return lambda pixels: encoder(pixels)


def darken(image, **options):
    """A processor with the interface of controlnet_aux: PIL image in, PIL image out."""
    return image.point(lambda level: level // 2)


# Small images: the cascade is what takes the time here.
FACES = {"embedder": "cascade", "embedder_params": {"side": 160}, "p_drop": 0.5, "p_full": 0.5}
# name -> (parameters, channels, what the sides are divided by, draws)
FILTERS = {
    "CannyFilter": ({"resize": 224}, 1, 1, False),
    "InpaintFilter": (
        {"p_outpaint": 0.4, **({"thresold": [0.04, 0.4]} if SALIENCY else {"p_saliency": 0})},
        4,
        1,
        True,
    ),
    "SREffnetFilter": ({"scale_factor": 0.5}, 16, 8, False),
    "SRPixelFilter": ({}, 3, 1, False),
    "SRFilter": ({"scale_factor": 0.5}, 3, 1, False),
    "SoftEdgeFilter": ({}, 1, 1, True),
    "QRFilter": ({}, 1, 1, True),
    "IdentityFilter": (FACES, 512, 32, True),
    "ControlNetAuxFilter": ({"processor": darken}, 3, 1, False),
}


@pytest.fixture(scope="module")
def filters():
    encoder = image_encoder()
    return {name: make_filter(name, values[0], encode=encoder) for name, values in FILTERS.items()}


@pytest.mark.parametrize("name", FILTERS)
def test_shape_and_range(name, filters, photographs):
    _, channels, divisor, _ = FILTERS[name]
    assert filters[name].channels == channels
    for control in (filters[name](photographs), filters[name](photographs, generators())):
        assert control.shape == (3, channels, SIDE // divisor, SIDE // divisor)
        assert control.dtype == torch.float32
        assert not control.requires_grad
        if channels <= 4:
            assert control.min() >= 0
            assert control.max() <= 1
            assert control.std() > 0.05, "the photograph leaves a trace"


@pytest.mark.parametrize("name", FILTERS)
def test_without_generators_nothing_is_drawn(name, filters, photographs):
    state = torch.get_rng_state()
    first = filters[name](photographs[:1])
    torch.manual_seed(1234)
    assert torch.equal(filters[name](photographs[:1]), first)
    torch.set_rng_state(state)
    filters[name](photographs[:1], generators(SEEDS[:1]))
    assert torch.equal(torch.get_rng_state(), state), "a filter draws from its sample's generator alone"


@pytest.mark.parametrize("name", FILTERS)
def test_a_sample_depends_on_its_own_generator_alone(name, filters, photographs):
    whole = filters[name](photographs, generators())
    order = [2, 0, 1]
    shuffled = filters[name](photographs[order], generators([SEEDS[i] for i in order]))
    assert torch.equal(shuffled, whole[order])
    # Convolutions over batches of other sizes differ in the last bits.
    torch.testing.assert_close(filters[name](photographs[1:2], generators(SEEDS[1:2])), whole[1:2])


@pytest.mark.parametrize("name", [name for name, values in FILTERS.items() if values[3]])
def test_other_generators_give_other_controls(name, filters, photographs):
    image = photographs[:1]
    results = [filters[name](image, generators([seed])) for seed in range(6)]
    assert any(not torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", [name for name in FILTERS if name not in ("IdentityFilter", "SREffnetFilter")])
def test_sides_that_fit_nothing_and_half_precision(name, filters):
    image = photograph("coffee", 160)[..., :101, :].half()
    control = filters[name](image, generators([3]))
    assert control.shape[-2:] == (101, 160)
    assert control.dtype == torch.float32


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_even_images(level, filters):
    even = torch.full((1, 3, 96, 96), level)
    assert filters["CannyFilter"](even).max() == 0
    assert filters["SoftEdgeFilter"](even).max() < 1e-5
    assert torch.all(filters["QRFilter"](even) == 0.5)
    faint = even + 1e-4 * torch.rand(even.shape, generator=torch.Generator().manual_seed(0))
    assert torch.all(filters["QRFilter"](faint) == 0.5), "rounding is not made blobs of"
    assert torch.equal(filters["SRPixelFilter"](even), even)
    assert filters["IdentityFilter"](even).abs().max() == 0
    masked = filters["InpaintFilter"](even)
    assert 0.2 < masked[:, 3].mean() < 0.3, "nothing is salient: a box of half the sides"


def test_flipping_the_image_flips_soft_edges_and_blobs(filters, photographs):
    for name, tolerance in (("SoftEdgeFilter", 1e-4), ("QRFilter", 0.01)):
        flipped = filters[name](photographs.flip(-1)).flip(-1)
        assert (flipped - filters[name](photographs)).abs().mean() < tolerance, name


# Canny


def test_canny_is_opencv_at_224_with_the_originals_thresholds(filters, photographs):
    small = F.interpolate(photographs, size=(224, 224), mode="bilinear")
    levels = [(image * 255).permute(1, 2, 0).byte().numpy().copy() for image in small]
    edges = torch.stack([torch.from_numpy(cv2.Canny(level, 100, 200)) for level in levels])[:, None] / 255
    expected = F.interpolate(edges, size=(SIDE, SIDE), mode="bilinear")
    assert torch.equal(filters["CannyFilter"](photographs), expected)


def test_canny_finds_the_outline_of_a_square():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 16:48, 16:48] = 1
    edges = make_filter("CannyFilter", {"resize": None})(image)[0, 0]
    rows, columns = edges.nonzero(as_tuple=True)
    assert edges.unique().tolist() == [0, 1]
    assert 110 < len(rows) < 130, "four sides of 32"
    border = torch.stack([(rows - 15.5).abs(), (rows - 47.5).abs(), (columns - 15.5).abs(), (columns - 47.5).abs()])
    assert border.amin(dim=0).max() <= 1.5


# Soft edges


def test_soft_edges_are_strongest_at_the_outline_and_ignore_faint_noise():
    generator = torch.Generator().manual_seed(0)
    image = 0.2 + 0.01 * torch.rand(1, 3, 96, 96, generator=generator)
    assert make_filter("SoftEdgeFilter")(image).max() < 0.25
    image[..., 48:] += 0.6
    edges = make_filter("SoftEdgeFilter", {"resize": None})(image)[0, 0]
    assert edges[:, 46:50].amin(dim=0).max() > 0.9
    assert edges[:, :40].max() < 0.1
    assert edges[:, 56:].max() < 0.1


def test_dilation_thickens_and_binarising_leaves_two_values(photographs):
    thin = make_filter("SoftEdgeFilter", {"resize": None, "binarize": True, "dilation_kernels": [0]})(photographs)
    thick = make_filter("SoftEdgeFilter", {"resize": None, "binarize": True, "dilation_kernels": [5]})(photographs)
    assert thin.unique().tolist() == [0, 1]
    assert torch.all(thick >= thin)
    assert thick.mean() > 1.5 * thin.mean()


# QR


def test_a_qr_image_keeps_its_modules():
    modules = (torch.rand(25, 25, generator=torch.Generator().manual_seed(5)) > 0.5).float()
    bordered = F.pad(modules, (4, 4, 4, 4), value=1.0)
    image = F.interpolate(bordered[None, None], scale_factor=12).expand(1, 3, -1, -1)
    control = make_filter("QRFilter")(image)[0, 0]
    assert torch.equal(control[6::12, 6::12], bordered)


def test_blobs_are_each_images_own_thirds(filters, photographs):
    controls = filters["QRFilter"](photographs)
    brightness = photographs.amax(dim=1)
    for control, bright in zip(controls[:, 0], brightness, strict=True):
        assert bright[control > 0.9].mean() > bright[(control > 0.4) & (control < 0.6)].mean()
        assert bright[control < 0.1].mean() < bright[(control > 0.4) & (control < 0.6)].mean()
    dim = filters["QRFilter"](photographs * 0.5)
    torch.testing.assert_close(dim, controls, atol=1e-3, rtol=0)


# Inpainting


def test_masked_areas_are_white_and_the_rest_is_the_image(filters, photographs):
    control = filters["InpaintFilter"](photographs, generators())
    image, mask = control[:, :3], control[:, 3:]
    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(image, torch.where(mask > 0.5, 1.0, photographs))


def test_masks_of_ones_own(filters, photographs):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., :50, 100:] = 1
    control = filters["InpaintFilter"](photographs, masks=mask)
    assert torch.equal(control[:, 3:], mask.expand(3, -1, -1, -1))
    assert torch.all(control[:, :3, :50, 100:] == 1)
    assert torch.equal(control[:, :3, 50:], photographs[:, :, 50:])
    assert torch.equal(
        filters["InpaintFilter"](photographs, masks=mask.bool(), outpaint=True)[:, 3:], 1 - control[:, 3:]
    )


@needs_saliency
def test_lower_thresholds_mask_more_and_both_spellings_are_one(photographs):
    def share(value, key="threshold"):
        values = {key: [value, value], "p_saliency": 1, "p_strokes": 0, "p_outpaint": 0}
        return make_filter("InpaintFilter", values)(photographs, generators())[:, 3].mean(dim=(1, 2))

    low, high = share(0.04), share(0.4)
    assert torch.all(low > high)
    assert torch.all(low < 0.9)
    assert torch.all(high > 0.01)
    assert torch.equal(low, share(0.04, "thresold"))


@pytest.mark.parametrize("p_saliency", [0.0, pytest.param(1.0, marks=needs_saliency)])
def test_outpainting_masks_the_rest_as_often_as_it_is_asked_to(p_saliency, photographs):
    def masks(p_outpaint, seeds, side):
        values = {"p_outpaint": p_outpaint, "p_saliency": p_saliency, "p_strokes": 0}
        images = F.interpolate(photographs[:1], size=side).expand(len(seeds), -1, -1, -1)
        return make_filter("InpaintFilter", values)(images, generators(seeds))[:, 3]

    seeds, side = range(12 if p_saliency else 200), 48
    inside, outside, mixed = (masks(p, seeds, side) for p in (0.0, 1.0, 0.4))
    assert torch.equal(outside, 1 - inside)
    inverted = (mixed == outside).all(dim=2).all(dim=1)
    assert torch.equal(inverted, ~(mixed == inside).all(dim=2).all(dim=1))
    if len(seeds) == 200:
        assert 0.3 < inverted.float().mean() < 0.5


def test_strokes_and_boxes_cover_a_part(photographs):
    small = F.interpolate(photographs[:1], size=96).expand(60, -1, -1, -1)
    for p_strokes in (0, 1):
        mask = make_filter("InpaintFilter", {"p_saliency": 0, "p_strokes": p_strokes, "p_outpaint": 0})
        share = mask(small, generators(range(60)))[:, 3].mean(dim=(1, 2))
        assert 0.01 < share.min()
        assert share.max() < 0.75
        assert share.std() > 0.05


def test_a_saliency_that_opencv_lacks_is_an_error_with_a_remedy(monkeypatch, photographs):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"InpaintFilter needs cv2.*stable-cascade\[controls\].*p_saliency: 0"):
        make_filter("InpaintFilter")(photographs)
    assert make_filter("InpaintFilter", {"p_saliency": 0})(photographs, generators()).shape[1] == 4
    with pytest.raises(ValueError, match=r"CannyFilter needs cv2.*stable-cascade\[controls\]"):
        check_filter(make_filter("CannyFilter"))


# Super resolution


def test_semantic_latents_of_the_shrunk_image_enlarged(photographs):
    encode = image_encoder()
    control = make_filter("SREffnetFilter", {"scale_factor": 0.5}, encode=encode)(photographs)
    small = encode(photographs[:, :, ::2, ::2])
    assert torch.equal(control, small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).detach())


def test_an_image_enlarged_by_hand_is_the_small_image_again(filters):
    small = photograph("coffee", 48)
    enlarged = F.interpolate(small, scale_factor=4, mode="nearest")
    assert torch.equal(filters["SRPixelFilter"](enlarged), enlarged)


def test_super_resolution_without_an_encoder_says_so():
    control_filter = make_filter("SREffnetFilter")
    assert control_filter.channels == 16
    with pytest.raises(ValueError, match="no image encoder"):
        check_filter(control_filter)


# Images of control images


@pytest.mark.parametrize("name", FILTERS)
def test_every_control_image_has_an_image(name, filters, photographs):
    control = filters[name](photographs)
    image = view_control(control)
    assert image.shape == (3, 3, *control.shape[-2:])
    assert image.min() >= 0
    assert image.max() <= 1
    if control.shape[1] == 3:
        assert torch.equal(image, control)
    assert image[0].std() > 0.01


def test_images_of_masks_and_of_nothing():
    masked = torch.ones(1, 4, 8, 8)
    masked[:, 3, :4] = 0
    image = view_control(masked)
    assert torch.all(image[:, :, :4] == 1)
    assert not torch.allclose(image[:, 0, 4:], image[:, 1, 4:]), "the mask is tinted"
    assert torch.all(view_control(torch.zeros(1, 512, 4, 4)) == 0.5)
    with pytest.raises(ValueError, match="batch, channels, height, width"):
        view_control(torch.zeros(3, 8, 8))


def test_importing_controls_loads_no_extra():
    code = (
        "import sys\nfrom stable_cascade.controls import make_filter\n"
        "for name in ('CannyFilter', 'InpaintFilter', 'IdentityFilter', 'QRFilter'):\n    make_filter(name)\n"
        "print([name for name in ('cv2', 'skimage', 'insightface', 'controlnet_aux', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_controls_lie_on_the_images_device(filters, photographs):
    for name in set(FILTERS) - {"SREffnetFilter"}:
        control = filters[name](photographs.cuda(), generators())
        assert control.is_cuda, name
        assert torch.equal(control.cpu(), filters[name](photographs, generators())), name
