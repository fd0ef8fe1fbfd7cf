"""`dataset_filters`: which samples of an index are kept."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FIRST = 1000
"""A filter that rejects this many samples from the first on is taken for a mistake."""

_SIZE_KEYS = ("width", "height")
_MISSING = object()


@dataclass(frozen=True)
class Filter:
    """Keeps a sample when the expression is true for the value of one of its keys."""

    key: str
    expression: Expression

    def keeps(self, values: dict[str, Any]) -> bool:
        """Whether the sample with these values stays; one without the key, or with a value of the wrong kind, goes."""
        value = values.get(self.key, _MISSING)
        if value is _MISSING:
            return False
        try:
            return bool(self.expression(value))
        except (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError):
            return False


def parse_filters(dataset_filters: Iterable[Sequence[str]] | None) -> list[Filter]:
    """The filters that a config lists as [key, 'lambda s: …'] pairs.

    Raises:
        ValueError: an entry is no pair, or its expression is refused.
    """
    filters = []
    for entry in dataset_filters or ():
        pair = [entry] if isinstance(entry, str) else list(entry)
        if len(pair) != 2 or not all(isinstance(item, str) for item in pair):
            raise ValueError(f"dataset_filters {pair!r} is no pair; write ['aesthetic_score', 'lambda s: s > 4.5']")
        filters.append(Filter(pair[0], Expression(pair[1], f"dataset_filters {pair[0]!r}")))
    return filters


def with_size(values: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """`values`, with width and height from the image's header where the JSON has none."""
    return {**dict(zip(_SIZE_KEYS, (int(side) for side in size), strict=True)), **values}


def apply_filters(
    filters: Sequence[Filter], rows: Iterable[tuple[Any, Sequence[int]]]
) -> tuple[np.ndarray, list[int]]:
    """Which rows stay, and how many each filter rejected.

    Args:
        filters: all must keep a row.
        rows: the values of each row (or their JSON text, '' for none), and its (width, height).

    Shapes: -> (N,) bool.

    Raises:
        ValueError: a filter rejects all of the first 1,000 rows (all rows when there are fewer).
    """
    kept: list[bool] = []
    rejected = [0] * len(filters)
    watch = RejectionWatch(filters)
    for values, size in rows:
        if isinstance(values, str):
            values = json.loads(values) if values else {}
        verdicts = watch.verdicts(with_size(values, size))
        kept.append(all(verdicts))
        for number, verdict in enumerate(verdicts):
            rejected[number] += not verdict
    watch.finish()
    return np.array(kept, bool), rejected


class RejectionWatch:
    """Evaluates filters row by row and raises as soon as one has rejected the first 1,000 rows."""

    def __init__(self, filters: Sequence[Filter]):
        self.filters = filters
        self.count = 0
        self.passed = [False] * len(filters)
        self.examples: list[Any] = [_MISSING] * len(filters)

    def verdicts(self, values: dict[str, Any]) -> list[bool]:
        """Whether each filter keeps the row.

        Raises:
            ValueError: as the class says.
        """
        found = [item.keeps(values) for item in self.filters]
        self.count += 1
        for number, item in enumerate(self.filters):
            self.passed[number] |= found[number]
            if self.examples[number] is _MISSING:
                self.examples[number] = values.get(item.key, _MISSING)
        if self.count == FIRST:
            self.finish()
        return found

    def finish(self) -> None:
        """Raises ValueError when a filter has kept nothing so far."""
        for item, passed, example in zip(self.filters, self.passed, self.examples, strict=True):
            if self.count and not passed:
                shown = "none has this key" if example is _MISSING else f"for example {item.key} = {example!r}"
                raise ValueError(
                    f"dataset_filters [{item.key!r}, {item.expression.text!r}] rejects all of the first "
                    f"{min(self.count, FIRST):,} samples ({shown}); correct the key or the threshold"
                )


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "int": int,
    "float": float,
    "str": str,
    "lower": lambda text: str(text).lower(),
}

ALLOWED = (
    "allowed: 'identity' or 'lambda x: …' with literals, comparisons, + - * / // %, and, or, not, in, "
    "x['key'], " + ", ".join(f"{name}()" for name in FUNCTIONS)
)

_LONGEST = 1000
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}


