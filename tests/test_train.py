"""Tests training of a mini model: it learns, and a stopped run resumes exactly."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import reported, write_clips
from conftest import TINY_MINI, Clapsep
from safetensors.torch import save_file

from clapsep_cli import load_model
from clapsep_cli.data import read_clip, read_corpus
from clapsep_cli.errors import CheckpointError, ModelError, RecipeError, StoppedError
from clapsep_cli.registry import weights_folder
from clapsep_cli.store.checkpoint import choose_precision, load_part
from clapsep_cli.store.tensors import copy, read_tensors
from clapsep_cli.training.loop.sampling import Draw, MemoryPool, Sampler
from clapsep_cli.training.loop.train import Report, Run, train
from clapsep_cli.training.recipes.augment import Acoustics
from clapsep_cli.training.recipes.conditions import Mixing, Queries, Texts
from clapsep_cli.training.recipes.mini import MiniRecipe, SeparatorSettings, SeparatorTask

fabric = pytest.importorskip("lightning_fabric", reason="training takes the packages of clapsep[train]")

BUNDLED = weights_folder() / "mini"
RECIPE = MiniRecipe(
    draw=Draw(seconds=1.0),
    separator=SeparatorSettings(steps=4, batch=2, lr=1e-3, warmup=1),
    report_every=1,
    validate_every=4,
    validation_mixtures=2,
    save_every=1,
    mini=replace(TINY_MINI, seconds=2),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def run(manifest: Path, out: Path, recipe: MiniRecipe = RECIPE, stop_at: tuple[str, int] = ("", 0)) -> list[Report]:
    return reported(manifest, out, recipe, stop_at)


def curve(reports: list[Report]) -> dict[tuple[str, int, str], float]:
    return {
        (r.stage, r.step, name): value
        for r in reports
        for name, value in r.figures.items()
        if name != "examples/s" and r.stage != "estimate"
    }


def log(folder: Path) -> list[list[str]]:
    with (folder / "log.csv").open() as file:
        return [row for row in csv.reader(file) if row[2] != "examples/s"]


@pytest.fixture(scope="module")
def straight(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Report]]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(manifest, folder)


def same_weights(first: Path, second: Path, *parts: str) -> None:
    for part in parts:
        left, right = (read_tensors(folder / f"{part}.safetensors") for folder in (first, second))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), part


def test_a_stopped_run_goes_on_to_the_same_weights(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]]
) -> None:
    folder, reports = straight
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path, stop_at=("separator", 3))
    resumed = run(manifest, tmp_path)
    assert [r.step for r in resumed if r.stage == "separator"] == [3, 4]
    whole = curve(reports)
    assert all(whole[key] == value for key, value in curve(resumed).items())
    assert log(tmp_path) == log(folder)
    same_weights(folder, tmp_path, "audio", "separator", "heard", "state")
    assert not list(tmp_path.rglob("*.partial"))


def test_the_trunk_and_the_encoders_stay_as_they_are(straight: tuple[Path, list[Report]]) -> None:
    """In a space that is kept; neither the trunk nor the separator's map into the space is trained."""
    folder, _ = straight
    for name in ("text.safetensors", "audio.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (BUNDLED / name).read_bytes()
    before, after = (
        read_tensors(f / part) for f, part in ((BUNDLED, "audio.safetensors"), (folder, "separator.safetensors"))
    )
    trunk = [name for name in before if name.startswith("trunk.")]
    assert len(trunk) == 54
    assert all(torch.equal(before[name], after[name]) for name in trunk)
    assert torch.equal(before["keys.finer.weight"], after["keys.finer.weight"])
    moments = [name for name in read_tensors(folder / "state.safetensors") if name.startswith("optimiser.")]
    assert moments
    assert not [name for name in moments if ".trunk." in name or ".keys." in name]


@pytest.fixture(scope="module")
def fitted(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    recipe = replace(RECIPE, space="fit", ridge=1e-3, separator=replace(RECIPE.separator, steps=1))
    with pytest.raises(KeyboardInterrupt):
        run(manifest, folder, recipe, stop_at=("separator", 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clapsep_cli.training.recipes.mini.fit_sounds", None)  # it is done once
        run(manifest, folder, recipe)
    return folder


def test_a_space_that_is_fitted_has_each_caption_near_its_clips(manifest: Path, fitted: Path) -> None:
    model = load_model(fitted, "cpu", "high")
    corpus = read_corpus(manifest)
    clips = [corpus.clips[index] for index in corpus.train]
    heard = torch.stack([model.audio.embed(torch.from_numpy(read_clip(clip.path))) for clip in clips])
    captions = sorted({clip.captions[0] for clip in clips})
    nearest = (heard @ model.text.embed(captions).T).argmax(1).tolist()
    assert [captions[at] for at in nearest] == [clip.captions[0] for clip in clips]
    kept, made = (read_tensors(folder / "audio.safetensors") for folder in (BUNDLED, fitted))
    assert {name for name in kept if not torch.equal(kept[name], made[name])} == {
        "keys.finer.weight", "keys.finer.bias", "keys.coarser.weight"
    }  # fmt: skip
    kept, made = (read_tensors(folder / "text.safetensors") for folder in (BUNDLED, fitted))
    assert {name for name in kept if not torch.equal(kept[name].half(), made[name].half())} == {
        "map.weight",
        "map.bias",
    }


def test_encoders_of_another_run_are_taken(manifest: Path, tmp_path: Path, fitted: Path) -> None:
    recipe = replace(RECIPE, encoders=str(fitted), separator=replace(RECIPE.separator, steps=1, lr=0.0), ema=0.0)
    run(manifest, tmp_path, recipe)
    same_weights(fitted, tmp_path, "text", "audio")
    audio, separator = (read_tensors(tmp_path / f"{part}.safetensors") for part in ("audio", "separator"))
    assert torch.equal(audio["keys.finer.weight"], separator["keys.finer.weight"])
    with pytest.raises(ModelError, match="--encoders takes a folder with a mini model"):
        run(manifest, tmp_path / "x", replace(recipe, encoders=str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match="brings its own encoders: set init or encoders, not both"):
        run(manifest, tmp_path / "x", replace(recipe, init="mini"))
    (tmp_path / "m.csv").write_text(manifest.read_text().replace("a dog;dog", "qwxzz").replace("a rain;rain", "zzxwq"))
    assert not (tmp_path / "x").exists()


def test_hidden_layers_are_trained_by_muon_unless_told_otherwise(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]]
) -> None:
    names = set(read_tensors(straight[0] / "state.safetensors"))
    by_muon = {name[len("optimiser.") : -len(".mean")] for name in names if name.endswith(".mean")}
    by_adamw = {name[len("optimiser.") : -len(".exp_avg")] for name in names if name.endswith(".exp_avg")}
    assert {"down.0.conv1.weight", "context.gru.weight_hh_l0", "context.out.weight", "up.1.film.weight"} <= by_muon
    assert {
        "stem.weight",
        "head.weight",
        "fine.0.weight",
        "down.0.norm1.weight",
        "query.0.weight",
    } <= by_adamw
    assert not by_muon & by_adamw
    run(manifest, tmp_path, replace(RECIPE, optimiser="adamw"))
    assert not [name for name in read_tensors(tmp_path / "state.safetensors") if name.endswith(".mean")]


def test_what_is_written_is_what_was_validated(manifest: Path, tmp_path: Path) -> None:
    """Variances beyond float16 are kept: as infinities, they would silence their channels."""
    recipe = replace(RECIPE, ema=0.0)
    run(manifest, tmp_path, recipe)
    with pytest.MonkeyPatch.context() as patch:
        tasks: list[Any] = []
        patch.setattr(Run, "fit", lambda self, task: tasks.append(task))
        reported(manifest, tmp_path / "again", replace(recipe, init=str(tmp_path)))
    weights = tasks[0].net.state_dict()
    weights["down.0.norm1.running_var"] = torch.full_like(weights["down.0.norm1.running_var"], 1e6)
    tasks[0].write(weights)
    written = load_part(tmp_path / "again", "separator", "mini", recipe.mini).state_dict()
    assert torch.equal(written["down.0.norm1.running_var"], weights["down.0.norm1.running_var"])
    assert all(torch.isfinite(tensor).all() for tensor in written.values() if tensor.is_floating_point())


def test_a_run_that_is_asked_to_stop_saves_its_state_and_goes_on_exactly(manifest: Path, tmp_path: Path) -> None:
    """At a step at which nothing would have been reported or saved."""
    sparse = replace(RECIPE, separator=replace(RECIPE.separator, steps=6), report_every=5, save_every=100)
    reported(manifest, tmp_path / "whole", sparse)
    stop, prepare = threading.Event(), SeparatorTask.prepare

    def prepare_and_stop(self: Any, drawn: Any, step: int, rows: range) -> Any:
        if step == 2:
            stop.set()
        return prepare(self, drawn, step, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeparatorTask, "prepare", prepare_and_stop)
        with pytest.raises(StoppedError, match="stopped after step 3 of 6 of the separator; its state is saved"):
            train(manifest, tmp_path / "cut", sparse, stop=stop)
    reported(manifest, tmp_path / "cut", sparse)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    same_weights(tmp_path / "whole", tmp_path / "cut", "audio", "separator", "state")


def test_a_run_may_be_stopped_while_it_listens(manifest: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError, match="stopped; the same command continues"):
        train(manifest, tmp_path, RECIPE, stop=stop)
    assert not (tmp_path / "heard.safetensors").exists()


SMALL = (
    "draw.seconds=1,separator.batch=2,mini.seconds=2,mini.query=16,mini.hidden=8,mini.fine=2,"
    "mini.narrow=2,mini.channels=[8;8;8]"
)
SMALL_SETTINGS = [part for setting in SMALL.split(",") for part in ("--set", setting.replace(";", ","))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_the_command_and_its_state_is_saved(
    manifest: Path, tmp_path: Path, clapsep: Clapsep, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    prepare, sent = SeparatorTask.prepare, list[int]()

    def prepare_and_kill(self: SeparatorTask, drawn: Any, step: int, rows: range) -> Any:
        if step == 2 and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        return prepare(self, drawn, step, rows)

    monkeypatch.setattr(SeparatorTask, "prepare", prepare_and_kill)
    arguments = ["train", manifest, "--out", "run", *SMALL_SETTINGS, "--steps", "4"]
    done = clapsep(*arguments, cwd=tmp_path)
    assert done.returncode == 130
    assert "stopping after this step" in done.stderr
    assert "stopped after step 3 of 4 of the separator; its state is saved in run" in done.stderr
    again = clapsep(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "separator 4/4 " in again.stdout
    assert "separator 1/4 " not in again.stdout


def test_a_run_tells_how_long_it_will_take_and_soon_a_first_figure(manifest: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, report_every=100, validate_every=100, save_every=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clapsep_cli.training.loop.train.SILENT_SECONDS", 0.0)  # as if each step took long
        reports = run(manifest, tmp_path, recipe)
    estimated = reports[2]
    assert [r.stage for r in reports[:2]] == ["clips read", "clips heard"]
    assert (estimated.stage, estimated.step) == ("estimate", 0)
    assert list(estimated.figures) == ["separator (4 steps)"]
    assert 0 < estimated.seconds_left == sum(estimated.figures.values()) < 60
    told = [(r.step, "loss" in r.figures) for r in reports if r.stage == "separator"]
    assert told == [(1, True), (2, False), (3, False), (4, True)]
    assert {row[1] for row in log(tmp_path) if row[0] == "separator"} == {"1", "4"}


def test_steps_and_batches_that_are_not_set_suit_the_data(manifest: Path) -> None:
    corpus = read_corpus(manifest)
    few, many, most = (
        MiniRecipe().suited(replace(corpus, seconds=(seconds,) * len(corpus.clips))) for seconds in (1, 1000, 36_000)
    )
    assert [(r.separator.steps, r.separator.batch) for r in (few, many, most)] == [(200, 4), (1600, 8), (6000, 8)]
    assert few.plan().schedule.rate(19, []) == few.separator.lr  # a short run warms up for a tenth of its steps
    assert most.plan().schedule.rate(19, []) < most.separator.lr
    assert RECIPE.suited(corpus) == RECIPE


def test_precision_is_what_the_device_has_natively_and_stays(manifest: Path, tmp_path: Path) -> None:
    def precisions() -> list[str]:
        return [call["precision"] for call in json.loads((tmp_path / "run.json").read_text())["calls"]]

    for dtype in (torch.bfloat16, torch.float32):  # as on another machine
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clapsep_cli.training.loop.train.choose_precision", lambda *_, dtype=dtype: dtype)
            reports = run(manifest, tmp_path)
    assert precisions() == ["bf16-mixed", "bf16-mixed"]
    assert reports[0].text == "on cpu, bf16-mixed (as it began)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clapsep_cli.training.loop.train.choose_precision", lambda *_: torch.float32)
        reports = run(manifest, tmp_path / "other")
    assert reports[0].text == "on cpu, 32-true (no native bfloat16)"


def test_means_between_reports_survive_a_stop(manifest: Path, tmp_path: Path) -> None:
    """Stopped between two reports, a run still reports the mean over all steps since the first."""
    sparse = replace(RECIPE, separator=replace(RECIPE.separator, steps=6), report_every=3, save_every=2)
    whole = curve(run(manifest, tmp_path / "whole", sparse))
    with pytest.MonkeyPatch.context() as patch:
        draw = SeparatorTask.prepare

        def cut(self: SeparatorTask, drawn: Any, step: int, rows: range) -> Any:
            if step == 5:
                raise KeyboardInterrupt
            return draw(self, drawn, step, rows)

        patch.setattr(SeparatorTask, "prepare", cut)
        with pytest.raises(KeyboardInterrupt):
            run(manifest, tmp_path / "cut", sparse)
    resumed = curve(run(manifest, tmp_path / "cut", sparse))
    assert ("separator", 6, "loss") in resumed
    assert ("separator", 3, "loss") not in resumed
    assert all(whole[key] == value for key, value in resumed.items())


def test_a_run_that_is_killed_while_it_saves_goes_on_from_what_it_saved_before(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]]
) -> None:
    saved: list[Path] = []

    def save(tensors: dict[str, torch.Tensor], path: Path, notes: dict[str, str]) -> None:
        save_file(tensors, path, notes)
        saved.append(path)
        if notes.get("step") == "3":
            path.write_bytes(path.read_bytes()[:1000])  # what reached the disk when the power went
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clapsep_cli.store.tensors.save_file", save)
        with pytest.raises(KeyboardInterrupt):
            run(manifest, tmp_path)
    assert all(path.suffix == ".partial" for path in saved)
    assert [r.step for r in run(manifest, tmp_path) if r.stage == "separator"] == [3, 4]
    first, second = (read_tensors(f / "separator.safetensors") for f in (straight[0], tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves(manifest: Path, straight: tuple[Path, list[Report]]) -> None:
    folder, reports = straight
    validated = [r for r in reports if r.stage == "validation"]
    assert set(validated[-1].figures) == {"both", "positive", "shot"}
    model = load_model(folder, "cpu", "high")
    assert model.config == RECIPE.mini
    assert model.separator.window == 64_000
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["separator.lr"] == 1e-3
    assert record["settings"]["mini.channels"] == [8, 8, 8]
    assert record["data"]["digest"] == read_corpus(manifest).digest
    assert (record["data"]["clips"], record["data"]["held_out"]) == (8, 8)
    (call,) = record["calls"]
    assert call["packages"]["torch"] == torch.__version__
    assert call["git"] is None or len(call["git"].rstrip("+")) == 40
    native = choose_precision("auto", torch.device("cpu")) == torch.bfloat16
    expected = ("cpu", 1, "bf16-mixed" if native else "32-true")
    assert (call["accelerator"], call["devices"], call["precision"]) == expected
    rows = log(folder)
    losses = {
        int(step): float(value) for stage, step, figure, value in rows[1:] if (stage, figure) == ("separator", "loss")
    }
    assert losses == {r.step: r.figures["loss"] for r in reports if r.stage == "separator"}
    assert {row[2] for row in rows} == {"figure", "loss", "lr", "both", "positive", "shot"}
    assert len(list((folder / "tensorboard").rglob("events.out.tfevents.*"))) == 1


def test_files_of_a_run_follow_the_umask_and_are_its_own(straight: tuple[Path, list[Report]], tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode

    files = [path for path in straight[0].iterdir() if path.is_file()]
    assert len(files) >= 7
    assert {path.name for path in files if path.stat().st_mode != mode} == set()
    assert not [path.name for path in files if path.stat().st_nlink > 1]


def test_a_link_to_an_installed_model_becomes_a_copy(tmp_path: Path) -> None:
    """Runs of older versions were links."""
    installed, place = tmp_path / "installed", tmp_path / "run"
    installed.write_text("a")
    place.hardlink_to(installed)
    copy(installed, place)
    place.write_text("b")
    assert installed.read_text() == "a"
    copy(installed, place)
    assert place.read_text() == "b"


def test_another_configuration_or_other_clips_are_refused(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]]
) -> None:
    folder, _ = straight
    other = replace(RECIPE, mini=replace(RECIPE.mini, hidden=9))
    with pytest.raises(CheckpointError, match=r"another configuration \(mini.hidden was 8, now 9\)"):
        run(manifest, folder, other)
    (tmp_path / "m.csv").write_text("\n".join(manifest.read_text().replace("a dog;", "").splitlines()))
    for clip in manifest.parent.glob("*.wav"):
        (tmp_path / clip.name).hardlink_to(clip)
    with pytest.raises(CheckpointError, match="other clips"):
        run(tmp_path / "m.csv", folder)
    (folder / "run.json").rename(tmp_path / "run.json")  # as a run of an older version, which wrote none
    try:
        with pytest.raises(CheckpointError, match="another configuration"):
            run(manifest, folder, other)
    finally:
        (tmp_path / "run.json").rename(folder / "run.json")


def test_a_run_can_be_made_longer(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    longer = replace(RECIPE, separator=replace(RECIPE.separator, steps=6))
    resumed = run(manifest, tmp_path, longer)
    assert len(json.loads((tmp_path / "run.json").read_text())["calls"]) == 2
    assert [r.step for r in resumed if r.stage == "separator"] == [5, 6]
    assert not [r for r in resumed if r.stage == "clips heard"]
    assert not [r for r in run(manifest, tmp_path, longer) if r.stage == "separator"]


def test_the_state_of_an_older_version_is_read(manifest: Path, tmp_path: Path) -> None:
    """It had no record beside it, and noted nothing but the step."""
    first = run(manifest, tmp_path)
    path = tmp_path / "state.safetensors"
    save_file(read_tensors(path), tmp_path / "old", {"step": "4"})
    (tmp_path / "old").replace(path)
    (tmp_path / "run.json").unlink()
    longer = replace(RECIPE, separator=replace(RECIPE.separator, steps=5))
    assert [r.step for r in run(manifest, tmp_path, longer) if r.stage == "separator"] == [5]
    assert first


def test_a_loss_that_is_no_number_stops_the_run(manifest: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clapsep_cli.training.recipes.mini.separation_loss", lambda mask, *_: mask.sum() * float("nan"))
        with pytest.raises(RecipeError, match="not finite after step 1 of the separator"):
            run(manifest, tmp_path)
    assert not (tmp_path / "state.safetensors").exists()
    assert not (tmp_path / "separator.safetensors").exists()


def test_going_on_from_another_model(manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]]) -> None:
    folder, _ = straight
    recipe = replace(RECIPE, init=str(folder), separator=replace(RECIPE.separator, steps=1, lr=0.0))
    reports = run(manifest, tmp_path, recipe)
    assert {r.stage for r in reports} == {"clips read", "clips heard", "estimate", "separator", "validation"}
    before, after = (read_tensors(f / "separator.safetensors") for f in (folder, tmp_path))
    weights = [name for name in before if "running" not in name]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    with pytest.raises(ModelError, match="--init takes a folder with a mini model"):
        run(manifest, tmp_path / "x", replace(recipe, init=str(tmp_path / "nowhere")))
    other = replace(recipe.mini, hidden=16, channels=(4, 8, 8))
    sizes = rf"set mini\.channels=\[8,8,8\] mini\.hidden={recipe.mini.hidden}$"
    with pytest.raises(RecipeError, match=sizes):
        run(manifest, tmp_path / "x", replace(recipe, mini=other))


def task(
    manifest: Path, folder: Path, recipe: MiniRecipe, reports: list[Report], kind: type[SeparatorTask] = SeparatorTask
) -> tuple[Run, SeparatorTask]:
    """The separator's task, on the CPU in float32, with shots that stand in for the clips'."""
    torch.manual_seed(0)
    corpus = read_corpus(manifest)
    pool = MemoryPool(corpus)
    texts = Texts(load_part(BUNDLED, "text", "mini", TINY_MINI), pool.clips, {})
    views = {i: torch.nn.functional.normalize(torch.randn(2, TINY_MINI.dim), dim=1) for i in corpus.train}
    queries, sampler = Queries(pool, texts, views, recipe.mixing), Sampler(pool, recipe.draw, 0, corpus.train)
    on = fabric.Fabric(accelerator="cpu", devices=1, precision="32-true")
    on.launch()
    going = Run(on, folder, corpus, reports.append)
    return going, kind(recipe, sampler, queries, [], load_part(BUNDLED, "audio", "mini", TINY_MINI), going)


def test_what_a_row_is_trained_on_depends_on_seed_step_and_row_alone(manifest: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, untold=0.5)
    _, made = task(manifest, tmp_path, recipe, [])
    with torch.no_grad():
        whole, half = (made.prepare(made.draw(3, rows), 3, rows) for rows in (range(4), range(2, 4)))
    queries = recipe.mixing.queries
    assert whole.told.shape == (4 * queries, 1)
    assert 0 < whole.told.sum() < whole.told.numel()
    assert torch.equal(whole.told[2 * queries :], half.told)
    assert torch.equal(whole.asked.conditions[2 * queries :], half.asked.conditions)
    torch.testing.assert_close(whole.levels[2:], half.levels)
    assert not whole.maps[0].requires_grad


def test_training_learns(manifest: Path, tmp_path: Path) -> None:
    """A few steps on one batch go far beyond every constant mask, whatever the processor's rounding."""

    class OneBatch(SeparatorTask):
        def draw(self, step: int, rows: range) -> tuple[torch.Tensor, ...]:
            return super().draw(0, rows)

        def prepare(self, drawn: tuple[torch.Tensor, ...], step: int, rows: range) -> Any:
            return super().prepare(drawn, 0, rows)

    recipe = replace(
        RECIPE,
        separator=SeparatorSettings(steps=20, batch=4, lr=1e-2, warmup=5),
        mixing=Mixing(text_only=1.0, absent=0.0, noise=0.0),
        draw=replace(RECIPE.draw, snr_std=0),
        acoustics=Acoustics(eq=0, low_pass=0, high_pass=0, floor=0),
        report_every=10,
        validate_every=1000,
        save_every=1000,
    )
    reports: list[Report] = []
    going, made = task(manifest, tmp_path, recipe, reports, OneBatch)
    going.fit(made)
    losses = [r.figures["loss"] for r in reports if r.stage == "separator" and "loss" in r.figures]
    assert losses[-1] < losses[0] - 2.0


def test_the_command(manifest: Path, clapsep: Clapsep, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[mini]\nchannels = [8, 8, 8]\n")
    arguments = ["train", manifest, "--config", "c.toml", *SMALL_SETTINGS[:-2], "--steps", "2"]
    done = clapsep(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("clips read ")
    assert "  on cpu, " in lines[0]
    assert lines[1].startswith("clips heard 8/8  ")
    assert re.fullmatch(r"about .* in all: separator \(2 steps\) .* s", lines[2])
    assert lines[3].startswith("separator 1/2  loss ")
    assert lines[4].startswith("separator 2/2  loss ")
    assert lines[4].endswith("left")
    assert lines[5].startswith("validation 2/2  SI-SDRi in dB: both ")
    assert lines[6] == 'done: clapsep extract --model runs/manifest MIX --pos "…"'
    mix = manifest.parent / "dog0.wav"
    assert clapsep("extract", mix, "--pos", "dog", "--model", "runs/manifest", "-o", "o", cwd=tmp_path).returncode == 0
    wrong = clapsep("train", manifest, "--set", "separator.step=3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "no setting 'step'; did you mean 'steps'?" in wrong.stderr
    assert clapsep("train", cwd=tmp_path).returncode == 2
    bad = clapsep("train", manifest, "--precision", "16", cwd=tmp_path)
    assert "no precision '16': use 32-true or bf16-mixed" in bad.stderr
