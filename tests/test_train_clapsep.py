"""Tests training of a tiny CLAPSep by the paper's recipe: resuming, trained weights, adapters, ablations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import reported, write_clips
from conftest import Clapsep
from tiny_clapsep import ROBERTA, write_checkpoints

from clapsep_cli import Query, dsp, load_model, separate
from clapsep_cli.data import Labelling, read_corpus
from clapsep_cli.errors import CheckpointError, ManifestError, RecipeError
from clapsep_cli.models.base import condition
from clapsep_cli.registry import MODELS
from clapsep_cli.store import adapters
from clapsep_cli.store.checkpoint import Model, load_part, read_config, read_metadata, save_part
from clapsep_cli.store.convert_clapsep import convert_clapsep
from clapsep_cli.store.library import write_tokenizer
from clapsep_cli.store.tensors import read_tensors
from clapsep_cli.training.loop.train import Report, Run, train
from clapsep_cli.training.recipes.clapsep import ClapsepRecipe, ClapsepTask, build

fabric = pytest.importorskip("lightning_fabric", reason="training takes the packages of clapsep[train]")
pytest.importorskip("peft", reason="LoRA takes the packages of clapsep[train]")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLAPSep as it is converted."""
    folder = tmp_path_factory.mktemp("base")
    convert_clapsep(write_checkpoints(folder / "released", ROBERTA), folder / "model", ROBERTA, revision="r1")
    write_tokenizer(MODELS["clapsep"], folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def recipe(base: Path) -> ClapsepRecipe:
    return ClapsepRecipe(
        base=str(base), precision="32-true", batch=2, epochs=2, lr=1e-3, report_every=1, save_every=1, workers=1
    )


def run(manifest: Path, out: Path, recipe: ClapsepRecipe, stop_at: int = 0) -> list[Report]:
    return reported(manifest, out, recipe, ("separator", stop_at))


def curve(reports: list[Report]) -> dict[tuple[str, int, str], float]:
    return {
        (r.stage, r.step, name): value for r in reports for name, value in r.figures.items() if name != "examples/s"
    }


def task_of(recipe: ClapsepRecipe, manifest: Path, folder: Path) -> ClapsepTask:
    """The task that a run would fit."""
    tasks: list[ClapsepTask] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "fit", lambda self, task: tasks.append(task))
        train(manifest, folder, recipe)
    return tasks[0]


@pytest.fixture(scope="module")
def straight(
    manifest: Path, recipe: ClapsepRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Report]]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(manifest, folder, recipe)


def test_a_stopped_run_goes_on_to_the_same_weights(
    manifest: Path, recipe: ClapsepRecipe, straight: tuple[Path, list[Report]], tmp_path: Path
) -> None:
    folder, reports = straight
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path, recipe, stop_at=6)
    resumed = run(manifest, tmp_path, recipe)
    assert [r.step for r in resumed if r.stage == "separator"] == [6, 7, 8]
    assert [r.step for r in reports if r.stage == "validation"] == [4, 8]
    whole = curve(reports)
    assert all(whole[key] == value for key, value in curve(resumed).items())
    for part in ("separator", "state"):
        first, second = (read_tensors(f / f"{part}.safetensors") for f in (folder, tmp_path))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_of_a_run_is_a_model(straight: tuple[Path, list[Report]], base: Path, tmp_path: Path) -> None:
    folder, _ = straight
    trained = load_model(folder, "cpu", "high")
    assert trained.config == ROBERTA
    validated = next(iter(trained.separator.state_dict()))
    assert validated in read_tensors(base / "separator.safetensors")
    assert read_tensors(folder / "separator.safetensors").keys() == read_tensors(base / "separator.safetensors").keys()
    for part in ("text", "audio"):
        assert read_metadata(folder / f"{part}.safetensors") == read_metadata(base / f"{part}.safetensors")
        copied, installed = (f / f"{part}.safetensors" for f in (folder, base))
        assert not copied.samefile(installed), "writing to a run must not change the model it began from"
        assert copied.read_bytes() == installed.read_bytes()
    mask = trained.separator.mask(
        trained.separator.encode(torch.zeros(1, ROBERTA.window)), condition(trained.text.embed(["a dog"]), None)
    )
    assert mask.isfinite().all()


