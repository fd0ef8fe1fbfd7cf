"""What an installation promises: declared imports, ranges that can be tried, an sdist whose tests run."""

import ast
import itertools
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.lowest_versions import declared, lowest

ROOT = Path(__file__).resolve().parents[1]
# What a package is called where it is imported, if not as it is installed.
IMPORTED_AS = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-contrib-python-headless",
    "resvg_py": "resvg-py",
    "skimage": "scikit-image",
    "yaml": "PyYAML",
}
# Brought by an extra's own package, and used only together with it.
BROUGHT_BY = {"fastapi": "gradio", "uvicorn": "gradio", "tokenizers": "transformers"}


def imports_of(folder):
    """Top-level names of other packages -> one file that imports them."""
    own = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"stable_cascade", "tests", "benchmarks", "examples"}
    own |= {path.stem for path in (ROOT / "examples").rglob("*.py")}
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in own:
                    found.setdefault(name, path.relative_to(ROOT))
    return found


def names_in(requirements):
    return {re.split(r"[\[<>=~!;]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


@pytest.mark.parametrize("folder", ["stable_cascade", "examples", "benchmarks", "tests"])
def test_every_import_is_declared(folder):
    extras = declared("EXTRAS")
    known = names_in(declared("REQUIRES")) | names_in(itertools.chain(*extras.values()))
    missing = {}
    for name, path in imports_of(folder).items():
        package = IMPORTED_AS.get(name, name).lower().replace("_", "-")
        if BROUGHT_BY.get(name, package).lower() not in known:
            missing[name] = str(path)
    assert not missing, f"setup.py does not declare {missing}"


def test_a_plain_install_imports_all_that_is_imported_at_the_top_of_a_module():
    """Extras may only be imported within functions, where their absence can be told."""
    known = names_in(declared("REQUIRES"))
    missing = set()
    for path in (ROOT / "stable_cascade").rglob("*.py"):
        if "app" in path.relative_to(ROOT).parts:  # reached only after gradio was found
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names | {"stable_cascade"}:
                    package = IMPORTED_AS.get(name, name).lower().replace("_", "-")
                    missing |= {(name, path.name)} if package not in known else set()
    assert not missing


def test_every_range_has_a_lowest_version_that_can_be_installed():
    pins = [lowest(requirement) for requirement in declared("REQUIRES")]
    assert len(pins) == len(set(names_in(pins))) >= 15


def test_an_sdist_holds_all_that_git_tracks(tmp_path):
    """The tests of an unpacked sdist have their helpers, examples, launch configs and documents."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode or not listing.stdout:
        pytest.skip("no git checkout, so no list of tracked files")
    build = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    result = subprocess.run(
        [*build, "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {name for name in listing.stdout.splitlines() if (ROOT / name).is_file()}
    assert not wanted - held - {".gitignore", ".ci/run"}, sorted(wanted - held)[:20]
