"""Tests training of a TUSS, from a manifest to a model for the command; a stopped run resumes exactly."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import reported
from conftest import Clapsep
from tuss_stand_in import TINY

from clapsep_cli import Query, load_model
from clapsep_cli.data import read_corpus
from clapsep_cli.errors import CheckpointError, ManifestError, RecipeError
from clapsep_cli.models.prompts import PROMPTS
from clapsep_cli.models.tuss import LARGE, MEDIUM, Tuss
from clapsep_cli.store.checkpoint import read_metadata, save_part
from clapsep_cli.store.tensors import read_tensors
from clapsep_cli.training.loop.optimisation import Plateau
from clapsep_cli.training.loop.sampling import DiskPool, MemoryPool, open_pool
from clapsep_cli.training.loop.state import mean_of
from clapsep_cli.training.loop.train import Report, Run, train
from clapsep_cli.training.recipes import presets
from clapsep_cli.training.recipes.objective import source_losses
from clapsep_cli.training.recipes.prompt_mixing import ListedMixtures, PromptMixer, PromptMixing
from clapsep_cli.training.recipes.tuss import TussRecipe, TussTask

pytest.importorskip("lightning_fabric", reason="training takes the packages of clapsep[train]")

SMALL = replace(TINY, window=4800, cross_blocks=1)
RECIPE = TussRecipe(
    tuss=SMALL,
    mixing=PromptMixing(counts=(2, 3), summed=(1.0,)),
    epochs=3,
    epoch_steps=2,
    batch=2,
    warmup=2,
    average=2,
    report_every=1,
    save_every=1,
    workers=1,
    validation_mixtures=2,
)


def write_clips(folder: Path, splits: Mapping[str, int], noise: bool = True) -> Path:
    """Low and high tones called speech and sfx, so many of each in a split, and noise called musicbg; the manifest."""
    rng, lines = np.random.default_rng(0), ["file,label,prompt,split,captions"]

    def write(name: str, sound: np.ndarray, rate: int, prompt: str, split: str) -> None:
        soundfile.write(folder / f"{name}.flac", np.stack([sound, sound / 2], 1), rate)
        lines.append(f"{name}.flac,anything,{prompt},{split},")

    for split, count in splits.items():
        for prompt, (low, high), rate in (("speech", (150, 600), 16_000), ("sfx", (4000, 7000), 44_100)):
            for n in range(count):
                t = np.arange(round(rate * rng.uniform(0.05, 0.4))) / rate
                tone = 0.3 * np.sin(2 * np.pi * rng.uniform(low, high) * t)
                write(f"{split}-{prompt}{n}", tone, rate, prompt, split)
        if noise:
            write(f"{split}-noise", 0.1 * rng.standard_normal(20_000), 48_000, "musicbg", split)
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), {"train": 4, "near": 2, "far": 2})


def run(manifest: Path, out: Path, recipe: TussRecipe = RECIPE, stop_at: tuple[str, int] = ("", 0)) -> list[Report]:
    return reported(manifest, out, recipe, stop_at)


@pytest.fixture(scope="module")
def straight(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Report]]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(manifest, folder)


def equal(first: Path, second: Path, names: Sequence[str]) -> bool:
    for name in names:
        left, right = (read_tensors(folder / f"{name}.safetensors") for folder in (first, second))
        if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
            return False
    return True


def log(folder: Path) -> list[list[str]]:
    with (folder / "log.csv").open() as file:
        return [row for row in csv.reader(file) if row[2] != "examples/s"]


@pytest.mark.parametrize("stop_at", [("separator", 3), ("validation", 4)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]], stop_at: tuple[str, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path, stop_at=stop_at)
    resumed = run(manifest, tmp_path)
    assert next(r.step for r in resumed if r.stage == "separator") == stop_at[1]
    assert log(tmp_path) == log(straight[0])
    best = sorted(path.stem for path in straight[0].glob("best-*"))
    assert best == sorted(path.stem for path in tmp_path.glob("best-*"))
    assert equal(straight[0], tmp_path, ["separator", "state", *best])


def test_what_a_run_leaves(straight: tuple[Path, list[Report]]) -> None:
    folder, reports = straight
    validated = [r for r in reports if r.stage == "validation"]
    assert [r.step for r in validated] == [2, 4, 6]
    assert all(list(r.figures) == ["mean of sets", "near", "far"] for r in validated)
    assert all(r.figures["mean of sets"] == np.mean([r.figures["near"], r.figures["far"]]) for r in validated)
    assert all(r.measure == "SNR in dB, up to 30" for r in validated)
    figures = [r.figures["mean of sets"] for r in validated]
    kept = sorted(sorted(range(3), key=lambda at: -figures[at])[:2])
    assert sorted(path.name for path in folder.glob("best-*")) == [f"best-{at + 1}.safetensors" for at in kept]
    several = [read_tensors(folder / f"best-{at + 1}.safetensors") for at in kept]
    written = read_tensors(folder / "separator.safetensors")
    for name, tensor in mean_of(several).items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-8)
    assert not torch.equal(several[0]["prompts"], several[1]["prompts"])
    assert load_model(folder, "cpu").config == SMALL
    assert json.loads((folder / "run.json").read_text())["settings"]["tuss.width"] == SMALL.width
    rates = {r.step: r.figures["lr"] for r in reports if r.stage == "separator"}
    assert rates == {1: 5e-4, **dict.fromkeys(range(2, 7), 1e-3)}


def test_a_run_can_be_made_longer_and_is_refused_another_size(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]]
) -> None:
    short, longer = replace(RECIPE, epochs=1), replace(RECIPE, epochs=2, validation_mixtures=0)
    run(manifest, tmp_path, short)
    with pytest.raises(CheckpointError, match="validation_mixtures was 2, now 0"):
        run(manifest, tmp_path, longer)
    assert run(manifest, tmp_path)[1].step == 3
    assert equal(straight[0], tmp_path, ["separator", "state"])
    with pytest.raises(CheckpointError, match=r"tuss\.width was 16, now 32"):
        run(manifest, tmp_path, replace(RECIPE, tuss=replace(SMALL, width=32)))


def test_without_sets_to_validate_on_the_training_loss_counts(manifest: Path, tmp_path: Path) -> None:
    reports = run(manifest, tmp_path, replace(RECIPE, epochs=2, average=1, validation_mixtures=0, store="disk"))
    assert {r.stage for r in reports} == {"clips read", "separator"}
    assert not list(tmp_path.glob("best-*"))
    losses = [r.figures["loss"] for r in reports[1:]]
    first_is_best = sum(losses[:2]) <= sum(losses[2:])
    last = {k.removeprefix("net."): v for k, v in read_tensors(tmp_path / "state.safetensors").items()}
    written = read_tensors(tmp_path / "separator.safetensors")
    assert torch.equal(written["prompts"], last["prompts"]) != first_is_best


def test_going_on_from_another_model(
    manifest: Path, tmp_path: Path, straight: tuple[Path, list[Report]], tiny_folder: Path
) -> None:
    folder, _ = straight
    still = replace(RECIPE, tuss=MEDIUM, init=str(folder), lr=0.0, epochs=1, average=1)
    run(manifest, tmp_path, still)
    assert equal(folder, tmp_path, ["separator"])
    metadata = read_metadata(tmp_path / "separator.safetensors")
    assert metadata["base"] == str(folder)
    with pytest.raises(RecipeError, match="set init, or settings of tuss"):
        run(manifest, tmp_path / "x", replace(still, tuss=replace(SMALL, width=32)))
    with pytest.raises(RecipeError, match="family 'mini'; this preset trains TUSS models"):
        run(manifest, tmp_path / "x", replace(still, init=str(tiny_folder)))
    assert not (tmp_path / "x").exists()


def test_a_tiny_network_learns_to_separate_what_it_never_heard(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, {"train": 8, "dev": 1}, noise=False)
    still = replace(RECIPE, lr=0.0, epochs=1, epoch_steps=1, validation_mixtures=4, precision="32-true")
    recipe = replace(still, lr=5e-3, epoch_steps=25, report_every=25, save_every=25)
    before, after = (run(manifest, tmp_path / str(r.lr), r)[-1].figures["dev"] for r in (still, recipe))
    assert after > before + 2


# What is trained on.


def test_what_is_drawn_is_the_same_from_memory_and_from_disk(manifest: Path) -> None:
    corpus = read_corpus(manifest, labelling=RECIPE.labelling)
    memory, disk = (open_pool(corpus, store, None, float("inf")) for store in ("memory", "disk"))
    assert isinstance(memory, MemoryPool)
    assert isinstance(disk, DiskPool)
    assert memory.rates == disk.rates == corpus.rates
    assert [memory.samples(i) for i in corpus.train] == [disk.samples(i) for i in corpus.train]
    mixers = [PromptMixer(pool, corpus.train, 4800, 3, PromptMixing()) for pool in (memory, disk)]
    for step in range(8):
        (sources, prompts), (others, same) = (mixer.batch(step, range(3)) for mixer in mixers)
        np.testing.assert_array_equal(prompts, same)
        np.testing.assert_allclose(sources, others, atol=2e-3)
        np.testing.assert_array_equal(mixers[0].batch(step, range(1, 3))[0], sources[1:])


def test_rows_of_a_step_are_drawn_apart_from_their_number(manifest: Path) -> None:
    """The first row must not follow from what decides how many prompts there are."""
    corpus = read_corpus(manifest, labelling=RECIPE.labelling)
    mixer = PromptMixer(DiskPool(corpus, None), corpus.train, 480, 0, PromptMixing(counts=(2, 3)))
    first = {2: set[int](), 3: set[int]()}
    for step in range(40):
        prompts = mixer.batch(step, range(1))[1]
        first[prompts.shape[1]].add(int(prompts[0, 0]))
    assert first[2] == first[3] == {PROMPTS.index(prompt) for prompt in ("speech", "sfx", "musicbg", "sfxbg")}


def test_a_smaller_vocabulary_numbers_its_own_prompts(manifest: Path) -> None:
    corpus = read_corpus(manifest, labelling=RECIPE.labelling)
    own = ("musicbg", "sfx", "speech")
    mixer = PromptMixer(DiskPool(corpus, None), corpus.train, 480, 0, PromptMixing(), own)
    whole = PromptMixer(DiskPool(corpus, None), corpus.train, 480, 0, PromptMixing(counts=(3,)), own)
    drawn = {own[i] for step in range(30) for i in mixer.batch(step, range(1))[1].ravel()}
    assert drawn == set(own)
    assert whole.batch(0, range(2))[1].shape == (2, 3)


def test_all_that_is_wrong_with_the_clips_is_told_before_anything_is_written(manifest: Path, tmp_path: Path) -> None:
    clip = manifest.parent / "train-speech0.flac"
    soundfile.write(tmp_path / "silent.wav", np.zeros(100), 8000)
    listed = tmp_path / "m.csv"
    listed.write_text(f"file,label\n{clip},voice\nnone.wav,speech\nsilent.wav,dog\n")
    with pytest.raises(ManifestError) as raised:
        run(listed, tmp_path / "out")
    known = ", ".join(PROMPTS)
    assert str(raised.value).splitlines()[1:] == [
        f"  line 2: 'voice' is none of {known}",
        f"  line 3: no file {tmp_path / 'none.wav'}",
        f"  line 4: 'dog' is none of {known}",
    ]
    listed.write_text(f"file,prompt\n{clip},speech\n{manifest.parent / 'train-sfx0.flac'},sfx\nsilent.wav,sfx\n")
    with pytest.raises(ManifestError, match=r"silent throughout: .*silent\.wav"):
        run(listed, tmp_path / "out")
    listed.write_text(f"file,label\n{clip},speech\n")
    with pytest.raises(ManifestError, match=r"split 'train': no 2 of the clips may be mixed .*\(speech\)"):
        run(listed, tmp_path / "out")
    listed.write_text(f"file,sound\n{clip},speech\n")
    with pytest.raises(ManifestError, match="no column prompt or label"):
        run(listed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Settings.


def test_presets_are_those_of_the_released_models() -> None:
    medium, large = (presets.build(name) for name in ("tuss-medium", "tuss-large"))
    assert isinstance(medium, TussRecipe)
    assert isinstance(large, TussRecipe)
    assert (medium.tuss, medium.batch, medium.epsilon, medium.lr) == (MEDIUM, 4, 1e-8, 1e-3)
    assert (large.tuss, large.batch, large.epsilon, large.lr) == (LARGE, 2, 1e-4, 1e-3)
    assert (medium.epochs, medium.epoch_steps, medium.warmup, medium.clip) == (150, 2500, 10_000, 5.0)
    assert (medium.precision, medium.weight_decay, medium.average) == ("auto", 0.01, 5)
    assert presets.preset_of("tuss") == presets.preset_of("tuss", "runs/mine") == "tuss-medium"
    assert presets.preset_of("tuss", "tuss-large") == "tuss-large"
    # A size that only all settings together make.
    together = presets.build("tuss-medium", {"tuss.width": 20}, {"tuss": {"groups": 5}}, {"mixing.counts": [2]})
    assert isinstance(together, TussRecipe)
    assert (together.tuss.width, together.tuss.groups, together.mixing.counts) == (20, 5, (2,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tuss.width": 20}, "tuss-medium.tuss: not a TUSS size, it must hold that groups divide the width"),
        ({"prompts": ["speech", "sfx", "musicbg", "sfx"]}, "prompts: .* prompts are named, each once"),
        ({"mixing.never": [["speech", "dog"]]}, "mixing.never: no prompt dog; there are: speech, sfx"),
        ({"mixing.summed": [0.5, 0.4]}, "mixing.summed: should add up to 1; the sum is 0.9"),
        ({"mixing.counts": [0]}, "mixing.counts.0 should be greater than 0"),
        ({"epoch_steps": 0}, "epoch_steps should be greater than 0"),
    ],
)
def test_settings_that_are_wrong(manifest: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(manifest, tmp_path / "out", presets.build("tuss-medium", {"tuss": {"window": 480}}, values))
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_is_warmed_up_and_lowered_only_late() -> None:
    schedule = Plateau(lr=1.0, floor=0.0, factor=0.5, patience=2, warmup=10, ignored=3)
    assert [schedule.rate(step, []) for step in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert schedule.rate(99, [9.0, 8.0, 7.0, 1.0, 0.0]) == 1.0
    assert schedule.rate(99, [9.0, 8.0, 7.0, 1.0, 0.0, 1.0]) == 0.5
    assert schedule.rate(99, [9.0, 8.0, 7.0, 1.0, 2.0, 3.0]) == 1.0


def test_ingredients_have_levels_of_their_own(manifest: Path) -> None:
    """A background summed of events is no sum of equally loud ones; the learning rate falls as the release counts."""
    pool = DiskPool(read_corpus(manifest, labelling=presets.build("tuss-medium").labelling), rate=None)
    events = [index for index, clip in enumerate(pool.clips) if clip.label == "sfx"][:2]
    mixer = PromptMixer(pool, range(len(pool.clips)), 9600, 0, PromptMixing())
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(mixer, "_choose", lambda rng, name, used: events)
        patched.setattr(
            mixer, "_stretch", lambda rng, index, rate: np.eye(2, 9600, dtype=np.float32)[events.index(index)]
        )
        levels = [mixer._sources(np.random.default_rng(n), ["sfxbg"])[0, :2] for n in range(200)]
    gaps = [20 * np.log10(a / b) for a, b in levels]
    assert 15 < max(gaps) <= 20
    assert -20 <= min(gaps) < -15
    assert np.std(gaps) == pytest.approx(20 / 6**0.5, rel=0.2)


def test_prompts_are_dropped_and_their_sources_stay_in_the_mixture(manifest: Path, tmp_path: Path) -> None:
    tasks: list[TussTask] = []
    recipe = replace(presets.build("tuss-medium", {"tuss": {"window": 4800}, "prompt_dropout": 0.5}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "fit", lambda self, task: tasks.append(task))
        train(manifest, tmp_path, recipe)
    # Held for 75 epochs, then after more than five stale ones: an epoch later each than the words say.
    assert tasks[0].plan.schedule == Plateau(1e-3, 0.0, 0.5, patience=6, warmup=10_000, ignored=76)
    counts = []
    for step in range(30):
        drawn = tasks[0].draw(step, range(4))
        prepared = tasks[0].prepare(drawn, step, range(4))
        torch.testing.assert_close(prepared.mixtures, drawn[0].sum(1))
        assert prepared.sources.shape[:2] == prepared.prompts.shape
        half = tasks[0].prepare(tuple(part[2:] for part in drawn), step, range(2, 4))
        assert torch.equal(prepared.prompts[2:], half.prompts)
        for source, prompt in zip(prepared.sources[0], prepared.prompts[0], strict=True):
            at = [n for n, other in enumerate(drawn[0][0]) if torch.equal(source, other)]
            assert prompt in drawn[1][0][at]
        counts.append(prepared.prompts.shape[1] < drawn[1].shape[1])
    assert 8 < sum(counts) < 22


# The command.


def test_from_the_command_to_stems(manifest: Path, clapsep: Clapsep, tmp_path: Path) -> None:
    sizes = "window=4800 width=16 groups=4 heads=2 cross_blocks=1 cross_attention=8 cross_feed_forward=12"
    sizes += " conditional_blocks=1 conditional_attention=12 conditional_feed_forward=10"
    rest = ["batch=2", "epoch_steps=2", "validation_mixtures=1"]
    settings = [part for s in [f"tuss.{size}" for size in sizes.split()] + rest for part in ("--set", s)]
    arguments = ["train", manifest, "--preset", "tuss-medium", "--out", "runs/x", "--epochs", "1", *settings]
    done = clapsep(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("clips read ")
    assert lines[1].startswith("separator 1/2  loss ")
    assert lines[2].startswith("separator 2/2  loss ")
    assert lines[3].startswith("validation 2/2  SNR in dB, up to 30: mean of sets ")
    assert lines[4] == "done: clapsep separate --model runs/x MIX --prompts NAME..."
    mix = manifest.parent / "train-sfx0.flac"
    done = clapsep("separate", mix, "--model", "runs/x", "--prompts", "speech", "sfx", "-o", "stems", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.suffixes[0] for path in (tmp_path / "stems").iterdir()} == {".speech", ".sfx"}
    tuned = ["train", manifest, "--init", "runs/x", "--set", "lr=1e-4", *settings[-6:]]
    done = clapsep(*tuned, "--epochs", "1", "--out", "runs/y", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_metadata(tmp_path / "runs/y/separator.safetensors")["base"] == "runs/x"


def test_a_model_of_prompts_of_its_own_is_tuned(manifest: Path, tmp_path: Path) -> None:
    own = replace(SMALL, prompts=("musicbg", "sfx", "speech"))
    torch.manual_seed(0)
    save_part(tmp_path / "base", "separator", "tuss", own, Tuss(own).state_dict())
    run(manifest, tmp_path / "out", replace(RECIPE, init=str(tmp_path / "base"), tuss=MEDIUM, epochs=1))
    assert load_model(tmp_path / "out", "cpu").config == own


def test_a_new_prompt_joins_those_of_a_model_and_a_specialist_keeps_few(manifest: Path, tmp_path: Path) -> None:
    own = replace(SMALL, prompts=("musicbg", "sfx", "speech"))
    torch.manual_seed(0)
    save_part(tmp_path / "base", "separator", "tuss", own, Tuss(own).state_dict())
    before = read_tensors(tmp_path / "base" / "separator.safetensors")
    listed = tmp_path / "clips.csv"
    listed.write_text(manifest.read_text().replace("musicbg", "piano").replace("far,", "near,"))
    still = replace(RECIPE, init=str(tmp_path / "base"), tuss=MEDIUM, epochs=1, lr=0.0, average=1)
    more = replace(still, prompts=("speech", "sfx", "musicbg", "piano"), mixing=PromptMixing(counts=(2, 3)))
    train(listed, tmp_path / "more", more, audio=manifest.parent)
    after = read_tensors(tmp_path / "more" / "separator.safetensors")
    assert torch.equal(after["prompts"][:3], before["prompts"].flip(0))
    assert all(torch.equal(after[name], before[name]) for name in before if name != "prompts")
    model = load_model(tmp_path / "more", "cpu", "high")
    assert model.config.prompts == more.prompts
    assert not model.doubts([Query("piano"), Query("speech")]), "it was trained on the new prompt"
    corpus = read_corpus(listed, labelling=more.labelling, audio=manifest.parent)

    def drawn(mixing: PromptMixing) -> set[frozenset[str]]:
        mixer = PromptMixer(DiskPool(corpus, None), corpus.train, 480, 0, mixing, more.prompts)
        return {frozenset(more.prompts[i] for i in row) for step in range(40) for row in mixer.batch(step, range(2))[1]}

    pairs = drawn(PromptMixing(counts=(2,)))
    assert {frozenset(("piano", "speech")), frozenset(("piano", "sfx"))} < pairs
    assert frozenset(("piano",)) not in pairs
    assert drawn(PromptMixing(counts=(2,), never=(("sfx", "piano"),))) == pairs - {frozenset(("piano", "sfx"))}
    few = tmp_path / "few.csv"
    few.write_text("\n".join(line for line in manifest.read_text().splitlines() if "musicbg" not in line))
    train(few, tmp_path / "special", replace(still, prompts=("speech", "sfx")), audio=manifest.parent)
    kept = read_tensors(tmp_path / "special" / "separator.safetensors")
    assert torch.equal(kept["prompts"], before["prompts"].flip(0)[:2])


def test_listed_mixtures_are_a_set_to_validate_on(manifest: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sounds = {name: 0.1 * rng.standard_normal(9600) for name in ("mixture", "speech", "sfx")}
    for name, sound in sounds.items():  # the mixture is not the sum of what is listed
        soundfile.write(tmp_path / f"{name}.wav", sound, 48_000, "FLOAT")
    listed = tmp_path / "val.csv"
    listed.write_text("mixture,prompt,reference\nmixture.wav,sfx,sfx.wav\nmixture.wav,speech,speech.wav\n")
    sources, prompts, mixture = ListedMixtures(listed, 4800, PROMPTS).batch(0, range(1))
    assert prompts.tolist() == [[PROMPTS.index("sfx"), PROMPTS.index("speech")]]
    for got, name in ((mixture[0], "mixture"), (sources[0, 0], "sfx"), (sources[0, 1], "speech")):
        np.testing.assert_allclose(got, sounds[name][2400:7200], atol=1e-6)
    recipe = replace(RECIPE, epochs=1, lr=0.0, average=1, precision="32-true", validation_lists=(str(listed),))
    reports = run(manifest, tmp_path / "out", recipe)
    (figures,) = (report.figures for report in reports if report.stage == "validation")
    assert list(figures) == ["mean of sets", "near", "far", str(listed)]
    net = load_model(tmp_path / "out", "cpu", "high").separator
    assert isinstance(net, Tuss)
    tensors = [torch.from_numpy(part) for part in (sources, prompts, mixture)]
    with torch.no_grad():
        loss = source_losses(net.separate(tensors[2], tensors[1]), tensors[0], tensors[1]).mean()
    assert figures[str(listed)] == pytest.approx(-loss.item(), abs=1e-3)
    listed.write_text("mixture,prompt,reference\nmixture.wav,dog,sfx.wav\n")
    with pytest.raises(ManifestError, match=r"val\.csv: no prompt 'dog'"):
        run(manifest, tmp_path / "x", recipe)
    assert not (tmp_path / "x").exists()
