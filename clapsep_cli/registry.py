"""Model families and models, as data. A further family is a row here and a file in `models/`."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Family:
    """The classes of a family as "module:name"; imported when a model of it is loaded. "" where it has none."""

    config: str
    separator: str  # made from the config
    ask: str  # makes, of a model, queries and which of them are kept, what the separator is asked for
    stream: str  # makes, of a model, what it is asked for, a rate and channels, what joins its results to a recording
    as_set: bool = False  # hears all that it is asked for at once, so that no target has to be told what to leave
    doubts: str = ""  # says, of a model and queries, why they may go wrong though they can be asked
    likeness: str = ""  # how alike a recording is to what a stem is asked for
    refine: bool = False  # whether it separates in two passes unless told otherwise
    near_in_bfloat16: bool = True  # to its float32 output, 40 dB or more: so near that it is used unasked
    text: str = ""  # made from the config and a tokenizer
    audio: str = ""  # made from the config
    convert: str = ""  # writes the parts of a model, from files as they were released
    tokenizer: str = ""  # of the released text encoder, below the bundled weights

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks of its models, each a file on disk."""
        return tuple(part for part in ("separator", "text", "audio") if getattr(self, part))


FAMILIES = {
    "clapsep": Family(
        config="clapsep_cli.models.clapsep:CLAPSepConfig",
        separator="clapsep_cli.models.clapsep:CLAPSep",
        ask="clapsep_cli.separation.embedding:conditions",
        stream="clapsep_cli.separation.embedding:stream",
        likeness="clapsep_cli.separation.embedding:likeness",
        text="clapsep_cli.models.clap:ClapTextEncoder",
        audio="clapsep_cli.models.clap:ClapAudioEncoder",
        convert="clapsep_cli.store.convert:convert_clapsep",
        tokenizer="roberta-tokenizer.json.gz",
    ),
    "mini": Family(
        config="clapsep_cli.models.mini:MiniConfig",
        separator="clapsep_cli.models.mini:Mini",
        ask="clapsep_cli.separation.embedding:conditions",
        stream="clapsep_cli.separation.embedding:stream",
        doubts="clapsep_cli.separation.embedding:doubts",
        likeness="clapsep_cli.separation.embedding:likeness",
        refine=True,
        near_in_bfloat16=False,
        text="clapsep_cli.models.mini:MiniText",
        audio="clapsep_cli.models.mini:MiniAudio",
    ),
    "tuss": Family(
        config="clapsep_cli.models.tuss:TussConfig",
        separator="clapsep_cli.models.tuss:Tuss",
        ask="clapsep_cli.separation.prompting:prompts",
        stream="clapsep_cli.separation.prompting:stream",
        as_set=True,
        doubts="clapsep_cli.separation.prompting:doubts",
        near_in_bfloat16=False,
        convert="clapsep_cli.store.convert_tuss:convert_tuss",
    ),
}


SHORT = 12  # digits of a hash that name a folder or a revision


@dataclass(frozen=True, kw_only=True)
class Remote(ABC):
    """A file to download, pinned by its `size` in bytes and its SHA-256 in hex. Each kind says where it lies."""

    size: int
    sha256: str

    @property
    @abstractmethod
    def name(self) -> str:
        """The file's own name."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The file and its place, in words."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where a browser finds it."""

    @property
    @abstractmethod
    def version(self) -> str:
        """What was released, and which of it, in short."""

    @property
    @abstractmethod
    def pinned(self) -> tuple[str | int, ...]:
        """All that makes it another file if it changes."""


@dataclass(frozen=True, kw_only=True)
class HubFile(Remote):
    """A file on the Hugging Face Hub; `repo_type` is "model" or "space", `revision` a commit.

    The hash that the Hub states for that revision is believed, too: the revision is what is pinned.
    """

    repo: str
    repo_type: str
    revision: str
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def where(self) -> str:
        return f"{self.path} of the {self.repo_type} {self.repo}"

    @property
    def address(self) -> str:
        kind = {"model": "", "space": "spaces/"}[self.repo_type]
        return f"https://huggingface.co/{kind}{self.repo}/resolve/{self.revision}/{self.path}"

    @property
    def version(self) -> str:
        return f"{self.repo}@{self.revision[:SHORT]}"

    @property
    def pinned(self) -> tuple[str | int, ...]:
        return self.repo, self.revision, self.path, self.size


