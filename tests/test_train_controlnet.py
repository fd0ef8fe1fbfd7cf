"""ControlNet training through its own `main`: what stays, what is exported, what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from tqdm import tqdm

from stable_cascade import StableCascadeControlNet, StableCascadePriorPipeline, factory
from stable_cascade.config import ControlNetConfig, load_config
from stable_cascade.diffusion.guidance import guide
from stable_cascade.files.controlnet import read_description
from stable_cascade.models.controlnet import RELEASED_BLOCKS
from stable_cascade.objectives.denoising import ConditionedPrior, prior_loss
from stable_cascade.pipelines.sampling import Control, Settings, Text, sample_semantic
from stable_cascade.schedulers import StableCascadeScheduler
from stable_cascade.trainers.check import plan_training
from stable_cascade.training.loop import train as train_loop
from stable_cascade.training.tracking import make_accelerator
from tests.tiny_cascade import tiny_prior
from tests.trainer_runs import (
    ROOT,
    ROUNDED,
    assert_same,
    settings,
    tensors,
    train,
    trainer_main,
    write_cascade,
    write_config,
    write_images,
)
from tests.two_processes import launch_two

pytest.importorskip("cv2", reason="CannyFilter needs OpenCV")

quiet = partial(tqdm, disable=True)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"))
    write_images(folder / "images.tar")
    return folder


def configured(folder, cascade, *arguments, **changes):
    path = write_config(folder / "run.yaml", settings("controlnet", folder, cascade, **changes))
    return load_config(ControlNetConfig, ["--config", str(path), *arguments])


def built(config):
    """Prior, filter and ControlNet as the trainer builds them."""
    prior = factory.network(config, "prior").requires_grad_(False)
    control = factory.control_filter(config, torch.device("cpu"))
    return prior, control, factory.controlnet(config, prior, control)


def awake(controlnet):
    """The ControlNet with projections that are not zero."""
    generator = torch.Generator().manual_seed(3)
    for projection in controlnet.projections:
        projection[2].weight.data.normal_(std=0.5, generator=generator)
    return controlnet.eval()


def test_untrained_controlnet_changes_no_bit(tmp_path, cascade):
    config = configured(tmp_path, cascade)
    prior, control, controlnet = built(config)
    inputs = factory.prior_inputs(config, make_accelerator(config), factory.samples(config))
    batch = next(inputs.batches(0))
    image = factory.control_images(control, torch.device("cpu"))(batch)
    assert image.shape[:2] == (2, 1)
    assert image.any()
    clean, weight = inputs.encode(batch), factory.loss_weight(config).weight
    plain = ConditionedPrior(prior, inputs.text).train()
    controlled = ConditionedPrior(prior, inputs.text, controlnet).train()

    def loss(model, **control):
        return prior_loss(model, clean, batch.captions, batch.seeds, weight=weight, **control)

    for grad in (False, True):  # kernels differ by a last bit between the two, so both sides need the same
        clean.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            without, with_it = loss(plain), loss(controlled, control=image)
            for name in without:
                assert torch.equal(without[name], with_it[name]), (name, grad)
    awake(controlnet)
    assert not torch.equal(loss(controlled, control=image)["loss"], without["loss"])


def test_frozen_prior_keeps_weights_and_gets_no_gradients(tmp_path, cascade):
    config = configured(tmp_path, cascade, updates=3, lr=0.05)
    prior, control, controlnet = built(config)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    start = {name: value.clone() for name, value in controlnet.state_dict().items()}
    accelerator = make_accelerator(config)
    inputs = factory.prior_inputs(config, accelerator, factory.samples(config))
    model = ConditionedPrior(prior, inputs.text, controlnet)
    images = factory.control_images(control, accelerator.device)
    loss_fn = factory.prior_loss_fn(config, inputs, factory.loss_weight(config).weight, control=images)
    seen = []

    def watched(model, batch):
        seen.append((prior.training, controlnet.training))
        return loss_fn(model, batch)

    train_loop(
        config, accelerator, model=model, batches=inputs.batches, loss_fn=watched, save_fn=lambda *_: None,
        preview_fn=lambda *_: [],
    )  # fmt: skip
    assert set(seen) == {(False, True)}
    assert all(parameter.grad is None for parameter in prior.parameters())
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    moved = {name for name, value in controlnet.state_dict().items() if not torch.equal(value, start[name])}
    assert {name for name, _ in controlnet.named_parameters()} == moved  # and no statistics of batch norms


def test_export_loads_both_ways_and_knows_its_filter(tmp_path, cascade):
    final = train("controlnet", tmp_path, cascade, ema_beta=0.5, save_every=3)
    folder = StableCascadeControlNet.from_pretrained(final / "controlnet")
    single = StableCascadeControlNet.from_single_file(final / "controlnet.safetensors")
    assert folder.config.blocks == single.config.blocks == [0, 1, 3]
    ours = folder.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in single.state_dict().items())
    averages = tensors(final.parent / "step-00000006")
    exported = tensors(final)["controlnet.safetensors:projections.0.2.weight"]
    assert exported.any()
    assert torch.equal(exported, averages["ema.safetensors:controlnet.projections.0.2.weight"])
    for place in (final / "controlnet", final / "controlnet.safetensors"):
        known = read_description(place)
        assert (known["filter"], known["filter_params"]) == ("CannyFilter", {"resize": 32})
        assert known["config"]["projection_channels"] == 16
    assert all(name.split(":")[1].startswith("controlnet.") for name in averages if name.startswith("weights"))
    assert len(list((tmp_path / "out/run").glob("step-*.png"))) == 2


def test_training_goes_on_from_an_export(tmp_path, cascade):
    first = train("controlnet", tmp_path, cascade, updates=2)
    for number, place in enumerate((first, first / "controlnet", first / "controlnet.safetensors")):
        config = configured(tmp_path, cascade, controlnet_checkpoint_path=str(place))
        state = built(config)[2].state_dict()
        values = tensors(first / "controlnet")
        assert len(values) == len(state), number
        assert all(torch.equal(value, state[name.split(":")[1]]) for name, value in values.items()), number


@pytest.mark.parametrize(("mode", "filter_name"), [("simple", "CannyFilter"), ("large", "SREffnetFilter")])
def test_bottlenecks_train(tmp_path, cascade, mode, filter_name):
    changes = {"controlnet_filter_params": None} if filter_name == "SREffnetFilter" else {}
    final = train("controlnet", tmp_path, cascade, updates=2, controlnet_bottleneck_mode=mode,
                  controlnet_filter=filter_name, multi_aspect_ratio=None, **changes)  # fmt: skip
    loaded = StableCascadeControlNet.from_single_file(final / "controlnet.safetensors")
    assert loaded.config.bottleneck == mode
    assert loaded.config.in_channels == (16 if filter_name == "SREffnetFilter" else 1)
    assert loaded.projections[0][2].weight.any()


def test_effnet_starts_from_the_image_encoder(tmp_path, cascade):
    _, _, controlnet = built(configured(tmp_path, cascade))
    encoder = factory.network(configured(tmp_path, cascade), "semantic_encoder").backbone.state_dict()
    own = controlnet.backbone.state_dict()
    assert torch.equal(own["0.0.weight"], encoder["0.0.weight"][:, :1])
    assert all(torch.equal(value, encoder[name]) for name, value in own.items() if name != "0.0.weight")


@pytest.mark.parametrize(("version", "count", "width"), [("3.6B", 64, 2048), ("1B", 32, 1536), ("embedded", 12, 128)])
def test_every_prior_gets_its_width(tmp_path, version, count, width):
    changes = {"pretrained_model_name_or_path": None, "model_version": version, "generator_checkpoint_path": "scratch",
               "effnet_checkpoint_path": "scratch"}  # fmt: skip
    blocks = list(RELEASED_BLOCKS) if count == 64 else [0, count - 1]
    config = configured(tmp_path, tmp_path, controlnet_blocks=blocks, **changes)
    prior, control = factory.network_on_meta(config, "prior"), factory.control_filter(config)
    model = factory.controlnet_on_meta(config, prior, control)
    assert [projection[2].out_channels for projection in model.projections] == [width] * len(blocks)
    if version == "3.6B":
        assert sum(parameter.numel() for parameter in model.parameters()) == 54_255_776
        assert model.config.backbone_config is None
    config.controlnet_blocks = [0, count]
    with pytest.raises(ValueError, match=f"controlnet_blocks: {count} is over the prior's range 0 to {count - 1} "):
        factory.controlnet_on_meta(config, prior, control)


def test_check_prints_the_controlnet(tmp_path, cascade, capsys):
    config = write_config(tmp_path / "run.yaml", settings("controlnet", tmp_path, cascade))
    trainer_main("controlnet")(["--config", str(config), "--check"])
    printed = capsys.readouterr().out
    assert "MISSING" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("controlnet ")]
    assert "new, effnet, blocks 0, 1, 3; CannyFilter of 1 channels" in line
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_refused(tmp_path, cascade):
    first = train("controlnet", tmp_path, cascade, updates=1, num_preview_images=0)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no weights")
    other = str(first / "controlnet.safetensors")
    cases = [
        ({"controlnet_blocks": [0, 4]}, "controlnet_blocks: 4 is over the prior's range 0 to 3"),
        ({"controlnet_filter": "CannyFilte"}, "controlnet_filter 'CannyFilte' is unknown; nearest: 'CannyFilter'"),
        ({"controlnet_filter_params": {"size": 3}}, "controlnet_filter_params 'size' is unknown"),
        ({"controlnet_checkpoint_path": str(tmp_path / "no")}, "controlnet_checkpoint_path .* is neither a file"),
        ({"controlnet_checkpoint_path": str(damaged)}, "ControlNet file .* is damaged"),
        ({"controlnet_checkpoint_path": other, "controlnet_blocks": [0]}, "trained with controlnet_blocks "),
        (
            {"controlnet_checkpoint_path": other, "controlnet_filter": "SRPixelFilter",
             "controlnet_filter_params": None},
            "trained with channels of controlnet_filter 1, this config has 3",
        ),
        ({"controlnet_checkpoint_path": other, "controlnet_bottleneck_mode": "large"}, "controlnet_bottleneck_mode"),
    ]  # fmt: skip
    for changes, message in cases:
        config = configured(tmp_path, cascade, **changes)
        with pytest.raises(ValueError, match=message) as refused:
            plan_training(config, trains="ControlNet", needs=["prior", "semantic_encoder"])
        assert "\n" not in str(refused.value)


def test_both_halves_of_a_guided_batch_are_controlled_alike(tmp_path, cascade):
    _, _, controlnet = built(configured(tmp_path, cascade))
    residuals = awake(controlnet)(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    prior, scheduler = tiny_prior(), StableCascadeScheduler(shift=2.0)
    draw = torch.Generator().manual_seed(1)
    noise, hidden, pooled = torch.randn(2, 16, 4, 4, generator=draw), torch.randn(4, 5, 32, generator=draw), \
        torch.randn(4, 1, 32, generator=draw)  # fmt: skip
    text = Text(hidden[:2], pooled[:2], hidden[2:], pooled[2:])
    generator = torch.Generator().manual_seed(2)
    drawn = sample_semantic(prior, scheduler, noise, text, None, Settings(1, 3.0), generator=generator,
                            progress=quiet, control=[Control(residuals)])  # fmt: skip
    time = scheduler.timesteps[0]
    ratio = scheduler.noise_condition(time).expand(2)
    halves = [
        prior(noise, ratio, clip_text_pooled=pooled[rows], clip_text=hidden[rows], control=residuals).sample
        for rows in (slice(0, 2), slice(2, 4))
    ]
    expected = scheduler.step(guide(*halves, 3.0, rescale=0.7), time, noise).pred_original_sample
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    plain = sample_semantic(prior, scheduler, noise, text, None, Settings(1, 3.0), generator=generator,
                            progress=quiet)  # fmt: skip
    assert (plain - drawn).abs().max() > 0.01


def test_prior_pipeline_takes_a_controlnet(tmp_path, cascade):
    _, _, controlnet = built(configured(tmp_path, cascade))
    pipeline = StableCascadePriorPipeline.from_pretrained(cascade)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).round()

    def latents(count=2, **control):
        generators = [torch.Generator().manual_seed(number // (count // 2)) for number in range(count)]
        return pipeline(["a dog", "a snail"], height=64, width=64, num_inference_steps=2, generator=generators,
                        num_images_per_prompt=count // 2, **control).image_embeddings  # fmt: skip

    plain = latents()
    with pytest.raises(ValueError, match="control_image needs a controlnet"):
        latents(control_image=image)
    pipeline.register_modules(controlnet=controlnet)
    assert torch.equal(latents(), plain)
    assert torch.equal(latents(control_image=image), plain)
    awake(controlnet)
    controlled = latents(control_image=image)
    assert (controlled - plain).abs().max() > 0.01
    assert torch.equal(latents(control_image=image, controlnet_conditioning_scale=0.0), plain)
    one = latents(control_image=image[:1])
    torch.testing.assert_close(one[0], controlled[0], atol=1e-3, rtol=1e-3)
    assert (one[1] - controlled[1]).abs().max() > 0.01
    pairs = latents(4, control_image=image)
    torch.testing.assert_close(pairs[::2], controlled, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="control_image has 3 rows for 2 images"):
        latents(control_image=torch.zeros(3, 1, 32, 32))


def test_edge_f1_of_shifted_edges():
    import sys

    sys.path.insert(0, str(ROOT / "examples/embedded"))
    try:
        from evaluate_control import edge_f1
    finally:
        sys.path.pop(0)
    wanted = torch.zeros(3, 1, 8, 8)
    wanted[:, :, 3] = 1  # 8 pixels in a row
    drawn = torch.stack([wanted[0], wanted[0].roll(1, 1), wanted[0].clone()])
    drawn[2, :, :, 4:] = 0  # half of them: precision 1, recall 0.5
    torch.testing.assert_close(edge_f1(drawn, wanted, 0), torch.tensor([1.0, 0.0, 2 / 3]))
    assert edge_f1(drawn, wanted, 1)[1] == 1


def test_longer_run_continues_a_shorter_one_bitwise(tmp_path, cascade):
    changes = {"ema_beta": 0.5, "adaptive_loss_weight": True, "image_embedding_share": 0.5}
    train("controlnet", tmp_path, cascade, updates=3, **changes)
    again = train("controlnet", tmp_path, cascade, **changes)
    log = (tmp_path / "out/run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    whole = train("controlnet", tmp_path, cascade, experiment_id="whole", num_preview_images=0, **changes)
    assert_same(again, whole)


@pytest.mark.slow
def test_batch_equals_its_parts(tmp_path, cascade):
    whole = train("controlnet", tmp_path, cascade, grad_accum_steps=1, **ROUNDED)
    parts = train("controlnet", tmp_path, cascade, grad_accum_steps=2, experiment_id="parts", **ROUNDED)
    assert_same(parts, whole, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["effnet", "large"])
@pytest.mark.parametrize("choice", [True, "selective"])
def test_gradient_checkpointing_changes_nothing(tmp_path, cascade, mode, choice):
    changes = {"controlnet_bottleneck_mode": mode}
    plain = train("controlnet", tmp_path, cascade, **changes)
    again = train("controlnet", tmp_path, cascade, gradient_checkpointing=choice, experiment_id="again", **changes)
    assert_same(again, plain, tolerance=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, cascade):
    changes = {"ema_beta": 0.5, "adaptive_loss_weight": True, **ROUNDED}
    values = settings("controlnet", tmp_path / "two", cascade, **changes)
    config = write_config(tmp_path / "two.yaml", values)
    done = launch_two(ROOT / "tests/trainer_runs.py", "controlnet", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes       2,") == 1
    one = train("controlnet", tmp_path / "one", cascade, **changes)
    assert_same(tmp_path / "two/runs/run/final", one, tolerance=1e-5)


@pytest.mark.slow
def test_embedded_config_trains(tmp_path):
    """A few steps of the example's config, on the images of the repository."""
    config = str(ROOT / "examples/configs/controlnet_embedded.yaml")
    changes = {"webdataset_path": ROOT / "examples/data/ink_emoji.tar", "checkpoint_path": tmp_path / "runs",
               "output_path": tmp_path / "out", "updates": 2, "batch_size": 4, "num_preview_images": 2}  # fmt: skip
    trainer_main("controlnet")(["--config", config, *(f"--{key}={value}" for key, value in changes.items())])
    final = tmp_path / "runs/controlnet_embedded/final"
    model = StableCascadeControlNet.from_single_file(final / "controlnet.safetensors")
    assert model.config.blocks == list(range(12))
    shutil.rmtree(final)
