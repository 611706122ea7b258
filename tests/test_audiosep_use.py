"""AudioSep as a model of the house: from its released file to every command, with a tiny stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audiosep_stand_in import TINY, save_released, tiny_checkpoint
from conftest import Clapsep
from fill import noise, signal
from torch.nn import functional as F

from clapsep_cli import Query, load_model
from clapsep_cli import separate as separate_in_memory
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import QueryError
from clapsep_cli.evaluation.evaluate import mixer
from clapsep_cli.evaluation.mixtures import Mixture, read_mixtures
from clapsep_cli.metrics import si_sdr
from clapsep_cli.models.audiosep import AudioSepConfig
from clapsep_cli.registry import MODELS
from clapsep_cli.store import library
from clapsep_cli.store.convert_audiosep import convert_audiosep
from clapsep_cli.store.library import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of a tiny size."""
    place = tmp_path_factory.mktemp("audiosep")
    save_released(place / "a.ckpt", tiny_checkpoint())
    (place / "model").mkdir()
    convert_audiosep([place / "a.ckpt"], place / "model", TINY)
    write_tokenizer(MODELS["audiosep"], place / "model")
    return place / "model"


def test_the_command_separates_by_words(clapsep: Clapsep, folder: Path, tmp_path: Path) -> None:
    mix = 0.05 * np.random.default_rng(0).standard_normal((60_001, 2))
    soundfile.write(tmp_path / "mix.wav", mix, 44_100, "PCM_16")
    done = clapsep("extract", "mix.wav", "--pos", "dog barking", "--model", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, target, residual = (
        soundfile.read(tmp_path / name)[0] for name in ("mix.wav", "mix.target.wav", "mix.residual.wav")
    )
    np.testing.assert_array_equal(target + residual, whole)
    assert np.abs(target - whole).max() > 0.01
    assert np.abs(target).max() > 0.01


def test_it_is_the_network_under_the_embedding_of_the_text(folder: Path) -> None:
    model, audio = load_model(folder, "cpu"), signal(0.6, RATE_HZ, 5).numpy()
    got = separate_in_memory(audio, RATE_HZ, {"a": Query("dog"), "b": Query(["rain", "wind"])}, model)
    dog, rain, wind = model.text.embed(["dog", "rain", "wind"])
    for name, asked in (("a", dog), ("b", F.normalize((rain + wind) / 2, dim=0))):
        expected = model.separator(torch.from_numpy(audio)[None], asked[None])[0].detach().numpy()
        np.testing.assert_allclose(got.stems[name], expected, rtol=0, atol=1e-5)


QUERIES = [
    (Query("dog", neg="rain"), "use the residual"),
    (Query(neg="rain"), "use the residual"),
    (Query(pos_audio=[(np.ones(100, np.float32), RATE_HZ)]), "in words with --pos"),
    (Query("dog", pos_spans=(0, 0.1)), "in words with --pos"),
]


@pytest.mark.parametrize(("query", "instead"), QUERIES)
def test_what_it_does_not_take_is_said(folder: Path, query: Query, instead: str) -> None:
    with pytest.raises(QueryError, match=instead) as refused:
        separate_in_memory(np.ones(9000, np.float32), RATE_HZ, query, load_model(folder, "cpu"))
    assert "\n" not in str(refused.value)


REFUSED = [
    (["--neg", "rain"], "use the residual"),
    (["--pos", "dog", "--neg", "rain"], "use the residual"),
    (["--target", "a=dog", "--target", "b=rain", "--neg", "wind"], "use the residual"),
    (["--query-audio", "mix.wav"], "in words with --pos"),
    (["--pos", "dog", "--neg-span", "0-0.1"], "in words with --pos"),
    (["--pos", "dog", "--presence"], "cannot measure presence"),
    (["--pos", "dog", "--refine"], "takes no recordings as queries"),
    (["--target", "a=dog", "--target", "b=rain", "--mutual"], "never makes targets negative queries"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_the_command_refuses_at_once(
    clapsep: Clapsep, folder: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    soundfile.write(tmp_path / "mix.wav", np.ones(9000), 44_100)
    refused = clapsep("extract", "mix.wav", *arguments, "--model", folder, cwd=tmp_path)
    assert refused.returncode
    assert refused.stdout == ""
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mix.wav"]


def test_a_query_is_refused_before_a_download(
    clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "load_model", lambda *_, **__: pytest.fail("no model is needed"))
    soundfile.write(tmp_path / "mix.wav", np.ones(9000), 44_100)
    refused = clapsep("extract", "mix.wav", "--pos", "a", "--neg", "rain", "--model", "audiosep", cwd=tmp_path)
    assert (refused.returncode, "audiosep takes no negative queries" in refused.stderr) == (2, True)


def test_prompts_are_words_and_targets_stay_as_they_are(clapsep: Clapsep, folder: Path, tmp_path: Path) -> None:
    """Several targets do not share the mixture: each is what it would be alone."""
    soundfile.write(tmp_path / "mix.wav", signal(0.3, RATE_HZ, 7).numpy(), RATE_HZ, "FLOAT")
    done = clapsep("separate", "mix.wav", "--prompts", "dog", "rain", "--residual", "--model", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = ["--pos", "dog", "--no-residual", "--model", folder]
    assert clapsep("extract", "mix.wav", *alone, cwd=tmp_path).returncode == 0
    parts = {name: soundfile.read(tmp_path / f"mix.{name}.wav")[0] for name in ("dog", "rain", "residual", "target")}
    whole = soundfile.read(tmp_path / "mix.wav")[0]
    np.testing.assert_allclose(parts["dog"] + parts["rain"] + parts["residual"], whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(parts["dog"], parts["target"], rtol=0, atol=1e-6)


# Evaluation.


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Two mixtures, each with a shot and an absent sound."""
    for n, key in enumerate((1, 2, 3)):
        soundfile.write(tmp_path / f"{n}.wav", 0.2 * noise(9000, key), 16_000)
    head = "source_file,positive_caption,noise_file,negative_caption,label,shot_file,absent_caption\n"
    (tmp_path / "list.csv").write_text(f"{head}0.wav,a dog,1.wav,rain,dog,2.wav,a car\n1.wav,rain,2.wav,a car,rain,,\n")
    return tmp_path / "list.csv"


def test_it_is_evaluated_by_positive_texts(clapsep: Clapsep, folder: Path, listed: Path) -> None:
    common = ["evaluate", "--mixtures", listed, "--audio", listed.parent, "--model", folder, "--no-bss"]
    done = clapsep(*common, "--json", "--report", "r.html", cwd=listed.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: kind["mixtures"] for name, kind in found["queries"].items()} == {"positive": 2, "absent": 1}
    assert found["settings"]["sides"] == ["positive"]
    assert "AudioSep, VGGSound" in (listed.parent / "r.html").read_text()

    model = load_model(folder, "cpu")
    mixed, target = mixer(listed.parent, model)(read_mixtures(listed)[1])
    (stem,) = separate_in_memory(mixed, RATE_HZ, Query("rain"), model).stems.values()
    expected = si_sdr(stem, target) - si_sdr(mixed, target)
    assert found["labels"]["positive"]["rain"]["si_sdri"] == pytest.approx(expected, abs=2e-3)

    for wrong, said in (
        (["--queries", "both"], "takes no negative queries"),
        (["--queries", "pos,neg"], "use --queries pos"),
        (["--shots", "1", "--shots-csv", "s.csv"], "takes no recordings as queries"),
        (["--refine"], "takes no recordings as queries"),
    ):
        (listed.parent / "s.csv").write_text("class,file\na dog,2.wav\n")
        refused = clapsep(*common, *wrong, cwd=listed.parent)
        assert refused.returncode
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_mixtures_last_ten_seconds(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", np.ones(800), 8000)
    model = load_model(folder, "cpu")
    assert model.separator.window == TINY.window
    for window, samples in ((TINY.window, TINY.window), (AudioSepConfig().window, 320_000)):
        model.separator.window = window
        assert len(mixer(tmp_path, model)(Mixture("clip.wav", "a", "clip.wav", "b"))[0]) == samples
