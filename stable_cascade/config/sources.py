"""From a file and the command line to a checked config."""

from __future__ import annotations

import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from stable_cascade.disk import path_text, read_text
from stable_cascade.redaction import redacted
from stable_cascade.wording import brief, printable

from .fields import documentation, help_text, keys_where, kind_text, kinds, settings_of
from .rules import problems, resolve
from .settings import TRAINERS

Config = TypeVar("Config")

_REFERENCE = re.compile(r"\$\{([^{}]*)")
DEEPEST = 50
LARGEST_CONFIG = 2**20
MOST_ENTRIES = 100_000
"""Bytes and values of a config file; some lines can refer to each other so that they mean billions."""


class ConfigError(ValueError):
    """A setting that cannot work; one line that names the key, the value and the remedy."""


def load_config(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The config of a trainer from `[--config] FILE` and `--key value` overrides, checked.

    Args:
        cls: the trainer's dataclass.
        argv: the arguments without the program's name; absent: those of this process.

    Raises:
        ConfigError: a key is unknown, missing or has an impossible value; one line with the remedy.
        SystemExit: `--help` was asked for and printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text(cls) + "\n")
        raise SystemExit(0)
    path, overrides = split_arguments(cls, arguments)
    given = {key: (value, path or "") for key, value in read_yaml(path).items()} if path else {}
    for key, value in overrides.items():
        name, _, part = key.partition(".")
        present = given[name][0] if name in given and isinstance(given[name][0], dict) else {}
        given[name] = ({**present, part: value} if part else value, "command line")
    return make_config(cls, given)


def make_config(cls: type[Config], given: dict[str, tuple[Any, str]]) -> Config:
    """The checked config of the given values, each with the place it comes from.

    Raises:
        ConfigError: as `load_config`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys: Any = cls
    # Fill the typed fields; each value is refused by its own name.
    node = OmegaConf.structured(cls)
    for key, (value, source) in given.items():
        _refuse_resolvers(key, value, source)
        if key not in kinds(keys):
            raise ConfigError(f"{source}: unknown key {key!r} (value {_short(value)}); {_nearest_key(keys, key)}")
        try:
            OmegaConf.update(node, key, value)
        except (OmegaConfBaseException, OverflowError) as error:
            raise ConfigError(
                f"{source}: {key}: {_short(value)} is not allowed; {_expected(keys, key, value)}"
            ) from error
    missing = [str(key) for key in node if OmegaConf.is_missing(node, key)]
    if missing:
        meaning = documentation(keys)[missing[0]]
        raise ConfigError(f"{cls.__name__}: missing {', '.join(missing)}; set {missing[0]}: {meaning}")
    try:
        config: Any = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "config")
        raise ConfigError(f"{cls.__name__}: {key}: {str(error).splitlines()[0]}") from error

    # Expand the home folder in paths.
    for key in keys_where([keys], path=True):
        value = getattr(config, key)
        setattr(config, key, _at_home(value))

    # Check each value alone, then what several say together; fill in what absent keys mean.
    alone = ((key, known.problem(getattr(config, key))) for key, known in settings_of(keys).items())
    for key, clause in itertools.chain(alone, problems(config)):
        if clause:
            source = given[key][1] if key in given else cls.__name__
            raise ConfigError(f"{source}: {key}: {_short(getattr(config, key))} {clause}")
    resolve(config)
    return config


def _refuse_resolvers(key: str, value: Any, source: str) -> None:
    """Raises ConfigError where a value, of the command line for one, calls for something outside of the config."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, dict | list):
            _refuse_resolvers(key, part, source)
        elif isinstance(part, str):
            try:
                for reference in _REFERENCE.findall(part):
                    check_resolver(reference)
            except ValueError as error:
                raise ConfigError(f"{source}: {key}: {error}") from None


