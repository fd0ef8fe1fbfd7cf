"""How well a canny ControlNet leads the embedded cascade: prints one JSON line and a sentence, writes a sheet.

    python examples/embedded/evaluate_control.py --controlnet outputs/checkpoints/controlnet_embedded/final

Compares the edges of a control image with those of the image drawn from the same caption and the same seeds, once
without and once with the ControlNet. The control images are in control_120.webp: training captions, poses (size,
place, angle, mirrored) that no training image has.

Edges are CannyFilter's, of both images at 64 px. An edge pixel is found when the other image has one within the
tolerance in both directions. Precision is the share of found pixels of the drawn image, recall of the control
image, F1 their harmonic mean; the number is the mean over all images.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measures import read_mosaic, write_sheet
from torch import Tensor

HERE = Path(__file__).resolve().parent
SIDE = 64


def edge_f1(drawn: Tensor, wanted: Tensor, tolerance: int) -> Tensor:
    """F1 of two edge maps, per image; 0 where nothing is found.

    Shapes: (B, 1, H, W) twice, 1 on edges -> (B,).
    """
    near = [F.max_pool2d(edges, 2 * tolerance + 1, 1, tolerance) for edges in (drawn, wanted)]
    precision = (drawn * near[1]).sum((1, 2, 3)) / drawn.sum((1, 2, 3)).clamp_min(1)
    recall = (wanted * near[0]).sum((1, 2, 3)) / wanted.sum((1, 2, 3)).clamp_min(1)
    return 2 * precision * recall / (precision + recall).clamp_min(1e-9)


def load_pipeline(arguments: argparse.Namespace, controlnet):
    """The cascade with the ControlNet, in float32, without progress bars."""
    from stable_cascade import StableCascadePipeline
    from stable_cascade.embedded import embedded_path

    folder = arguments.model or embedded_path()
    pipeline = StableCascadePipeline.from_pretrained(folder, torch_dtype=torch.float32, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_control(folder: Path):
    """The ControlNet that train_controlnet.py wrote, and the filter that it was trained with."""
    from stable_cascade import StableCascadeControlNet
    from stable_cascade.controls import make_filter
    from stable_cascade.files.controlnet import read_description

    known = read_description(folder / "controlnet.safetensors")
    controlnet = StableCascadeControlNet.from_pretrained(folder / "controlnet").eval()
    return controlnet, make_filter(known["filter"], known["filter_params"])


def generate(pipeline, captions: list[str], arguments: argparse.Namespace, images: Tensor | None = None) -> Tensor:
    """Images for the captions; image i has the seed `--seed` + i, with and without control.

    Shapes: control images (B, c, H, W) -> (B, 3, 64, 64) in [0, 1].
    """
    parts = []
    for start in range(0, len(captions), arguments.batch_size):
        rows = slice(start, start + arguments.batch_size)
        generators = [torch.Generator().manual_seed(arguments.seed + start + i) for i in range(len(captions[rows]))]
        drawn = pipeline(
            prompt=captions[rows],
            height=SIDE,
            width=SIDE,
            prior_num_inference_steps=arguments.prior_steps,
            prior_guidance_scale=arguments.prior_guidance_scale,
            num_inference_steps=arguments.steps,
            control_image=None if images is None else images[rows],
            controlnet_conditioning_scale=arguments.scale,
            generator=generators,
            output_type="pt",
        ).images
        parts.append(drawn.float().cpu().clamp(0, 1))
    return torch.cat(parts)


def rebuild(images: Tensor, arguments: argparse.Namespace) -> Tensor:
    """The control images through image encoder, Stage B and Stage A: as near as the cascade can come to their edges.

    Shapes: (B, 3, 64, 64) -> (B, 3, 64, 64) in [0, 1].
    """
    import stable_cascade
    from stable_cascade.embedded import embedded_path

    pipeline = stable_cascade.StableCascadeReconstructionPipeline.from_pretrained(arguments.model or embedded_path())
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(arguments.seed + i) for i in range(len(images))]
    return pipeline(images, num_inference_steps=arguments.steps, generator=generators, output_type="pt").images


def measure(arguments: argparse.Namespace) -> dict:
    """F1 by tolerance: without control, with it, their ratio, and what the cascade could reach."""
    from stable_cascade.controls import make_filter

    _, captions, images = read_mosaic(arguments.images, side=SIDE)
    captions, images = captions[: arguments.count], images[: arguments.count]
    controlnet, control_filter = load_control(arguments.controlnet)
    pipeline = load_pipeline(arguments, controlnet)
    canny = make_filter("CannyFilter", {"resize": SIDE})
    # At the size of the training images: a latent stands for 8 px there, and for 10.67 px of what is drawn.
    seen = F.interpolate(images, size=pipeline.control_size(SIDE, SIDE), mode="bilinear", antialias=True)
    drawn = {
        "uncontrolled": generate(pipeline, captions, arguments),
        "controlled": generate(pipeline, captions, arguments, control_filter(seen)),
    }
    drawn["rebuilt"] = rebuild(images, arguments).float().clamp(0, 1)
    wanted = canny(images)
    edges = {name: canny(batch) for name, batch in drawn.items()}
    result: dict = {"images": len(images), "f1": {}}
    for tolerance in range(4):
        f1 = {name: edge_f1(found, wanted, tolerance).mean().item() for name, found in edges.items()}
        result["f1"][tolerance] = {**f1, "ratio": f1["controlled"] / f1["uncontrolled"]}
    blocks = [
        [wanted[i].expand(3, -1, -1), drawn["uncontrolled"][i], drawn["controlled"][i], images[i]]
        for i in range(min(len(images), arguments.shown))
    ]
    write_sheet(arguments.sheet, blocks, columns=arguments.columns)
    return {**result, **result["f1"][1], "sheet": str(arguments.sheet)}


def main() -> None:
    """Prints the measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controlnet", type=Path, required=True, help="folder that train_controlnet.py wrote")
    parser.add_argument("--model", type=Path, help="folder of a cascade; default: the embedded one")
    parser.add_argument("--images", type=Path, default=HERE / "control_120.webp", help="control images")
    parser.add_argument("--sheet", type=Path, default=Path("outputs/embedded/evaluation/control.png"))
    parser.add_argument("--shown", type=int, default=48, help="images on the sheet")
    parser.add_argument("--columns", type=int, default=4, help="images in a row of the sheet")
    parser.add_argument("--count", type=int, default=120, help="images to measure")
    parser.add_argument("--scale", type=float, default=1.0, help="controlnet_conditioning_scale")
    parser.add_argument("--prior_steps", type=int, default=20)
    parser.add_argument("--prior_guidance_scale", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        with torch.no_grad():
            result = measure(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result))
    print(
        f"edge F1 within 1 px over {result['images']} images: {result['controlled']:.3f} controlled, "
        f"{result['uncontrolled']:.3f} uncontrolled, {result['ratio']:.2f} times "
        f"({result['rebuilt']:.3f} when the images themselves go through the cascade)"
    )


if __name__ == "__main__":
    main()