class Expression:
    """A function of one value, written as `identity` or `lambda x: …`.

    Raises:
        ValueError: the text uses anything that is not allowed; the message names `key`, text and what is allowed.
    """

    def __init__(self, text: str, key: str):
        self.text = str(text).strip()
        self.key = key
        self.body: ast.expr | None = None
        if self.text != "identity":
            self.name, self.body = self._parse()
            self._check(self.body)

    def __call__(self, value: Any) -> Any:
        """The expression's value; errors of the data (a missing key, a wrong type) come as they are."""
        return value if self.body is None else _evaluate(self.body, {self.name: value})

    def _parse(self) -> tuple[str, ast.expr]:
        if len(self.text) > _LONGEST:
            raise ValueError(f"{self.key}: an expression of {len(self.text)} characters is too long ({_LONGEST})")
        try:
            tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._refusal("it is not a valid expression") from None
        if not isinstance(tree, ast.Lambda):
            raise self._refusal("it is neither identity nor a lambda")
        arguments = tree.args
        others = (arguments.posonlyargs, arguments.kwonlyargs, arguments.defaults, arguments.vararg, arguments.kwarg)
        if len(arguments.args) != 1 or any(others):
            raise self._refusal("a lambda takes exactly one plain argument")
        return arguments.args[0].arg, tree.body

    def _refusal(self, reason: str) -> ValueError:
        shown = self.text if len(self.text) <= 120 else self.text[:117] + "..."
        return ValueError(f"{self.key}: {shown!r} is refused: {reason}; {ALLOWED}")

    def _check(self, node: ast.expr) -> None:
        problem = _problem(node, self.name)
        if problem:
            raise self._refusal(problem)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and not (isinstance(node, ast.Call) and child is node.func):
                self._check(child)


def _problem(node: ast.expr, name: str) -> str | None:
    """Why this one node is not allowed, or None."""
    # Values and the argument; no attributes, since they lead out of any expression.
    if isinstance(node, ast.Constant):
        fine = node.value is None or isinstance(node.value, (bool, int, float, str))
        return None if fine else f"the literal {node.value!r}"
    if isinstance(node, ast.Name):
        return None if node.id == name else f"the name {node.id!r}"
    if isinstance(node, ast.Attribute):
        return f"the attribute access .{node.attr}"
    # Calls of listed functions, subscripts by constants.
    if isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if not isinstance(node.func, ast.Name) or called not in FUNCTIONS:
            return f"the call {called}(…)"
        return "a call with keywords or *" if node.keywords or _starred(node.args) else None
    if isinstance(node, ast.Subscript):
        index = node.slice
        if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub):
            index = index.operand
        plain = isinstance(index, ast.Constant) and isinstance(index.value, (str, int))
        return None if plain else "a subscript that is no constant"
    # Operators and displays.
    if isinstance(node, ast.BinOp):
        return None if type(node.op) in _ARITHMETIC else f"the operator {type(node.op).__name__}"
    if isinstance(node, ast.UnaryOp):
        return None if type(node.op) in _UNARY else f"the operator {type(node.op).__name__}"
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return "an unpacking *" if _starred(node.elts) else None
    if isinstance(node, (ast.Compare, ast.BoolOp, ast.IfExp)):
        return None
    return f"{type(node).__name__}"


def _starred(nodes: list[ast.expr]) -> bool:
    return any(isinstance(node, ast.Starred) for node in nodes)


def _evaluate(node: ast.expr, scope: dict[str, Any]) -> Any:
    # Python's own meaning of each node that `_problem` lets pass.
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return scope[node.id]
        case ast.List() | ast.Tuple() | ast.Set():
            return tuple(_evaluate(item, scope) for item in node.elts)
        case ast.Call(func=ast.Name()):
            return FUNCTIONS[node.func.id](*[_evaluate(item, scope) for item in node.args])  # type: ignore[attr-defined]
        case ast.Subscript():
            return _evaluate(node.value, scope)[_evaluate(node.slice, scope)]
        case ast.UnaryOp():
            return _UNARY[type(node.op)](_evaluate(node.operand, scope))
        case ast.BinOp():
            return _arithmetic(node.op, _evaluate(node.left, scope), _evaluate(node.right, scope))
        case ast.IfExp():
            return _evaluate(node.body if _evaluate(node.test, scope) else node.orelse, scope)
        case ast.BoolOp():
            return _boolean(node, scope)
        case ast.Compare():
            return _comparison(node, scope)
    raise AssertionError(f"unchecked node {type(node).__name__}")


def _arithmetic(operation: ast.operator, left: Any, right: Any) -> Any:
    """Numbers only, and + of two strings: 'a' * 10**9 and '%999999999d' % 1 are ways to fill the memory."""
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    strings = isinstance(operation, ast.Add) and isinstance(left, str) and isinstance(right, str)
    if not numbers and not strings:
        raise TypeError(f"arithmetic on {type(left).__name__} and {type(right).__name__}")
    return _ARITHMETIC[type(operation)](left, right)


def _boolean(node: ast.BoolOp, scope: dict[str, Any]) -> Any:
    stop_at = isinstance(node.op, ast.Or)
    value: Any = None
    for item in node.values:
        value = _evaluate(item, scope)
        if bool(value) is stop_at:
            break
    return value


def _comparison(node: ast.Compare, scope: dict[str, Any]) -> bool:
    left = _evaluate(node.left, scope)
    for operation, item in zip(node.ops, node.comparators, strict=True):
        right = _evaluate(item, scope)
        if not _COMPARE[type(operation)](left, right):
            return False
        left = right
    return True
