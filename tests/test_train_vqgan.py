"""Stage A's training: two networks in one loop that never mix their gradients, codes that live, exact resumption."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from safetensors.torch import load_file

from stable_cascade import StableCascadeVQGAN
from stable_cascade.config import VQGANConfig, load_config
from stable_cascade.models.vqgan import PatchDiscriminator
from stable_cascade.objectives.vqgan import (
    AdversarialAutoencoder,
    hinge_loss,
    latent_scale,
    perplexity,
    prepare_new,
    psnr,
    reconstruction_loss,
    vqgan_loss,
)
from stable_cascade.trainers.vqgan import CodebookRevival, numbered
from tests.tiny_cascade import VQGAN, seeded
from tests.trainer_runs import ROOT, assert_same, settings, train, trainer_main, write_config, write_images
from tests.two_processes import launch_two

SHORT = {
    "pretrained_model_name_or_path": None, "preview_steps": None, "preview_decoder_steps": None,
    "discriminator_channels": 4, "adversarial_start": 2, "revive_every": 2, "adversarial_weight": 0.1,
    "num_preview_images": 2,
}  # fmt: skip
SPLIT = {"adam_epsilon": 0.1, "max_grad_norm": 1e9, "lr": 0.03}
"""Some gradients are zero but for rounding, which Adam with a small epsilon would blow up to a step's size; with this
one, and without clipping, a step also shows a gradient that is right but for its scale."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stage A to start from, and images."""
    folder = tmp_path_factory.mktemp("stage_a")
    vqgan = new_vqgan()
    prepare_new(vqgan, pixels(8), seed=0)
    vqgan.save_pretrained(folder / "vqgan")
    write_images(folder / "images.tar")
    return folder


def new_vqgan():
    return seeded(lambda: StableCascadeVQGAN(**VQGAN)).requires_grad_(True)


def pixels(count=4, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def run(where, folder, **changes):
    start = {"stage_a_checkpoint_path": str(folder / "vqgan")}
    return train("vqgan", where, folder, **SHORT | start | changes)


def make_model(seed=0):
    torch.manual_seed(seed)
    vqgan = new_vqgan()
    prepare_new(vqgan, pixels(8), seed=0)
    return AdversarialAutoencoder(vqgan, PatchDiscriminator(4)).train()


CODED = torch.tensor([True, False, True, True])


# ------------------------------------------------------------------------------------------------------------ losses


def test_loss_is_the_sum_worked_out_by_hand():
    model, x = make_model(), pixels()
    rebuilt = model(x, CODED, adversarial=True)
    terms = vqgan_loss(rebuilt, x, codebook_weight=0.7, commitment_weight=0.3, adversarial_weight=0.2)

    vqgan, table = model.vqgan, model.vqgan.vquantizer.embedding.weight
    latents = vqgan.encode(x).latents
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = (rows[:, None] - table[None]).square().sum(2).argmin(1)
    codes = table[nearest].view(4, 4, 4, 4).permute(0, 3, 1, 2)
    distance = (codes - latents).square().mean((1, 2, 3))
    assert torch.equal(rebuilt.indices.flatten(), nearest)
    assert torch.allclose(rebuilt.codebook, distance)
    assert torch.allclose(rebuilt.commitment, distance)
    given = torch.where(CODED[:, None, None, None], codes, latents)
    images = vqgan.decode(given).sample
    assert torch.allclose(rebuilt.images, images, atol=1e-6)
    real, fake = model.discriminator(x), model.discriminator(images)
    judging = ((1 - real).clamp_min(0).mean((1, 2, 3)) + (1 + fake).clamp_min(0).mean((1, 2, 3))) / 2
    total = reconstruction_loss(images, x) + distance - 0.2 * fake.mean((1, 2, 3)) + judging
    assert torch.allclose(terms["loss"], total, atol=1e-5)
    assert torch.allclose(terms["reconstruction"], reconstruction_loss(images, x), atol=1e-5)


def test_codebook_and_commitment_reach_their_own_side():
    """Codes get the gradient of the codebook loss alone, the encoder that of the commitment and the image."""
    model, x = make_model(), pixels()
    table = model.vqgan.vquantizer.embedding.weight
    rebuilt = model(x, CODED)
    latents, indices = rebuilt.latents, rebuilt.indices
    vqgan_loss(rebuilt, x, codebook_weight=0.7, commitment_weight=0.0)["loss"].mean().backward()
    # d/dcode of the mean squared distance: 2 (code - latent) / (values per sample), averaged over samples.
    codes = model.vqgan.vquantizer.lookup(indices).detach()
    each = (0.7 * 2 * (codes - latents) / latents[0].numel() / len(x)).permute(0, 2, 3, 1).reshape(-1, 4)
    wanted = torch.zeros_like(table).index_add_(0, indices.flatten(), each)
    assert torch.allclose(table.grad, wanted, atol=1e-7)
    model.zero_grad()
    model(x, CODED).commitment.mean().backward()
    assert table.grad is None
    assert model.vqgan.in_block[1].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.vqgan.up_blocks.parameters())


