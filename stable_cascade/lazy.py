"""Public names of a package that are imported when they are first asked for."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, from the imports in its `if TYPE_CHECKING:` block.

    So a type checker and Python read the same list:

        if TYPE_CHECKING:
            from .prior import StableCascadePrior

        __getattr__, __dir__ = lazy_exports(globals())
    """
    homes = type_checking_imports(Path(package["__file__"]).read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name] or f".{name}", package["__name__"])
        package[name] = getattr(module, name) if homes[name] else module
        return package[name]

    return get, lambda: sorted({*package, *homes})


def type_checking_imports(source: str) -> dict[str, str]:
    """Name -> the module that defines it, as `from` says it; empty for a module that is itself the name."""
    homes: dict[str, str] = {}
    for block in ast.parse(source).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for line in block.body:
                if isinstance(line, ast.ImportFrom):
                    module = "." * line.level + (line.module or "")
                    homes |= {alias.name: "" if module == "." else module for alias in line.names}
    return homes
