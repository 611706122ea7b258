"""Training: what is drawn, what is learned, and that a stopped run goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_MINI
from torch import Tensor

from clapsep_cli import dsp, load_model
from clapsep_cli.augment import equaliser, seeded, stripes
from clapsep_cli.checkpoint import load_part, read_tensors
from clapsep_cli.conditions import Mixing, Queries, Texts
from clapsep_cli.data import Draw, Pool, Sampler, mix, read_manifest
from clapsep_cli.errors import CheckpointError, ManifestError
from clapsep_cli.metrics import sdr, si_sdr
from clapsep_cli.models.mini import MiniText, band_matrix
from clapsep_cli.objective import separation_loss, statistics
from clapsep_cli.registry import weights_folder
from clapsep_cli.train import Report, Run, Stage, TrainConfig, learning_rate, train, train_separator

TEXT = weights_folder() / "mini"
CONFIG = TrainConfig(
    draw=Draw(seconds=1.0),
    audio=Stage(steps=2, batch=4, lr=1e-3),
    separator=Stage(steps=4, batch=4, lr=1e-3, warmup=1),
    report_every=1,
    validate_every=4,
    save_every=1,
    mini=replace(TINY_MINI, seconds=2),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labels of tones and noises, four clips each; two of each are held out."""
    folder = tmp_path_factory.mktemp("clips")
    rng, t = np.random.default_rng(0), np.arange(16_000) / 16_000
    lines = ["file,split,label,captions"]
    for label, frequency in (("dog", 300), ("rain", 0), ("violin", 1500), ("bell", 4000)):
        for n in range(4):
            sound = np.sin(2 * np.pi * frequency * (1 + n / 10) * t) if frequency else rng.standard_normal(len(t))
            soundfile.write(folder / f"{label}{n}.wav", 0.3 * sound[: 9000 + 2000 * n], 16_000)
            lines.append(f"{label}{n}.wav,{'dev' if n >= 2 else 'train'},{label},a {label};{label} sound")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def pool(manifest: Path) -> Pool:
    return Pool.load(read_manifest(manifest))


def run(manifest: Path, out: Path, config: TrainConfig = CONFIG, stop_at: int = 0) -> list[Report]:
    reports: list[Report] = []

    def listen(report: Report) -> None:
        reports.append(report)
        if report.stage == "separator" and report.step == stop_at:
            raise KeyboardInterrupt

    train(manifest, out, TEXT, None, config, listen)
    return reports


def test_a_stopped_run_goes_on_to_the_same_weights(manifest: Path, tmp_path: Path) -> None:
    straight = run(manifest, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path / "stopped", stop_at=3)
    resumed = run(manifest, tmp_path / "stopped")
    assert [r.step for r in resumed if r.stage == "separator"] == [3, 4]
    losses = {r.step: r.figures["loss"] for r in straight if r.stage == "separator"}
    for report in resumed:
        if report.stage == "separator":
            assert report.figures["loss"] == losses[report.step]
    first, second = (read_tensors(tmp_path / name / "separator.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    validated = [r for r in straight if r.stage == "validation"]
    assert set(validated[-1].figures) == {"both", "positive", "shot"}

    model = load_model(tmp_path / "straight", "cpu")
    assert model.config == CONFIG.mini
    assert model.separator.window == 64_000
    other = replace(CONFIG, mini=replace(CONFIG.mini, hidden=9))
    with pytest.raises(CheckpointError, match="another configuration"):
        run(manifest, tmp_path / "straight", other)


def loss_of(mask: Tensor, target: Tensor, other: Tensor, present: bool, eq: float = 0.0) -> float:
    """The loss of one example under a mask per band, `[frames, bands]`."""
    gains = (equaliser(1, eq, seeded(2)), equaliser(1, eq, seeded(5)))
    spread = band_matrix(128, 48)
    of = statistics(target[None], other[None], gains, spread, spread)
    return separation_loss(mask[None], of, torch.tensor([present])).item()


def test_the_loss_is_the_papers_on_waveforms() -> None:
    """Parseval: on sounds that fade in and out, it is −0.9 · SNR − 0.1 · SI-SNR of the waveforms."""
    fade = torch.hann_window(32_000)
    target, other = torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0)) * fade
    estimate, clean = (0.3 * (target + other)).numpy(), target.numpy()
    expected = -0.9 * sdr(estimate, clean) - 0.1 * si_sdr(estimate, clean)
    # The floor of 30 dB takes a hundredth of a decibel at these ratios.
    assert loss_of(torch.full((101, 128), 0.3), target, other, present=True) == pytest.approx(expected, abs=0.03)


def test_the_loss_on_bands_is_the_loss_on_bins() -> None:
    generator = torch.Generator().manual_seed(1)
    target, other = torch.randn(2, 32_000, generator=generator)
    mask = torch.rand(101, 128, generator=generator)
    spectra = [dsp.spectrum(x[None]) * equaliser(1, 6.0, seeded(k)) for x, k in ((target, 2), (other, 5))]
    wanted, estimate = spectra[0], (spectra[0] + spectra[1]) * (mask @ band_matrix(128, 48))
    energy, error = wanted.abs().square().sum(), (estimate - wanted).abs().square().sum()
    fitted = (estimate * wanted.conj()).real.sum().square() / energy
    rest = estimate.abs().square().sum() - fitted
    expected = -9 * torch.log10(energy / (error + 1e-3 * energy)) - torch.log10(fitted / (rest + 1e-3 * fitted))
    assert loss_of(mask, target, other, present=True, eq=6.0) == pytest.approx(expected.item(), abs=1e-3)


