"""`clapsep hear`: what likely sounds in a recording, and when."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, Done, Fixed, Stub
from recordings import noise
from torch import Tensor

from clapsep_cli.listening import hearing
from clapsep_cli.listening.hearing import Calibration, Listener, Vocabulary
from clapsep_cli.models.base import AudioEncoder, TextEncoder
from clapsep_cli.store import library

RATE = 16_000
SOUNDS = ("low", "high", "other")


class Names(TextEncoder):
    def embed(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.eye(3)[SOUNDS.index(text)] for text in texts])


class Pitch(AudioEncoder):
    """Points at "low" and "high" as far as there is energy below and above 2 kHz."""

    rate = RATE

    def embed(self, audio: Tensor) -> Tensor:
        power = torch.fft.rfft(audio).abs().square()
        split = round(2000 / (RATE / 2) * len(power))
        return torch.nn.functional.normalize(
            torch.stack([power[:split].sum(), power[split:].sum(), torch.tensor(0.0)]), dim=0
        )


def tones(*parts: tuple[float, float]) -> np.ndarray:
    """One tone after the other: Hz and seconds."""
    return np.concatenate([0.3 * np.sin(2 * np.pi * hz * np.arange(round(s * RATE)) / RATE) for hz, s in parts])


@pytest.fixture
def model() -> Stub:
    stub = Stub(Fixed(0.5))
    stub.__dict__ |= {"text": Names(), "audio": Pitch()}
    return stub


@pytest.fixture
def hear(clapsep: Clapsep, tmp_path: Path, model: Stub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clapsep hear mix.wav` with a model that knows low from high, and a vocabulary for it."""
    monkeypatch.setattr(library, "load_model", lambda *_, **__: model)
    (tmp_path / "sounds.txt").write_text("# of my own\nlow\nhigh\n\nother\n")
    soundfile.write(tmp_path / "mix.wav", tones((500, 10), (5000, 6)), RATE)
    return lambda *more: clapsep("hear", "mix.wav", "--vocabulary", "sounds.txt", *more, cwd=tmp_path)


def test_sounds_are_listed_with_their_times_and_a_proposal(hear: Callable[..., Done]) -> None:
    done = hear()
    assert done.returncode == 0, done.stderr
    head, *sounds, proposal = done.stdout.splitlines()
    assert head == "mix.wav: 16.00 s"
    assert [line.split()[1:3] for line in sounds] == [["low", "0-12.5"], ["high", "7.5-16"]]
    assert proposal == "  try: clapsep extract mix.wav --pos low --neg high"


def test_json_and_times_of_a_part(hear: Callable[..., Done]) -> None:
    told = json.loads(hear("--json", "--start", "10", "--min-score", "0.5").stdout)
    assert told["sounds"][0]["stretches"] == [[10.0, 16.0]]
    assert [one["sound"] for one in told["sounds"]] == ["high"]
    assert (told["seconds"], told["pos"], told["neg"]) == (6.0, "high", [])


def test_recordings_of_a_store_are_heard(hear: Callable[..., Done], tmp_path: Path) -> None:
    url = "memory://hear/mix.wav"
    fsspec.filesystem("memory").put_file(str(tmp_path / "mix.wav"), "/hear/mix.wav")
    local, remote = map(json.loads, hear(url, "--json").stdout.splitlines())
    assert remote == {**local, "input": url}
    refused = hear(url, "--plot")
    assert (refused.returncode, f"use it without {url}" in refused.stderr) == (2, True)
    fsspec.filesystem("memory").rm("/hear", recursive=True)


def test_expand_hears_what_is_above(model: Stub) -> None:
    listener = Listener(model, Vocabulary(SOUNDS, Calibration(10, 0.5)))
    audio = tones((5000, 10))[None].astype(np.float32)
    assert listener.hear([audio], RATE).best(1, 0.5)[0][0] == "high"
    slow = listener.hear([audio], RATE // 4, 4, start=3)
    assert slow.best(1, 0.5)[0][0] == "low"
    assert (slow.seconds, slow.starts[:2], slow.window) == (10.0, (3.0, 3.625), 1.25)


@pytest.mark.parametrize("block", [999, 40_000, 200_000])
def test_what_is_heard_does_not_depend_on_the_blocks(model: Stub, block: int) -> None:
    audio = noise(2, 190_000).astype(np.float32)
    listener = Listener(model, Vocabulary(SOUNDS, Calibration(10, 0.5)))
    heard = listener.hear((audio[:, at : at + block] for at in range(0, 190_000, block)), RATE)
    assert heard.starts == (0.0, 2.5, 5.0, 7.5)
    assert heard.seconds == 190_000 / RATE
    for at, scores in zip(heard.starts, heard.scores, strict=True):
        first = round(at * RATE)
        np.testing.assert_allclose(scores, listener.score(audio[:, first : first + 5 * RATE], RATE), atol=1e-6)


def test_faults(hear: Callable[..., Done], tmp_path: Path, clapsep: Clapsep) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    empty = hear("--vocabulary", "empty.txt")
    assert (empty.returncode, "empty.txt: lists no sounds" in empty.stderr) == (2, True)
    gone = hear("--vocabulary", "gone.txt")
    assert (gone.returncode, "gone.txt: this vocabulary cannot be read" in gone.stderr) == (2, True)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    some = clapsep("hear", "bad.wav", "mix.wav", "--vocabulary", "sounds.txt", cwd=tmp_path)
    assert some.returncode == 1
    assert "bad.wav" in some.stderr
    assert "mix.wav: 16.00 s" in some.stdout


def test_a_family_without_a_vocabulary_hears_the_classes_of_audioset(model: Stub) -> None:
    model.family = "clapsep"
    sounds = hearing.vocabulary_of(model).sounds
    assert (len(sounds), sounds[0]) == (527, "Speech")
    asked: list[int] = []

    class Counted(Names):
        def embed(self, texts: Sequence[str]) -> Tensor:
            asked.append(len(texts))
            return torch.ones(len(texts), 3)

    model.__dict__["text"] = Counted()
    Listener(model, hearing.vocabulary_of(model))
    assert sum(asked) == 527
    assert max(asked) <= 32, "a text tower takes much memory for all at once"


def test_a_model_without_words_says_so(model: Stub) -> None:
    model.kind = library.import_module("clapsep_cli.families.tuss").FAMILY
    with pytest.raises(hearing.ModelError, match="cannot compare"):
        hearing.vocabulary_of(model)


def test_the_bundled_model_hears_the_demo(clapsep: Clapsep, tmp_path: Path) -> None:
    """It knows the dog, and proposes no other word for it to leave out."""
    example = Path(__file__).parents[1] / "examples" / "dog.flac"
    done = clapsep("hear", example, "--model", "mini", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "dog" in told["pos"]
    assert not any("dog" in sound for sound in told["neg"])


def test_a_picture_of_the_scores(hear: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert hear("--plot").returncode == 0
    assert (tmp_path / "mix.sounds.png").read_bytes().startswith(b"\x89PNG")
    again = hear("--plot")
    assert (again.returncode, "mix.sounds.png: exists already" in again.stderr) == (1, True)
