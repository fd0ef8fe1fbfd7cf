"""What the documentation names exists: pages, images, links, commands, flags, files and functions."""

from __future__ import annotations

import argparse
import importlib
import re
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from tests.docs_blocks import ROOT, pages, without_blocks

DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
CODE = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", flags=re.MULTILINE)
PATHS = re.compile(r"(?<![\w./-])(?:stable_cascade|examples|tests|docs|accelerate_configs|benchmarks)/[\w./-]*\w")
WRITTEN = {"benchmarks/out/bench.json"}
"""Files that a command leaves, which no clone has."""
LARGEST_IMAGE = 200_000
LARGER = {"before_after.png", "canny_embedded.png", "embedded_samples.png"}
"""Images from before there was a limit."""
OTHERS = {
    "--cpu", "--num_processes", "--mixed_precision", "--config_file", "--num_machines",  # accelerate
    "--sort", "--durations", "--nodes",
    "--network_dim", "--network_alpha", "--cache_latents", "--dataset_config",  # kohya
}  # fmt: skip
"""Flags of other programs."""


def inline_code(page: Path) -> list[tuple[int, str]]:
    """(line, words between backticks), outside of blocks."""
    lines = without_blocks(page).split("\n")
    return [(number, code) for number, line in enumerate(lines, 1) for code in CODE.findall(line)]


def anchors(page: Path) -> set[str]:
    """The ids that headings get in the site."""
    found: set[str] = set()
    for heading in HEADING.findall(without_blocks(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
        number = 0
        while (name := f"{slug}_{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def nav_files(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [name for child in children for name in nav_files(child)]


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(nav_files(settings["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))
    assert settings["theme"]["font"] is False, "pages must fetch nothing from another host"
    assert not settings.get("extra_javascript")
    assert not settings.get("extra_css")


def broken_link(page: Path, target: str) -> str | None:
    """What is wrong with a link, if anything."""
    if re.match(r"https?://|mailto:", target):
        return None
    name, _, anchor = unquote(target).partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return "does not exist"
    if page.parent == DOCS and DOCS not in (path, *path.parents):
        return "leaves docs/, so it breaks in the site; name the file instead"
    if anchor and path.suffix == ".md" and anchor not in anchors(path):
        return f"{path.name} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_links_and_images_resolve(page):
    faults = []
    for number, line in enumerate(without_blocks(page).split("\n"), 1):
        for target in LINK.findall(CODE.sub("", line)):
            fault = broken_link(page, target)
            if fault:
                faults.append(f"{page.name}:{number}: {target} {fault}")
    assert not faults, "\n".join(faults)


def test_images_are_small_and_used():
    showing = [*pages(), *(ROOT / folder / "README.md" for folder in ("stable_cascade/embedded", "examples/embedded"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in showing)
    for image in sorted((DOCS / "images").iterdir()):
        assert f"images/{image.name}" in text, f"no page shows {image.name}"
        assert image.name in LARGER or image.stat().st_size < LARGEST_IMAGE, f"{image.name} is too large"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    from stable_cascade.cli.main import make_parser

    actions = make_parser()._actions
    return dict(next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices)


def trainer_keys() -> set[str]:
    from stable_cascade.config.settings import TRAINERS

    return {f"--{name}" for cls in TRAINERS for name in cls.__dataclass_fields__}


def unknown_flags(page: Path) -> list[str]:
    """Flags in running text that no command, trainer or example has, and commands that do not exist."""
    commands = parsers()
    options = {name: set(parser._option_string_actions) for name, parser in commands.items()}
    examples = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py"))
    anywhere = set().union(*options.values(), trainer_keys(), OTHERS, {"--help", "--version"})
    faults = []
    for number, code in inline_code(page):
        flags = re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code)
        command = re.match(r"(?:\.venv/bin/)?stable-cascade ([a-z][a-z0-9]*)", code)
        allowed = anywhere
        if command and command.group(1) not in commands:
            faults.append(f"{page.name}:{number}: there is no command '{command.group(1)}'")
        elif command:
            takes_keys = any(action.dest == "overrides" for action in commands[command.group(1)]._actions)
            allowed = options[command.group(1)] | (trainer_keys() if takes_keys else set())
        for flag in flags:
            if flag not in allowed and (command or f'"{flag}"' not in examples):
                faults.append(f"{page.name}:{number}: `{code}`: no flag {flag}")
    return faults


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_commands_and_flags_exist(page):
    faults = unknown_flags(page)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_names_and_files_exist(page):
    faults = []
    for number, code in inline_code(page):
        for name in re.findall(r"(?<![\w./])stable_cascade(?:\.[A-Za-z_]\w*)+", code):
            if not resolves(name) and not code.startswith("tracker"):
                faults.append(f"{page.name}:{number}: there is no {name}")
        for path in PATHS.findall(code):
            if not (ROOT / path).exists() and path not in WRITTEN and not re.search(r"[*…{<]", code):
                faults.append(f"{page.name}:{number}: there is no {path}")
    assert not faults, "\n".join(faults)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one, or of a class in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            fields = getattr(found, "__dataclass_fields__", {}) if isinstance(found, type) else {}
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_the_checks_see_faults(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n[b](nothing.md) `stable-cascade estimate --nonsense` `stable-cascade fly` `--nonsense`\n")
    assert broken_link(page, "nothing.md")
    assert broken_link(page, "#b")
    assert broken_link(page, "#a") is None
    assert len(unknown_flags(page)) == 3
    assert resolves("stable_cascade.config.LoraConfig.rank")
    assert not resolves("stable_cascade.config.LoraConfig.rnak")
    assert not resolves("stable_cascade.nothing.at_all")
