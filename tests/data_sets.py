"""Small stand-ins of the data sets that are fetched, in their layouts, on a server."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from zipfile import ZipFile, ZipInfo

import pytest
import soundfile
from hub_server import HubServer
from recordings import noise

from clapsep_cli.evaluation.datasets import DATA_SETS
from clapsep_cli.models.prompts import STEMS

VIDEOS = ("abcdefghij-", "_bcdefghijk", "abcdefghijl", "abcdefghijm")


def sound(seed: int, seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(round(16_000 * seconds), 1, seed=seed), 16_000, "PCM_16", format="WAV")
    return file.getvalue()


def table(*rows: Sequence[object]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def zipped(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with ZipFile(file, "w") as packed:
        for name, data in files.items():
            packed.writestr(ZipInfo(name), data)
    return file.getvalue()


def esc50() -> bytes:
    labels = ("dog", "rain", "cat", "frog")
    rows = [(f"{n}.wav", 5 if n < 8 else 1, n % 4, labels[n % 4], "False", 1, "A") for n in range(12)]
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    audio = {f"ESC-50-master/audio/{n}.wav": sound(n) for n in range(12)}
    return zipped({"ESC-50-master/meta/esc50.csv": table(header, *rows), **audio})


def serve_record(server: HubServer, record: int, files: Mapping[str, bytes], **wrong: object) -> None:
    """Serve a record of Zenodo with its files. `wrong`: what it states of each in place of the truth."""
    stated = []
    for name, data in files.items():
        path = f"/api/records/{record}/files/{name}/content"
        server.add_plain(path, data)
        checksum = f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
        links = {"self": f"https://zenodo.org{path}"}
        stated.append({"key": name, "size": len(data), "checksum": checksum, "links": links, **wrong})
    server.add_plain(f"/api/records/{record}", json.dumps({"files": stated}).encode())


def fsd() -> dict[str, bytes]:
    labels = ("Cello", "Bass_drum")
    meta = {}
    for part, name in (("test", "test_post_competition_scoring_clips"), ("train", "train_post_competition")):
        rows = [(f"{part}{n}.wav", label, "x") for n, label in enumerate(labels)]
        meta[f"FSDKaggle2018.meta/{name}.csv"] = table(("fname", "label", "usage"), *rows)
    audio = {
        part: {f"FSDKaggle2018.audio_{part}/{part}{n}.wav": sound(20 + n + at, 1.5) for n in range(2)}
        for at, part in enumerate(("test", "train"))
    }
    files = {"audio_test": audio["test"], "audio_train": audio["train"], "meta": meta}
    return {f"FSDKaggle2018.{name}.zip": zipped(content) for name, content in files.items()}


def serve_data_sets(server: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Serve all of them at their addresses' paths, with the SHA-256 of the stand-in where one is known."""
    (github,) = DATA_SETS["esc50"].parts
    server.add_plain(github.url.removeprefix("https://github.com"), esc50())
    serve_record(server, DATA_SETS["fsdkaggle2018"].record, fsd())
    songs = {f"test/A - Song/{stem}.wav": sound(60 + n) for n, stem in enumerate(("mixture", *STEMS))}
    musdb, archive = DATA_SETS["musdb18-hq"], zipped(songs)
    serve_record(server, musdb.record, {"musdb18hq.zip": archive})
    sha256 = {"musdb18hq.zip": hashlib.sha256(archive).hexdigest()}
    patch.setitem(DATA_SETS, "musdb18-hq", replace(musdb, sha256=sha256))
    for part, first in zip(DATA_SETS["audiocaps"].parts, (0, 9, 2), strict=True):
        videos = VIDEOS[first : first + 2]
        rows = [(n, video, 30, f"Sound {video}; and {n}") for n, video in enumerate((*videos, *videos[:1]))]
        server.add_plain(
            part.url.removeprefix("https://raw.githubusercontent.com"),
            table(("audiocap_id", "youtube_id", "start_time", "caption"), *rows),
        )
