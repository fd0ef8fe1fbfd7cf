"""The one rule of the layout: a file imports only from lower layers or its own folder."""

import ast
from pathlib import Path

import pytest

import stable_cascade
from stable_cascade.lazy import type_checking_imports

HOMES = type_checking_imports(Path(stable_cascade.__file__).read_text())
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "stable_cascade"

# Folder or module of the package (or of the repository) -> its layer. A new one has to be placed here.
LAYERS = {
    "bounds": -1,
    "compilation": -1,
    "components": -1,
    "disk": -1,
    "embedded": -1,
    "hub": -1,
    "lazy": -1,
    "pixels": -1,
    "redaction": -1,
    "transfer": -1,
    "wording": -1,
    "diffusion": 0,
    "data": 0,
    "controls": 0,
    "files": 0,
    "config": 0,
    "models": 1,
    "schedulers": 1,
    "objectives": 2,
    "adapters": 2,
    "training": 3,
    "pipelines": 3,
    "factory": 4,
    "drawing": 4,
    "estimate": 5,
    "trainers": 5,
    "cli": 6,
    "app": 6,
    "examples": 6,
    "benchmarks": 6,
}
# These files lie in one folder, the package's own; only in this direction, so that no circle arises.
SAME_FOLDER = {
    ("disk", "wording"),
    ("hub", "wording"),
    ("cli", "app"),  # the command that starts the page
}
MAY_IMPORT_CONFIG = {"training", "factory", "estimate", "trainers", "cli", "examples", "benchmarks"}
BANNED_MODULES = {"torchvision", "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
SHELLS = {"os.system", "os.popen", "commands.getoutput", "subprocess.getoutput", "subprocess.getstatusoutput"}


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts]


def unit_of(path: Path) -> str:
    """The folder or module that a file belongs to: `stable_cascade/data/shards.py` -> "data"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def absolute_module(node: ast.ImportFrom, path: Path) -> str:
    """The module named by `from X import Y`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[: -node.level]
    return ".".join([*package, node.module] if node.module else package)


def imports_of(tree: ast.AST, path: Path) -> list[tuple[int, str]]:
    """Every import of a file, wherever it stands, as (line, dotted name); `from a import b` gives "a.b"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute_module(node, path)
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                found.append((node.lineno, literal.value))
    return found


def imported_unit(name: str) -> str | None:
    """The unit of the package that a dotted import reaches; None for a foreign package or the package's own top."""
    parts = name.split(".")
    if parts[0] in LAYERS and parts[0] in ("examples", "benchmarks"):
        return parts[0]
    if parts[0] != PACKAGE or len(parts) == 1:
        return None
    if HOMES.get(parts[1]):  # from stable_cascade import StableCascadePrior
        return HOMES[parts[1]].removeprefix(".")
    return None if parts[1].startswith("__") else parts[1]