def test_an_absent_sound_is_learned_as_silence() -> None:
    target, other = torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0))
    quiet, loud = (loss_of(torch.full((101, 128), m), target, other, present=False) for m in (0.01, 0.5))
    assert quiet < loud


def test_training_learns(pool: Pool, tmp_path: Path) -> None:
    """A few steps on tones and noise beat every constant mask."""
    among = [i for i, clip in enumerate(pool.clips) if clip.split == "train"]
    texts = Texts(load_text(), pool.clips, {})
    views = {i: torch.nn.functional.normalize(torch.randn(2, TINY_MINI.dim), dim=1) for i in among}
    config = replace(
        CONFIG,
        separator=Stage(steps=150, batch=8, lr=1e-2, warmup=5),
        mixing=Mixing(text_only=1.0, absent=0.0),
        draw=replace(CONFIG.draw, snr_std=0),
        validate_every=1000,
        save_every=1000,
    )
    reports: list[Report] = []
    queries = Queries(pool, texts, views, config.mixing)
    sampler = Sampler(pool, config.draw, 0, among)
    train_separator(Run(config, tmp_path), sampler, queries, lambda net: {}, reports.append)
    losses = [r.figures["loss"] for r in reports if r.stage == "separator"]
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 1.5


def load_text() -> MiniText:
    return load_part(TEXT, "text", "mini", TINY_MINI)


def test_what_is_drawn_depends_on_seed_and_step_alone(pool: Pool) -> None:
    sampler, same, other = (Sampler(pool, Draw(seconds=1.0), seed) for seed in (0, 0, 1))
    for left, right in zip(sampler.pairs(5, 3), same.pairs(5, 3), strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(sampler.pairs(5, 3)[0], sampler.pairs(6, 3)[0])
    assert not np.array_equal(sampler.pairs(5, 3)[0], other.pairs(5, 3)[0])


def test_pairs_are_of_two_sounds_within_the_snr_limits(pool: Pool) -> None:
    targets, others, indices = Sampler(pool, Draw(seconds=1.0), 0).pairs(0, 64)
    labels = [[pool.clips[i].label for i in pair] for pair in indices.tolist()]
    assert all(a != b for a, b in labels)
    snr = 10 * np.log10(np.square(targets).sum(1) / np.square(others).sum(1))
    assert np.abs(snr).max() <= 8.1
    assert np.abs(targets + others).max() <= 1.0


def test_mixing_follows_the_paper() -> None:
    rng = np.random.default_rng(0)
    target, other = rng.standard_normal((2, 1000)).astype(np.float32)
    mixture, scaled = mix(target, 5 * other)
    assert np.abs(mixture).max() == pytest.approx(0.9)
    rest = mixture - scaled
    assert np.square(rest).sum() == pytest.approx(np.square(scaled).sum(), rel=1e-4)
    quiet, same = mix(0.01 * target, other, snr_db=6.0)
    np.testing.assert_array_equal(same, np.float32(0.01) * target)
    assert 10 * np.log10(np.square(same).sum() / np.square(quiet - same).sum()) == pytest.approx(6, abs=1e-3)


def test_conditions_are_a_quarter_positive_a_quarter_negative_half_both(pool: Pool) -> None:
    texts = Texts(load_text(), pool.clips, {"dog": ("a puppy",)})
    assert len(texts.by_label["dog"]) == 3
    views = {i: torch.eye(1, TINY_MINI.dim) for i in range(len(pool.clips))}
    queries = Queries(pool, texts, views, Mixing(absent=0.0))
    sampler = Sampler(pool, Draw(seconds=1.0), 0)
    drawn, present = queries.draw(sampler, [[0, 4]] * 2000, np.random.default_rng(0))
    sides = drawn.view(2000, 2, -1).norm(dim=2) > 0
    kinds = torch.tensor([(True, False), (False, True), (True, True)])
    shares = [(sides == kind).all(1).float().mean().item() for kind in kinds]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.04)
    assert present.all()
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(2000))


def test_augmentation_is_bounded() -> None:
    gains = equaliser(200, 4.0, seeded(0))
    assert gains.shape == (200, 1, 513)
    flat = (gains == 1).all(2)[:, 0].float().mean().item()
    assert 0.35 < flat < 0.65
    kept = stripes(200, 100, 10, seeded(1))
    assert 1 - kept.mean().item() < 0.2
    assert (kept == 0).any()


def test_the_learning_rate_rises_holds_and_falls_to_nothing() -> None:
    stage = Stage(steps=1000, batch=1, lr=2.0, warmup=100, decay=0.3)
    assert learning_rate(stage, 0) == pytest.approx(0.02)
    assert learning_rate(stage, 99) == learning_rate(stage, 700) == 2.0
    assert learning_rate(stage, 850) == pytest.approx(1.0)
    assert learning_rate(stage, 999) < 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,split\na.wav,train\n", "no column label; needed: file,label"),
        ("file,label\n", "no rows"),
        ("file,label\nnone.wav,dog\nnone2.wav,\n", r"line 2: no file .*none.wav; line 3: no label"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(path)
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "none.csv")
