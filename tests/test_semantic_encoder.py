import pytest
import torch
from safetensors.torch import save_file

from stable_cascade.models.semantic_encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EfficientNetFeatures,
    InvertedBottleneck,
    StableCascadeSemanticEncoder,
)
from tests.golden import assert_matches, entry, fill, tensors

TINY = {
    "latent_channels": 5,
    "stem_width": 8,
    "block_types": ["fused", "fused", "mbconv"],
    "widths": [8, 12, 16],
    "depths": [1, 2, 2],
    "strides": [1, 2, 2],
    "expansions": [1, 2, 3],
    "head_width": 20,
    "stochastic_depth": 0.0,
}


def tiny_encoder(**config):
    torch.manual_seed(0)
    return StableCascadeSemanticEncoder(**(TINY | config))


@pytest.fixture(scope="module")
def golden_encoder():
    model = StableCascadeSemanticEncoder(image_mean=[0, 0, 0], image_std=[1, 1, 1]).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict(fill(shapes, entry("io_effnet")["fill"]))
    return model


@pytest.mark.parametrize("size", ["a", "odd", "big"])
def test_matches_the_original(golden_encoder, size):
    with torch.no_grad():
        latents = golden_encoder(tensors("io_effnet")[f"in.{size}"])
    assert_matches("io_effnet", f"out.{size}", latents)


def test_every_stage_matches_the_original(golden_encoder):
    x = tensors("io_effnet")["in.a"]
    with torch.no_grad():
        for number, stage in enumerate(golden_encoder.backbone):
            x = stage(x)
            assert_matches("io_effnet", f"out.stage{number}_absmean.a", x.abs().mean(dim=(0, 2, 3))[:24])


def test_pixels_are_normalised_inside():
    model, pixels = tiny_encoder().eval(), torch.rand(2, 3, 32, 48)
    raw = tiny_encoder(image_mean=[0, 0, 0], image_std=[1, 1, 1]).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), raw((pixels - mean) / std))
        assert not torch.allclose(model(pixels), raw(pixels))


@pytest.mark.parametrize(("strides", "total"), [([1, 2, 2], 8), ([1, 1, 1], 2), ([2, 2, 2], 16)])
def test_the_stride_is_that_of_the_latents(strides, total):
    model = tiny_encoder(strides=strides).eval()
    assert model.stride == total
    with torch.no_grad():
        assert model(torch.rand(1, 3, 2 * total, 3 * total)).shape == (1, 5, 2, 3)
        assert model(torch.rand(1, 3, 2 * total - 1, total + 1)).shape == (1, 5, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(dtype):
    model, pixels = tiny_encoder().train(), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        for _ in range(50):
            model(pixels)  # moves the running statistics to where a trained encoder has them
        model.eval()
        exact = model(pixels)
        rough = model.to(dtype)(pixels)
    assert rough.dtype == dtype
    assert (rough - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_the_latents_have_unit_variance_in_training():
    latents = tiny_encoder().train()(torch.rand(8, 3, 64, 64))
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(5), atol=0.02, rtol=0)


def test_checkpointing_changes_neither_gradients_nor_statistics():
    outcomes = []
    for checkpointed in (False, True):
        model = tiny_encoder(stochastic_depth=0.9).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).pow(3).mean().backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        outcomes.append(gradients | dict(model.named_buffers()))
    assert any("num_batches_tracked" in name for name in outcomes[0])
    for name, value in outcomes[0].items():
        torch.testing.assert_close(value, outcomes[1][name], msg=name)


def test_stochastic_depth_skips_whole_samples_in_training_only():
    torch.manual_seed(0)
    block, x = InvertedBottleneck(4, 4, fused=True, expansion=2, stride=1, drop=0.5), torch.randn(64, 4, 6, 6)
    changed = (block.train()(x) - x).abs().amax(dim=(1, 2, 3)) > 0
    assert 16 < changed.sum() < 48
    assert ((block.eval()(x) - x).abs().amax(dim=(1, 2, 3)) > 0).all()
    drops = [m.drop for m in EfficientNetFeatures().modules() if isinstance(m, InvertedBottleneck)]
    assert drops == pytest.approx([0.005 * n for n in range(40)])


def test_saves_and_loads(tmp_path):
    model = tiny_encoder(image_std=[1, 2, 3]).eval()
    model.save_pretrained(tmp_path)
    back = StableCascadeSemanticEncoder.from_pretrained(tmp_path).eval()
    assert back.stride == model.stride
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(back(pixels), model(pixels))


def test_single_file_in_original_names(golden_encoder, tmp_path):
    save_file(golden_encoder.state_dict(), tmp_path / "effnet_encoder.safetensors")
    model = StableCascadeSemanticEncoder.from_single_file(
        tmp_path / "effnet_encoder.safetensors", torch_dtype=torch.float16
    )
    assert model.dtype == torch.float16
    assert model.stride == 32
    torch.testing.assert_close(model.mapper[0].weight, golden_encoder.mapper[0].weight.half())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": [8, 12]}, "widths has 2 entries for 3 block_types"),
        ({"depths": [1, 0, 2]}, "every entry must be at least 1"),
        ({"block_types": ["fused", "dense", "mbconv"]}, "'dense'; allowed: 'fused', 'mbconv'"),
        ({"image_mean": [0.5]}, "image_mean has 1 entries for in_channels=3"),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_encoder(**config)


def test_wrong_pixels_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 32, 32\); expected \(batch, 3"):
        tiny_encoder()(torch.rand(1, 4, 32, 32))
    with pytest.raises(ValueError, match="divide by 255"):
        tiny_encoder()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
