"""Mangled recordings of all formats: `python tests/fuzz_audio.py [INPUTS] [SEED]`. A share of them runs with the tests.

Each is copied from `Source` to `Outputs`, every other one leniently, every third one from a pipe. Whatever it holds,
nothing but `AudioError` may come of it, in time, and what is left behind is both parts or nothing. The work is done in
a process of its own, which a hang or a crash of some decoder ends without ending this one.
"""

from __future__ import annotations

import importlib.util
import io
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import media_files
import numpy as np
import soundfile

from clapsep_cli.audio.encoding import choose_encoding
from clapsep_cli.audio.sources import Source
from clapsep_cli.audio.writers import Outputs
from clapsep_cli.errors import AudioError

INPUTS, SEED = 3000, 0
LIMIT_SECONDS = 20  # for one input; on an idle machine the slowest take a tenth
MEMORY_BYTES = 3 * 2**30
HEADER_BYTES = 200

SOUNDFILE = {  # suffix: libsndfile's format and subtype
    "16.wav": ("WAV", "PCM_16"),
    "24.wav": ("WAV", "PCM_24"),
    "8.wav": ("WAV", "PCM_U8"),
    "float.wav": ("WAV", "FLOAT"),
    "double.wav": ("WAV", "DOUBLE"),
    "ext.wav": ("WAVEX", "PCM_16"),
    "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "alac.caf": ("CAF", "ALAC_16"),
    "au": ("AU", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
PYAV = {  # suffix: codec
    "m4a": "aac",
    "alac.m4a": "alac",
    "aac": "aac",
    "mkv": "flac",
    "webm": "libopus",
    "wma": "wmav2",
    "mp4": "aac",
    "avi": "libmp3lame",
    "ac3": "ac3",
    "wv": "wavpack",
    "noxing.mp3": "libmp3lame",
}


def seeds(folder: Path) -> dict[str, bytes]:
    """A short recording in every format, by suffix."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((4800, 2)).astype(np.float32)
    for suffix, (form, subtype) in SOUNDFILE.items():
        soundfile.write(folder / f"seed.{suffix}", noise, 48_000, subtype, format=form)
    if importlib.util.find_spec("av") is not None:
        for suffix, codec in PYAV.items():
            options = {"write_xing": "0"} if suffix.startswith("noxing") else {}
            media_files.encode(folder / f"seed.{suffix}", noise.T, 48_000, codec, **options)
    return {path.name.removeprefix("seed."): path.read_bytes() for path in sorted(folder.glob("seed.*"))}


def cut(rng: np.random.Generator, data: bytearray) -> None:
    del data[rng.integers(0, len(data)) :]


def flip_header(rng: np.random.Generator, data: bytearray) -> None:
    for at in rng.integers(0, min(HEADER_BYTES, len(data)), rng.integers(1, 5)):
        data[at] = rng.integers(0, 256)


def flip_anywhere(rng: np.random.Generator, data: bytearray) -> None:
    for at in rng.integers(0, len(data), rng.integers(1, 20)):
        data[at] = rng.integers(0, 256)


def extreme_number(rng: np.random.Generator, data: bytearray) -> None:
    at = int(rng.integers(0, max(1, min(HEADER_BYTES, len(data)) - 4)))
    value = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0)[rng.integers(6)]
    data[at : at + 4] = value.to_bytes(4, ("little", "big")[rng.integers(2)])


def erase(rng: np.random.Generator, data: bytearray) -> None:
    at, size = rng.integers(0, len(data)), rng.integers(1, 400)
    data[at : at + size] = bytes(len(data[at : at + size]))


def remove(rng: np.random.Generator, data: bytearray) -> None:
    at = rng.integers(0, len(data))
    del data[at : at + rng.integers(1, 400)]


def repeat(rng: np.random.Generator, data: bytearray) -> None:
    at = rng.integers(0, len(data))
    data[at:at] = data[at : at + rng.integers(1, 2000)]


def append(rng: np.random.Generator, data: bytearray) -> None:
    data += rng.bytes(int(rng.integers(1, 3000)))


def prepend(rng: np.random.Generator, data: bytearray) -> None:
    data[0:0] = rng.bytes(int(rng.integers(1, 300)))


MANGLERS: tuple[Callable[[np.random.Generator, bytearray], None], ...] = (
    *(cut, flip_header, flip_anywhere, extreme_number, erase, remove, repeat, append, prepend),
    *(flip_header, extreme_number),  # headers are where the trouble is
)


def mangled(seeds: dict[str, bytes], index: int, seed: int) -> tuple[str, bytes]:
    """The input of this number: its suffix, and its bytes."""
    rng = np.random.default_rng((seed, index))
    suffix = sorted(seeds)[index % len(seeds)]
    data = bytearray(seeds[suffix])
    for _ in range(rng.integers(1, 4)):
        if data:
            MANGLERS[rng.integers(len(MANGLERS))](rng, data)
    if rng.random() < 0.1:  # the suffix is a lie
        suffix = sorted(seeds)[rng.integers(len(seeds))]
    return suffix, bytes(data)


def separate(path: Path, piped: bool, lenient: bool, out: Path) -> str:
    """Read `path` and write it twice; "read", or the reason why not, less what differs from file to file.

    Raises `AssertionError` if more or less is left behind than there should be.
    """
    parts = {part: out / f"x.{part}.wav" for part in ("target", "residual")}
    stdin = sys.stdin
    try:
        if piped:
            sys.stdin = io.TextIOWrapper(path.open("rb"))
        with Source(Path("-") if piped else path, lenient=lenient) as source:
            encoding = choose_encoding("wav", None, source.rate, source.channels, source.bits)
            with Outputs(parts, source.rate, source.channels, encoding) as outputs:
                frames = 0
                for block in source.blocks(0.05):
                    assert block.shape[0] == source.channels
                    assert np.isfinite(block).all()
                    frames += block.shape[1]
                    outputs.write(dict.fromkeys(parts, block))
                outputs.commit()
    except AudioError as error:
        assert not out.exists(), f"left behind: {sorted(out.iterdir())}"
        line = str(error)
        assert "\n" not in line, line
        return " ".join(word for word in line.split(": ", 1)[1].split() if not any(map(str.isdigit, word)))[:40]
    finally:
        if piped:
            sys.stdin.close()
        sys.stdin = stdin
    assert sorted(out.iterdir()) == sorted(parts.values())
    assert all(soundfile.info(part).frames == frames for part in parts.values())
    shutil.rmtree(out)
    return "read"


def work(folder: Path, first: int, last: int, seed: int) -> None:
    """Work through inputs, with one line of stdout before and one after each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    corpus = {
        path.name.removeprefix("seed."): path.read_bytes()
        for path in sorted(folder.glob("seed.*"))
        if path.suffix != ".log"
    }
    for index in range(first, last):
        suffix, data = mangled(corpus, index, seed)
        path = folder / f"input.{suffix}"
        path.write_bytes(data)
        os.write(1, f"{index}\t".encode())
        try:
            outcome = separate(path, index % 3 == 0, index % 2 == 1, folder / "out" / "new")
        except Exception as error:
            outcome = f"FOUND {type(error).__name__}: {error}".replace("\n", " ")
            shutil.rmtree(folder / "out", ignore_errors=True)
        os.write(1, f"{outcome}\n".encode())
        path.unlink()


def fuzz(inputs: int, seed: int, limit: float = LIMIT_SECONDS) -> tuple[Counter[str], list[str]]:
    """How often each outcome came of that many inputs, and what should not have."""
    outcomes: Counter[str] = Counter()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder, at = Path(name), 0
        seeds(folder)
        while at < inputs:
            command = [sys.executable, __file__, "--work", name, str(at), str(inputs), str(seed)]
            log = folder / "seed.log"
            with (
                log.open("w") as stderr,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as worker,
            ):
                assert worker.stdout is not None
                text = b""
                while select.select([worker.stdout], [], [], limit)[0]:
                    if not (part := os.read(worker.stdout.fileno(), 2**16)):
                        break
                    text += part
                else:
                    found.append("hang")
                    worker.kill()
            lines = text.decode().splitlines()
            for line in lines:
                _, _, outcome = line.partition("\t")
                outcomes[outcome or "crash or hang"] += 1
                if not outcome or outcome.startswith("FOUND"):
                    found.append(line)
            at += max(1, len(lines))
            if "Traceback" in (said := log.read_text("utf-8", "replace")):
                found.append(said[said.index("Traceback") :][:6000])
        left = (path.name for path in folder.rglob("*") if not path.name.startswith("seed.") and path.name != "out")
        found += [f"debris {name}" for name in left]
    return outcomes, found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), *map(int, sys.argv[3:6]))
        sys.exit()
    arguments = [*map(int, sys.argv[1:])]
    counted, wrong = fuzz(*(arguments + [INPUTS, SEED][len(arguments) :]))
    lines = [f"{count:6}  {outcome}\n" for outcome, count in counted.most_common()]
    sys.stdout.writelines([*lines, f"{sum(counted.values())} inputs; found: {wrong or 'nothing'}\n"])
    sys.exit(bool(wrong))
