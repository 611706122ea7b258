"""Model families and models, as data. A further family is a row here and a file in `models/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """The classes of a family as "module:name"; imported when a model of it is loaded."""

    config: str
    separator: str  # made from the config
    text: str  # made from the config and a tokenizer
    audio: str  # made from the config


FAMILIES = {
    "clapsep": Family(
        config="clapsep_cli.models.clapsep:CLAPSepConfig",
        separator="clapsep_cli.models.clapsep:CLAPSep",
        text="clapsep_cli.models.clap:ClapTextEncoder",
        audio="clapsep_cli.models.clap:ClapAudioEncoder",
    ),
    "mini": Family(
        config="clapsep_cli.models.mini:MiniConfig",
        separator="clapsep_cli.models.mini:Mini",
        text="clapsep_cli.models.mini:MiniText",
        audio="clapsep_cli.models.mini:MiniAudio",
    ),
}


@dataclass(frozen=True)
class Entry:
    """A model that can be named. `folder`: below the weights that come with the package."""

    name: str
    family: str
    folder: str
    licence: str
    about: str


MODELS = {
    entry.name: entry
    for entry in [
        Entry(
            "mini",
            "mini",
            "mini",
            "MIT",
            "bundled; small and fast, for the sounds it was trained on (weights/README.md)",
        ),
    ]
}

DEFAULT_MODEL = "mini"


def weights_folder() -> Path:
    """Where the bundled weights lie: in the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"
