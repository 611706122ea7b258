"""Lists model families and models, as data that needs no torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Traits:
    """Describes a family without torch; `families` has the rest.

    Attributes:
        parts: its networks, each a file on disk.
        takes: the kinds of queries it takes: "text", "audio", "negatives", "prompts".
        presets: names of the recipes that train it; the first one trains a model further.
        tokenizer: file of the released text encoder's tokenizer, below the bundled weights; "" for none.
    """

    parts: tuple[str, ...]
    takes: tuple[str, ...]
    presets: tuple[str, ...] = ()
    tokenizer: str = ""


FAMILIES = {
    "mini": Traits(parts=("separator", "text", "audio"), takes=("text", "audio", "negatives"), presets=("mini",)),
    "clapsep": Traits(
        parts=("separator", "text", "audio"),
        takes=("text", "audio", "negatives"),
        presets=("clapsep-hybrid", "clapsep-text"),
        tokenizer="roberta-tokenizer.json.gz",
    ),
    "tuss": Traits(parts=("separator",), takes=("prompts",), presets=("tuss-medium", "tuss-large")),
    "audiosep": Traits(
        parts=("separator", "text"),
        takes=("text",),
        presets=("audiosep-base",),
        tokenizer="roberta-tokenizer.json.gz",
    ),
}


SHORT = 12  # digits of a hash that name a folder or a revision


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file on the Hugging Face Hub to download.

    Its `size` in bytes, its SHA-256 in hex and a commit (`revision`) are pinned. The hash that the Hub states for that
    commit is accepted, too. `repo_type` is "model" or "space".
    """

    repo: str
    repo_type: str
    revision: str
    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """File name."""
        return self.path.rpartition("/")[2]

    @property
    def where(self) -> str:
        """File and publisher, in words."""
        return f"{self.path} of the {self.repo_type} {self.repo}"

    @property
    def address(self) -> str:
        """Address for a browser."""
        kind = {"model": "", "space": "spaces/"}[self.repo_type]
        return f"https://huggingface.co/{kind}{self.repo}/resolve/{self.revision}/{self.path}"

    @property
    def version(self) -> str:
        """Short name of the release and its revision."""
        return f"{self.repo}@{self.revision[:SHORT]}"

    @property
    def pinned(self) -> tuple[str | int, ...]:
        """Values that identify the file."""
        return self.repo, self.revision, self.path, self.size


@dataclass(frozen=True, kw_only=True)
class WebFile:
    """A file at an HTTPS address to download, pinned by its content; with the properties of `HubFile`."""

    url: str
    size: int
    sha256: str

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


Remote = HubFile | WebFile


@dataclass(frozen=True)
class Entry:
    """Describes a named model: a bundled one (`remotes` is empty), or one converted from `remotes`."""

    name: str
    family: str
    licence: str
    about: str
    remotes: tuple[Remote, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Kinds of queries it takes, those of its family."""
        return FAMILIES[self.family].takes

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
    Entry(
        name="audiosep",
        family="audiosep",
        licence="MIT, as its Space states",
        about="the released AudioSep: words only, no negative queries (arXiv 2308.05037)",
        remotes=(
            HubFile(
                repo="Audio-AGI/AudioSep",
                repo_type="space",
                revision="0807a713283035d8b0d0628f1b8e3d6580459f7b",
                path="checkpoint/audiosep_base_4M_steps.ckpt",
                size=1_264_844_076,
                sha256="f8cda01bfd0ebd141eef45d41db7a3ada23a56568465840d3cff04b8010ce82c",
            ),
        ),
    ),
    Entry(
        name="audiosep-hive",
        family="audiosep",
        licence="Apache-2.0, as its repository states",
        about="newer weights for AudioSep, by others; reported, not checked here",
        remotes=(
            HubFile(
                repo="AlayaLab/AudioSep-hive",
                repo_type="model",
                revision="113d2e4399a4f19b6a0d567bbde38f2fe1b11794",
                path="audiosep_hive.ckpt",
                size=1_264_846_755,
                sha256="a13fff5fa4ece1a8bc13e42e1c7b8d90e21603075302ca89e4339c9471973300",
            ),
        ),
    ),
]
MODELS = {entry.name: entry for entry in _ENTRIES}
PREFERRED, BUNDLED = "clapsep", "mini"


def weights_folder() -> Path:
    """Return the folder of the bundled weights."""
    return _bundled("weights")


def examples_folder() -> Path:
    """Return the folder of the example recordings."""
    return _bundled("examples")


def _bundled(name: str) -> Path:
    """Return a folder of the installed package, or of the top of a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def home() -> Path:
    """Return the folder of converted models and records: CLAPSEP_HOME, or one in the platform's user cache."""
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
