"""Downloads data sets of the papers, checks and unpacks them, and lists their clips.

The size and MD5 that the server states (Zenodo) are checked, and the SHA-256 where others published it. The SHA-256 of
the first download is kept in `SHA256SUMS`, and later downloads must have the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from clapsep_cli.audio.sources import SUFFIXES
from clapsep_cli.errors import DownloadError, ManifestError, OutputError, UsageError
from clapsep_cli.evaluation.mixtures import caption_of
from clapsep_cli.files import BLOCK_BYTES, replacing
from clapsep_cli.models.prompts import STEMS
from clapsep_cli.store import download
from clapsep_cli.store.library import FileProgress
from clapsep_cli.tables import read_table, write_table

ZENODO = "https://zenodo.org/api/records/{}"
AUDIOCAPS = "https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset/{}.csv"
SPLITS = ("train", "val", "test")
VIDEO = re.compile(r"Y?([\w-]{11})(_|$)")  # names of AudioCaps' clips: the video's id, and often where the clip begins


@dataclass(frozen=True)
class Part:
    """A file of a data set, with its size in bytes and MD5 in hex where its server states them, and a known SHA-256."""

    name: str
    url: str
    size: int | None = None
    md5: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class DataSet:
    """A data set that may be downloaded.

    Attributes:
        terms: its licence, in words.
        listed: writes lists of the clips in a folder, and yields their paths.
        parts: its files, where they have addresses of their own …
        record: … or its record on Zenodo, and the names of the files in it.
        names: of these files.
        sha256: of some of these, by name.
    """

    terms: str
    listed: Callable[[Path], Iterator[Path]]
    parts: tuple[Part, ...] = ()
    record: int = 0
    names: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


def _esc50(folder: Path) -> Iterator[Path]:
    meta = _found(folder, "esc50.csv")
    audio = (meta.parent.parent / "audio").relative_to(folder)
    rows = [row for _, row in read_table(meta, ("filename", "fold", "category"))]
    lines = [((audio / row["filename"]).as_posix(), row["category"], f"fold{row['fold']}") for row in rows]
    yield _written(folder / "clips.csv", ("file", "label", "split"), lines)


def _fsd(folder: Path) -> Iterator[Path]:
    def rows(part: str, name: str) -> list[tuple[str, str]]:
        audio = _found(folder, f"FSDKaggle2018.audio_{part}").relative_to(folder)
        table = read_table(_found(folder, f"{name}.csv"), ("fname", "label"))
        return [((audio / row["fname"]).as_posix(), row["label"]) for _, row in table]

    yield _written(folder / "clips.csv", ("file", "label"), rows("test", "test_post_competition_scoring_clips"))
    shots = [(caption_of(label), file) for file, label in rows("train", "train_post_competition")]
    yield _written(folder / "shots.csv", ("class", "file"), shots)


def _audiocaps(folder: Path) -> Iterator[Path]:
    """List the clips in the folder, found by the id of their video; if there are none, list all captions."""
    captions: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        for _, row in read_table(folder / f"audiocaps-{split}.csv", ("youtube_id", "caption")):
            captions.setdefault(split, {}).setdefault(row["youtube_id"], []).append(row["caption"])
    known = {name for clips in captions.values() for name in clips}
    there = {
        found[1]: path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and (found := VIDEO.match(path.stem)) and found[1] in known
    }
    for split, clips in captions.items():
        kept = {name: texts for name, texts in clips.items() if name in there or not there}
        most = max(map(len, kept.values()), default=0)
        columns = ["file_name", "caption", *(f"caption_{n}" for n in range(2, most + 1))]
        lines = [[there.get(name, f"{name}.wav"), *texts, *[""] * (most - len(texts))] for name, texts in kept.items()]
        if lines:
            yield _written(folder / f"{split}.csv", columns, lines)


def _musdb(folder: Path) -> Iterator[Path]:
    songs = sorted(path.parent.relative_to(folder) for path in folder.glob("**/test/*/mixture.wav"))
    lines = [((song / "mixture.wav").as_posix(), s, (song / f"{s}.wav").as_posix()) for song in songs for s in STEMS]
    yield _written(folder / "test.csv", ("mixture", "prompt", "reference"), lines)


DATA_SETS = {
    "esc50": DataSet(
        "CC BY-NC 3.0: not for commercial use",
        _esc50,
        (Part("ESC-50.zip", "https://github.com/karolpiczak/ESC-50/archive/refs/heads/master.zip"),),
    ),
    "fsdkaggle2018": DataSet(
        "CC0 or CC BY, by clip",
        _fsd,
        record=2552860,
        names=tuple(f"FSDKaggle2018.{part}.zip" for part in ("audio_test", "audio_train", "meta")),
    ),
    "audiocaps": DataSet(
        "captions alone: their sound is on YouTube, whose terms do not let us fetch it; put your own copy into the "
        "folder, named by the videos' ids, and run this again",
        _audiocaps,
        tuple(Part(f"audiocaps-{split}.csv", AUDIOCAPS.format(split)) for split in SPLITS),
    ),
    "musdb18-hq": DataSet(
        "for research and teaching only",
        _musdb,
        record=3338373,
        names=("musdb18hq.zip",),
        # As torchaudio.datasets.MUSDB_HQ checks it.
        sha256={"musdb18hq.zip": "baac80d0483c61d74b2e5f3be75fa557eec52898339e6aa45c1fa48833c5d21d"},
    ),
}
# Why others cannot be fetched, and what to do.
ON_YOUTUBE = "its sound is on YouTube, whose terms do not let us fetch it; bring your own copy"
OWN_COPY = {
    "audioset": f"{ON_YOUTUBE}, with a CSV file,label",
    "music21": f"{ON_YOUTUBE}, a folder for each instrument",
    "dnr": "its archive comes in parts; join and unpack those of zenodo.org/records/6949108 yourself",
}


def data_set(name: str) -> DataSet:
    """Return a data set by name. Raises `UsageError`, which says why others cannot be downloaded."""
    if name in OWN_COPY:
        raise UsageError(f"{name} is not fetched: {OWN_COPY[name]}")
    if name not in DATA_SETS:
        raise UsageError(f"no data set {name!r}: there are {', '.join((*DATA_SETS, *OWN_COPY))}")
    return DATA_SETS[name]


def fetch(name: str, folder: Path, progress: FileProgress | None = None) -> tuple[dict[str, str], list[Path]]:
    """Fetch a data set into a folder. What is there from an earlier call is used.

    Args:
        name: of `DATA_SETS`.
        folder: where archives, recordings and lists go.
        progress: called with a file's name, bytes done and bytes in all.

    Returns:
        The SHA-256 of each file that was downloaded, by name, and the lists that were written.

    Raises:
        UsageError: for a data set that cannot be fetched.
        DownloadError: for a file that cannot be downloaded, differs from what its server states or sent before, or
            would be unpacked outside of the folder.
        ManifestError: for contents that are not as expected.
        OutputError: where the folder cannot be written.
    """
    data = data_set(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = download.read_sums(folder) if (folder / download.SUMS).exists() else {}
        sums = {}
        for part in _stated(data, folder):
            sums[part.name] = _bring(part, folder, progress)
            if before.get(part.name, sums[part.name]) != sums[part.name]:
                raise DownloadError(
                    f"{folder / part.name}: has SHA-256 {sums[part.name]}, and had {before[part.name]} before: delete "
                    f"{folder / download.SUMS} to accept it"
                )
        download.write_sums(folder, before | sums)
        for archive in (folder / part for part in sums if part.endswith(".zip")):
            unpack(archive, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return sums, list(data.listed(folder))


def _stated(data: DataSet, folder: Path) -> Sequence[Part]:
    """Return the files of a data set; those of a Zenodo record with what Zenodo states of them.

    Where it cannot be asked, files that are all in the folder already are taken as they are.
    """
    if not data.record:
        return data.parts
    try:
        return _in_record(data, folder)
    except DownloadError:
        if all((folder / name).is_file() for name in data.names):
            return [Part(name, "", sha256=data.sha256.get(name, "")) for name in data.names]
        raise


def _in_record(data: DataSet, folder: Path) -> list[Part]:
    url = ZENODO.format(data.record)
    way_out = f"or fetch {', '.join(data.names)} elsewhere and save them in {folder}"
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "record.json"
        download.attempts(url, folder, way_out, lambda: download.save(url, answer))
        content = answer.read_bytes()
    try:
        files = {file["key"]: file for file in json.loads(content)["files"]}
        parts = []
        for name in data.names:
            kind, _, md5 = files[name]["checksum"].partition(":")
            if kind != "md5":
                raise ValueError(kind)
            url, size, sha256 = files[name]["links"]["self"], files[name]["size"], data.sha256.get(name, "")
            parts.append(Part(name, str(url), int(size), md5, sha256))
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{url}: does not state {', '.join(data.names)}; the record may be restricted: log in there, {way_out}"
        ) from error
    return parts


def _bring(part: Part, folder: Path, progress: FileProgress | None) -> str:
    """Download a file of a data set if it is not there; return its SHA-256, of what was checked."""
    path = folder / part.name
    if path.exists():
        return _checked(part, path, path)
    _ensure_room(folder, part.size or 0)

    def told(done: int, total: int) -> None:
        if progress:
            progress(part.name, done, total)

    with replacing(path) as temporary:
        way_out = f"or fetch {part.name} elsewhere and save it as {path}"
        download.attempts(part.url, folder, way_out, lambda: download.save(part.url, temporary, part.size, told))
        return _checked(part, temporary, path)


def _checked(part: Part, file: Path, path: Path) -> str:
    """Return the SHA-256 of a `file`, read once; raise `DownloadError` if it is not what is stated of `path`."""
    size, md5, sha256 = file.stat().st_size, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            sha256.update(block)
            if part.md5:
                md5.update(block)
    stated = {
        "bytes": part.size or size,
        "MD5": part.md5 or md5.hexdigest(),
        "SHA-256": part.sha256 or sha256.hexdigest(),
    }
    found = {"bytes": size, "MD5": md5.hexdigest(), "SHA-256": sha256.hexdigest()}
    if wrong := next((kind for kind in stated if found[kind] != stated[kind]), None):
        raise DownloadError(
            f"{path}: is not what is stated of it: expected {wrong} {stated[wrong]}, got {found[wrong]}; delete it if "
            "it is there, and try again"
        )
    return sha256.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ZIP into a folder: each entry of its top level appears whole, unless it is there already.

    Raises `DownloadError` for a damaged archive, and for one that would write elsewhere; `OSError` where the disk is
    full.
    """
    try:
        with ZipFile(archive) as packed, tempfile.TemporaryDirectory(dir=folder, prefix=".unpacked-") as scratch:
            members = packed.infolist()
            if outside := next((member.filename for member in members if _is_outside(member)), None):
                raise DownloadError(f"{archive}: holds {outside!r}, which would lie outside of {folder}; not unpacked")
            tops = {PurePosixPath(member.filename).parts[0] for member in members}
            missing = {top for top in tops if not (folder / top).exists()}
            wanted = [member for member in members if PurePosixPath(member.filename).parts[0] in missing]
            _ensure_room(folder, sum(member.file_size for member in wanted))
            packed.extractall(scratch, wanted)
            for top in sorted(missing):
                (Path(scratch) / top).replace(folder / top)
    except (BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({error}); delete it and try again") from error


def _is_outside(member: ZipInfo) -> bool:
    name = PurePosixPath(member.filename)
    linked = stat.S_ISLNK(member.external_attr >> 16)
    return linked or not name.parts or name.is_absolute() or ".." in name.parts or "\\" in member.filename


def _ensure_room(folder: Path, size: int) -> None:
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {download.amount(size)} needed")


def _found(folder: Path, name: str) -> Path:
    """Return the file or folder of that name. Raises `ManifestError` if there is none."""
    found = sorted(folder.rglob(name))
    if not found:
        raise ManifestError(f"{folder}: has no {name}; the data set has another layout than expected")
    return found[0]


def _written(path: Path, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Path:
    if not lines:
        raise ManifestError(f"{path}: there is nothing to list; the data set has another layout than expected")
    write_table(path, columns, lines)
    return path