def dotted(node: ast.AST) -> str:
    """`os.path.join` of an attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def layer_faults(source: str, path: Path) -> list[str]:
    """What in a file breaks the layer rule, one line each."""
    unit, faults = unit_of(path), []
    for line, name in imports_of(ast.parse(source), path):
        target = imported_unit(name)
        if target is None or target == unit or (unit, target) in SAME_FOLDER:
            continue
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if target not in LAYERS:
            faults.append(f"{where}: '{target}' has no layer")
        elif LAYERS[target] >= LAYERS[unit]:
            faults.append(f"{where}: layer {LAYERS[unit]} may not import layer {LAYERS[target]}")
        elif target == "config" and unit not in MAY_IMPORT_CONFIG:
            faults.append(f"{where}: only {sorted(MAY_IMPORT_CONFIG)} import config")
        elif unit == "training" and target in ("models", "adapters", "objectives", "schedulers"):
            faults.append(f"{where}: the loop does not know what it trains")
    return faults


def safety_faults(source: str, path: Path) -> list[str]:
    """Imports and calls that the project bans: torchvision, pickle, eval, exec, shells."""
    tree, faults = ast.parse(source), []
    where = path.relative_to(ROOT)
    for line, name in imports_of(tree, path):
        if name.split(".")[0] in BANNED_MODULES:
            faults.append(f"{where}:{line} imports {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in ("eval", "exec", "builtins.eval", "builtins.exec") or called in SHELLS:
            faults.append(f"{where}:{node.lineno} calls {called}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "shell" and value is not False:
                faults.append(f"{where}:{node.lineno} calls {called} with shell={value}")
            if keyword.arg == "weights_only" and value is not True:
                faults.append(f"{where}:{node.lineno} calls {called} with weights_only={value}")
            if keyword.arg == "allow_pickle" and value is not False:
                faults.append(f"{where}:{node.lineno} calls {called} with allow_pickle={value}")
        if called == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
            faults.append(f"{where}:{node.lineno} calls torch.load without weights_only=True")
    return faults


def test_every_folder_of_the_package_has_a_layer():
    units = {unit_of(path) for path in python_files(PACKAGE)} - {"__init__"}
    assert units <= set(LAYERS), f"place these in LAYERS: {sorted(units - set(LAYERS))}"


def test_files_import_only_from_lower_layers_or_their_own_folder():
    files = [path for path in python_files(PACKAGE, "examples", "benchmarks") if unit_of(path) in LAYERS]
    assert files
    faults = [fault for path in files for fault in layer_faults(path.read_text(encoding="utf-8"), path)]
    assert not faults, "\n".join(faults)


def test_every_module_that_is_imported_exists():
    """Imports inside functions too, which nothing else looks at before they run."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files(PACKAGE)}
    modules |= {name.removesuffix(".__init__") for name in modules}
    missing = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(PACKAGE, "examples", "benchmarks", "tests", "docs")
        for line, name in imports_of(ast.parse(path.read_text(encoding="utf-8")), path)
        if name.startswith(f"{PACKAGE}.") and not {name, name.rpartition(".")[0]} & modules
    ]
    assert not missing, "\n".join(missing)


def test_package_top_imports_nothing_eagerly():
    path = ROOT / PACKAGE / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    eager = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {name.rpartition(".")[0] for node in eager for _, name in imports_of(node, path)} <= {
        "__future__",
        "typing",
        "stable_cascade.lazy",
    }


def test_nothing_banned_is_imported_or_called():
    files = [*python_files(PACKAGE, "examples", "benchmarks"), ROOT / "setup.py"]
    faults = [fault for path in files for fault in safety_faults(path.read_text(encoding="utf-8"), path)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "where, source",
    [
        ("stable_cascade/diffusion/x.py", "from stable_cascade.data import shards"),
        ("stable_cascade/diffusion/x.py", "from ..models import unet"),
        ("stable_cascade/models/x.py", "import stable_cascade.pipelines"),
        ("stable_cascade/models/x.py", "from stable_cascade.config import load_config"),
        ("stable_cascade/pipelines/x.py", "def f():\n    from ..training import loop"),
        ("stable_cascade/training/x.py", "from stable_cascade import StableCascadePrior"),
        ("stable_cascade/training/x.py", "from ..objectives import prior"),
        ("stable_cascade/objectives/x.py", "import importlib\nimportlib.import_module('stable_cascade.adapters')"),
        ("stable_cascade/trainers/start.py", "import examples.quickstart"),
        ("stable_cascade/data/x.py", "from stable_cascade.newfolder import thing"),
    ],
)
def test_a_broken_layer_rule_is_seen(where, source):
    assert len(layer_faults(source, ROOT / where)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torchvision.transforms as T",
        "from pickle import loads",
        "eval('1 + 1')",
        "exec('x = 1')",
        "import os\nos.system('aws s3 cp a b')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import torch\ntorch.load('a.pt')",
        "import torch\ntorch.load('a.pt', weights_only=False)",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
    ],
)
def test_a_banned_call_is_seen(source):
    assert len(safety_faults(source, ROOT / "stable_cascade/data/x.py")) == 1


def test_allowed_imports_pass():
    source = "from stable_cascade.diffusion import process\nfrom .shards import open_shard\nimport torch"
    assert layer_faults("from stable_cascade.config import LoraConfig", ROOT / "stable_cascade/training/x.py") == []
    assert layer_faults(source, ROOT / "stable_cascade/pipelines/x.py") == []
    assert safety_faults("model.eval()\ntorch.load('a.pt', weights_only=True)", ROOT / "stable_cascade/x.py") == []
