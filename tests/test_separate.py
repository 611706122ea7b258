"""Tests `clapsep separate`: by prompts, through the common pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, Done, Stub
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Audio, names, noise, read
from torch import Tensor

from clapsep_cli import Query, extract, load_model
from clapsep_cli.cli.separate import parts, repeated
from clapsep_cli.errors import UsageError
from clapsep_cli.families import tuss
from clapsep_cli.jobs.job import Options
from clapsep_cli.models.base import Separator, go_on
from clapsep_cli.models.prompts import PROMPTS, TASKS
from clapsep_cli.models.tuss import Prompted, Tuss
from clapsep_cli.store import library
from clapsep_cli.store.checkpoint import Model

RATE = 48_000


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "mix.wav", noise(30_000, 2), RATE, "PCM_16")
    return tmp_path / "mix.wav"


@pytest.fixture
def run(clapsep: Clapsep, mix: Path, tuss_folder: Path) -> Callable[..., Done]:
    return lambda *arguments: clapsep("separate", *arguments, "--model", tuss_folder, cwd=mix.parent)


@pytest.mark.parametrize("task", TASKS)
def test_tasks(run: Callable[..., Done], mix: Path, task: str) -> None:
    done = run("mix.wav", "--task", task, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    expected = {
        "speech-enhancement": ["speech", "sfxbg"],
        "speech-separation": ["speech", "speech-2", "sfxbg"],
        "sound-events": ["sfx", "sfx-2", "sfx-3"],
        "music": ["drums", "bass", "vocals", "other"],
        "cinematic": ["speech", "musicbg", "sfxbg"],
    }[task]
    told = json.loads(done.stdout)
    assert list(told["outputs"]) == expected
    assert told["presence"] == {}
    assert names(mix.parent) == sorted(["mix.wav", *(f"mix.{part}.wav" for part in expected)])
    for part in expected:
        info = soundfile.info(mix.with_name(f"mix.{part}.wav"))
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, 2, 30_000, "PCM_16")


def test_a_list_of_prompts_is_the_task(run: Callable[..., Done], mix: Path) -> None:
    assert run("mix.wav", "-o", "task", "--task", "speech-separation").returncode == 0
    assert run("mix.wav", "--prompts", "speech", "speech", "sfxbg", "-o", "list").returncode == 0
    for name in names(mix.parent / "task"):
        np.testing.assert_array_equal(read(mix.parent / "task" / name), read(mix.parent / "list" / name))


def test_only_what_is_written_is_computed(run: Callable[..., Done], mix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, mask = [], Tuss.mask
    monkeypatch.setattr(Tuss, "mask", lambda self, x: [masks.append(len(x)), mask(self, x)][1])
    counts = {}
    for folder, extra in (("all", []), ("one", ["--only", "vocals"]), ("rest", ["--only", "vocals", "--residual"])):
        masks.clear()
        assert run("mix.wav", "-o", folder, "--task", "music", *extra).returncode == 0
        counts[folder] = sum(masks)
    assert counts["all"] == counts["rest"] == 4 * counts["one"]  # what is left takes all to be known
    assert names(mix.parent / "one") == ["mix.vocals.wav"]
    assert names(mix.parent / "rest") == ["mix.residual.wav", "mix.vocals.wav"]
    np.testing.assert_array_equal(
        read(mix.parent / "one" / "mix.vocals.wav"), read(mix.parent / "all" / "mix.vocals.wav")
    )


def test_only_one_of_equal_prompts_or_all_of_them(run: Callable[..., Done], mix: Path) -> None:
    common = ["mix.wav", "--task", "speech-separation"]
    assert run(*common, "-o", "both", "--only", "speech").returncode == 0
    assert names(mix.parent / "both") == ["mix.speech-2.wav", "mix.speech.wav"]
    assert run(*common, "-o", "second", "--only", "speech-2").returncode == 0
    assert names(mix.parent / "second") == ["mix.speech-2.wav"]


@pytest.mark.parametrize("depth", ["PCM_16", "PCM_24", "FLOAT"])
def test_residual_and_consistent_add_up(run: Callable[..., Done], mix: Path, depth: str) -> None:
    soundfile.write(mix, noise(30_000, 2), RATE, depth)
    assert run("mix.wav", "-o", "plain", "--task", "cinematic", "--residual").returncode == 0
    plain = {name: read(mix.parent / "plain" / name) for name in names(mix.parent / "plain")}
    step = {"PCM_16": 2.0**-15, "PCM_24": 2.0**-23, "FLOAT": 1e-7}[depth]
    np.testing.assert_allclose(sum(plain.values()), read(mix), rtol=0, atol=0 if depth == "PCM_16" else step)
    assert np.abs(plain["mix.residual.wav"]).max() > 1e-3
    assert run("mix.wav", "-o", "whole", "--task", "cinematic", "--consistent").returncode == 0
    whole = {name: read(mix.parent / "whole" / name) for name in names(mix.parent / "whole")}
    np.testing.assert_allclose(sum(whole.values()), read(mix), rtol=0, atol=3 * step)
    for name, stem in whole.items():
        np.testing.assert_allclose(stem - plain[name], plain["mix.residual.wav"] / 3, rtol=0, atol=3 * step)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mix.wav"], 2, "--prompts NAME..., or --task"),
        (["mix.wav", "--task", "music", "--prompts", "speech"], 2, "--prompts NAME..., or --task"),
        (["mix.wav", "--task", "karaoke"], 2, "speech-enhancement"),
        (["mix.wav", "--task", "music", "--only", "speech"], 2, "drums, bass, vocals, other"),
        (["mix.wav", "--prompts", "speech", "dogs"], 2, "no prompt 'dogs'; there are: speech, sfx"),
        (["mix.wav", "--prompts", "speech", "residual"], 2, "residual"),
        (["--prompts", "speech", "sfxbg", "mix.wav"], 2, "mix.wav was taken for a prompt"),
        (["--task", "music"], 2, "no recordings"),
        (["mix.wav", "--task", "music", "-o", "-"], 2, "one part"),
        (["-", "mix.wav", "--task", "music"], 1, "only input"),
    ],
)
def test_mistakes(run: Callable[..., Done], mix: Path, arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert names(mix.parent) == ["mix.wav"]


@pytest.mark.parametrize(
    ("prompts", "warning"),
    [
        (["speech", "sfxbg"], ""),
        (["speech", "speech", "sfxbg"], ""),
        (["drums", "musicbg"], "drums with musicbg"),
        (["bass", "bass"], "bass more than once"),
        (["speech", "speech", "sfx", "sfx", "musicbg"], "5 prompts instead of 2 to 4"),
    ],
)
def test_sets_that_were_never_trained_get_a_warning(run: Callable[..., Done], prompts: list[str], warning: str) -> None:
    done = run("mix.wav", "--prompts", *prompts)
    assert done.returncode == 0
    assert (warning in done.stderr) if warning else done.stderr == ""
    assert run("mix.wav", "--prompts", *prompts, "-q", "--overwrite").stderr == ""


def test_extract_maps_a_text_to_a_prompt(
    clapsep: Clapsep, run: Callable[..., Done], mix: Path, tuss_folder: Path
) -> None:
    common = ["extract", "mix.wav", "--model", tuss_folder]
    assert clapsep(*common, "--pos", "vocals", cwd=mix.parent).returncode == 0
    parts = [read(mix.with_name(f"mix.{part}.wav")) for part in ("target", "residual")]
    np.testing.assert_array_equal(sum(parts), read(mix))
    assert run("mix.wav", "-o", "set", "--prompts", "vocals", "drums", "bass", "other").returncode == 0
    np.testing.assert_allclose(parts[0], read(mix.parent / "set" / "mix.vocals.wav"), rtol=0, atol=2**-15)
    for query, message in (
        (["--pos", "a dog"], "there are: " + ", ".join(PROMPTS)),
        (["--neg", "speech"], "--pos"),
        (["--query-audio", "mix.wav"], "takes no recordings as queries: name a prompt"),
        (["--pos-span", "0-0.1"], "takes no recordings as queries: name a prompt"),
        (["--pos", "vocals", "--min-presence", "0"], "--min-presence"),
    ):
        failed = clapsep(*common, *query, "-o", "no", cwd=mix.parent)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1
    assert not (mix.parent / "no").exists()


def test_a_side_to_leave_names_what_else_there_is(tuss_folder: Path) -> None:
    model = load_model(tuss_folder, "cpu")
    asked = tuss.prompts(model, [Query("speech", ["sfx", "musicbg"])], [0])
    assert [PROMPTS[number] for number in asked.prompts.tolist()] == ["speech", "sfx", "musicbg"]
    assert asked.kept == (0,)


def test_any_words_with_a_model_that_takes_them(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    arguments = ["--prompts", "dog barking", "rain", "--residual", "--model", tiny_folder]
    assert clapsep("separate", "mix.wav", *arguments, cwd=mix.parent).returncode == 0
    stems = ["mix.dog_barking.wav", "mix.rain.wav", "mix.residual.wav"]
    assert names(mix.parent) == sorted([*stems, "mix.wav"])
    np.testing.assert_array_equal(sum(read(mix.with_name(name)) for name in stems), read(mix))
    targets = ["--target", "dog=dog barking", "--target", "rain=rain", "-o", "targets", "--model", tiny_folder]
    assert clapsep("extract", "mix.wav", *targets, cwd=mix.parent).returncode == 0
    only = [*arguments[:3], "--only", "rain", "-o", "only", "--model", tiny_folder]
    assert clapsep("separate", "mix.wav", *only, cwd=mix.parent).returncode == 0
    for folder in ("targets", "only"):
        np.testing.assert_array_equal(read(mix.parent / folder / "mix.rain.wav"), read(mix.with_name("mix.rain.wav")))
    assert names(mix.parent / "only") == ["mix.rain.wav"]


def test_a_model_of_queries_refuses_equal_prompts(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    failed = clapsep("separate", "mix.wav", "--prompts", "dog", "dog", "--model", tiny_folder, cwd=mix.parent)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "dog and dog-2 ask" in failed.stderr
    assert "for the same sound: name it once" in failed.stderr


def test_without_a_network_separate_says_what_works(
    clapsep: Clapsep, mix: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed = clapsep("separate", "mix.wav", "--prompts", "speech", "sfxbg", cwd=mix.parent)
    assert failed.returncode == 3
    assert failed.stderr.endswith("; without a network, --model mini takes any words: --prompts speech sfxbg\n")
    named = clapsep("separate", "mix.wav", "--task", "music", "--model", "tuss-medium", cwd=mix.parent)
    assert (named.returncode, "--model mini" in named.stderr) == (3, False)


def test_many_recordings_and_going_on(run: Callable[..., Done], mix: Path) -> None:
    for number in range(4):
        soundfile.write(mix.parent / f"{number}.wav", noise(7000 + 9000 * number, 1, seed=number), RATE, "PCM_16")
    common = ["[0-3].wav", "--task", "cinematic", "--json"]
    assert run(*common, "-o", "one", "--batch-size", "1").returncode == 0
    assert run(*common, "-o", "many", "--batch-size", "8").returncode == 0
    for name in names(mix.parent / "one"):
        one, many = (read(mix.parent / folder / name) for folder in ("one", "many"))
        np.testing.assert_allclose(one, many, rtol=0, atol=2**-15)
    (mix.parent / "one" / "2.speech.wav").unlink()
    again = run(*common, "-o", "one", "--skip-existing")
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()] == ["skipped"] * 3 + ["done"]
    other = run("[0-3].wav", "-o", "one", "--skip-existing", "--task", "cinematic", "--consistent")
    assert other.returncode == 1
    assert "4 of 4 files failed" in other.stderr


def test_words_up_to_the_next_option() -> None:
    assert repeated(["a.wav", "--prompts", "x", "y", "--only", "x", "-o", "out", "b.wav"]) == [
        *["a.wav", "--prompts", "x", "--prompts", "y", "--only", "x", "-o", "out", "b.wav"]
    ]
    assert repeated(["--prompts", "x", "y", "--", "c.wav"]) == ["--prompts", "x", "--prompts", "y", "--", "c.wav"]
    assert repeated(["--prompts=x", "c.wav"]) == ["--prompts=x", "c.wav"]


@given(st.lists(st.sampled_from(["speech", "Speech", "sfx", "a/b", "a b", "speech-2", "犬"]), min_size=1, max_size=6))
def test_every_prompt_gets_a_name_of_its_own(chosen: list[str]) -> None:
    named = parts(chosen)
    assert list(named.values()) == chosen
    assert len({name.casefold() for name in named}) == len(chosen)


def test_names_that_are_taken() -> None:
    with pytest.raises(UsageError, match="Mixture"):
        parts(["speech", "Mixture"])


# Through the pipeline with a separator whose stems are known


class Bands(Separator[Prompted]):
    """Parts a mixture at 1 kHz, and gives the two bands to equal prompts in whatever order `flips` says.

    It is told by the number of the window and the channel.
    """

    rate, window = RATE, 2 * RATE
    overlap = 48_000

    def __init__(self, channels: int, flips: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.channels, self.flips, self.heard = channels, flips, 0

    def lower(self, dtype: torch.dtype) -> None:
        pass

    def infer(self, windows: Tensor, wanted: Prompted, check: Callable[[], None] = go_on) -> Tensor:
        spectra = torch.fft.rfft(windows)
        low = torch.fft.irfft(spectra * (torch.fft.rfftfreq(windows.shape[1], 1 / RATE) < 1000), windows.shape[1])
        stems = torch.stack([low, windows - low], 1)
        for row in stems:
            if self.flips(*divmod(self.heard, self.channels)):
                row[:] = row.flip(0).clone()
            self.heard += 1
        return stems


def twins(separator: Bands) -> Stub:
    """A TUSS that is asked for two of the same, whatever the queries."""
    model = Stub(separator)
    model.kind = replace(tuss.FAMILY, ask=lambda *_: Prompted(torch.tensor([0, 0]), (0, 1)), doubts=None)
    return model


def two_sounds(samples: int, rate: int) -> Audio:
    """A low sound and a high one, both in bursts, in a stereo mixture that holds both everywhere."""
    time = np.arange(samples) / rate
    low = 0.2 * np.sin(2 * np.pi * 300 * time) * (1 + 0.5 * np.sin(2 * np.pi * 1.7 * time))
    high = 0.2 * np.sin(2 * np.pi * 3000 * time) * (1 + 0.5 * np.sin(2 * np.pi * 2.3 * time))
    return np.stack([np.stack([low, 0.7 * high], 1), np.stack([0.6 * low, high], 1)]).transpose(2, 1, 0)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize(
    "flips",
    [
        lambda window, channel: window % 2 == 1,
        lambda window, channel: channel == 1,
        lambda window, channel: (window + channel) % 3 == 1,
    ],
)
def test_equal_prompts_keep_their_sources_over_windows_and_channels(
    tmp_path: Path, rate: int, batch: int, flips: Callable[[int, int], bool]
) -> None:
    sounds = two_sounds(8 * rate, rate)
    soundfile.write(tmp_path / "mix.wav", sounds.sum(0), rate, "FLOAT")
    targets = {"sfx": Query("sfx"), "sfx-2": Query("sfx")}
    done = extract(tmp_path / "mix.wav", targets, twins(Bands(2, flips)), options=Options(batch_size=batch))
    stems = [read(done.outputs[name]) for name in targets]
    if flips(0, 0):
        stems.reverse()
    middle = slice(rate, 7 * rate)
    for stem, sound in zip(stems, sounds, strict=True):
        assert np.square(stem - sound)[middle].mean() < 1e-3 * np.square(sound)[middle].mean()


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8000, 22_050, 44_100, 48_000, 96_000]),
    channels=st.integers(1, 2),
    samples=st.one_of(st.integers(1, 40), st.integers(41, 260_000)),
)
def test_stems_have_the_mixtures_shape_and_add_up(
    tmp_path_factory: pytest.TempPathFactory, rate: int, channels: int, samples: int
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    soundfile.write(folder / "mix.wav", two_sounds(samples, rate).sum(0)[:, :channels], rate, "PCM_16")
    done = extract(folder / "mix.wav", {"a": Query("a"), "b": Query("b")}, twins(Bands(channels, lambda *_: False)))
    written = [read(path) for path in done.outputs.values()]
    mixture = read(folder / "mix.wav")
    assert [part.shape for part in written] == [mixture.shape] * 3
    np.testing.assert_array_equal(sum(written), mixture)
    ends = rate // 100  # near which a resampler rings
    assert np.abs(written[2][ends:-ends]).max(initial=0) < 1e-3


def test_by_default_the_released_model_is_meant(clapsep: Clapsep, mix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(model: object, *_: object, **__: object) -> Model:
        asked.append(model)
        return twins(Bands(2, lambda *_: False))

    monkeypatch.setattr(library, "load_model", load)
    assert clapsep("separate", "mix.wav", "--prompts", "speech", "sfxbg", cwd=mix.parent).returncode == 0
    assert asked == ["tuss-medium"]
