"""Noise: the golden pyramid, unit variance, and that a sample's draw depends on its seed alone."""

from __future__ import annotations

import pytest
import torch

from stable_cascade import diffusion as d
from tests.golden import entry, tensors


@pytest.mark.parametrize("case", ["sq", "wide", "noclip"])
def test_golden_pyramid(case):
    data, info = tensors("pyramid_noise"), entry("pyramid_noise")
    noise, limits = data[f"{case}.in.epsilon"], info["size_range"][case]
    sizes = d.pyramid_sizes(*noise.shape[-2:], size_range=limits and tuple(limits), levels=info["levels"], square=True)
    drawn = [data[f"{case}.in.offset.{i}"] for i in range(len(sizes))]
    assert f"{case}.in.offset.{len(sizes)}" not in data
    assert [tuple(values.shape[-2:]) for values in drawn] == list(sizes.values())
    actual = d.combine_pyramid(noise, dict(zip(sizes, drawn, strict=True)))
    torch.testing.assert_close(
        actual, data[f"{case}.out"], rtol=1e-4, atol=1e-5 * data[f"{case}.out"].abs().max().item()
    )


def test_pyramid_levels_have_the_images_shape():
    assert d.pyramid_sizes(24, 40) == {1: (12, 20), 2: (6, 10), 3: (3, 5), 4: (1, 2)}
    assert d.pyramid_sizes(40, 24) == {level: size[::-1] for level, size in d.pyramid_sizes(24, 40).items()}
    assert d.pyramid_sizes(24, 40, square=True)[1] == (12, 12)
    assert d.pyramid_sizes(24, 40, size_range=(4, 16)) == {1: (12, 20), 2: (6, 10)}
    assert d.pyramid_sizes(64, 64, size_range=None, levels=3) == {1: (32, 32), 2: (16, 16)}


def test_pyramid_noise_is_its_parts_and_has_unit_variance():
    noise = d.pyramid_noise((4, 24, 40), d.sample_generators(range(64), "noise"))
    assert noise.square().mean().item() == pytest.approx(1, abs=0.03)
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean().item()
    assert neighbours > 0.3  # white noise has 0
    generators = d.sample_generators([7], "noise")
    base = torch.randn(4, 24, 40, generator=generators[0])
    coarse = {
        level: torch.randn(4, *size, generator=generators[0])[None] for level, size in d.pyramid_sizes(24, 40).items()
    }
    assert torch.equal(noise[7:8], d.combine_pyramid(base[None], coarse))


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: d.gaussian_noise((3, 4, 5), g),
        lambda g: d.gaussian_noise((3, 4, 5), g, offset=0.1),
        lambda g: d.pyramid_noise((3, 8, 12), g),
        lambda g: d.training_times(g),
    ],
)
def test_a_sample_does_not_depend_on_its_batch(draw):
    seeds = [11, 5, 2**40, 0]
    together = draw(d.sample_generators(torch.tensor(seeds), "noise"))
    alone = torch.cat([draw(d.sample_generators([seed], "noise")) for seed in seeds])
    assert torch.equal(together, alone)
    assert together.dtype == torch.float32
    assert not torch.equal(together, draw(d.sample_generators(seeds, "other")))
    assert len({float(sample.flatten()[0]) for sample in together}) == len(seeds)


def test_streams_are_pinned():
    """A change of the recipe would change every training: these are its first numbers."""
    generators = d.sample_generators([0, 1, -1], "noise")
    assert [g.initial_seed() for g in generators] == PINNED


def test_offset_shifts_whole_channels():
    plain = d.gaussian_noise((3, 6, 6), d.sample_generators(range(4), "noise"))
    shifted = d.gaussian_noise((3, 6, 6), d.sample_generators(range(4), "noise"), offset=0.5)
    difference = shifted - plain
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), rtol=0, atol=1e-6)
    assert difference.std() > 0.2


def test_training_times_are_uniform_and_never_clean():
    times = d.training_times(d.sample_generators(range(4000), "time"))
    assert times.shape == (4000,)
    assert times.min() >= 0.001
    assert times.max() <= 1
    shares = torch.histogram(times, bins=10, range=(0.0, 1.0)).hist / 4000
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.02)


PINNED = [5083561941252096584, 597375901696841381, 5022765906814253201]