def read_yaml(path: str, what: str = "--config") -> dict[str, Any]:
    """The keys and values of a YAML file; `what` is the option that names it.

    Raises:
        ConfigError: there is no such file, or it is not YAML of the form `key: value`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # A missing file: name the nearest one beside it.
    if not Path(path).is_file():
        folder = Path(path).parent
        hint = _nearest(Path(path).name, [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else [])
        raise ConfigError(f"{what} {path}: no such file{hint}")
    # Read it within the limits on size and references, and resolve the references.
    try:
        text = read_text(path, at_most=LARGEST_CONFIG, what="config")
        _check_extent(text)
        node = OmegaConf.load(io.StringIO(text))
        _check_references(OmegaConf.to_container(node, resolve=False))
        loaded = OmegaConf.to_container(node, resolve=True)
    except (YAMLError, OSError, ValueError, OverflowError, RecursionError, OmegaConfBaseException) as error:
        reason = brief(str(error).replace(str(path), Path(path).name), 300)  # YAML's own errors name the file twice
        raise ConfigError(f"{what} {path}: not readable as YAML ({reason})") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{what} {path}: must be lines of the form `key: value`")
    return {str(key): value for key, value in loaded.items()}


def _check_references(values: Any) -> None:
    """Passes when `${key}` in texts means other keys of the file, and no more text than a config may have.

    Raises:
        ValueError: a text asks for something else, such as a variable of the environment, whose value would be written
            into the records of the run; or what it means is beyond all reason.
    """
    lengths: dict[str, int] = {}

    # The length of what a value means: references count as what they refer to, each computed once.
    def length(value: Any, depth: int) -> int:
        if depth > DEEPEST:
            raise ValueError(f"its parts or references are nested more than {DEEPEST} deep")
        if isinstance(value, dict):
            return sum(length(one, depth + 1) for one in value.values())
        if isinstance(value, list):
            return sum(length(one, depth + 1) for one in value)
        if not isinstance(value, str):
            return 1
        # A text: check what it asks for, and add the lengths of those.
        total = len(value)
        for reference in _REFERENCE.findall(value):
            check_resolver(reference)
            if reference not in lengths:
                lengths[reference] = length(_looked_up(values, reference), depth + 1)
            total += lengths[reference]
        if total > LARGEST_CONFIG:
            raise ValueError(f"a text of it means more than {LARGEST_CONFIG:,} characters")
        return total

    if length(values, 0) > LARGEST_CONFIG:
        raise ValueError(f"its texts mean more than {LARGEST_CONFIG:,} characters")


def check_resolver(reference: str) -> None:
    """Passes when a `${…}` names a key.

    Raises:
        ValueError: it calls for something else.
    """
    if ":" in reference:
        raise ValueError(
            f"${{{brief(reference, 60)}}} asks for something outside of the config, which would be written into its "
            "records; write the value, or leave secrets in the environment, where wandb, S3 and the Hub look for them"
        )


def _looked_up(values: Any, reference: str) -> Any:
    """The part of a config that `a.b` or `a[0]` names; nothing where there is none, which OmegaConf then says."""
    for part in re.split(r"[.\[\]]+", reference.strip().strip("]")):
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values


def _check_extent(text: str) -> None:
    """Passes when a YAML file is no larger than a config may be, its aliases written out.

    Raises:
        ValueError: it is larger, or refers to itself.
        YAMLError: it is no YAML.
    """
    import yaml

    sizes: dict[int, int] = {}

    # Number of values below a node; an alias counts each time, and a node that is being counted contains itself.
    def size(node: Any) -> int:
        if id(node) in sizes and not sizes[id(node)]:
            raise ValueError("a part of it contains itself")
        if id(node) not in sizes:
            sizes[id(node)] = 0
            inner = getattr(node, "value", None)
            parts = inner if isinstance(inner, list) else []
            total = sum(map(size, (one for part in parts for one in (part if isinstance(part, tuple) else (part,)))))
            sizes[id(node)] = 1 + total
        return sizes[id(node)]

    if size(yaml.compose(text, Loader=yaml.SafeLoader)) > MOST_ENTRIES:
        raise ValueError(f"more than {MOST_ENTRIES:,} entries")


def split_arguments(cls: type, arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The path of the config file, if any, and the overrides as values.

    Raises:
        ConfigError: an argument has no value, or is neither a key nor the config file.
    """
    path: str | None = None
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        # A word without dashes is the config file.
        word = rest.pop(0)
        if not word.startswith("--"):
            if path is not None:
                raise ConfigError(
                    f"command line: {word!r} is neither a `--key` nor the config file; write `--key {word}`"
                )
            path = word
            continue
        # A key takes `=value` or the next word; a switch needs none.
        key, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if key == "config":
            if not value or path is not None:
                raise ConfigError("command line: --config takes one file, once")
            path = value
        elif equals:
            overrides[key] = _parse(value)
        elif bool in (kinds(cls).get(key), *get_args(kinds(cls).get(key))):
            overrides[key] = True
        else:
            hint = "set it as `--key value`" if key in kinds(cls) else _nearest_key(cls, key)
            raise ConfigError(f"command line: --{key} has no value; {hint}")
    return path, overrides


def _parse(text: str) -> Any:
    """A value of the command line, read as YAML reads it."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (YAMLError, ValueError):
        return text
    if isinstance(loaded["value"], dict) and not text.lstrip().startswith("{"):
        return text  # a sentence with a colon, such as a prompt or `lambda s: s > 4.5`
    return loaded["value"]


def run_main(main: Callable[[], Any]) -> Any:
    """What `main()` returns; an error in the user's input is printed in one line, and the process exits with status 2.

    With STABLE_CASCADE_TRACEBACK=1 in the environment the traceback is kept.
    """
    try:
        return main()
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("STABLE_CASCADE_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {printable(redacted(' '.join(str(error).split())))}\n")
        raise SystemExit(2) from None


def _at_home(value: Any) -> Any:
    """A path, or what holds several of them, with the home folder for a leading `~`."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    if isinstance(value, dict):
        return {key: _at_home(one) if key == "path" else one for key, one in value.items()}
    return path_text(value)


def _expected(cls: type, key: str, value: Any) -> str:
    """What a key takes, with the nearest of its choices."""
    kind = kinds(cls)[key]
    choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
    hint = _nearest(_short(value), [str(choice) for choice in choices])
    return f"{key} takes {kind_text(cls, key)}{hint}"


def _nearest_key(cls: type, key: str) -> str:
    """The remedy for an unknown key: our word for it, the config that has it, or the nearest spelling."""
    keys = list(kinds(cls))
    ours = [name for name, known in settings_of(cls).items() if known.elsewhere == key]
    if ours:
        return f"here it is called {ours[0]!r}"
    owners = [trainer.__name__ for trainer in TRAINERS if key in kinds(trainer)]
    if owners:
        return f"it belongs to {', '.join(owners)}, not to {cls.__name__}"
    return _nearest(key, keys).removeprefix("; ") or "--help lists the keys"


def _nearest(word: str, choices: Sequence[str]) -> str:
    """`; nearest: 'choice'`, or nothing when none is near."""
    found = difflib.get_close_matches(word, choices, 1, 0.5)
    return f"; nearest: {found[0]!r}" if found else ""


def _short(value: Any) -> str:
    """A value as one short line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no number of more than some thousand digits
        text = "a number too long to show"
    return text if len(text) <= 80 else text[:77] + "..."
