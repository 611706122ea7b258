"""Presets of training, and what overrides them: strictly, so that a misspelt setting never goes unnoticed."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clapsep_cli.errors import ExtraError, RecipeError
from clapsep_cli.models.tuss import LARGE
from clapsep_cli.registry import resolve
from clapsep_cli.training.record import flatten
from clapsep_cli.training.train import Recipe


@dataclass(frozen=True)
class Preset:
    """A named recipe: the class that holds its settings, as "module:name", and what it sets otherwise."""

    recipe: str
    family: str  # of the models that it makes, and can go on from
    about: str
    settings: Mapping[str, object] = field(default_factory=dict)


PRESETS = {
    "mini": Preset("clapsep_cli.training.mini:MiniRecipe", "mini", "a small model like the bundled one, on a CPU"),
    "clapsep-hybrid": Preset(
        "clapsep_cli.training.clapsep:ClapsepRecipe", "clapsep", "the paper's, queried by text, audio or both"
    ),
    "clapsep-text": Preset(
        "clapsep_cli.training.clapsep:ClapsepRecipe",
        "clapsep",
        "the paper's, queried by text alone",
        {"queries": "text"},
    ),
    "tuss-medium": Preset("clapsep_cli.training.tuss:TussRecipe", "tuss", "as the released TUSS, by prompts"),
    "tuss-large": Preset(
        "clapsep_cli.training.tuss:TussRecipe",
        "tuss",
        "3.4 times the weights",
        {"tuss": dataclasses.asdict(LARGE), "batch": 2, "epsilon": 1e-4},
    ),
}
DEFAULT = "mini"


def build(preset: str, *overrides: Mapping[str, object]) -> Recipe:
    """The recipe of that name with its settings overridden, the last one first. Raises `RecipeError`."""
    if preset not in PRESETS:
        raise RecipeError(f"no preset {preset!r}{_nearest(preset, PRESETS)}: there are {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    together: dict[str, object] = {}  # in one go, as sizes of a network have to fit together
    for values in (chosen.settings, *overrides):
        together = _merged(together, _nested(values))
    recipe: Recipe = override(resolve(chosen.recipe)(), together, preset)
    return recipe


def preset_of(family: str, model: str = "") -> str:
    """The preset called like `model`, or the first that makes models of its `family`. Raises `RecipeError`."""
    names = {preset.family: name for name, preset in reversed(PRESETS.items())}
    if family not in names:
        raise RecipeError(f"no preset trains models of the family {family!r}")
    return model if model in PRESETS else names[family]


def override(settings: Any, values: Mapping[str, object], what: str) -> Any:
    """`settings`, a tree of frozen dataclasses, with `values` in place of its own.

    Keys are nested or dotted ("separator.lr"). Raises `RecipeError` for one that is unknown, naming the closest one
    that is not, and for a value that does not fit.
    """
    names = {f.name for f in dataclasses.fields(settings) if f.init}
    hints, known, changes = get_type_hints(type(settings)), dict(flatten(settings)), {}
    for key, value in _nested(values).items():
        if key not in names:
            raise RecipeError(f"{what} has no setting {key!r}{_nearest(key, [*names, *known])}")
        current = getattr(settings, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{what}.{key} has settings of its own: {', '.join(dict(flatten(current)))}")
            changes[key] = override(current, value, f"{what}.{key}")
        else:
            changes[key] = _fitted(value, hints[key], f"{what}.{key}")
    try:
        return dataclasses.replace(settings, **changes)
    except ValueError as error:
        raise RecipeError(f"{what}: {error}") from error


def read_settings(path: Path) -> dict[str, object]:
    """The settings in a TOML or YAML file. Raises `RecipeError`."""
    try:
        text = path.read_text(encoding="utf-8")
        loaded = _yaml(text) if path.suffix.lower() in (".yaml", ".yml") else _toml(text)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as settings ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: holds no settings by name")
    return loaded


def parse_setting(text: str) -> dict[str, object]:
    """ "key=value" as a setting; the value as TOML where it is, else as it stands. Raises `RecipeError`."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise RecipeError(f"{text!r} is no setting: write key=value, e.g. batch=16")
    try:
        return {key: _toml(f"value = {value}")["value"]}
    except ValueError:
        return {key: value}


def _toml(text: str) -> dict[str, Any]:
    return dict(_reader("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text))


def _yaml(text: str) -> object:
    yaml = _reader("yaml")
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _reader(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ExtraError(f"reading settings takes {error.name} too: pip install 'clapsep[train]'") from error


def _nested(values: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys as nested ones."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        first, dot, rest = str(key).partition(".")
        if dot:
            nested[first] = {**nested.get(first, {}), rest: value}
        else:
            nested[first] = {**nested.get(first, {}), **value} if isinstance(value, Mapping) else value
    return nested


def _merged(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """Nested settings, the second overriding the first."""
    merged = dict(first)
    for key, value in second.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _fitted(value: object, hint: Any, name: str) -> object:
    """`value` as what `hint` says. Numbers may be written as text, as YAML reads 1e-4."""
    kind, among = get_origin(hint), get_args(hint)
    if kind is Literal:
        if value in among:
            return value
        raise RecipeError(f"{name} is one of {', '.join(map(str, among))}, not {value!r}")
    if kind in (UnionType, Union):
        return None if value is None else _fitted(value, next(a for a in among if a is not type(None)), name)
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or (among[-1] is not ... and len(value) != len(among)):
            raise RecipeError(f"{name} is a list{'' if among[-1] is ... else f' of {len(among)}'}, not {value!r}")
        return tuple(_fitted(v, among[0], name) for v in value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    try:
        if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            return float(value)
        if hint is int and isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    raise RecipeError(f"{name} takes {_KINDS.get(hint, hint.__name__)}, not {value!r}")


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    # A misspelt last part of a dotted name, or one that was named without what it belongs to.
    close = close or [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""
