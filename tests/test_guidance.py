"""Methods of guidance: laws of adaptive projected guidance, and the table in a pipeline."""

from __future__ import annotations

import pytest
import torch

from stable_cascade.diffusion import guidance
from stable_cascade.diffusion.guidance import GUIDANCES, Guided, project
from stable_cascade.drawing import Drawing, Session
from stable_cascade.schedulers import StableCascadeScheduler
from tests.tiny_cascade import tiny_prior
from tests.tiny_pipelines import cascade


def noise(seed, *shape):
    return torch.randn(shape or (2, 3, 4, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_of(scale, memory=None):
    """A run whose predictions are clean samples themselves."""
    return Guided(scale, 0.7, lambda x: x, lambda x: x, {} if memory is None else memory)


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def test_only_what_is_orthogonal_is_added():
    better, worse = noise(0), noise(0) + 0.01 * noise(1)  # shorter than the bound
    added = project(better, worse, run_of(5.0)) - better
    assert dot(added, better).abs().max() < 1e-9
    difference = better - worse
    expected = 4 * (difference - (dot(difference, better) / dot(better, better))[:, None, None, None] * better)
    torch.testing.assert_close(added, expected, rtol=1e-9, atol=1e-9)


def test_a_parallel_difference_adds_nothing_and_scale_one_changes_nothing():
    better = noise(0)
    torch.testing.assert_close(project(better, 0.98 * better, run_of(8.0)), better, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(project(better, noise(1), run_of(1.0)), better, rtol=1e-12, atol=1e-12)


def test_the_difference_is_bounded_per_sample():
    better, worse = noise(0), noise(1)
    worse[1] = better[1] + 0.001 * noise(2)[1]
    lengths = (project(better, worse, run_of(2.0)) - better).square().mean((1, 2, 3)).sqrt()
    assert lengths[0] <= guidance.LARGEST_DIFFERENCE * (1 + 1e-9)
    assert 0.0005 < lengths[1] < 0.0011
    assert project(torch.zeros_like(better), torch.zeros_like(better), run_of(3.0)).isfinite().all()


def test_momentum_takes_half_of_the_differences_before_away():
    memory = {}
    better, first, second = noise(0), noise(0) - 0.01 * noise(1), noise(0) - 0.01 * noise(2)
    project(better, first, run_of(3.0, memory))
    torch.testing.assert_close(memory["difference"], 0.01 * noise(1), rtol=1e-9, atol=1e-9)
    project(better, second, run_of(3.0, memory))
    torch.testing.assert_close(memory["difference"], 0.01 * noise(2) - 0.005 * noise(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_predictions_become_clean_samples_and_back(kind):
    scheduler = StableCascadeScheduler(prediction_type=kind, shift=2.0)
    prediction, sample = noise(0), noise(1)
    clean = scheduler.to_clean(prediction, 0.6, sample)
    torch.testing.assert_close(scheduler.from_clean(clean, 0.6, sample), prediction, rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps(timesteps=[0.6, 0.3])
    torch.testing.assert_close(scheduler.step(prediction, 0.6, sample).pred_original_sample, clean)


@pytest.mark.parametrize("method", [name for name in GUIDANCES if name != "cfg"])
def test_a_method_acts_and_one_run_leaves_nothing_to_the_next(method):
    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        return cascade()("red dog", generator=generator, prior_num_inference_steps=3, num_inference_steps=2,
                         output_type="pt", **options).images  # fmt: skip

    guided = draw(guidance_method=method, prior_guidance_scale=6.0)
    assert torch.equal(guided, draw(guidance_method=method, prior_guidance_scale=6.0))
    assert not torch.equal(guided, draw(prior_guidance_scale=6.0))
    unguided = {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0}
    assert torch.equal(draw(guidance_method=method, **unguided), draw(**unguided))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="guidance_method 'pag' is not one of cfg, apg"):
        cascade()("red dog", guidance_method="pag")
    with pytest.raises(TypeError, match="argument 'guidance_methd'; did you mean 'guidance_method'"):
        cascade()("red dog", guidance_methd="apg")


def drawn(**options):
    generator = torch.Generator().manual_seed(0)
    few = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "output_type": "pt"}
    return cascade()("red dog", generator=generator, **few, **options).images


def test_a_guide_that_is_the_prior_itself_changes_nothing():
    """Autoguidance adds the difference to the worse prior: here none, whatever the scale."""
    guided = drawn(prior_guidance_scale=5.0, guide_prior=cascade().prior)
    torch.testing.assert_close(guided, drawn(prior_guidance_scale=1.0), rtol=1e-4, atol=1e-4)


def test_a_worse_prior_guides_where_guidance_acts():
    guide = tiny_prior()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(0.9)
    plain = drawn(prior_guidance_scale=1.0)
    assert not torch.equal(drawn(prior_guidance_scale=3.0, guide_prior=guide), plain)
    assert torch.equal(drawn(prior_guidance_scale=1.0, guide_prior=guide), plain)
    never = {"guidance_interval": (0.0, 0.0), "decoder_guidance_scale": 1.0}
    unguided = drawn(prior_guidance_scale=1.0, decoder_guidance_scale=1.0)
    # Prompt and negative prompt are embedded in one batch, whose last bit is another.
    torch.testing.assert_close(
        drawn(prior_guidance_scale=3.0, guide_prior=guide, **never), unguided, atol=1e-4, rtol=0
    )


def test_what_is_no_prior_of_this_text_encoder_is_refused():
    for guide in (tiny_prior(clip_text_in_channels=64), cascade().decoder, "prior"):
        with pytest.raises(ValueError, match=f"guide_prior is a {type(guide).__name__} that does not read"):
            drawn(guide_prior=guide)


def test_the_command_draws_with_a_worse_prior_and_its_image_says_so(tmp_path):
    from stable_cascade.cli.main import main
    from stable_cascade.drawing import read_drawing
    from stable_cascade.embedded import embedded_path

    guide = str(embedded_path())
    few = ["--steps", "2", "--decoder-steps", "1", "--output", str(tmp_path / "apple.png")]
    assert not main(["generate", "red apple", "--guide-prior", guide, *few])
    assert read_drawing(tmp_path / "apple.png").guide_prior == guide
    assert main(["generate", "red apple", "--guide-prior", str(tmp_path / "none"), *few]) == 2


def test_a_negative_prompt_beside_a_worse_prior_is_refused():
    with pytest.raises(ValueError, match="negative_prompt and guide_prior are both given"):
        drawn(guide_prior=cascade().prior, negative_prompt="blue")
    with pytest.raises(ValueError, match="negative_prompt and guide_prior are both given"):
        Session().check(Drawing(guide_prior="small", negative_prompt="blue", prompt="red apple"))