def test_the_best_weights_are_kept(manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    figures = iter([1.0, 3.0, 2.0])
    seen: list[dict[str, torch.Tensor]] = []

    def validate(task: ClapsepTask, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        scale = task.recipe.lora_alpha / task.recipe.lora_rank
        seen.append({k: v.clone() for k, v in adapters.merged(weights, scale).items()})
        return {"both": next(figures)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClapsepTask, "validate", validate)
        run(manifest, tmp_path, replace(recipe, epochs=3))
    kept = read_tensors(tmp_path / "separator.safetensors")
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert any(not torch.equal(kept[name], seen[2][name]) for name in kept)


def test_only_lora_and_the_decoder_are_trained(
    manifest: Path, recipe: ClapsepRecipe, base: Path, straight: tuple[Path, list[Report]]
) -> None:
    net = build(recipe, load_model(base, "cpu", "high"))
    trained = [name for name, p in net.encoder.named_parameters() if p.requires_grad]
    layers = [
        f"layers.{i}.blocks.{j}.attn.{n}"
        for i, d in enumerate(ROBERTA.depths)
        for j in range(d)
        for n in ("qkv", "proj")
    ]
    parts = ("base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")
    assert sorted(trained) == sorted(f"{layer}.{part}" for layer in layers for part in parts)
    assert all(p.requires_grad for n, p in net.named_parameters() if not n.startswith("encoder."))
    clap = load_part(base, "audio", "clapsep", ROBERTA).htsat.state_dict()
    after = read_tensors(straight[0] / "separator.safetensors")
    adapted = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for name, tensor in clap.items():
        changed = not torch.equal(after[f"encoder.{name}"], tensor) if f"encoder.{name}" in after else False
        assert changed == (name in adapted), name


def test_merging_is_pefts(recipe: ClapsepRecipe, base: Path) -> None:
    net = build(recipe, load_model(base, "cpu", "high"))
    with torch.no_grad():
        for name, parameter in net.encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ours = adapters.merged(net.encoder.state_dict(), recipe.lora_alpha / recipe.lora_rank)
    for layer in [n for n, m in net.encoder.named_modules() if hasattr(m, "lora_A") and hasattr(m, "merge")]:
        module = net.encoder.get_submodule(layer)
        module.merge()
        torch.testing.assert_close(ours[f"{layer}.weight"], module.base_layer.weight, rtol=0, atol=1e-6)
        assert torch.equal(ours[f"{layer}.bias"], module.base_layer.bias)


@pytest.fixture(scope="module")
def tuned(
    manifest: Path, recipe: ClapsepRecipe, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ClapsepTask]:
    """A run of --lora-only, and its task at the end."""
    folder = tmp_path_factory.mktemp("tuned")
    tasks: list[ClapsepTask] = []
    with pytest.MonkeyPatch.context() as patch:
        ready = ClapsepTask.ready
        patch.setattr(ClapsepTask, "ready", lambda self: (tasks.append(self), ready(self)))
        lora = replace(recipe, init=str(base), lora_only=True, epochs=1, lr=1e-2, validation_mixtures=2)
        run(manifest, folder, lora)
    return folder, tasks[0]


def masks(model: Model, separator: torch.nn.Module) -> torch.Tensor:
    mixture = 0.3 * torch.randn(1, ROBERTA.window, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return separator.mask(separator.encode(mixture), condition(model.text.embed(["a dog"]), None))  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:--precision fast")  # where it is not native
def test_an_adapter_is_the_network_that_was_trained(
    tuned: tuple[Path, ClapsepTask], base: Path, tmp_path: Path
) -> None:
    folder, task = tuned
    path = folder / "adapter.safetensors"
    model = load_model(base, "cpu", "high")
    before = masks(model, model.separator)
    adapters.apply(model, path)
    after = masks(model, model.separator)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, masks(model, task.net.eval()), rtol=0, atol=1e-6)
    fast = load_model(base, "cpu", "fast")
    identity = fast.identity
    adapters.apply(fast, path)
    assert (masks(fast, fast.separator) - after).abs().max() < 0.02
    assert fast.identity != identity
    whole = load_model(folder, "cpu", "high")
    torch.testing.assert_close(after, masks(whole, whole.separator), rtol=0, atol=1e-6)
    tensors = read_tensors(path)
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B", "bias"}
    assert len(tensors) == 3 * 2 * sum(ROBERTA.depths)
    size = sum(t.numel() for t in tensors.values())
    assert size < sum(t.numel() for t in read_tensors(base / "separator.safetensors").values()) / 2


def test_an_adapter_goes_with_one_model_only(
    tuned: tuple[Path, ClapsepTask], base: Path, straight: tuple[Path, list[Report]], tiny_folder: Path, tmp_path: Path
) -> None:
    path = tuned[0] / "adapter.safetensors"
    for other in (straight[0], tiny_folder):
        with pytest.raises(CheckpointError, match=r"was trained on another model than .*: on model r1; use --model"):
            adapters.apply(load_model(other, "cpu", "high"), path)
    model = load_model(base, "cpu", "high")
    with pytest.raises(CheckpointError, match="is not an adapter"):
        adapters.apply(model, base / "separator.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapters.apply(model, tmp_path / "none.safetensors")


def test_nothing_else_is_tuned_by_lora_only(tuned: tuple[Path, ClapsepTask], base: Path) -> None:
    before, after = (read_tensors(f / "separator.safetensors") for f in (base, tuned[0]))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".attn.qkv." in name or ".attn.proj." in name for name in changed)
    assert all(name.startswith("encoder.") for name in changed)


def test_the_encoders_of_the_ablations(recipe: ClapsepRecipe, base: Path) -> None:
    model = load_model(base, "cpu", "high")
    clap = load_part(base, "audio", "clapsep", ROBERTA).htsat
    sound = 0.1 * torch.randn(1, 60_000, generator=torch.Generator().manual_seed(0))
    frozen, scratch, none = (build(replace(recipe, encoder=e), model) for e in ("frozen", "scratch", "none"))
    assert not any(p.requires_grad for net in (frozen, none) for p in net.encoder.parameters())
    assert all(p.requires_grad for p in scratch.encoder.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(frozen.encoder.state_dict().values(), clap.state_dict().values(), strict=True)
    )
    weight = "layers.0.blocks.0.attn.qkv.weight"
    assert not torch.equal(scratch.encoder.state_dict()[weight], clap.state_dict()[weight])
    with torch.no_grad():
        assert all(not feature.any() for feature in none.eval().encoder(sound))
        assert any(feature.any() for feature in frozen.eval().encoder(sound))


@pytest.mark.parametrize("encoder", ["frozen", "scratch", "none"])
def test_the_ablations_train(encoder: str, manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    ablation = replace(
        recipe, encoder=encoder, epochs=1, queries="text", validation_mixtures=1, report_every=4, store="disk"
    )
    run(manifest, tmp_path, ablation)
    assert load_model(tmp_path, "cpu", "high").separator.window == ROBERTA.window


def test_the_last_weights_are_kept_where_asked(manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def validate(task: ClapsepTask, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        scale = task.recipe.lora_alpha / task.recipe.lora_rank
        seen.append({k: v.clone() for k, v in adapters.merged(weights, scale).items()})
        return {"both": -float(len(seen))}  # the first are the best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClapsepTask, "validate", validate)
        run(manifest, tmp_path, replace(recipe, keep="last"))
    kept = read_tensors(tmp_path / "separator.safetensors")
    assert all(torch.equal(kept[name], seen[-1][name]) for name in kept)


def test_the_decoder_starts_as_the_references(recipe: ClapsepRecipe, base: Path) -> None:
    net = build(recipe, load_model(base, "cpu"))
    attentions = [layer.qkv for layer in net.mask_net.layers]
    for attention in attentions:  # torch's own attention there: uniform, by the sizes of both sides
        bound = (6 / sum(attention.weight.shape)) ** 0.5
        assert bound * 0.98 < attention.weight.abs().max() <= bound
        assert not attention.bias.any()
    weights = [
        layer.weight.detach().flatten()
        for part in (net.aggregator, net.mask_net)
        for layer in part.modules()
        if isinstance(layer, torch.nn.Linear) and layer not in attentions
    ]
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(torch.cat(weights).mean()) < 1e-3
    assert not net.aggregator.film.gamma.bias.any()
    assert not net.mask_net.output.bias.any()
    assert net.mask_net.spec_norm.momentum == 0.01
    kept = load_part(base, "separator", "clapsep", net.config)
    going_on = build(replace(recipe, init=str(base)), load_model(base, "cpu"))
    assert torch.equal(going_on.mask_net.output.weight, kept.mask_net.output.weight)


def test_later_blocks_of_the_decoder_are_dropped_more_often(
    manifest: Path, recipe: ClapsepRecipe, tmp_path: Path
) -> None:
    task = task_of(replace(recipe, batch=4), manifest, tmp_path)
    drawn = torch.stack([task._depth(step, range(4)) for step in range(1000)])
    shares = (drawn == 0).float().mean((0, 1, 3))
    last = len(shares) - 1
    assert shares.tolist() == pytest.approx([0.1 * at / last for at in range(last + 1)], abs=0.01)
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(task._depth(3, range(4))[1:3], task._depth(3, range(1, 3))), "however rows are shared"
    prepared = task.prepare(task.draw(0, range(2)), 0, range(2))
    task.net.eval()
    whole, none = (
        task.loss(prepared._replace(depth=torch.full_like(prepared.depth, x)))["loss"].item() for x in (1, 0)
    )
    blocks = [layer.block for layer in task.net.aggregator.layers]
    for block in blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
        for weight in block.mlp.parameters():
            torch.nn.init.zeros_(weight)
    assert whole != none == pytest.approx(task.loss(prepared)["loss"].item(), abs=1e-5)


def test_every_shot_is_played_at_a_speed_of_its_own(manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    task = task_of(replace(recipe, batch=8, spec_augment=False), manifest, tmp_path)
    clip = task.draw(0, range(1))[0][:1]
    heard = task._shots(clip.expand(8, -1), (0, 0), range(8))
    slow, fast = (
        task.audio.embed_windows(torch.nn.functional.pad(player(clip), (0, task.audio.window))[:, : task.audio.window])
        for player in task.players
    )
    which = [(torch.allclose(row, slow[0], atol=1e-4), torch.allclose(row, fast[0], atol=1e-4)) for row in heard]
    assert set(which) == {(True, False), (False, True)}


def test_audiocaps_as_released_is_trained_on(clapsep: Clapsep, manifest: Path, base: Path, tmp_path: Path) -> None:
    """Captions without labels, of files in another folder; what is validated on has a list of its own."""
    (tmp_path / "train.csv").write_text(
        'file_name,caption\ndog0.wav,"A dog; it barks"\nrain0.wav,Rain falls\nbell0.wav,A bell rings\n'
    )
    (tmp_path / "val.csv").write_text(
        "file_name,caption,caption_2\ndog2.wav,A dog,A hound\nrain2.wav,Rain,A shower\nbell2.wav,A bell,A chime\n"
    )
    done = clapsep(
        *("train", "train.csv", "--audio", manifest.parent, "--val", "val.csv", "--preset", "clapsep-hybrid"),
        *("--set", f"base={base}", "--set", "batch=1", "--epochs", "1", "--precision", "32-true", "-o", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "separator.safetensors").exists()
    corpus = read_corpus(tmp_path / "train.csv", 2, recipe_labels(), manifest.parent, tmp_path / "val.csv")
    assert corpus.clips[0].captions == ("A dog; it barks",)
    assert corpus.clips[3].captions == ("A dog", "A hound")
    assert (corpus.train, corpus.held_out) == ([0, 1, 2], [3, 4, 5])
    (tmp_path / "val.csv").write_text("file_name,caption\ngone.wav,A dog\n")
    with pytest.raises(ManifestError, match=r"val\.csv: line 2: no file .*gone\.wav"):
        read_corpus(tmp_path / "train.csv", 2, recipe_labels(), manifest.parent, tmp_path / "val.csv")
    with pytest.raises(ManifestError, match="no column label"):
        read_corpus(tmp_path / "train.csv", 1, audio=manifest.parent)


def recipe_labels() -> Labelling:
    return ClapsepRecipe().labelling


def test_a_step_follows_the_paper(manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    task = task_of(replace(recipe, batch=4, spec_augment=False, speeds=(1.0,)), manifest, tmp_path)
    assert task.audio is not None
    texts, kinds, alphas = task.texts, [], []
    for step in range(60):
        drawn = task.draw(step, range(4))
        prepared = task.prepare(drawn, step, range(4))
        power = [signal.square().sum(1) for signal in (prepared.targets, prepared.mixtures - prepared.targets)]
        torch.testing.assert_close(power[0], power[1], rtol=1e-3, atol=0)
        assert prepared.mixtures.abs().max() <= 1
        sides = prepared.conditions.view(4, 2, -1)
        asked = (sides.norm(dim=2) > 0).all(0)
        assert torch.equal((sides.norm(dim=2) > 0).any(0), asked)  # one valence for the whole step
        kinds.append(tuple(asked.tolist()))
        if step < 3 and asked.all():
            heard = dsp.Resampler(dsp.RATE_HZ, 48_000)(drawn[0])
            audio = task.audio.embed_windows(torch.nn.functional.pad(heard, (0, task.audio.window - heard.shape[1])))
            # α · audio + (1 − α) · text, up to the scale of the condition: solve for both.
            mixed = torch.linalg.lstsq(torch.stack([audio[0], texts[drawn[2][0, 0]]], 1), sides[0, 0]).solution
            alphas.append(float(mixed[0] / mixed.sum()))
    shares = [kinds.count(kind) / len(kinds) for kind in ((True, False), (False, True), (True, True))]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.15)
    assert all(0 < alpha < 1 for alpha in alphas)
    assert len(alphas) == len(set(alphas)) > 0


@pytest.mark.parametrize(("queries", "loads"), [("text", False), ("audio", True)])
def test_queries_of_one_modality(
    queries: str, loads: bool, manifest: Path, recipe: ClapsepRecipe, tmp_path: Path
) -> None:
    task = task_of(replace(recipe, queries=queries, valence=(1, 0, 0)), manifest, tmp_path)
    prepared = task.prepare(task.draw(0, range(2)), 0, range(2))
    positive = prepared.conditions[:, : ROBERTA.dim]
    assert not prepared.conditions[:, ROBERTA.dim :].any()
    texts = task.texts[task.draw(0, range(2))[2][:, 0]]
    assert torch.allclose(positive, texts, atol=1e-6) == (not loads)
    assert (task.audio is not None) == loads


def test_rows_are_drawn_alike_however_they_are_shared(manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    """The shares of two devices are the rows of one: clips, conditions and augmentation."""
    task = task_of(replace(recipe, batch=4), manifest, tmp_path)
    whole = task.prepare(task.draw(3, range(4)), 3, range(4))
    half = task.prepare(task.draw(3, range(2, 4)), 3, range(2, 4))
    for left, right in zip(whole, half, strict=True):
        torch.testing.assert_close(left[2:], right, rtol=1e-5, atol=1e-6)


def test_every_clip_is_a_target_once_an_epoch(manifest: Path, recipe: ClapsepRecipe, tmp_path: Path) -> None:
    task = task_of(replace(recipe, batch=2), manifest, tmp_path)
    steps = task.plan.validate_every  # of an epoch
    epochs = [[task.target(e * steps + step, row) for step in range(steps) for row in range(2)] for e in range(4)]
    assert all(len(set(epoch)) == 2 * steps and set(epoch) <= set(task.clips) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_without_clips_to_validate_on_the_loss_is_watched(
    manifest: Path, recipe: ClapsepRecipe, tmp_path: Path
) -> None:
    path = manifest.parent / "all.csv"
    path.write_text(manifest.read_text().replace(",dev,", ",train,"))
    reports = run(path, tmp_path, replace(recipe, batch=8, queries="text"))
    assert {r.stage for r in reports} == {"clips read", "separator"}
    with (tmp_path / "state.safetensors").open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    history = json.loads(head["__metadata__"]["history"])
    losses = [r.figures["loss"] for r in reports[1:]]
    np.testing.assert_allclose(history, [-np.mean(losses[:2]), -np.mean(losses[2:])], rtol=1e-6)
    assert (tmp_path / "separator.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, tiny: replace(r, lora_only=True), "it takes init, and encoder lora"),
        (lambda r, tiny: replace(r, init=r.base, lora_only=True, encoder="frozen"), "it takes init, and encoder lora"),
        (lambda r, tiny: replace(r, valence=(0.5, 0.5, 0.5)), "should add up to 1"),
        (lambda r, tiny: replace(r, speeds=()), "at least 1 item"),
        (lambda r, tiny: replace(r, base=str(tiny)), "family 'mini'; this preset trains CLAPSep models"),
        (lambda r, tiny: replace(r, batch=3, accumulate=2), "a batch of 3 cannot be shared evenly by 2"),
    ],
)
def test_recipes_that_do_not_fit(
    change: Callable[[ClapsepRecipe, Path], ClapsepRecipe],
    message: str,
    manifest: Path,
    recipe: ClapsepRecipe,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        run(manifest, tmp_path, change(recipe, tiny_folder))


def test_the_command_tunes_an_adapter(clapsep: Clapsep, manifest: Path, base: Path, tmp_path: Path) -> None:
    small = ["--set", "batch=2", "--epochs", "1", "--set", "validation_mixtures=1", "--set", "report_every=4"]
    done = clapsep("train", "--init", base, "--manifest", manifest, "--lora-only", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation 4/4  SI-SDRi in dB: both " in done.stdout
    assert "the adapter alone: runs/manifest/adapter.safetensors, 0.0 MB" in done.stdout
    assert read_config(read_metadata(tmp_path / "runs/manifest/separator.safetensors"), base) == ROBERTA
    settings = json.loads((tmp_path / "runs/manifest/run.json").read_text())["settings"]
    assert (settings["lora_only"], settings["queries"]) == (True, "hybrid")


def test_a_phase_head_starts_by_turning_nothing_and_is_trained(
    manifest: Path, recipe: ClapsepRecipe, base: Path, clapsep: Clapsep, tmp_path: Path
) -> None:
    released, turning = load_model(base, "cpu", "high"), replace(recipe, init=str(base), phase=True)
    net, asked = build(turning, released), condition(torch.randn(1, ROBERTA.dim), None)
    mixtures = 0.1 * torch.randn(2, ROBERTA.window)
    with torch.no_grad():
        (plain,), (same,) = (list(one.eval().estimate(mixtures, [asked])) for one in (released.separator, net))
    torch.testing.assert_close(same, plain)
    run(manifest, tmp_path / "out", replace(turning, epochs=1))
    trained = load_model(tmp_path / "out", "cpu", "high")
    assert trained.config == replace(ROBERTA, phase=True)
    assert trained.separator.mask_net.turn.weight.any(), "the head is trained"
    torch.manual_seed(0)
    torch.nn.init.normal_(trained.separator.mask_net.turn.weight, std=0.5)
    save_part(tmp_path / "out", "separator", "clapsep", trained.config, trained.separator.state_dict())
    rate, seconds = 44_100, 3.1
    mix = np.random.default_rng(0).standard_normal((2, round(rate * seconds))).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "mix.wav", mix.T, rate, "FLOAT")
    asked_for = ("extract", "mix.wav", "--model", "out", "--pos", "a dog", "--neg", "rain", "--overwrite")
    for more in ((), ("--refine",), ("--precision", "fast")):
        done = clapsep(*asked_for, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        parts = [soundfile.read(tmp_path / f"mix.{part}.wav", dtype="float32")[0].T for part in ("target", "residual")]
        np.testing.assert_allclose(sum(parts), mix, atol=1e-6)
    short = np.ascontiguousarray(mix[:1, : ROBERTA.window - 1000])
    result = separate(short, 32_000, Query("a dog"), trained)
    wanted = trained.ask([Query("a dog")]).targets
    whole = torch.nn.functional.pad(torch.from_numpy(short), (0, 1000))
    with torch.no_grad():
        (expected,) = trained.separator.estimate(whole, [wanted])
    far = slice(0, ROBERTA.window - 3000)  # near the end one is reflected, and the other padded
    np.testing.assert_allclose(result.target[0, far], expected[0, far].numpy(), atol=2e-4)
    assert not np.allclose(result.target[0, far], _magnitudes_alone(trained, whole, wanted)[0, far].numpy(), atol=1e-3)
    several = {"dog": Query("a dog"), "rain": Query("rain"), "roof": Query("roof")}
    assert len(separate(mix, rate, several, trained).stems) == 3
    with pytest.raises(RecipeError, match="leave phase out"):
        run(manifest, tmp_path / "x", replace(turning, lora_only=True))


def _magnitudes_alone(model: Model, mixtures: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """What the mask's moduli alone make."""
    with torch.no_grad():
        mask = model.separator.mask(model.separator.encode(mixtures), wanted).abs()
    return dsp.masked(dsp.spectrum(mixtures), mask, mixtures.shape[1])
