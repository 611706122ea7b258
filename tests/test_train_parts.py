"""Tests the parts of training: manifests, clips from memory or disk, sampling, loss, settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import write_clips
from conftest import TINY_MINI
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clapsep_cli import dsp
from clapsep_cli.data import mix, read_corpus, read_manifest
from clapsep_cli.errors import ManifestError, RecipeError
from clapsep_cli.metrics import sdr, si_sdr
from clapsep_cli.models.mini import band_matrix
from clapsep_cli.models.mini_queries import MiniText
from clapsep_cli.registry import weights_folder
from clapsep_cli.store.checkpoint import load_part
from clapsep_cli.training.loop.optimisation import Muon, Plateau, Trapezoid, orthogonal
from clapsep_cli.training.loop.sampling import DiskPool, Draw, MemoryPool, Pool, Sampler, ahead, open_pool
from clapsep_cli.training.loop.settings import parse_setting, read_settings
from clapsep_cli.training.recipes import presets
from clapsep_cli.training.recipes.augment import Acoustics, elsewhere, levelled, masked, room_spectra, seeded, stripes
from clapsep_cli.training.recipes.clapsep import ClapsepRecipe
from clapsep_cli.training.recipes.conditions import KINDS, Mixing, Queries, Texts
from clapsep_cli.training.recipes.mini import MiniRecipe
from clapsep_cli.training.recipes.objective import separation_loss, si_snr, snr, statistics, waveform_loss
from clapsep_cli.training.recipes.space import balanced, fit_sounds, fit_words
from clapsep_cli.training.recipes.validation import cases, choose


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def pool(manifest: Path) -> Pool:
    return MemoryPool(read_corpus(manifest))


def load_text() -> MiniText:
    text: MiniText = load_part(weights_folder() / "mini", "text", "mini", TINY_MINI)
    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,split\na.wav,train\n", "no column label or caption or captions; it has: file,split"),
        ("file,label\n", "no rows"),
        ("file,label\nnone.wav,dog\nnone2.wav,\n", r"line 2: no file .*none.wav; line 3: no label"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(path)
    with pytest.raises(ManifestError, match=r"none\.csv: no such file"):
        read_manifest(tmp_path / "none.csv")


def test_all_that_is_wrong_with_a_manifest_is_listed_at_once(tmp_path: Path) -> None:
    whole = write_clips(tmp_path)
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(2000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).standard_normal(40_000) / 9, 16_000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:20_000])
    rows = [  # from line 18 on
        "none.wav,train,dog,a dog",
        "text.wav,train,dog,a dog",
        "empty.wav,train,dog,a dog",
        "nan.wav,train,dog,a dog",
        "cut.flac,train,dog,a dog",
        "dog0.wav,train,dog,a dog",
        "bell3.wav,dev,owl, ; ",
        "rain2.wav,train,flute,a flute",
        "rain3.wav,train,,a cat",
    ]
    faulty = tmp_path / "faulty.csv"
    faulty.write_text(whole.read_text() + "\n".join(rows) + "\n")
    with pytest.raises(ManifestError) as raised:
        read_corpus(faulty, min_clips=2)
    head, *faults = str(raised.value).splitlines()
    assert head == f"{faulty}: {len(faults)} faults"
    expected = [
        (18, "no file"), (19, "cannot be decoded"), (20, "has no samples"), (21, "not finite"), (22, ""),
        (23, "dog0.wav is on line 2 already"), (24, "bell3.wav is on line 17 already"), (24, "the caption is empty"),
        (25, "rain2.wav is on line 8 already"), (25, "the label 'flute' has too few clips to train on, 1; it takes 2"),
        (26, "rain3.wav is on line 9 already"), (26, "no label"),
    ]  # fmt: skip
    assert len(faults) == len(expected)
    for fault, (line, what) in zip(faults, expected, strict=True):
        assert fault.startswith(f"  line {line}: ")
        assert what in fault
    (tmp_path / "val.csv").write_text("file,label\ndog0.wav,dog\n")
    with pytest.raises(ManifestError, match=r"val\.csv, line 2: .*dog0\.wav is on line 2 already"):
        read_corpus(whole, held_out=tmp_path / "val.csv")
    one = tmp_path / "one.csv"
    one.write_text("file,label\ndog0.wav,dog\ndog1.wav,dog\n")
    with pytest.raises(ManifestError, match="clips of 1 labels in the split 'train'; it takes two"):
        read_corpus(one)


def test_the_digest_is_of_what_training_notices(manifest: Path, tmp_path: Path) -> None:
    moved = write_clips(tmp_path)
    corpus = read_corpus(manifest)
    assert read_corpus(moved).digest == corpus.digest
    moved.write_text(moved.read_text().replace("a dog;", "a hound;"))
    assert read_corpus(moved).digest != corpus.digest
    assert len(corpus.train) == len(corpus.held_out) == 8


def test_clips_from_disk_are_those_from_memory(manifest: Path, tmp_path: Path) -> None:
    t = np.arange(44_100 * 3) / 44_100
    stereo = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), 0.3 * np.sin(2 * np.pi * 3000 * t)], 1)
    soundfile.write(tmp_path / "long.flac", stereo, 44_100)
    (tmp_path / "m.csv").write_text(f"file,label\nlong.flac,a\n{manifest.parent / 'dog0.wav'},b\n")
    corpus = read_corpus(tmp_path / "m.csv")
    memory, disk = MemoryPool(corpus), DiskPool(corpus)
    for index in range(2):
        length = disk.samples(index)
        assert abs(length - memory.samples(index)) <= 1
        for start, stop in (
            (0, length),
            (0, 5000),
            (1, 900),
            (length // 2 + 7, length // 2 + 4007),
            (length - 4000, length + 99),
        ):
            expected = memory.read(index, start, min(stop, length))
            read = disk.read(index, start, stop)
            assert len(read) == min(stop, length) - start
            n = min(len(read), len(expected))
            inner = slice(200, n - 200)  # a resampler is not itself at the ends of what it is given
            np.testing.assert_allclose(read[:n][inner], expected[:n][inner], atol=1e-3)
    (tmp_path / "long.flac").unlink()
    with pytest.raises(ManifestError, match=r"long\.flac: cannot be decoded"):
        disk.read(0, 0, 100)


def test_a_corpus_too_large_for_memory_stays_on_disk(manifest: Path) -> None:
    corpus = read_corpus(manifest)
    large = replace(corpus, seconds=(3600.0,) * len(corpus.clips))
    assert isinstance(open_pool(corpus), MemoryPool)
    assert isinstance(open_pool(corpus, "disk"), DiskPool)
    hours = replace(corpus, clips=corpus.clips * 600, seconds=large.seconds * 600)
    assert isinstance(open_pool(hours), DiskPool)


def test_what_is_made_ahead_is_bounded_and_in_order() -> None:
    begun: list[int] = []
    made = ahead(lambda step: begun.append(step) or step, range(3, 40), workers=4)  # type: ignore[func-returns-value]
    for step in range(3, 40):
        assert next(made) == step
        assert max(begun) <= step + 5
    assert next(made, None) is None

    def fails(step: int) -> int:
        raise ManifestError("gone")

    with pytest.raises(ManifestError, match="gone"):
        list(ahead(fails, range(3)))


def loss_of(mask: Tensor, target: Tensor, other: Tensor, present: bool) -> float:
    """The loss of one example under a mask per band, `[frames, bands]`."""
    spread = band_matrix(128, 48)
    of = statistics(target[None], other[None], spread, spread)
    return separation_loss(mask[None], of, torch.tensor([present]), 0.3).item()


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
    spectra = [dsp.spectrum(x[None]) for x in (target, other)]
    wanted, estimate = spectra[0], (spectra[0] + spectra[1]) * (mask @ band_matrix(128, 48))
    energy, error = wanted.abs().square().sum(), (estimate - wanted).abs().square().sum()
    fitted = (estimate * wanted.conj()).real.sum().square() / energy
    rest = estimate.abs().square().sum() - fitted
    expected = -9 * torch.log10(energy / (error + 1e-3 * energy)) - torch.log10(fitted / (rest + 1e-3 * fitted))
    assert loss_of(mask, target, other, present=True) == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("frames", [26, 27])
def test_a_mixture_is_asked_for_either_sound_by_masks_of_two_frames_each(frames: int) -> None:
    """As computed from masked spectra: of every mixture, for the target and for the interferer."""
    generator, spread = torch.Generator().manual_seed(frames), band_matrix(64, 16)
    targets, others = torch.randn(2, 3, (frames - 1) * dsp.HOP, generator=generator)
    mixtures, interferer = torch.tensor([0, 0, 2, 1, 2]), torch.tensor([False, True, True, False, False])
    mask = torch.rand(len(mixtures), -(-frames // 2), 64, generator=generator)
    present = torch.ones(len(mixtures), dtype=torch.bool)
    asked = statistics(targets, others, spread, spread).by_two().ask(mixtures, interferer)
    losses = [
        separation_loss(
            mask[row : row + 1], asked.ask(torch.tensor([row]), torch.tensor([False])), present[:1], 0.3
        ).item()
        for row in range(len(mixtures))
    ]
    for row, (mixture, second) in enumerate(zip(mixtures.tolist(), interferer.tolist(), strict=True)):
        pair = [dsp.spectrum(x[mixture]) for x in (targets, others)]
        wanted = pair[second]
        estimate = sum(pair) * (mask[row].repeat_interleave(2, 0)[:frames] @ spread)
        energy, error = wanted.abs().square().sum(), (estimate - wanted).abs().square().sum()
        fitted = (estimate * wanted.conj()).real.sum().square() / energy
        rest = estimate.abs().square().sum() - fitted
        expected = -9 * torch.log10(energy / (error + 1e-3 * energy)) - torch.log10(fitted / (rest + 1e-3 * fitted))
        assert losses[row] == pytest.approx(expected.item(), abs=1e-3)
        assert asked.other[row].item() == pytest.approx(pair[not second].abs().square().sum().item(), rel=1e-4)
    assert separation_loss(mask, asked, present, 0.3).item() == pytest.approx(np.mean(losses), abs=1e-4)


def test_an_absent_sound_is_learned_as_silence() -> None:
    target, other = torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0))
    quiet, loud = (loss_of(torch.full((101, 128), m), target, other, present=False) for m in (0.01, 0.5))
    assert quiet < loud


def test_the_loss_on_waveforms_is_the_papers() -> None:
    target, noise = torch.randn(2, 3, 4000, generator=torch.Generator().manual_seed(0))
    estimate = 0.7 * target + 0.2 * noise
    plain = [sdr(e.numpy(), t.numpy()) for e, t in zip(estimate, target, strict=True)]
    invariant = [si_sdr(e.numpy(), t.numpy()) for e, t in zip(estimate, target, strict=True)]
    np.testing.assert_allclose(snr(estimate, target), plain, atol=1e-3)
    np.testing.assert_allclose(si_snr(estimate, target), invariant, atol=1e-3)
    expected = -0.9 * np.mean(plain) - 0.1 * np.mean(invariant)
    assert waveform_loss(estimate, target).item() == pytest.approx(expected, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 50), level=st.floats(0.01, 3))
def test_si_snr_ignores_the_scale_and_snr_does_not(scale: float, level: float) -> None:
    target, noise = torch.randn(2, 1, 2000, generator=torch.Generator().manual_seed(1))
    estimate = target + level * noise
    torch.testing.assert_close(si_snr(scale * estimate, target), si_snr(estimate, target), atol=2e-2, rtol=0)
    # However it is scaled, an estimate's SNR is at most 1 + its scale-invariant one, as ratios.
    assert snr(scale * estimate, target) <= 10 * torch.log10(1 + 10 ** (si_snr(estimate, target) / 10)) + 1e-2


def test_what_is_drawn_depends_on_seed_step_and_row_alone(pool: Pool) -> None:
    sampler, same, other = (Sampler(pool, Draw(seconds=1.0), seed) for seed in (0, 0, 1))
    whole = sampler.pairs(5, range(4))
    for left, right in zip(whole, same.pairs(5, range(4)), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(whole, same.pairs(5, range(2, 4)), strict=True):
        assert torch.equal(left[2:], right)
    assert not torch.equal(whole.targets, sampler.pairs(6, range(4)).targets)
    assert not torch.equal(whole.targets, other.pairs(5, range(4)).targets)


def test_pairs_are_of_two_sounds_within_the_snr_limits(pool: Pool) -> None:
    pairs = Sampler(pool, Draw(seconds=1.0), 0).pairs(0, range(64))
    labels = [[pool.clips[i].label for i in pair] for pair in pairs.clips.tolist()]
    assert all(a != b for a, b in labels)
    targets, others = levelled(pairs.targets, pairs.interferers, pairs.snr_db)
    ratio = 10 * torch.log10(targets.square().sum(1) / others.square().sum(1))
    torch.testing.assert_close(ratio, pairs.snr_db, atol=1e-3, rtol=0)
    assert ratio.abs().max() <= 8
    assert (targets + others).abs().max() <= 1


def test_hard_interferers_are_of_the_nearest_labels(pool: Pool) -> None:
    near = Texts(load_text(), pool.clips, {}).nearest()
    assert set(near["violin"]) == {"dog", "rain", "bell"}
    draw = Draw(seconds=1.0, hard=1.0, hard_labels=1)
    for target, other in Sampler(pool, draw, 0, near=near).pairs(0, range(32)).clips.tolist():
        assert pool.clips[other].label == near[pool.clips[target].label][0]


def test_where_nothing_sounds_unlike_a_clip(manifest: Path, tmp_path: Path) -> None:
    same = manifest.read_text().replace("a rain;rain sound", "a dog").splitlines()
    path = manifest.parent / "same.csv"
    path.write_text("\n".join(line for line in same if "violin" not in line and "bell" not in line))
    pool = MemoryPool(read_corpus(path))
    sampler = Sampler(pool, Draw(seconds=1.0), 0)
    with pytest.raises(ManifestError, match="no clip sounds unlike"):
        sampler.pairs(0, range(1))
    assert choose(pool, range(len(pool.clips)), 9) == []


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

    left, right = levelled(*torch.from_numpy(np.stack([target, 5 * other]))[:, None], torch.zeros(1))
    np.testing.assert_allclose(left[0], scaled, atol=1e-6)
    np.testing.assert_allclose((left + right)[0], mixture, atol=1e-6)


def test_queries_are_a_quarter_positive_a_quarter_negative_half_both_for_either_clip(pool: Pool) -> None:
    texts = Texts(load_text(), pool.clips, {"dog": ("a puppy",)})
    assert len(texts.by_label["dog"]) == 3
    views = {i: torch.eye(1, TINY_MINI.dim) for i in range(len(pool.clips))}
    queries = Queries(pool, texts, views, Mixing(queries=4, absent=0.0))
    sampler = Sampler(pool, Draw(seconds=1.0), 0)
    asked = queries.draw(sampler, [[0, 4]] * 500, [np.random.default_rng(n) for n in range(500)])
    assert asked.mixtures.tolist() == [n for n in range(500) for _ in range(4)]
    sides = asked.conditions.view(2000, 2, -1).norm(dim=2) > 0
    drawn = [(int(other), bool(pos), bool(neg)) for other, (pos, neg) in zip(asked.interferer, sides, strict=True)]
    for kind in set(KINDS):
        assert drawn.count(kind) / len(drawn) == pytest.approx(KINDS.count(kind) / len(KINDS), abs=0.03)
    assert asked.present.all()
    torch.testing.assert_close(asked.conditions.norm(dim=1), torch.ones(2000))
    for at in range(0, 2000, 4):  # no query of a mixture is drawn more often than it is listed
        assert all(drawn[at : at + 4].count(kind) <= KINDS.count(kind) for kind in set(KINDS))


def test_each_side_of_a_query_asks_for_the_clip_it_names(pool: Pool) -> None:
    """Also where something else is asked for, which is flagged as absent."""
    labels = [clip.label for clip in pool.clips]
    texts = Texts(load_text(), pool.clips, {})
    views = {
        i: torch.eye(TINY_MINI.dim)[list(dict.fromkeys(labels)).index(label)][None] for i, label in enumerate(labels)
    }
    queries = Queries(pool, texts, views, Mixing(queries=8, noise=0.0, text_only=0.0, audio_only=1.0, absent=0.3))
    asked = queries.draw(Sampler(pool, Draw(), 0), [[0, 4]] * 100, [np.random.default_rng(n) for n in range(100)])
    positive, negative = asked.conditions.view(800, 2, -1).unbind(1)
    assert asked.present.float().mean().item() == pytest.approx(0.7, abs=0.06)
    for side, named in ((positive, asked.interferer.long()), (negative, 1 - asked.interferer.long())):
        given = asked.present & side.any(1)
        assert torch.equal(side[given].argmax(1), named[given])
    absent = ~asked.present
    assert bool((positive[absent].argmax(1) >= 2).all())  # of neither label of the mixture
    with_negative = negative[absent].any(1)
    assert 0.2 < with_negative.float().mean().item() < 0.6
    assert torch.equal(negative[absent][with_negative].argmax(1), 1 - asked.interferer[absent][with_negative].long())


def test_the_space_is_fitted_to_clips_in_closed_form() -> None:
    """What clips sound like is whitened; words point to what they caption; a label of n clips counts √n."""
    generator = torch.Generator().manual_seed(0)
    labels = ["a"] * 16 + ["b"] * 4 + ["c"] * 180
    weights = balanced(labels)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[:16].sum().item() == pytest.approx(2 * weights[16:20].sum().item())
    heard = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    matrix, offset = fit_sounds(heard, weights, 12, 1e-9)
    white = heard @ matrix + offset
    torch.testing.assert_close(weights @ white, torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        (white * weights[:, None]).T @ white / 200, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-5
    )
    few, bias = fit_sounds(heard, weights, 5, 1e-9)
    torch.testing.assert_close(heard @ few + bias, white[:, :5])
    calm, _ = fit_sounds(heard, weights, 12, 0.5)
    assert calm.norm() < matrix.norm()

    words = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    truth = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mean = weights @ words / 200
    mapped, constant = fit_words(words, (words - mean) @ truth, weights, 1e-9)
    torch.testing.assert_close(mapped, truth)
    torch.testing.assert_close(mean @ mapped + constant, torch.zeros(4, dtype=torch.float64))
    assert fit_words(words, words @ truth, weights, 1e3)[0].norm() < 0.5 * truth.norm()


def test_several_shots_are_averaged(pool: Pool) -> None:
    texts = Texts(load_text(), pool.clips, {})
    views = {i: torch.eye(TINY_MINI.dim)[i][None] for i in range(len(pool.clips))}
    queries = Queries(pool, texts, views, Mixing(noise=0.0, shots=5))
    rng = np.random.default_rng(0)
    drawn = torch.stack([queries.side(0, 1.0, rng) for _ in range(200)])
    torch.testing.assert_close(drawn.sum(1), torch.ones(200))  # each a mean of unit vectors …
    assert not drawn[:, 0].any()  # … of other clips of the label
    assert not drawn[:, 4:].any()
    counts = {round(1 / row[row > 0].min().item()) for row in drawn}
    assert counts >= {1, 2, 3, 4, 5}


def test_augmentation_is_bounded() -> None:
    kept = stripes(200, 100, 10, seeded(1))
    assert 1 - kept.mean().item() < 0.2
    assert (kept == 0).any()


def test_a_clip_sounds_as_if_recorded_elsewhere_at_its_own_level() -> None:
    clip = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    room = room_spectra([np.array([0, 1, 0, 0.5], np.float32)], clip.shape[1])
    still = Acoustics(eq=0, low_pass=0, high_pass=0, room=0, floor=0)
    assert torch.equal(elsewhere(clip, room, still, [seeded(1)]), clip)
    for change in ("eq", "low_pass", "high_pass", "room", "floor"):
        acoustics = replace(still, **{change: 1.0})
        first, again, other = (elsewhere(clip, room, acoustics, [seeded(n)]) for n in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, clip)
        assert torch.equal(first, other) == (change == "room")  # there is but one
        assert first.norm().item() == pytest.approx(clip.norm().item(), rel=0.02)
    late = elsewhere(clip, room, replace(still, room=1.0), [seeded(1)])
    expected = torch.cat([torch.zeros(1, 1), clip[:, :-1]], 1)
    expected[:, 3:] += 0.5 * clip[:, :-3]
    torch.testing.assert_close(late, expected * (clip.norm() / expected.norm()), atol=1e-4, rtol=1e-4)


def test_decoded_clips_are_kept_and_decoded_anew_for_others(manifest: Path, tmp_path: Path) -> None:
    corpus, cache = read_corpus(manifest), tmp_path / "clips.safetensors"
    fresh = MemoryPool(corpus, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clapsep_cli.training.loop.sampling.read_clip", None)
        kept = MemoryPool(corpus, cache=cache)
    for index in range(len(corpus.clips)):
        np.testing.assert_array_equal(kept.read(index, 0, 10**9), fresh.read(index, 0, 10**9))
    shorter = MemoryPool(corpus, seconds=0.1, cache=cache)
    assert shorter.samples(0) == 3200


def test_validation_mixes_each_split_among_itself(manifest: Path) -> None:
    pool = MemoryPool(read_corpus(manifest))
    clips = list(pool.clips)
    held_out = [i for i, clip in enumerate(clips) if clip.split == "dev"]
    for i in held_out[1::2]:
        clips[i] = replace(clips[i], split="unseen")
    pool.clips = tuple(clips)
    made = cases(pool, held_out, 2, 16_000, load_text(), None)
    assert [list(case.conditions) for case in made] == [["unseen both", "unseen positive"]] * 2 + [
        ["dev both", "dev positive"]
    ] * 2


def test_a_layer_is_masked_while_it_lasts() -> None:
    layer, x = torch.nn.Identity(), torch.ones(2, 3)
    kept = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    with masked(layer, kept):
        assert torch.equal(layer(x), kept)
    assert torch.equal(layer(x), x)


def test_the_learning_rate_rises_holds_and_falls_to_nothing() -> None:
    schedule = Trapezoid(lr=2.0, steps=1000, warmup=100, decay=0.3)
    assert schedule.rate(0, []) == pytest.approx(0.02)
    assert schedule.rate(99, []) == schedule.rate(700, [1.0]) == 2.0
    assert schedule.rate(850, []) == pytest.approx(1.0)
    assert schedule.rate(999, []) < 0.01


def test_the_learning_rate_falls_after_five_stale_epochs() -> None:
    schedule = Plateau(lr=1e-4, floor=5e-6, factor=0.3, patience=5)
    history = [1.0, 3.0, 2.0, 3.0, 2.9, 2.8]
    assert schedule.rate(0, history) == 1e-4
    assert schedule.rate(0, [*history, 1.0]) == pytest.approx(3e-5)
    assert schedule.rate(0, [*history, 3.1]) == 1e-4
    assert schedule.rate(0, [*history, *[1.0] * 6]) == pytest.approx(9e-6)
    assert schedule.rate(0, [0.0] * 100) == 5e-6


def test_validation_takes_every_label_before_one_twice(pool: Pool) -> None:
    held_out = [i for i, clip in enumerate(pool.clips) if clip.split == "dev"]
    chosen = choose(pool, held_out, 6)
    assert chosen == choose(pool, held_out, 6)
    assert len({pool.clips[target].label for target, _, _ in chosen[:4]}) == 4
    for target, interferer, shot in chosen:
        assert {target, interferer, shot} <= set(held_out)
        assert pool.clips[target].label != pool.clips[interferer].label
        assert shot is not None
        assert shot != target
        assert pool.clips[shot].label == pool.clips[target].label


def test_presets_and_what_overrides_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 3e-4\nspeeds: [1]\n")
    (tmp_path / "c.toml").write_text("lr = 3e-4\nspeeds = [1]\n")
    built = [presets.build("clapsep-text", read_settings(tmp_path / name)) for name in ("c.yaml", "c.toml")]
    assert built[0] == built[1]
    assert (built[0].lr, built[0].speeds, built[0].queries, built[0].batch) == (3e-4, (1.0,), "text", 32)
    paper = presets.build("clapsep-hybrid")
    assert (paper.lr, paper.lr_floor, paper.lr_factor, paper.stale_epochs) == (1e-4, 5e-6, 0.3, 5)
    assert (paper.lora_rank, paper.lora_alpha, paper.valence, paper.clip) == (16, 1.0, (0.25, 0.25, 0.5), 5.0)
    assert (paper.epochs, paper.precision, paper.snr_weight, paper.queries) == (150, "auto", 0.9, "hybrid")
    dotted = presets.build("mini", *map(parse_setting, ["separator.lr=0.5", "draw.hard = 0.25", "encoders=a b"]))
    assert (dotted.separator.lr, dotted.draw.hard, dotted.encoders) == (0.5, 0.25, "a b")
    assert dotted.mixing == MiniRecipe().mixing
    assert presets.preset_of("clapsep") == "clapsep-hybrid"
    assert presets.preset_of("mini") == "mini"


@pytest.mark.parametrize(
    ("preset", "values", "message"),
    [
        ("minni", {}, "no preset 'minni'; did you mean 'mini'?"),
        ("mini", {"seperator.lr": 1.0}, "mini has no setting 'seperator'; did you mean 'separator'?"),
        ("mini", {"separator": {"lrr": 1.0}}, "mini.separator has no setting 'lrr'; did you mean 'lr'?"),
        ("mini", {"hard": 1.0}, "mini has no setting 'hard'; did you mean 'draw.hard'?"),
        ("mini", {"separator": 3}, "mini.separator has settings of its own: lr, steps, batch"),
        ("mini", {"epochs": 3}, "mini has no setting 'epochs'"),
        ("mini", {"ema": "much"}, "mini.ema should be a valid number, not 'much'"),
        ("mini", {"seed": 1.5}, "mini.seed should be a valid integer, not 1.5"),
        ("mini", {"seed": True}, "mini.seed should be a valid integer, not True"),
        ("clapsep-hybrid", {"lora_only": 1}, "lora_only should be a valid boolean, not 1"),
        ("clapsep-hybrid", {"encoder": "lara"}, "encoder should be 'lora', 'frozen', 'scratch' or 'none', not 'lara'"),
        ("clapsep-hybrid", {"valence": [1, 0]}, "valence should have at least 3 items, not 2"),
        ("clapsep-hybrid", {"valence": [0.5, 0.5, 0.5]}, "valence: should add up to 1; the sum is 1.5"),
        ("clapsep-hybrid", {"speeds": []}, "speeds should have at least 1 item, not 0"),
        ("clapsep-hybrid", {"free": 1}, "no setting 'free'"),
        ("mini", {"mini.hiden": 1}, "mini.mini has no setting 'hiden'; did you mean 'hidden'?"),
        ("mini", {"report_every": 0}, "report_every should be greater than 0, not 0"),
        ("mini", {"save_every": 0}, "save_every should be greater than 0, not 0"),
        ("mini", {"workers": 0}, "workers should be greater than or equal to 1, not 0"),
        ("mini", {"draw.seconds": 0}, "draw.seconds should be greater than or equal to 0.05, not 0"),
        ("mini", {"draw.snr_limit": -1}, "draw.snr_limit should be greater than or equal to 0, not -1"),
        ("mini", {"draw.snr_std": math.nan}, "draw.snr_std should be a finite number, not nan"),
        ("mini", {"ema": 2}, "ema should be less than 1, not 2"),
        ("mini", {"space": "make"}, "mini.space should be 'keep', 'words' or 'fit', not 'make'"),
        ("mini", {"mixing.queries": 9}, "mini.mixing.queries should be less than or equal to 8, not 9"),
        ("mini", {"seed": -1}, "seed should be greater than or equal to 0, not -1"),
        ("tuss-medium", {"mixing.counts": [0]}, "mixing.counts.0 should be greater than 0, not 0"),
        ("tuss-medium", {"tuss.width": 20}, "tuss-medium.tuss: not a TUSS size"),
        (
            "mini",
            {"ema": 2, "separator.batch": "x"},
            "mini: 2 faults\n  mini.separator.batch should be a valid integer",
        ),
    ],
)
def test_settings_that_are_wrong(preset: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        presets.build(preset, values)
    assert message in str(raised.value)


def test_shares_that_miss_one_by_rounding_are_scaled() -> None:
    thirds = presets.build("clapsep-hybrid", {"valence": [0.3333333] * 3})
    assert isinstance(thirds, ClapsepRecipe)
    np.random.default_rng(0).choice(3, p=thirds.valence)  # which is strict about the sum
    assert replace(thirds, epochs=1).valence == thirds.valence  # a resumed run must find the same settings


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("lr = = 3")
    (tmp_path / "b.yaml").write_text("a: [")
    (tmp_path / "c.yml").write_text("just text")
    for name in ("a.toml", "b.yaml", "c.yml", "none.toml"):
        with pytest.raises(RecipeError, match=name):
            read_settings(tmp_path / name)
    with pytest.raises(RecipeError, match="write key=value"):
        parse_setting("lr")
    assert parse_setting("a.b=") == {"a.b": ""}
    assert isinstance(presets.build("mini"), MiniRecipe)
    assert presets.build("mini", {"separator.lr": 1}).separator.lr == 1.0


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 99))
def test_muon_moves_all_directions_alike(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=seeded(seed))
    matrix *= torch.logspace(0, -1, columns)  # of singular values that differ
    nearest = orthogonal(matrix)
    assert nearest.shape == matrix.shape
    values = torch.linalg.svdvals(nearest)
    strong = torch.linalg.svdvals(matrix) > 0.02 * matrix.norm()  # a weak direction is not noise that is blown up
    assert bool((values < 1.3).all())
    assert bool((values[strong] > 0.5).all())
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    cosine = float((nearest * (left @ right)).sum() / nearest.norm() / (left @ right).norm())
    assert cosine > 0.9 or not bool(strong.all())


def test_muon_steps_are_of_the_size_that_is_set_whatever_the_layout_and_the_gradient() -> None:
    kernel = torch.randn(16, 8, 3, 3, generator=seeded(0))
    gradient = torch.randn(16, 8, 3, 3, generator=seeded(1))
    moved = []
    for scale, layout in ((1.0, torch.contiguous_format), (1e-4, torch.channels_last)):
        parameter = torch.nn.Parameter(kernel.clone(memory_format=layout))
        optimiser = Muon([parameter], lr=1e-2, weight_decay=0.0)
        parameter.grad = scale * gradient
        optimiser.step()
        moved.append(parameter.detach() - kernel)
    cosine = torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), 0)
    assert float(cosine) > 0.995  # to the rounding of bfloat16
    assert 0.5 < float(moved[0].square().mean().sqrt()) / (0.2 * 1e-2) < 1.5  # as AdamW's steps are in the long run
    assert float((moved[0] * gradient).sum()) < 0


def test_muon_goes_on_in_the_direction_of_the_mean() -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    optimiser = Muon([parameter], lr=1.0, weight_decay=0.0)
    gradient = torch.randn(8, 8, generator=seeded(0))
    for _ in range(30):
        parameter.grad = gradient.clone()
        optimiser.step()
    before = parameter.detach().clone()
    parameter.grad = -gradient  # one against thirty
    optimiser.step()
    assert float(((parameter.detach() - before) * gradient).sum()) < 0


def test_muon_decays_weights() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))