def test_codes_pass_the_gradient_straight_through():
    model, x = make_model(), pixels()
    x.requires_grad_()
    latents = model.vqgan.encode(x).latents
    codes = model.vqgan.vquantizer(latents.detach()).latents.detach().requires_grad_()
    model.vqgan.decode(codes).sample.square().sum().backward()
    (wanted,) = torch.autograd.grad(latents, x, codes.grad)
    (found,) = torch.autograd.grad(model(x, torch.ones(4, dtype=torch.bool)).images.square().sum(), x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_two_networks_are_disjoint():
    model, x = make_model(), pixels()
    rebuilt = model(x, CODED, adversarial=True)
    rebuilt.judging.sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in model.vqgan.parameters())
    # Weights only: the last bias moves the scores of both images alike, and gets zero while neither is beyond 1.
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.discriminator.parameters() if parameter.dim() > 1)
    model.zero_grad()
    rebuilt.fooling.sum().backward()
    assert all(parameter.grad is None for parameter in model.discriminator.parameters())
    assert model.vqgan.out_block[0].weight.grad.abs().sum() > 0


def test_one_optimizer_does_what_two_do():
    """Three steps against the textbook: a generator step and a discriminator step, an optimizer and a loss each."""
    one, two, x = make_model(), make_model(), pixels()
    options = {"lr": 1e-3, "eps": 1e-5}
    optimizer = torch.optim.AdamW(one.parameters(), **options)
    generator = torch.optim.AdamW(two.vqgan.parameters(), **options)
    judge = torch.optim.AdamW(two.discriminator.parameters(), **options)
    for _ in range(3):
        optimizer.zero_grad()
        vqgan_loss(one(x, CODED, adversarial=True), x, adversarial_weight=0.3)["loss"].mean().backward()
        optimizer.step()

        rebuilt = two(x, CODED)
        fooling = -two.discriminator(rebuilt.images).mean()
        images = rebuilt.images.detach()
        generator.zero_grad()
        (vqgan_loss(rebuilt, x)["loss"].mean() + 0.3 * fooling).backward()
        judge.zero_grad()
        hinge_loss(two.discriminator(x), two.discriminator(images)).mean().backward()
        generator.step()
        judge.step()
    for (name, parameter), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (parameter - other).abs().max() <= 2e-6, name


def test_a_sample_does_not_depend_on_its_batch():
    model, x = make_model(), pixels()
    whole = vqgan_loss(model(x, CODED, adversarial=True), x, adversarial_weight=1.0)["loss"]
    parts = [
        vqgan_loss(model(x[i : i + 1], CODED[i : i + 1], adversarial=True), x[i : i + 1], adversarial_weight=1.0)
        for i in range(4)
    ]
    assert torch.allclose(torch.cat([part["loss"] for part in parts]), whole, rtol=1e-5)


def test_without_quantiser_and_discriminator_the_loss_is_the_reconstruction():
    vqgan, x = new_vqgan(), pixels()
    model = AdversarialAutoencoder(vqgan, quantize=False)
    rebuilt = model(x, CODED, adversarial=True)
    plain = vqgan.decode(vqgan.encode(x).latents).sample
    assert torch.equal(vqgan_loss(rebuilt, x)["loss"], reconstruction_loss(plain, x))
    assert not vqgan.vquantizer.embedding.weight.requires_grad


def test_figures():
    assert perplexity(torch.tensor([3, 3, 3, 0])) == pytest.approx(3)
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
    assert psnr(torch.full((2, 3, 4, 4), 0.6), torch.full((2, 3, 4, 4), 0.5)).tolist() == pytest.approx([20, 20], 1e-5)
    score = torch.tensor([[[[0.5, 2.0]]], [[[-3.0, 0.0]]]])
    assert torch.allclose(hinge_loss(score, -score), torch.tensor([0.25, 2.5]))


def test_discriminator_sees_patches():
    judge = PatchDiscriminator(4)
    assert judge(pixels(2, 8)).shape == (2, 1, 1, 1)
    image = torch.rand(1, 3, 128, 128).requires_grad_()
    score = PatchDiscriminator(4).requires_grad_(False)
    score.layers = torch.nn.Sequential(*[layer for layer in score.layers if not isinstance(layer, torch.nn.GroupNorm)])
    score(image)[0, 0, 8, 8].backward()
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [54, 54]
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in judge.modules())


# ------------------------------------------------------------------------------------------- a new Stage A, its codes


