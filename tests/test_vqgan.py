import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from safetensors.torch import save_file

from stable_cascade.models import vqgan as module
from stable_cascade.models.vqgan import StableCascadeVQGAN
from tests.golden import assert_matches, entry, fill, tensors

TINY = {"levels": 2, "bottleneck_blocks": 2, "embed_dim": 32, "num_vq_embeddings": 64}
SMALLEST = {"levels": 2, "bottleneck_blocks": 1, "embed_dim": 8, "num_vq_embeddings": 16}


def original_key(key):
    return key.replace("vquantizer.embedding", "vquantizer.codebook")


def golden_vqgan():
    model = StableCascadeVQGAN(**TINY)
    shapes = {original_key(key): value.shape for key, value in model.state_dict().items()}
    values = fill(shapes, entry("io_stage_a_a")["fill"])
    model.load_state_dict({key: values[original_key(key)] for key in model.state_dict()})
    return model.eval()


def random_vqgan(**config):
    """No weight at zero, so that every path counts."""
    torch.manual_seed(0)
    model = StableCascadeVQGAN(**(SMALLEST | config))
    for block in model.modules():
        if isinstance(block, module.MixingBlock):
            torch.nn.init.normal_(block.gammas, std=0.5)
    torch.nn.init.normal_(model.vquantizer.embedding.weight)
    return model


@pytest.mark.parametrize("name", ["io_stage_a_a", "io_stage_a_b"])
def test_matches_the_original(name):
    model, golden = golden_vqgan(), tensors(name)
    with torch.no_grad():
        latents = model.encode(golden["in.image"]).latents
        quantized = model.vquantizer(latents)
        assert_matches(name, "out.encode", latents / 0.43)
        assert_matches(name, "out.quantized", quantized.latents / 0.43)
        assert_matches(name, "out.vq_loss", quantized.loss[None])
        assert torch.equal(quantized.indices, golden["out.indices"])
        assert_matches(name, "out.decode", model.decode(golden["in.latent"] * 0.43).sample)
        assert_matches(name, "out.roundtrip", model(golden["in.image"]).sample)
        assert_matches(name, "out.roundtrip_quantized", model.decode(latents, force_not_quantize=False).sample)


@pytest.mark.parametrize("config", [{}, {"levels": 3, "embed_dim": 16}, {"levels": 1, "in_channels": 1}])
def test_equals_paella_in_float64_with_gradients(config):
    ours = random_vqgan(**config).double()
    theirs = PaellaVQModel(**(SMALLEST | config)).double()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.rand(2, config.get("in_channels", 3), 16, 24, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        x = pixels.clone().requires_grad_()
        latents = model.encode(x).latents
        plain = model.decode(latents).sample
        coded = model.decode(latents, force_not_quantize=False).sample
        _, loss, *_ = model.vquantizer(latents) if model is theirs else (0, model.vquantizer(latents).loss)
        (plain.square().mean() + coded.square().mean() + loss).backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        statistics = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        results.append(
            {"latents": latents, "plain": plain, "coded": coded, "loss": loss, "x": x.grad} | gradients | statistics
        )
    largest = max(value.abs().max() for name, value in results[1].items() if name.startswith("gradient"))
    for name, value in results[1].items():
        # The bias before a batch norm has gradient zero, up to rounding: measure it by the other gradients.
        gap = (results[0][name] - value).abs().max() / value.abs().max().clamp_min(1e-3 * largest)
        assert gap <= 1e-12, f"{name}: {gap:.1e}"


def test_folders_load_in_diffusers_and_back(tmp_path):
    ours = random_vqgan(scale_factor=0.5).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = PaellaVQModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = StableCascadeVQGAN.from_pretrained(tmp_path / "theirs").eval()
    assert back.config.scale_factor == theirs.config.scale_factor == 0.5
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in ours.state_dict().items())
    pixels = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(theirs(pixels).sample, back(pixels).sample)


def test_single_file_in_original_names(tmp_path):
    source = golden_vqgan().to_original()
    assert "vquantizer.codebook.weight" in source
    assert "vquantizer.embedding.weight" not in source
    save_file(source, tmp_path / "stage_a.safetensors")
    model = StableCascadeVQGAN.from_single_file(tmp_path / "stage_a.safetensors", config=TINY)
    golden = tensors("io_stage_a_a")
    with torch.no_grad():
        assert_matches("io_stage_a_a", "out.decode", model.decode(golden["in.latent"] * 0.43).sample)


def test_memory_format_and_checkpointing_change_nothing():
    model, pixels = random_vqgan(), torch.rand(2, 3, 16, 16)
    outcomes = []
    for layout, checkpointed in ((torch.contiguous_format, 0), (torch.channels_last, 0), (torch.channels_last, 1)):
        model = random_vqgan().to(memory_format=layout)
        if checkpointed:
            model.enable_gradient_checkpointing()
        output = model(pixels.contiguous(memory_format=layout)).sample
        output.square().mean().backward()
        outcomes.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(dtype):
    model, pixels = golden_vqgan(), tensors("io_stage_a_b")["in.image"]
    with torch.no_grad():
        exact = model(pixels).sample
        rough = model.to(dtype)(pixels).sample
    assert rough.dtype == dtype
    assert (rough - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_a_new_network_starts_as_the_original_does():
    model = StableCascadeVQGAN(**SMALLEST)
    blocks = [block for block in model.modules() if isinstance(block, module.MixingBlock)]
    assert len(blocks) == 4
    assert all(not block.gammas.any() and not block.depthwise[1].bias.any() for block in blocks)
    assert model.vquantizer.embedding.weight.abs().max() <= 1 / 16
    assert model.stride == 4


def test_quantiser_finds_its_own_codes(monkeypatch):
    quantiser = random_vqgan().vquantizer
    indices = torch.randint(16, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    codes = quantiser.lookup(indices).detach()
    found = quantiser(codes + 1e-3)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.loss.item(), 1.25e-6, rtol=1e-3, atol=0)
    latents = torch.randn(2, 4, 3, 5)
    whole = quantiser.indices(latents)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    assert torch.equal(quantiser.indices(latents), whole)


def test_the_gradient_passes_the_codes():
    quantiser, latents = random_vqgan().vquantizer, torch.randn(1, 4, 3, 5, requires_grad=True)
    quantiser(latents).latents.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_forward_gives_a_trainer_what_it_needs():
    model, pixels = random_vqgan(), torch.rand(2, 3, 16, 16)
    output = model(pixels, force_not_quantize=False)
    assert output.latents.shape == (2, 4, 4, 4)
    assert output.quantized.indices.shape == (2, 4, 4)
    output.quantized.loss.backward()
    assert model.in_block[1].weight.grad.any()
    assert model.vquantizer.embedding.weight.grad.any()
    assert isinstance(model(pixels, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"levels": 0}, "levels is 0"),
        ({"embed_dim": 9}, "embed_dim is 9; with levels=2 it must be a multiple of 2"),
        ({"bottleneck_blocks": -1}, "bottleneck_blocks is -1"),
        ({"scale_factor": 0.0}, "scale_factor is 0.0"),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        StableCascadeVQGAN(**(SMALLEST | config))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"pixels are 18x16 .* multiples of 4"):
        random_vqgan().encode(torch.rand(1, 3, 18, 16))
