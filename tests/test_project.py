"""What the repository promises outside its code: commands, launch configs, example configs, portability."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.two_processes import launch_two

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_CONFIGS = {"single_gpu", "ddp", "fsdp", "fsdp2", "deepspeed_zero2", "cpu", "cpu_2proc"}
# Example config, by the start of its name -> the trainer that reads it.
# How the name of an example config tells its trainer; the first that matches holds.
TRAINERS = {
    r"controlnet": "train_controlnet.py",
    r"lora|finetune_c_3b_lora": "train_lora.py",
    r"text_to_image|finetune_c": "train_text_to_image.py",
    r"decoder|finetune_b": "train_decoder.py",
    r"vqgan|stage_a": "train_vqgan.py",
}
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".sh", ".cfg", ".svg", ""}
# Put together here so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["ro" + "ot", "wo" + "rk", "ho" + "me", "Us" + "ers", "mn" + "t"]) + r")/\w"
)
INDEX_OPTIONS = re.compile(r"--(?:extra-)?index" + "-url|--find" + r"-links|--trusted" + "-host")


def repository_files() -> list[Path]:
    """Files that are, or would be, committed: what git does not ignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tracked files are not known")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return [path for path in paths if path.is_file()]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def make_targets() -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    return {name for rule in rules for name in rule.split()}


def test_documented_make_commands_exist():
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / ".ci" / "run"]
    used = set()
    for path in documents:
        used |= set(re.findall(r"(?:^ {4,}|`|^\$ |&& |time )make ([a-z][a-z-]*)", text_of(path), flags=re.MULTILINE))
    assert {"quickstart", "test"} <= used
    assert used <= make_targets(), f"no such make target: {sorted(used - make_targets())}"


def test_files_named_by_the_readme_exist():
    named = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(ROOT / "README.md")))
    named |= set(
        re.findall(
            r"(?:examples|docs|accelerate_configs)/[\w/]+\.(?:py|yaml|md|tar|png|sh)", text_of(ROOT / "README.md")
        )
    )
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


def test_launch_configs_are_complete():
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} == LAUNCH_CONFIGS


@pytest.mark.parametrize("name", sorted(LAUNCH_CONFIGS))
def test_launch_config_is_valid_for_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin

    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    loaded = load_config_from_file(str(path))  # refuses keys that it does not know
    options = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(loaded, section)) <= options, "the launcher would ignore an option that it does not have"
    if loaded.fsdp_config:
        keys = loaded.fsdp_config
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=keys["fsdp_version"],
            reshard_after_forward=keys["fsdp_reshard_after_forward"],
            auto_wrap_policy=keys["fsdp_auto_wrap_policy"],
            state_dict_type=keys["fsdp_state_dict_type"],
        )
        assert plugin.auto_wrap_policy is not None


@pytest.mark.parametrize("name", ["fsdp", "fsdp2"])
def test_sharded_units_are_blocks_of_every_prior_and_decoder(name):
    from stable_cascade.files.presets import PRESETS
    from stable_cascade.models import blocks

    keys = yaml.safe_load(text_of(ROOT / "accelerate_configs" / f"{name}.yaml"))["fsdp_config"]
    wanted = set(keys["fsdp_transformer_layer_cls_to_wrap"].split(","))
    assert all(hasattr(blocks, cls) for cls in wanted)
    for component in ("prior", "decoder"):
        for version, preset in PRESETS[component].items():
            present = {cls for level in preset["block_types_per_layer"] for cls in level}
            assert wanted <= present, f"accelerate would refuse {component} {version}: no {wanted - present}"


def test_two_process_launch_really_has_two_processes(tmp_path):
    script = tmp_path / "world.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "state = Accelerator()\n"
        "print(f'{state.num_processes} processes on {state.device.type}')\n"
    )
    result = launch_two(script)
    assert result.stdout.count("2 processes on cpu") == 2, result.stdout + result.stderr


def test_example_configs_have_a_trainer():
    configs = sorted((ROOT / "examples" / "configs").rglob("*.yaml"))
    assert configs
    for path in configs:
        trainers = [script for pattern, script in TRAINERS.items() if re.match(pattern, path.stem)]
        assert trainers, f"{path.name}: a config's name starts with one of {', '.join(TRAINERS)}"
        assert (ROOT / "examples" / trainers[0]).is_file(), f"{path.name} needs examples/{trainers[0]}"
        assert isinstance(yaml.safe_load(text_of(path)), dict), f"{path.name} holds no keys"


def test_no_path_of_one_machine_and_no_package_index():
    faults = []
    for path in repository_files():
        if path.suffix not in TEXT or path.name == "LICENSE":
            continue
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if MACHINE_PATHS.search(line) or INDEX_OPTIONS.search(line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not faults, "\n".join(faults)


def test_constraints_pin_the_tested_set_without_cuda():
    pins = [line.strip() for line in text_of(ROOT / "constraints.txt").splitlines() if line.strip() and line[0] != "#"]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", pin) for pin in pins)
    assert not [pin for pin in pins if re.match(r"(torchvision|torchaudio|nvidia|triton|cuda)", pin)]


def test_licence_is_apache_2():
    licence = text_of(ROOT / "LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert 'license="Apache-2.0"' in text_of(ROOT / "setup.py")


def test_embedded_cascade_is_small_and_safe():
    folder = ROOT / "stable_cascade" / "embedded"
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert not [path.name for path in files if path.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}]


def test_configuration_page_is_up_to_date():
    from stable_cascade import config

    page = text_of(ROOT / "docs" / "configuration.md")
    assert page == config.reference(config.TRAINERS).rstrip() + "\n", "run `make docs`"