def test_a_new_stage_a_has_the_statistics_of_its_images():
    torch.manual_seed(0)
    vqgan, x = StableCascadeVQGAN(**VQGAN), pixels(12)
    prepare_new(vqgan, x, seed=3)
    latents = vqgan.eval().encode(x).latents
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert latent_scale(vqgan, x) == pytest.approx(latents.std().item(), rel=1e-5)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    distance = (vqgan.vquantizer.embedding.weight[:, None] - rows[None]).abs().sum(2).min(1).values
    assert distance.max() < 1e-5
    # The statistics stay in training, and the latents are still normalised by them.
    before = copy.deepcopy(vqgan.state_dict())
    model = AdversarialAutoencoder(vqgan).train()
    assert torch.allclose(model(x, torch.ones(12, dtype=torch.bool)).latents, latents, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in vqgan.state_dict().items())


class Alone:
    """What the revival asks of an accelerator on one process."""

    num_processes = 1


def test_unused_codes_become_latents():
    book = torch.nn.Embedding(6, 4)
    before = book.weight.detach().clone()
    latents = torch.randn(2, 4, 3, 3)
    indices = torch.tensor([0, 2, 5] * 6).view(2, 3, 3)

    def revive(order):
        torch.nn.init.zeros_(book.weight).data.copy_(before)
        revival = CodebookRevival(book, Alone(), every=3, batch_size=2, seed=9)
        for step in range(3):
            for i in order:
                assert revival.before(step) == 0
                revival.record(indices[i], latents[i], torch.tensor(i) + 2 * step)
        state = revival.state_dict()
        again = CodebookRevival(book, Alone(), every=3, batch_size=2, seed=9)
        again.load_state_dict(state)
        assert again.counts.tolist() == [18, 0, 18, 0, 0, 18]
        assert again.before(3) == 3
        assert again.before(3) == 0
        return book.weight.detach().clone()

    whole = revive([[0, 1]])
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    for code in range(6):
        if code in (0, 2, 5):
            assert torch.equal(whole[code], before[code])
        else:
            assert (rows - whole[code]).abs().sum(1).min() == 0
    assert torch.equal(revive([[0], [1]]), whole)  # split up
    assert torch.equal(revive([[1], [0]]), whole)  # in another order


