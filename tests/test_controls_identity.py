"""Faces on real photographs: where they are, whose they are, and what is painted of them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stable_cascade.controls import CascadeFaceEmbedder, FaceEmbedder, InsightFaceEmbedder, check_filter, make_filter
from stable_cascade.diffusion.noise import sample_generators

# The astronaut's face, in the photograph of 512 x 512: left, top, right, bottom.
FACE = torch.tensor([175.0, 66.0, 275.0, 168.0])


@pytest.fixture(scope="module")
def astronaut() -> torch.Tensor:
    from skimage import data

    return torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def two_faces(astronaut) -> torch.Tensor:
    """The photograph on the left, its mirror image, smaller, on the right."""
    canvas = torch.full((3, 384, 768), 0.5)
    canvas[:, :, :384] = F.interpolate(astronaut[None], size=384, mode="bilinear", antialias=True)[0]
    canvas[:, :320, 448:] = F.interpolate(astronaut.flip(-1)[None], size=320, mode="bilinear", antialias=True)[0]
    return canvas


@pytest.fixture(scope="module")
def embedder() -> CascadeFaceEmbedder:
    return CascadeFaceEmbedder()


class FixedFaces:
    """An embedder that finds what it is told to: a box and a vector for each."""

    size = 512

    def __init__(self, boxes):
        self.boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)

    def __call__(self, image):
        return self.boxes, torch.eye(512)[: len(self.boxes)]


def overlap(first, second) -> float:
    corners = torch.cat([torch.maximum(first, second)[:2], torch.minimum(first, second)[2:]])
    sides = [(box[2] - box[0]).clamp_min(0) * (box[3] - box[1]).clamp_min(0) for box in (corners, first, second)]
    return float(sides[0] / (sides[1] + sides[2] - sides[0]))


def only_face(embedder, image) -> torch.Tensor:
    boxes, vectors = embedder(image)
    assert len(boxes) == 1
    return vectors[0]


def test_the_face_of_a_photograph_is_found(embedder, astronaut):
    assert isinstance(embedder, FaceEmbedder)
    boxes, vectors = embedder(astronaut)
    assert boxes.shape == (1, 4)
    assert overlap(boxes[0], FACE) > 0.8
    assert vectors.shape == (1, 512)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(embedder(astronaut)[1], vectors, rtol=0, atol=0)


def test_an_image_without_faces_has_none(embedder):
    from skimage import data

    coffee = torch.from_numpy(data.coffee().copy()).permute(2, 0, 1).float() / 255
    boxes, vectors = embedder(coffee)
    assert boxes.shape == (0, 4)
    assert vectors.shape == (0, 512)


def test_one_shot_stays_close_and_other_people_do_not(embedder, astronaut):
    from skimage import data

    own = only_face(embedder, astronaut)
    enlarged = F.interpolate(astronaut[None], size=768, mode="bilinear", antialias=True)[0]
    changed = [enlarged, astronaut * 0.6, astronaut.roll((20, -30), (1, 2)), (astronaut - 0.5) * 0.7 + 0.5]
    assert min(float(own @ only_face(embedder, image)) for image in changed) > 0.8
    similar, crops = [], torch.from_numpy(data.lfw_subset()[:8]).float()  # faces of Labeled Faces in the Wild
    for crop in F.interpolate(crops[:, None], size=120, mode="bicubic").clamp(0, 1):
        image = torch.full((3, 200, 200), 0.5)
        image[:, 40:160, 40:160] = crop
        similar += [float(own @ vector) for vector in embedder(image)[1]]
    assert len(similar) >= 6
    assert max(similar) < 0.6


def test_the_vector_is_painted_over_the_face(astronaut, embedder):
    control = make_filter("IdentityFilter", {"embedder": "cascade"})(astronaut[None])
    assert control.shape == (1, 512, 16, 16)
    left, top, right, bottom = (FACE / 32).round().int().tolist()
    vector = only_face(embedder, astronaut)
    assert torch.equal(
        control[0, :, top:bottom, left:right], vector[:, None, None].expand(-1, bottom - top, right - left)
    )
    assert int(control.abs().sum(dim=1).count_nonzero()) == (bottom - top) * (right - left)


def test_at_most_max_faces_the_largest_first(two_faces):
    def painted(max_faces):
        control_filter = make_filter("IdentityFilter", {"embedder": "cascade", "max_faces": max_faces})
        columns = control_filter(two_faces[None])[0].abs().sum(dim=(0, 1))
        return bool(columns[:12].any()), bool(columns[13:].any())

    assert painted(4) == (True, True)
    assert painted(1) == (True, False)


def test_faces_are_dropped_as_often_as_asked_and_never_without_generators():
    control_filter = make_filter("IdentityFilter", {"embedder": FixedFaces([[0, 0, 64, 64], [96, 96, 128, 128]])})
    images = torch.zeros(300, 3, 128, 128)
    control_filter.p_drop = 0.3
    control = control_filter(images, sample_generators(range(300), "control"))
    first, second = control[:, 0, 0, 0], control[:, 1, 3, 3]
    assert 0.2 < 1 - first.mean() < 0.4
    assert 0.2 < 1 - second.mean() < 0.4
    assert torch.all(control_filter(images[:20])[:, 0, 0, 0] == 1)


def test_an_only_face_may_cover_the_whole_image_and_one_of_two_never():
    generators = sample_generators(range(200), "control")
    params = {"p_drop": 0.0, "p_full": 0.3}
    one = make_filter("IdentityFilter", {**params, "embedder": FixedFaces([[0, 0, 32, 32]])})
    full = one(torch.zeros(200, 3, 96, 128), generators)[:, 0].mean(dim=(1, 2)) == 1
    assert 0.2 < full.float().mean() < 0.4
    assert not (one(torch.zeros(20, 3, 96, 128))[:, 0].mean(dim=(1, 2)) == 1).any()
    two = make_filter("IdentityFilter", {**params, "embedder": FixedFaces([[0, 0, 32, 32], [64, 64, 96, 96]])})
    control = two(torch.zeros(50, 3, 96, 128), sample_generators(range(50), "control"))
    assert torch.all(control[:, :2].sum(dim=(1, 2, 3)) == 2)


@pytest.mark.parametrize("box", [[-50, -50, 10, 10], [120, 120, 400, 400], [60, 60, 61, 61]])
def test_faces_at_the_border_and_small_ones_get_a_cell(box):
    control = make_filter("IdentityFilter", {"embedder": FixedFaces([box])})(torch.zeros(1, 3, 130, 130))
    assert control.shape[-2:] == (4, 4)
    assert control.sum() == 1


def test_insightface_gets_bgr_and_gives_arcface_vectors(astronaut):
    class App:
        """The interface of insightface.app.FaceAnalysis that is used: get(bgr) -> faces."""

        def get(self, bgr):
            self.seen = bgr
            embedding = np.full(512, 3.0, dtype=np.float32)
            return [SimpleNamespace(bbox=np.array([32.0, 64.0, 96.0, 128.0]), embedding=embedding)]

    app = App()
    control = make_filter("IdentityFilter", {"embedder": InsightFaceEmbedder(app=app)})(astronaut[None])
    assert app.seen.dtype == np.uint8
    expected = (astronaut.permute(1, 2, 0).numpy()[:, :, ::-1] * 255).round().astype(np.uint8)
    assert np.array_equal(app.seen, expected)
    assert torch.allclose(control[0, :, 2:4, 1:3], torch.tensor(512**-0.5))


def test_without_insightface_the_error_names_both_ways_out(monkeypatch):
    for name in ("insightface", "insightface.app"):
        monkeypatch.setitem(sys.modules, name, None)
    control_filter = make_filter("IdentityFilter", {"max_faces": 4, "p_drop": 0.05, "p_full": 0.3})
    assert control_filter.channels == 512
    with pytest.raises(ValueError, match=r"stable-cascade\[identity\].*embedder: cascade"):
        check_filter(control_filter)


def test_an_embedder_of_ones_own_by_name(astronaut):
    values = {"embedder": "tests.test_controls_identity:FixedFaces", "embedder_params": {"boxes": [[0, 0, 512, 512]]}}
    assert torch.all(make_filter("IdentityFilter", values)(astronaut[None])[0, 0] == 1)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"embedder": "insigtface"}, r"embedder 'insigtface' is unknown; nearest: 'insightface'"),
        (
            {"embedder": "cascade", "embedder_params": {"sid": 3}},
            r"embedder_params 'sid' is unknown .*nearest: 'side'",
        ),
        ({"embedder": len}, "needs `size`"),
        ({"embedder": FixedFaces([]), "embedder_params": {"side": 3}}, "given by name"),
        ({"max_faces": 0}, "max_faces is 0; allowed: a whole number from 1"),
        ({"p_drop": 1.5}, r"p_drop is 1.5; allowed: a number in \[0, 1\]"),
        ({"p_full": "often"}, "p_full is 'often'"),
    ],
)
def test_refused_parameters(params, message):
    with pytest.raises(ValueError, match=message) as error:
        make_filter("IdentityFilter", params)
    assert "\n" not in str(error.value)


def test_an_embedder_with_vectors_of_another_length_is_refused():
    class Short(FixedFaces):
        size = 128

    with pytest.raises(
        ValueError, match=r"Short gave boxes \(1, 4\) and vectors \(1, 512\); expected \(N, 4\) and \(N, 128\)"
    ):
        make_filter("IdentityFilter", {"embedder": Short([[0, 0, 9, 9]])})(torch.zeros(1, 3, 64, 64))
