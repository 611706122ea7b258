"""When a target sounds: `--events` and `--no-audio`, from what is typed to what is written and printed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, Done, Fixed, Stub
from recordings import names, noise
from torch import Tensor

from clapsep_cli.jobs import recording
from clapsep_cli.models.base import AudioEncoder
from clapsep_cli.store import library

RATE = 32_000
PLACED = [(1.0, 2.5), (7.0, 7.8), (12.0, 15.0)]


class Gate(Fixed):
    """Lets through what is loud: frames of a window over a level."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def encode(self, mixture: Tensor) -> Tensor:
        self.heard.append(mixture[0].clone())
        return mixture

    def mask(self, features: Tensor, condition: Tensor) -> Tensor:
        frames = torch.nn.functional.pad(features, (160, 319)).unfold(1, 320, 320).abs().amax(2) > 0.5
        return frames[:, : self.window // 320 + 1, None].float().expand(max(len(features), len(condition)), -1, 513)


class Loudness(AudioEncoder):
    """Finds loud recordings like the query "dog", and quiet ones unlike it."""

    rate = RATE

    def embed(self, audio: Tensor) -> Tensor:
        loud = 1.0 if audio.abs().max() > 0.2 else -1.0
        return torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 0.0, loud]), dim=0)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def events(clapsep: Clapsep, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clapsep extract --pos dog --events` with a gate for a model."""
    model = Stub(gate)
    model.__dict__["audio"] = Loudness()
    monkeypatch.setattr(library, "load_model", lambda *_, **__: model)
    return lambda *more: clapsep("extract", "mix.wav", "--pos", "dog", "--events", *more, cwd=tmp_path)


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    audio = 0.1 * noise(2, 45 * RATE)
    for start, end in PLACED:
        audio[:, round(start * RATE) : round(end * RATE)] += 0.8 * np.sign(noise(1, round((end - start) * RATE)))
    soundfile.write(tmp_path / "mix.wav", audio.T, RATE, "PCM_16")
    return tmp_path / "mix.wav"


def listed(path: Path) -> list[tuple[float, float]]:
    with path.open(newline="") as file:
        return [(float(row["start"]), float(row["end"])) for row in csv.DictReader(file)]


def near(placed: list[tuple[float, float]]) -> list[object]:
    return [pytest.approx(pair, abs=0.1) for pair in placed]


def test_events_are_written_beside_the_parts_and_told(events: Callable[..., Done], mix: Path) -> None:
    done = events("--json")
    assert done.returncode == 0, done.stderr
    assert names(mix.parent) == ["mix.events.csv", "mix.residual.wav", "mix.target.wav", "mix.wav"]
    assert listed(mix.with_name("mix.events.csv")) == near(PLACED)
    told = json.loads(done.stdout)
    assert told["events_file"].endswith("mix.events.csv")
    assert [(one["start"], one["end"]) for one in told["events"]["target"]] == near(PLACED)
    assert all(one["level_db"] == pytest.approx(-1.9, abs=1) for one in told["events"]["target"])
    assert all(one["presence"] == pytest.approx(1, abs=0.02) for one in told["events"]["target"])


def test_times_are_those_of_the_recording(events: Callable[..., Done], mix: Path) -> None:
    done = events("--start", "6", "--end", "14", "--no-audio")
    assert "  target sounds 2 times, 2.9" in done.stdout
    assert listed(mix.with_name("mix.events.csv")) == near([PLACED[1], (12.0, 14.0)])


@pytest.mark.parametrize("rate", [16_000, 96_000])
def test_events_alone_take_no_more_than_the_model_hears(
    events: Callable[..., Done], mix: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    audio, _ = soundfile.read(mix)
    soundfile.write(mix, np.repeat(audio, 3, 0) if rate > RATE else audio[::2], rate, "PCM_16")
    made: list[tuple[int, int]] = []
    passage = recording.Passage

    def noted(model: object, wanted: object, rate: int, channels: int) -> recording.Passage:
        made.append((rate, channels))
        return passage(model, wanted, rate, channels)  # type: ignore[arg-type]

    monkeypatch.setattr(recording, "Passage", noted)
    assert events("--no-audio", "--events-format", "raven").returncode == 0
    assert names(mix.parent) == ["mix.events.txt", "mix.wav"]
    assert made == [(min(rate, RATE), 1)]
    table = [line.split("\t") for line in mix.with_name("mix.events.txt").read_text().splitlines()[1:]]
    assert [(float(row[3]), float(row[4])) for row in table] == near(PLACED)
    assert {row[6] for row in table} == {str(rate // 2)}


def test_events_alone_resume(events: Callable[..., Done], mix: Path, gate: Gate) -> None:
    assert events("--no-audio", "--skip-existing").returncode == 0
    gate.heard = []
    before = mix.with_name("mix.events.csv").stat().st_mtime_ns
    again = events("--no-audio", "--skip-existing")
    assert "done before" in again.stdout
    assert not gate.heard
    assert mix.with_name("mix.events.csv").stat().st_mtime_ns == before
    other = events("--no-audio", "--skip-existing", "--events-length", "1")
    assert other.returncode == 1, other.stdout
    assert "was not written for this query, model and options" in other.stderr
    mix.with_name("mix.events.csv").unlink()
    assert events("--no-audio", "--skip-existing").returncode == 0
    assert listed(mix.with_name("mix.events.csv")) == near(PLACED)


def test_an_absent_target_has_no_events(events: Callable[..., Done], mix: Path) -> None:
    done = events("--no-audio", "--min-presence", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["events"] == {"target": []}
    assert listed(mix.with_name("mix.events.csv")) == []


def test_events_of_several_targets_share_a_list(clapsep: Clapsep, events: Callable[..., Done], mix: Path) -> None:
    line = "extract mix.wav --target a=dog --target b=lion --events --no-audio --events-format audacity"
    done = clapsep(*line.split(), cwd=mix.parent)
    assert done.returncode == 0, done.stderr
    rows = [row.split("\t") for row in mix.with_name("mix.events.txt").read_text().splitlines()]
    assert {name for _, _, name in rows} == {"a"}, "the stem is not like the other query"
    assert len(rows) == 3


def test_an_existing_list_is_kept(events: Callable[..., Done], mix: Path) -> None:
    mix.with_name("mix.events.csv").write_text("mine")
    refused = events()
    assert refused.returncode == 1
    assert "mix.events.csv: exists already" in refused.stderr
    assert mix.with_name("mix.events.csv").read_text() == "mine"


def test_events_are_drawn(events: Callable[..., Done], mix: Path) -> None:
    pytest.importorskip("matplotlib")
    done = events("--no-audio", "--plot", "--end", "10")
    assert done.returncode == 0, done.stderr
    assert names(mix.parent) == ["mix.events.csv", "mix.png", "mix.wav"]
    from matplotlib.image import imread

    picture = imread(mix.with_name("mix.png"))[..., :3]
    marked = np.all(np.abs(picture - np.array([0x3D, 0xDC, 0x84]) / 255) < 0.02, axis=2).any(0)
    assert np.count_nonzero(np.diff(marked.astype(int)) == 1) == 2