def test_batches_know_their_step():
    parts = numbered(lambda start: iter(range(100 * start, 100 * start + 6)), 2)
    assert [(part.batch, part.step) for part in parts(5)] == [(500 + i, 5 + i // 2) for i in range(6)]


# ------------------------------------------------------------------------------------------------------- the trainer


def test_longer_run_continues_a_shorter_one_bitwise(tmp_path, folder):
    """Across the start of the discriminator and between two revivals."""
    changes = {"ema_beta": 0.5, "discriminator_lr": 3e-3, "revive_every": 4}
    run(tmp_path, folder, updates=1, **changes)
    run(tmp_path, folder, updates=3, **changes)
    again = run(tmp_path, folder, **changes)
    whole = run(tmp_path, folder, experiment_id="whole", **changes)
    assert_same(again, whole)
    assert_same(again.parent / "step-00000006", whole.parent / "step-00000006")
    trained = load_file(whole.parent / "step-00000006/weights.safetensors")
    assert {name.split(".")[0] for name in trained} == {"vqgan", "discriminator"}


def test_batch_equals_its_parts(tmp_path, folder):
    whole = run(tmp_path, folder, grad_accum_steps=1, **SPLIT)
    parts = run(tmp_path, folder, grad_accum_steps=2, experiment_id="parts", **SPLIT)
    assert_same(parts.parent / "step-00000006", whole.parent / "step-00000006", 5e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path, folder):
    plain = run(tmp_path, folder, **SPLIT)
    again = run(tmp_path, folder, gradient_checkpointing=True, experiment_id="again", **SPLIT)
    assert_same(again, plain, 1e-6)


def test_the_discriminator_waits_for_its_start(tmp_path, folder):
    """And has a learning rate of its own."""
    idle = run(tmp_path, folder, updates=2)
    never = run(tmp_path, folder, updates=2, experiment_id="never", adversarial_weight=0)
    assert_same(idle, never)
    still = run(tmp_path, folder, experiment_id="still", discriminator_lr=0.0, weight_decay=0)
    moving = run(tmp_path, folder, experiment_id="moving", weight_decay=0)
    torch.manual_seed(0)
    new = PatchDiscriminator(4).state_dict()
    for final, moves in ((still, False), (moving, True)):
        weights = load_file(final.parent / "step-00000006/weights.safetensors")
        assert moves != all(torch.equal(weights[f"discriminator.{name}"], value) for name, value in new.items())


def test_export_is_a_paella_folder_with_the_averages(tmp_path, folder):
    final = run(tmp_path, folder, ema_beta=0.9)
    ours, theirs = (cls.from_pretrained(final / "vqgan").eval() for cls in (StableCascadeVQGAN, PaellaVQModel))
    assert ours.config.scale_factor == theirs.config.scale_factor == VQGAN["scale_factor"]
    x = pixels()
    for quantize in (True, False):
        mine = ours.decode(ours.encode(x).latents, force_not_quantize=quantize).sample
        assert torch.allclose(
            mine, theirs.decode(theirs.encode(x).latents, force_not_quantize=quantize).sample, atol=1e-5
        )
    averages = load_file(final.parent / "step-00000006/ema.safetensors")
    exported = ours.state_dict()
    assert all(torch.equal(exported[name], averages[f"vqgan.{name}"]) for name, _ in ours.named_parameters())
    assert {path.name for path in final.iterdir()} == {"vqgan"}
    assert (tmp_path / "out/run/step-00000006.png").exists()
    figures = json.loads((tmp_path / "out/run/step-00000006.json").read_text())
    assert figures.keys() == {"step", "psnr", "psnr_codes", "codes", "perplexity"}


def test_previews_may_lie_beside_the_checkpoints(tmp_path, folder):
    final = run(tmp_path, folder, updates=4, save_every=1, output_path=str(tmp_path / "runs"))
    names = {path.name for path in final.parent.iterdir()}
    assert {f"step-{step:08d}.{kind}" for step in range(1, 5) for kind in ("png", "json")} <= names
    assert {name for name in names if name.startswith("step-") and "." not in name} == {
        "step-00000003",
        "step-00000004",
    }


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, folder):
    """Accumulation, revivals, the start of the discriminator in the middle."""
    changes = SHORT | SPLIT | {"ema_beta": 0.5, "stage_a_checkpoint_path": str(folder / "vqgan")}
    config = write_config(tmp_path / "vqgan.yaml", settings("vqgan", tmp_path / "two", folder, **changes))
    done = launch_two(ROOT / "tests/trainer_runs.py", "vqgan", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes       2," in done.stdout
    one = train("vqgan", tmp_path / "one", folder, **changes)
    assert_same(tmp_path / "two/runs/run/step-00000006", one.parent / "step-00000006", 1e-5)


def test_check_prints_the_plan(tmp_path, folder, capsys):
    config = write_config(tmp_path / "run.yaml", settings("vqgan", tmp_path, folder, **SHORT))
    trainer_main("vqgan")(["--config", str(config), "--check", "--model_version", "embedded"])
    printed = capsys.readouterr().out
    assert "567,966 parameters from scratch" in printed
    assert "12 samples in 1 shards" in printed
    assert "MISSING" not in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_fsdp": True}, "use_fsdp: True is not for Stage A"),
        ({"discriminator_lr": 1e-4, "adversarial_weight": 0}, "discriminator_lr: 0.0001 needs adversarial_weight"),
        ({"quantize_share": 1.5}, r"quantize_share: 1.5 must lie in \[0, 1\]"),
        ({"revive_every": 0}, "revive_every: 0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, folder, changes, message):
    config = write_config(tmp_path / "run.yaml", settings("vqgan", tmp_path, folder, **SHORT | changes))
    with pytest.raises(ValueError, match=message):
        load_config(VQGANConfig, ["--config", str(config)])


@pytest.mark.parametrize(
    "name", ["configs/stage_a.yaml", "configs/vqgan_embedded.yaml", "embedded/configs/vqgan.yaml"]
)
def test_configs_of_the_repository_are_valid(name):
    load_config(VQGANConfig, ["--config", str(ROOT / "examples" / name)])


@pytest.mark.slow
def test_training_on_the_ink_drawings_rebuilds_them(tmp_path):
    """From scratch, with everything on: reconstruction gets good through codes and past them."""
    changes = {"checkpoint_path": tmp_path, "output_path": tmp_path, "updates": 80, "save_every": 40,
               "adversarial_start": 40, "webdataset_path": ROOT / "examples/data/ink_emoji.tar"}  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in changes.items()]
    trainer_main("vqgan")(["--config", str(ROOT / "examples/configs/vqgan_embedded.yaml"), *arguments])
    early, late = (json.loads((tmp_path / f"vqgan_embedded/step-{n:08d}.json").read_text()) for n in (40, 80))
    assert late["psnr"] > 15
    assert late["psnr_codes"] > 13
    assert late["psnr"] > early["psnr"]
    assert late["perplexity"] > 10
    weights = load_file(tmp_path / "vqgan_embedded/step-00000080/weights.safetensors")
    torch.manual_seed(0)
    new = PatchDiscriminator(16).state_dict()
    moved = [name for name, value in new.items() if not torch.equal(weights[f"discriminator.{name}"], value)]
    assert {name for name in new if name.endswith("weight")} <= set(moved)
