"""Checks types and bounds of training settings by pydantic; reads settings from TOML, YAML and KEY=VALUE."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from clapsep_cli.errors import ExtraError, RecipeError

ROUNDING = 5e-3  # allowed difference of a sum of shares from 1, as of [0.333, 0.333, 0.333]
EXACT = 1e-9

Settings = TypeVar("Settings")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[Settings]) -> type[Settings]:
    """Make a class a frozen dataclass that checks its fields: types strictly, bounds, no unknown names.

    An instance with a wrong value raises pydantic's `ValidationError`, which is a `ValueError`.
    """
    checked: Any = dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
    return cast("type[Settings]", checked(cls))


def _add_up(shares: tuple[float, ...]) -> tuple[float, ...]:
    total = sum(shares)
    if abs(total - 1) > ROUNDING:
        raise ValueError(f"should add up to 1; the sum is {total:g}")
    return shares if abs(total - 1) < EXACT else tuple(share / total for share in shares)


Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1), AfterValidator(_add_up)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Workers = Annotated[int, Field(ge=1, le=256)]


def validated(kind: type[Settings], values: Mapping[str, object], what: str) -> Settings:
    """Build settings of a `kind` whose fields all have defaults, with `values` in place of some.

    Args:
        kind: a class made by `settings`.
        values: new values; names are nested or dotted ("separator.lr").
        what: name of the settings, for messages.

    Raises:
        RecipeError: lists all wrong values, and for each unknown name the closest known one.
    """
    default = kind()
    given = merged(dataclasses.asdict(default), nested(values))  # type: ignore[call-overload]
    try:
        # From JSON, a strict type takes a list for a tuple and a table for a dataclass.
        return TypeAdapter(kind).validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        faults = [_fault(fault, default, what) for fault in error.errors()]
        raise RecipeError(
            "\n  ".join(faults if len(faults) < 2 else [f"{what}: {len(faults)} faults", *faults])
        ) from error


def _fault(fault: ErrorDetails, default: object, what: str) -> str:
    *parents, last = map(str, fault["loc"] or ("",))
    inside = default
    for parent in parents:
        inside = getattr(inside, parent, None)
    above, name = ".".join((what, *parents)), ".".join((what, *map(str, fault["loc"])))
    if fault["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(inside)]  # type: ignore[arg-type]
        return f"{above} has no setting {last!r}{nearest(last, [*known, *dict(flatten(inside))])}"
    if fault["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{name} has settings of its own: {', '.join(dict(flatten(getattr(inside, last))))}"
    said = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("too_short", "too_long"):  # "Tuple should have at least 3 items after validation, not 2"
        return f"{name} {said.partition(' ')[2].replace(' after validation', '')}"
    if fault["type"] == "value_error":
        return f"{name}: {said}"
    return f"{name} {said.removeprefix('Input ')}, not {fault['input']!r}"


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of nested dataclasses by dotted name."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def nested(values: Mapping[str, object]) -> dict[str, object]:
    """Turn dotted names into nested ones."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        first, dot, rest = str(key).partition(".")
        inner = nested({rest: value}) if dot else nested(value) if isinstance(value, Mapping) else value
        made = merged(made, {first: inner})
    return made


def merged(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """Join nested settings; those of `second` override those of `first`."""
    together = dict(first)
    for key, value in second.items():
        before = together.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        together[key] = merged(before, value) if both else value  # type: ignore[arg-type]
    return together


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known name closest to `name`, or an empty text."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    # The last part of a dotted name, misspelt in its first parts or given alone.
    close = close or [k for k in names if k.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


def read_settings(path: Path) -> dict[str, object]:
    """Read the settings in a TOML or YAML file. Raises `RecipeError`."""
    try:
        text = path.read_text(encoding="utf-8")
        loaded = _yaml(text) if path.suffix.lower() in (".yaml", ".yml") else _toml(text)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as settings ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: holds no settings by name")
    return loaded


def parse_setting(text: str) -> dict[str, object]:
    """Parse "key=value": the value as TOML if it is TOML, or else as text. Raises `RecipeError`."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise RecipeError(f"{text!r} is not a setting: write key=value, e.g. batch=16")
    try:
        return {key: _toml(f"value = {value}")["value"]}
    except ValueError:
        return {key: value}


def _toml(text: str) -> dict[str, Any]:
    return dict(_reader("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text))


def _yaml(text: str) -> object:
    yaml = _reader("yaml")
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    # YAML 1.1 takes 1e-4 for a text: it wants a point and a sign.
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _reader(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ExtraError(f"reading settings needs {error.name}: pip install 'clapsep[train]'") from error
