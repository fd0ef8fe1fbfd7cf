"""Sessions: what draws on the embedded cascade, with as few steps as can be."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stable_cascade.drawing import ControlChoice, Drawing, InputFile, InputImages, LoraChoice, Session
from tests.drawing_parts import checkered, distance, half_mask, make_controlnet, make_lora, same, saved

FAST = {"prior_num_inference_steps": 2, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def session():
    return Session()


def fast(session, **settings):
    return session.drawing(**{"prompt": "red apple", **FAST, **settings})


def test_every_image_of_a_count_is_the_one_its_seed_draws_alone(session):
    several = session.draw(fast(session, seed=3), count=3)
    assert [one.drawing.seed for one in several] == [3, 4, 5]
    alone = [session.draw(fast(session, seed=seed))[0] for seed in (5, 4, 3)]
    assert all(same(one.image, other.image) for one, other in zip(several, reversed(alone), strict=True))
    assert not same(several[0].image, several[1].image)
    assert several[0].drawing == replace(fast(session, seed=3), height=64, width=64)
    assert several[0].made_with["dtype"] == "float32"


def test_a_batch_is_within_a_level_of_its_images_alone(session):
    alone = session.draw(fast(session), count=3)
    together = session.draw(fast(session), count=3, batch_size=2)
    for one, other in zip(alone, together, strict=True):
        difference = np.asarray(one.image, int) - np.asarray(other.image, int)
        assert np.abs(difference).max() <= 1


def test_every_setting_decides_the_image(session):
    base = fast(session, prompt="red (apple:1.5)", prior_num_inference_steps=2, num_inference_steps=2)
    changes = [
        {}, {"prompt": "panda"}, {"weighted": True}, {"negative_prompt": "red"}, {"seed": 1}, {"width": 72},
        {"height": 72}, {"sampler": "ddim"},
        {"prior_num_inference_steps": 3}, {"prior_guidance_scale": 2.0}, {"num_inference_steps": 1},
        {"decoder_guidance_scale": 3.0}, {"guidance_rescale": 0.0}, {"guidance_interval": (0.7, 1.0)},
        {"sampler": "lcm"}, {"shift": 1.0}, {"preview": True}, {"cache_interval": 2},
    ]  # fmt: skip
    drawn = [session.draw(replace(base, **change))[0].image for change in changes]
    assert len({image.tobytes() for image in drawn}) == len(changes)
    images = InputImages(image=checkered(), images=(checkered(shift=9), Image.new("RGB", (64, 64), "red")))
    changes = [{}, {"strength": 0.5}, {"image_weights": (1.0, 0.1)}, {"image_weights": (0.1, 1.0)}]
    drawn = [session.draw(replace(base, task="img2img", **change), images)[0].image for change in changes]
    assert len({image.tobytes() for image in drawn}) == len(changes)


def test_what_was_drawn_before_leaves_no_trace(session, tmp_path):
    first, second = make_lora(tmp_path / "a.safetensors", 1), make_lora(tmp_path / "b.safetensors", 2)
    control = ControlChoice(make_controlnet(tmp_path / "cn"), InputFile(saved(tmp_path)))
    plans = {
        "plain": {},
        "lora": {"loras": (LoraChoice(first, 0.5),)},
        "stronger": {"loras": (LoraChoice(first, 2.0),)},
        "both": {"loras": (LoraChoice(first, 0.5), LoraChoice(second, 1.0))},
        "other": {"loras": (LoraChoice(second),)},
        "ddim": {"sampler": "ddim"},
        "shift": {"shift": 0.5},
        "control": {"task": "control", "controlnets": (control,)},
    }
    drawings = {name: fast(session, **settings) for name, settings in plans.items()}
    images = {name: session.draw(drawing)[0].image for name, drawing in drawings.items()}
    assert len({image.tobytes() for image in images.values()}) == len(plans)
    for name in reversed(list(plans)):
        assert same(session.draw(drawings[name])[0].image, images[name]), name
    assert same(Session().draw(drawings["lora"])[0].image, images["lora"])
    assert session.pipeline.prior_scheduler.config["sampler"] == "ddpm"
    assert session.pipeline.prior_scheduler.config["shift"] == 2.0


def test_a_lora_that_does_not_fit_leaves_the_session_as_it_was(session, tmp_path):
    before = session.draw(fast(session))[0].image
    wide = LoraChoice(make_lora(tmp_path / "wide.safetensors", width=2048))
    with pytest.raises(ValueError, match=r"wide\.safetensors' was trained for a prior of width 2048"):
        session.draw(fast(session, loras=(LoraChoice(make_lora(tmp_path / "a.safetensors")), wide)))
    assert same(session.draw(fast(session))[0].image, before)


def test_steps_are_told_with_rough_images(session):
    told = []
    session.draw(fast(session), on_step=lambda *step: told.append(step))
    assert [step[:3] for step in told] == [("prior", 1, 2), ("prior", 2, 2), ("decoder", 1, 1)]
    assert told[0][3].size == (48, 48)
    assert told[2][3] is None
    told.clear()
    image = InputImages(image=checkered())
    session.draw(fast(session, task="img2img", strength=0.5, prior_num_inference_steps=4), image,
                 on_step=lambda *step: told.append(step), previews=False)  # fmt: skip
    assert told[1] == ("prior", 2, 2, None)


def test_what_a_step_raises_stops_the_drawing(session):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.draw(fast(session), on_step=stop)


def test_images_in_memory_draw_what_their_files_do(session, tmp_path):
    drawing = fast(
        session, task="inpaint", image=InputFile(saved(tmp_path)), mask_image=InputFile(half_mask(tmp_path))
    )
    from_files = session.draw(drawing)[0]
    assert from_files.drawing.image.sha256
    assert from_files.drawing.strength == 1.0
    in_memory = InputImages(image=checkered(), mask_image=Image.open(tmp_path / "mask.png"))
    assert same(session.draw(fast(session, task="inpaint"), in_memory)[0].image, from_files.image)
    kept = (0, 0, 32, 64)
    assert same(from_files.image.crop(kept), checkered().crop(kept))


def test_outpainting_keeps_the_image(session):
    drawing = fast(session, task="inpaint", outpaint=(32, 0, 16, 16))
    with pytest.raises(ValueError, match=r"left \+ right and top \+ bottom must be multiples of 8"):
        session.draw(replace(drawing, outpaint=(4, 0, 0, 0)), InputImages(image=checkered()))
    image = session.draw(drawing, InputImages(image=checkered()))[0]
    assert image.image.size == (112, 80)
    assert (image.drawing.height, image.drawing.width) == (80, 112)
    assert same(image.image.crop((32, 0, 96, 64)), checkered())
    again = session.draw(image.drawing, InputImages(image=checkered()))[0]
    assert same(again.image, image.image)


def test_reconstruction_ignores_stage_c(session):
    red = Image.new("RGB", (64, 64), (220, 60, 40))
    images = InputImages(image=red)
    drawing = fast(session, task="reconstruct", num_inference_steps=4)
    one = session.draw(drawing, images)[0]
    other = session.draw(replace(drawing, prior_num_inference_steps=9), images)[0]
    assert same(one.image, other.image)
    assert distance(one.image, red) < 40


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((64, 64), {}, (64, 64)),
        ((67, 61), {}, (64, 72)),
        ((300, 100), {}, (64, 192)),
        ((256, 256), {}, (64, 64)),
        ((256, 128), {"height": 96}, (96, 192)),
        ((256, 128), {"height": 64, "width": 64}, (64, 64)),
        ((8, 8), {}, (64, 64)),
    ],
)
def test_the_size_follows_the_image(session, size, settings, expected):
    drawing = fast(session, task="reconstruct", **settings)
    images = InputImages(image=checkered(*size))
    (one,) = session.draw(drawing, images)
    assert (one.drawing.height, one.drawing.width) == expected
    assert one.image.size == expected[::-1]


def test_a_control_image_is_what_the_filter_makes(session, tmp_path):
    folder = make_controlnet(tmp_path / "cn")
    photo = Image.new("RGB", (64, 64))
    photo.paste("white", (16, 16, 48, 48))
    drawing = fast(session, task="control", controlnets=(ControlChoice(folder),))
    images = InputImages(control_images=(photo,))
    (edges,) = session.control_images(drawing, images)
    assert edges.size == (48, 48)
    assert 0 < np.asarray(edges).mean() < 128
    from_photo = session.draw(drawing, images)[0].image
    ready = replace(drawing, controlnets=(replace(drawing.controlnets[0], filtered=True),))
    from_edges = session.draw(ready, InputImages(control_images=(edges,)))[0].image
    assert distance(from_photo, from_edges) < 1  # edges as an image have 8 bits
    nothing = replace(drawing, controlnets=(replace(drawing.controlnets[0], scale=0.0),))
    assert same(session.draw(nothing, images)[0].image, session.draw(fast(session))[0].image)
    with pytest.raises(ValueError, match="has 3 channels, its ControlNet takes 1"):
        session.draw(ready, InputImages(control_images=(checkered(),)))
    rgb = make_controlnet(tmp_path / "rgb", channels=3)
    with pytest.raises(ValueError, match="has 1 channels, its ControlNet takes 3"):
        session.draw(replace(ready, controlnets=(ControlChoice(rgb, filtered=True),)),
                     InputImages(control_images=(edges.convert("L"),)))  # fmt: skip


def test_two_controlnets_draw_together(session, tmp_path):
    nets = [ControlChoice(make_controlnet(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    images = InputImages(control_images=(checkered(), checkered(shift=9)))
    both = session.draw(fast(session, task="control", controlnets=tuple(nets)), images)[0].image
    without = (nets[0], replace(nets[1], scale=0.0))
    one = session.draw(fast(session, task="control", controlnets=without), images)[0].image
    alone = session.draw(
        fast(session, task="control", controlnets=(nets[0],)), InputImages(control_images=(checkered(),))
    )
    assert not same(both, one)
    assert distance(one, alone[0].image) < 1


@pytest.mark.parametrize(
    "description",
    [
        {"filter": "os:system", "filter_params": {"command": "touch broken"}},
        {"filter": "IdentityFilter", "filter_params": {"embedder": "os:system"}},
    ],
)
def test_a_controlnet_file_names_no_code(session, tmp_path, description):
    choice = ControlChoice(make_controlnet(tmp_path / "cn", **description), InputFile(saved(tmp_path)))
    with pytest.raises(ValueError, match="make the control image yourself"):
        session.check(fast(session, task="control", controlnets=(choice,)))


def test_changed_files_are_refused_unless_allowed(session, tmp_path):
    drawing = fast(session, task="img2img", image=InputFile(saved(tmp_path)),
                   loras=(LoraChoice(make_lora(tmp_path / "a.safetensors")),))  # fmt: skip
    known = session.draw(drawing)[0].drawing
    session.check(known)
    make_lora(tmp_path / "a.safetensors", seed=5)
    with pytest.raises(ValueError, match=r"lora '.*a\.safetensors' is not the file .*--allow-changed-files"):
        session.draw(known)
    assert session.draw(known, allow_changed_files=True)[0].drawing.loras[0].sha256 != known.loras[0].sha256
    saved(tmp_path, shift=1)
    with pytest.raises(ValueError, match=r"image '.*photo\.png' is not the file"):
        session.draw(replace(known, loras=()))
    (tmp_path / "photo.png").unlink()
    with pytest.raises(ValueError, match=r"image '.*photo\.png' does not exist; give the place"):
        session.draw(known, allow_changed_files=True)


@pytest.mark.parametrize(
    ("settings", "images", "said"),
    [
        ({"task": "img2img"}, {}, "task img2img needs an image and none is known; give image"),
        ({"task": "inpaint"}, {"image": checkered()}, "task inpaint needs a mask"),
        ({"task": "variation"}, {}, "task variation needs reference images"),
        ({"task": "control"}, {}, "task control needs a ControlNet"),
        ({"strength": 0.5}, {}, "task generate takes no strength"),
        ({}, {"image": checkered()}, "task generate takes no image"),
        ({"task": "variation", "image_weights": (1.0, 2.0)}, {"images": (checkered(),)}, "has 2 entries for 1"),
        (
            {"task": "inpaint"},
            {"image": checkered(), "mask_image": checkered(32)},
            "mask_image is 32 x 64 and image 64",
        ),
        ({}, {"control_images": (checkered(),)}, "control_images has 1 images for 0 ControlNets"),
        ({"model": "/elsewhere"}, {}, "the drawing has model '/elsewhere', this session 'embedded'"),
        ({"dtype": "float16"}, {}, "the drawing has dtype 'float16', this session 'float32'"),
        ({"loras": (LoraChoice("none.safetensors"),)}, {}, "lora 'none.safetensors' does not exist"),
        ({"task": "control", "controlnets": (ControlChoice("nowhere"),)}, {}, "controlnet 'nowhere' does not exist"),
        (
            {"task": "control", "controlnets": (ControlChoice("nobody/nothing"),)},
            {"control_images": (checkered(),)},
            "'nobody/nothing' is no file or folder here and could not be loaded from the Hub",
        ),
        ({"seed": 2**63 - 1}, {}, "goes beyond"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(settings, images, said):
    session = Session()
    with pytest.raises(ValueError) as caught:
        session.draw(Drawing(**settings), InputImages(**images), count=2)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert session._pipeline is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"device": "gpu"}, "device 'gpu' is none"),
        ({"model": "c.safetensors,b.safetensors"}, "model file 'c.safetensors' does not exist"),
        ({"model": "missing.safetensors"}, "model file 'missing.safetensors' does not exist"),
        ({"model": f"{__file__},tokenizer="}, "says no place for tokenizer; write NAME=PLACE"),
    ],
)
def test_a_session_that_cannot_be_is_one_line(settings, said):
    with pytest.raises(ValueError, match=said):
        Session(**settings)


def test_single_files_draw_what_their_folder_does(session, tmp_path):
    from safetensors.torch import save_file

    from stable_cascade.embedded import embedded_path
    from stable_cascade.files import to_original

    plain = session.draw(fast(session))[0].image  # takes LoRAs of other tests out, too
    for stage, component in (("stage_c", "prior"), ("stage_b", "decoder")):
        weights = getattr(session.pipeline, component).state_dict()
        save_file(to_original(weights, component), tmp_path / f"{stage}.safetensors")
    parts = [f"{name}={embedded_path() / name}" for name in ("text_encoder", "tokenizer", "vqgan")]
    model = ",".join([f"{tmp_path}/stage_c.safetensors", f"{tmp_path}/stage_b.safetensors", *parts])
    drawn = Session(model).draw(fast(session, model=model))[0]
    assert same(drawn.image, plain)
    with pytest.raises(ValueError, match="lite and variant choose files of a folder"):
        Session(model, lite=True).pipeline  # noqa: B018
    with pytest.raises(ValueError, match="needs text_encoder, tokenizer, vqgan"):
        Session(f"{tmp_path}/stage_c.safetensors,{tmp_path}/stage_b.safetensors").pipeline  # noqa: B018


def test_a_count_of_nothing_is_refused(session):
    for name in ("count", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} 0 is not a whole number from 1"):
            session.draw(fast(session), **{name: 0})
