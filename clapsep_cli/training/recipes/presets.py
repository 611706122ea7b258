"""Lists the presets of training, and overrides their settings; an unknown setting is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from clapsep_cli.errors import RecipeError
from clapsep_cli.models.tuss import LARGE
from clapsep_cli.registry import FAMILIES
from clapsep_cli.training.loop.settings import merged, nearest, nested, validated
from clapsep_cli.training.loop.train import Recipe


@dataclass(frozen=True)
class Preset:
    """A named recipe: the class of its settings, as "module:name", and the settings that differ from the defaults.

    `registry` lists the presets of each family.
    """

    recipe: str
    settings: Mapping[str, object] = field(default_factory=dict)


RECIPES = "clapsep_cli.training.recipes"
PRESETS = {
    "mini": Preset(f"{RECIPES}.mini:MiniRecipe"),
    "clapsep-hybrid": Preset(f"{RECIPES}.clapsep:ClapsepRecipe"),
    "clapsep-text": Preset(f"{RECIPES}.clapsep:ClapsepRecipe", {"queries": "text"}),
    "tuss-medium": Preset(f"{RECIPES}.tuss:TussRecipe"),
    "tuss-large": Preset(
        f"{RECIPES}.tuss:TussRecipe", {"tuss": dataclasses.asdict(LARGE), "batch": 2, "epsilon": 1e-4}
    ),
    "audiosep-base": Preset(f"{RECIPES}.audiosep:AudioSepRecipe"),
}
DEFAULT = "mini"


def build(preset: str, *overrides: Mapping[str, object]) -> Recipe:
    """Make the recipe of a preset with overridden settings; later overrides win. Raises `RecipeError`."""
    if preset not in PRESETS:
        raise RecipeError(f"no preset {preset!r}{nearest(preset, PRESETS)}: there are {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    together: dict[str, object] = {}  # in one go, as sizes of a network have to fit together
    for values in (chosen.settings, *overrides):
        together = merged(together, nested(values))
    module, _, name = chosen.recipe.partition(":")
    recipe: Recipe = validated(getattr(import_module(module), name), together, preset)
    return recipe


def preset_of(family: str, model: str = "") -> str:
    """Return the preset called `model`, or else the first of its `family`. Raises `RecipeError`."""
    names = FAMILIES[family].presets
    if not names:
        raise RecipeError(f"no preset trains models of the family {family!r}")
    return model if model in names else names[0]
