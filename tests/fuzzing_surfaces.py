"""All ways into the package that are tried with damaged input, and how many cases of each, see `fuzzing`."""

from __future__ import annotations

from tests import fuzzing_commands, fuzzing_image_surfaces, fuzzing_runs, fuzzing_weights
from tests.fuzzing import Surface

SURFACES: dict[str, Surface] = {
    surface.name: surface
    for module in (fuzzing_weights, fuzzing_image_surfaces, fuzzing_commands, fuzzing_runs)
    for surface in module.SURFACES
}
CASES = {
    "weights": 900, "controlnet file": 500, "lora keys": 1000, "lora header": 600, "peft folder": 200,
    "learned tokens": 500, "pickle": 200,
    "inspect": 1300, "pipeline folder": 400, "image bytes": 1200, "drawing image": 1000, "drawing record": 500,
    "control image": 300, "config file": 300, "command": 300,
    "shard structure": 500, "run folder": 300,
}  # fmt: skip
"""Ten thousand in all."""