@dataclass(frozen=True, kw_only=True)
class WebFile(Remote):
    """A file at an HTTPS address. Nothing but its content pins it: the address may change, and the file stays."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def where(self) -> str:
        return f"{self.name} at {urlsplit(self.url).hostname}"

    @property
    def address(self) -> str:
        return self.url

    @property
    def version(self) -> str:
        return f"{self.name}@{self.sha256[:SHORT]}"

    @property
    def pinned(self) -> tuple[str | int, ...]:
        return self.sha256, self.size


@dataclass(frozen=True)
class Entry:
    """A model that can be named. It is bundled (`remotes` is empty), or made from the files `remotes` by `convert`."""

    name: str
    family: str
    licence: str
    about: str
    remotes: tuple[Remote, ...] = ()

    @property
    def download_bytes(self) -> int:
        """Size in bytes of all that is downloaded for it."""
        return sum(remote.size for remote in self.remotes)


_TUSS_FILES = (  # Git LFS media of the release 1.0.0; the commit's own pointers state the hashes below
    "https://media.githubusercontent.com/media/merlresearch/unified-source-separation/"
    "f7711c1120e00669d905a4fef9c8494a0f8c9662/pretrained_models"
)

_ENTRIES = [
    Entry(
        name="mini",
        family="mini",
        licence="MIT",
        about="bundled; small and fast, for the sounds it was trained on",
    ),
    Entry(
        name="clapsep",
        family="clapsep",
        licence="LAION-CLAP CC0; the separator's weights state none (its code: MIT)",
        about="the released CLAPSep with LAION-CLAP's HTSAT-base and RoBERTa (arXiv 2402.17455)",
        remotes=(
            HubFile(
                repo="lukewys/laion_clap",
                repo_type="model",
                revision="b3708341862f581175dba5c356a4ebf74a9b6651",
                path="music_audioset_epoch_15_esc_90.14.pt",
                size=2_352_471_003,
                sha256="fae3e9c087f2909c28a09dc31c8dfcdacbc42ba44c70e972b58c1bd1caf6dedd",
            ),
            HubFile(
                repo="AisakaMikoto/CLAPSep",
                repo_type="space",
                revision="e3c73653fa9aadcddbcc3b5e967182a573589e81",
                path="model/best_model.ckpt",
                size=177_818_986,
                sha256="6fcc8dbcd7174af86266cf16b4105eced0802352762f81dbfefdce29af3dba04",
            ),
        ),
    ),
    Entry(
        name="tuss-medium",
        family="tuss",
        licence="AGPL-3.0-or-later",
        about="the released TUSS, medium: speech, effects and music by prompts (arXiv 2410.23987)",
        remotes=(
            WebFile(
                url=f"{_TUSS_FILES}/tuss.medium.2-4src/checkpoints/model.pth",
                size=44_864_630,
                sha256="112174a8c894b008cfd676052e8a3d60c876bc2ba063c77a3a4700a257655eec",
            ),
        ),
    ),
    Entry(
        name="tuss-large",
        family="tuss",
        licence="AGPL-3.0-or-later",
        about="the released TUSS, large: 3.4 times the weights, three times the time",
        remotes=(
            WebFile(
                url=f"{_TUSS_FILES}/tuss.large.2-4src/checkpoints/model.pth",
                size=153_210_470,
                sha256="1ed66c06944ef197c9f0ff585c1643ffec25a9925641c02ad6c108a88dfe5acd",
            ),
        ),
    ),
]
MODELS = {entry.name: entry for entry in _ENTRIES}
PREFERRED, BUNDLED = "clapsep", "mini"


def resolve(target: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def weights_folder() -> Path:
    """Where the bundled weights lie: in the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def examples_folder() -> Path:
    """Where the example recordings lie, likewise."""
    package = Path(__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parent / "examples"


def home() -> Path:
    """Where clapsep keeps converted models and records: CLAPSEP_HOME, or a folder in the platform's user cache."""
    own = os.environ.get("CLAPSEP_HOME")
    if own:
        return Path(own).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "clapsep"
