import pytest
import torch

from stable_cascade.files.presets import preset
from stable_cascade.models.controlnet import StableCascadeControlNet
from stable_cascade.models.previewer import StableCascadePreviewer
from stable_cascade.models.semantic_encoder import StableCascadeSemanticEncoder
from tests.golden import assert_matches, entry, fill, tensors

FEATURES = {
    "stem_width": 8,
    "block_types": ["fused", "mbconv"],
    "widths": [8, 12],
    "depths": [1, 2],
    "strides": [2, 2],
    "expansions": [1, 2],
    "head_width": 20,
}


def filled(model, name):
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict(fill(shapes, entry(name)["fill"]))
    return model.eval()


@pytest.mark.parametrize(("name", "hidden"), [("io_previewer", 512), ("io_previewer_small", 16)])
def test_previewer_matches_the_original(name, hidden):
    model, golden = filled(StableCascadePreviewer(16, hidden, 3), name), tensors(name)
    for key in golden:
        if key.startswith("in."):
            with torch.no_grad():
                assert_matches(name, key.replace("in.", "out."), model(golden[key]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_previewer_in_half_precision(dtype):
    model, latents = filled(StableCascadePreviewer(16, 16, 3), "io_previewer_small"), torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        exact = model(latents)
        rough = model.to(dtype)(latents)
    assert rough.dtype == dtype
    assert (rough - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_previewer_trains_saves_and_loads(tmp_path):
    model = StableCascadePreviewer(4, 8, 3)
    model(torch.randn(2, 4, 3, 5)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    latents = torch.randn(1, 4, 3, 5)
    back = StableCascadePreviewer.from_pretrained(tmp_path).eval()
    assert back(latents).shape == (1, 3, 24, 40)
    assert torch.equal(back(latents), model(latents))


def test_previewer_refuses_a_width_it_cannot_halve_twice():
    with pytest.raises(ValueError, match="hidden_channels is 10; must be a positive multiple of 4"):
        StableCascadePreviewer(16, 10, 3)


def golden_controlnet(name):
    config = entry(name)["config"]
    bottleneck = config["bottleneck_mode"] or "effnet"  # the original's None
    model = StableCascadeControlNet(config["c_in"], config["c_proj"], config["proj_blocks"], bottleneck)
    return filled(model, name)


@pytest.mark.parametrize(
    "kind", ["effnet_c1", "effnet_c3", "effnet_c4", "simple", pytest.param("large", marks=pytest.mark.slow)]
)
def test_controlnet_matches_the_original(kind):
    name = f"io_controlnet_{kind}"
    with torch.no_grad():
        residuals = golden_controlnet(name)(tensors(name)["in.image"])
    assert len(residuals) == entry(name)["list_length"]
    for index, residual in enumerate(residuals):
        if index in entry(name)["config"]["proj_blocks"]:
            assert_matches(name, f"out.proj.{index}", residual)
        else:
            assert residual is None


@pytest.mark.parametrize(
    ("bottleneck", "backbone", "grid"),
    [
        ("effnet", FEATURES, (8, 6)),
        ("simple", None, (64, 48)),
        ("large", {"hidden": 16, "width": 8, "depth": 2, "out_channels": 12}, (64, 48)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_bottleneck_starts_silent_and_trains(bottleneck, backbone, grid, channels):
    torch.manual_seed(0)
    model = StableCascadeControlNet(channels, 10, [0, 3], bottleneck, backbone)
    image = torch.rand(2, channels, 64, 48)
    residuals = model(image)
    assert [None if r is None else tuple(r.shape) for r in residuals] == [(2, 10, *grid), None, None, (2, 10, *grid)]
    assert not residuals[0].any()
    assert not residuals[3].any()
    sum((r - 1).square().mean() for r in residuals if r is not None).backward()
    assert model.projections[1][2].weight.grad.any()


@pytest.mark.parametrize("bottleneck", ["effnet", "large"])
def test_checkpointing_changes_nothing(bottleneck):
    backbone = {"effnet": FEATURES, "large": {"hidden": 16, "width": 8, "depth": 2, "out_channels": 12}}[bottleneck]
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = StableCascadeControlNet(1, 10, [0], bottleneck, backbone).train()
        torch.nn.init.normal_(model.projections[0][2].weight)
        if checkpointed:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(torch.linspace(0, 1, 2 * 32 * 32).view(2, 1, 32, 32))[0].square().mean().backward()
        outcomes.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_controlnet_in_half_precision(dtype):
    model, image = golden_controlnet("io_controlnet_simple"), tensors("io_controlnet_simple")["in.image"]
    with torch.no_grad():
        exact = model(image)[0]
        rough = model.to(dtype)(image)[0]
    assert rough.dtype == dtype
    assert (rough - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_controlnet_saves_and_loads(tmp_path):
    model = StableCascadeControlNet(1, 10, (2, 0), "effnet", FEATURES).eval()
    torch.nn.init.normal_(model.projections[0][2].weight)
    model.save_pretrained(tmp_path)
    back = StableCascadeControlNet.from_pretrained(tmp_path).eval()
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(back(image)[2], model(image)[2])
    assert back(image)[2].any()
    assert not back(image)[0].any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_controlnet_starts_from_the_image_encoder(channels):
    encoder = StableCascadeSemanticEncoder(**FEATURES)
    model = StableCascadeControlNet(channels, 10, [0], "effnet", FEATURES)
    model.load_backbone(encoder.backbone)
    stem, source = model.backbone[0][0].weight, encoder.backbone[0][0].weight
    shared = min(channels, 3)
    assert torch.equal(stem[:, :shared], source[:, :shared])
    assert not stem[:, shared:].any()
    assert torch.equal(model.backbone[1][0].block[0][0].weight, encoder.backbone[1][0].block[0][0].weight)


def test_controlnet_does_not_start_from_another_backbone():
    encoder = StableCascadeSemanticEncoder(**FEATURES)
    with pytest.raises(ValueError, match="only 'effnet' can start from image features"):
        StableCascadeControlNet(3, 10, [0], "simple").load_backbone(encoder.backbone)
    wider = StableCascadeControlNet(3, 10, [0], "effnet", FEATURES | {"head_width": 24})
    with pytest.raises(ValueError, match="backbone_config differs"):
        wider.load_backbone(encoder.backbone)


def test_the_embedded_controlnet_fits_the_embedded_cascade():
    residuals = StableCascadeControlNet(**preset("controlnet", "embedded"))(torch.rand(1, 1, 64, 64))
    prior = preset("prior", "embedded")
    assert len(residuals) <= sum(prior["down_num_layers_per_block"] + prior["up_num_layers_per_block"])
    assert residuals[0].shape[:2] == (1, prior["block_out_channels"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8, [0], "tiny"), "bottleneck is 'tiny'; allowed: 'effnet', 'simple', 'large'"),
        ((1, 8, [], "simple"), r"blocks is \[\]"),
        ((1, 8, [0, 0], "simple"), "distinct block numbers"),
        ((1, 8, [-1], "simple"), "counted from 0"),
    ],
)
def test_impossible_controlnets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StableCascadeControlNet(*arguments)


def test_wrong_control_images_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\); expected \(batch, 4"):
        StableCascadeControlNet(4, 8, [0], "simple")(torch.rand(1, 3, 8, 8))
