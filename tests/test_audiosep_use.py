"""AudioSep as a model of the house: from its released file to every command, with a tiny stand-in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audiosep_stand_in import TINY, save_released, tiny_checkpoint
from clips import reported, write_clips
from conftest import Clapsep
from fill import noise, signal
from hub_server import HubServer
from huggingface_hub import constants
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli import Query, load_model
from clapsep_cli import separate as separate_in_memory
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import QueryError
from clapsep_cli.evaluation.evaluate import mixer
from clapsep_cli.evaluation.mixtures import Mixture, read_mixtures
from clapsep_cli.metrics import si_sdr
from clapsep_cli.models.audiosep import AudioSepConfig
from clapsep_cli.registry import MODELS, HubFile, weights_folder
from clapsep_cli.store import library
from clapsep_cli.store.checkpoint import read_metadata, read_tensors
from clapsep_cli.training.loop.train import Recipe, Run, train
from clapsep_cli.training.recipes import presets
from clapsep_cli.training.recipes.audiosep import AudioSepRecipe, AudioSepTask, Staircase, build


@pytest.fixture(scope="module")
def folder(audiosep_folder: Path) -> Path:
    return audiosep_folder


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


# Training.


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    small = {"batch": 2, "accumulate": 1, "epochs": 2, "epoch_steps": 2, "warmup": 1, "seconds": 0.1}
    often = {"report_every": 1, "save_every": 1, "workers": 1, "validation_mixtures": 2}
    return presets.build("audiosep-base", {"base": str(folder), **small, **often})


def weights(folder: Path, name: str = "separator") -> dict[str, Tensor]:
    return read_tensors(folder / f"{name}.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_stopped_run_goes_on_to_the_same_weights(manifest: Path, recipe: Recipe, tmp_path: Path) -> None:
    straight = reported(manifest, tmp_path / "a", recipe)
    with pytest.raises(KeyboardInterrupt):
        reported(manifest, tmp_path / "b", recipe, ("separator", 3))
    resumed = reported(manifest, tmp_path / "b", recipe)
    assert [r.step for r in resumed if r.stage == "separator"] == [3, 4]
    for name in ("separator", "state"):
        assert equal(weights(tmp_path / "a", name), weights(tmp_path / "b", name))
    rates = {r.step: r.figures["lr"] for r in straight if r.stage == "separator"}
    assert rates == pytest.approx({1: 1e-6, 2: 1e-5, 3: 1e-4, 4: 1e-3})
    state = weights(tmp_path / "a", "state")
    assert any(name.endswith(".max_exp_avg_sq") for name in state), "AMSGrad"
    assert [list(r.figures) for r in straight if r.stage == "validation"] == [["positive"]] * 2


def test_a_tiny_network_learns_to_keep_what_a_text_names(manifest: Path, recipe: Recipe, tmp_path: Path) -> None:
    assert isinstance(recipe, AudioSepRecipe)
    still = replace(recipe, lr=0.0, epochs=1, epoch_steps=1, validation_mixtures=8)
    figures = []
    for n, one in enumerate((still, replace(still, lr=1e-2, epoch_steps=90, report_every=90, save_every=90))):
        figures.append(reported(manifest, tmp_path / str(n), one)[-1].figures["positive"])
    assert figures[1] > figures[0] + 3


def test_what_is_drawn_are_two_sounds_at_up_to_ten_decibel(manifest: Path, recipe: Recipe, tmp_path: Path) -> None:
    assert isinstance(recipe, AudioSepRecipe)
    tasks: list[AudioSepTask] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "fit", lambda self, task: tasks.append(task))
        train(manifest, tmp_path, replace(recipe, batch=40))
    (task,) = tasks
    drawn = task.draw(3, range(40))
    assert torch.equal(drawn[0][5:9], task.draw(3, range(5, 9))[0]), "rows do not depend on one another"
    mixtures, targets, conditions = task.prepare(drawn, 3, range(40))
    rest = mixtures - targets
    snr = 10 * torch.log10(targets.square().sum(1) / rest.square().sum(1))
    np.testing.assert_allclose(snr, snr.round(), atol=0.01)
    assert -10 <= snr.round().min() < -5
    assert 5 < snr.round().max() <= 10
    assert mixtures.abs().max() <= 1
    np.testing.assert_allclose(conditions.norm(dim=1), 1, rtol=1e-5)
    again = task.prepare(tuple(part[5:9] for part in drawn), 3, range(5, 9))
    torch.testing.assert_close(again[0], mixtures[5:9])


def test_from_the_command_to_a_model_and_further(
    clapsep: Clapsep, manifest: Path, folder: Path, tmp_path: Path
) -> None:
    few = ["batch=2", "accumulate=1", "epoch_steps=1", "seconds=0.1", "warmup=1", "validation_mixtures=1", "lr=0.0"]
    settings = ["--epochs", "1", *(part for each in few for part in ("--set", each))]
    done = clapsep("train", manifest, "--init", folder, "--out", "tuned", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'done: clapsep extract --model tuned MIX --pos "…"'
    assert read_metadata(tmp_path / "tuned" / "separator.safetensors")["base"] == folder.name
    before, after = weights(folder), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("running_" in name for name in moved), "at a learning rate of 0, only statistics move"
    soundfile.write(tmp_path / "mix.wav", 0.1 * noise(9000, 3), 44_100)
    done = clapsep("extract", "mix.wav", "--pos", "dog", "--model", "tuned", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for wrong, said in (
        (["--preset", "audiosep-base", "--set", f"base={weights_folder() / 'mini'}"], "this preset trains AudioSep"),
        (["--init", folder, "--lora-only"], "has no setting 'lora_only'"),
    ):
        refused = clapsep("train", manifest, *wrong, "--out", "no", cwd=tmp_path)
        assert refused.returncode
        assert said in refused.stderr
    assert not (tmp_path / "no").exists()


def test_the_preset_is_as_published() -> None:
    preset = presets.build("audiosep-base")
    assert isinstance(preset, AudioSepRecipe)
    assert (preset.lr, preset.weight_decay, preset.batch, preset.seconds) == (1e-3, 0.0, 96, 5.0)
    assert (preset.epochs * preset.epoch_steps, preset.precision) == (1_000_000, "32-true")
    assert presets.preset_of("audiosep", "audiosep") == "audiosep-base"
    schedule = Staircase(1.0, 10_000)
    rates = [schedule.rate(step, []) for step in (0, 9_999, 10_000, 20_000, 30_000, 9**9)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-2, 1e-1, 1, 1])


def test_a_network_from_scratch_begins_as_published(folder: Path, recipe: Recipe) -> None:
    assert isinstance(recipe, AudioSepRecipe)
    state = build(recipe, load_model(folder, "cpu")).state_dict()
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith(("beta.bias", "running_mean")))
    weight = state["bottleneck.conv1.weight"]
    assert weight.abs().max() <= (6 / (2 * 9 * len(weight))) ** 0.5
    assert weight.std() == pytest.approx((2 / (2 * 9 * len(weight))) ** 0.5, rel=0.1)


# From its released file.

EXTRACT = """
import json, sys
from dataclasses import replace
from functools import partial
from audiosep_stand_in import TINY, save_released, tiny_checkpoint
from clapsep_cli.registry import MODELS
from clapsep_cli.store import convert_audiosep
entry = MODELS["audiosep"]
MODELS["audiosep"] = replace(entry, remotes=(replace(entry.remotes[0], **json.loads(sys.argv.pop(1))),))
convert_audiosep.convert_audiosep = partial(convert_audiosep.convert_audiosep, config=TINY)
from clapsep_cli.cli.app import main
main()
"""


def test_from_an_empty_home_through_the_hub_to_a_target(tmp_path: Path) -> None:
    save_released(tmp_path / "a.ckpt", tiny_checkpoint())
    data, remote = (tmp_path / "a.ckpt").read_bytes(), MODELS["audiosep"].remotes[0]
    assert isinstance(remote, HubFile)
    mix = 0.1 * noise(2 * 44_100, 4).reshape(-1, 2)
    soundfile.write(tmp_path / "mix.wav", mix, 44_100, "PCM_16")
    with HubServer(redirect=True) as hub:
        sha256 = hub.add_file(remote.repo, remote.repo_type, remote.revision, remote.path, data)
        pinned = json.dumps({"size": len(data), "sha256": sha256})
        arguments = ["extract", "mix.wav", "--pos", "dog barking", "--model", "audiosep"]
        done = subprocess.run(
            [sys.executable, "-c", EXTRACT, pinned, *arguments],
            cwd=tmp_path,
            env={
                **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "CLAPSEP_HOME": str(tmp_path / "home"),
                "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "licence: MIT" in done.stderr
    (place,) = (tmp_path / "home" / "models").glob("audiosep-*")
    kept = {"separator.safetensors", "text.safetensors", "tokenizer.json", "SHA256SUMS"}
    assert {path.name for path in place.iterdir()} == kept
    assert not list((tmp_path / "home").rglob("*.ckpt")), "the released file is not kept"
    whole, *parts = (
        soundfile.read(tmp_path / f"mix{part}.wav", dtype="int32")[0] for part in ("", ".target", ".residual")
    )
    np.testing.assert_array_equal(sum(parts), whole)


@pytest.mark.parametrize(
    "arguments",
    [
        "extract mix.wav --pos dog --model audiosep",
        "separate mix.wav --prompts dog rain --model audiosep",
        "evaluate --mixtures list.csv --audio . --model audiosep --no-bss",
        "train manifest.csv --init audiosep",
        "train manifest.csv --preset audiosep-base",
        "ui mix.wav --model audiosep --no-browser",
        "models download audiosep",
        "models path audiosep",
        "models verify audiosep",
    ],
)
def test_without_weights_every_command_says_what_to_do(
    clapsep: Clapsep, listed: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setenv("CLAPSEP_HOME", str(listed.parent / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    soundfile.write(listed.parent / "mix.wav", noise(800, 1), 8000)
    words = [str(manifest) if word == "manifest.csv" else word for word in arguments.split()]
    failed = clapsep(*words, cwd=listed.parent)
    assert (failed.returncode != 0, failed.stdout) == (True, "")
    *before, said = failed.stderr.splitlines()
    assert all(line.startswith("clapsep: downloading audiosep: 1.26 GB") for line in before)
    assert said.startswith("clapsep: ")
    assert "audiosep" in said
    assert re.search(r"clapsep models (download|convert) audiosep", said), said
