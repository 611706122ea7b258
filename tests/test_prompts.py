"""Prompts are drawn, mixed and scored as the specification of TUSS says, and training lowers the loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tuss_stand_in import GOLDEN, TINY

from clapsep_cli.data import Clip, Corpus
from clapsep_cli.errors import ManifestError, QueryError
from clapsep_cli.models.prompts import FIRST, NEXT, PROMPTS, STEMS, TASKS, draw, drawable, indices, untrained
from clapsep_cli.models.tuss import Tuss
from clapsep_cli.training.loop.sampling import Pool
from clapsep_cli.training.recipes.objective import source_losses
from clapsep_cli.training.recipes.prompt_mixing import PromptMixer, PromptMixing, check_audible

PLENTY = dict.fromkeys(PROMPTS, 9)
RATE = 48_000


# The objective.


@pytest.mark.parametrize("case", ["plain", "zero_in_pair", "zero_singleton", "near_perfect"])
def test_losses_are_the_reference_s(case: str) -> None:
    expected = json.loads((GOLDEN / "tuss_loss_cases.json").read_text())[case]
    with np.load(GOLDEN / "tuss_seed0.npz") as arrays:
        estimates, references = (torch.from_numpy(arrays[f"loss/{case}_{part}"]) for part in ("est", "ref"))
    losses = source_losses(estimates, references, torch.tensor(indices(expected["prompts"])))
    np.testing.assert_allclose(losses.mean(), expected["total"], rtol=0, atol=2e-5)
    # The reference lists the sources of equal prompts next to each other, and so are these.
    np.testing.assert_allclose(losses, expected["per_source_grouped_order"], rtol=0, atol=2e-5)


def test_losses_do_not_depend_on_the_order_of_equal_prompts_only() -> None:
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(2, 4, 500, generator=generator)
    estimates = references + 0.3 * torch.randn(2, 4, 500, generator=generator)
    prompts = torch.tensor([0, 1, 0, 0])
    expected = source_losses(estimates, references, prompts)
    for order in permutations([0, 2, 3]):
        shuffled = estimates[:, [order[0], 1, order[1], order[2]]]
        torch.testing.assert_close(source_losses(shuffled, references, prompts), expected)
    wrong = source_losses(estimates[:, [1, 0, 2, 3]], references, prompts)
    assert wrong.mean() > expected.mean() + 5
    rows = torch.tensor([[0, 1, 0, 0], [1, 1, 2, 2]])  # a row may have prompts of its own
    assert torch.equal(source_losses(estimates, references, rows)[0], expected[0])


def test_losses_have_gradients_where_all_is_silent_or_perfect() -> None:
    references = torch.stack([torch.zeros(2, 100), torch.ones(2, 100)])
    estimates = references.clone().requires_grad_()
    source_losses(estimates, references, torch.tensor([0, 0])).mean().backward()  # type: ignore[no-untyped-call]
    assert estimates.grad is not None
    assert estimates.grad.isfinite().all()


# The vocabulary.


def test_presets_are_complete_sets_that_were_trained() -> None:
    for prompts in TASKS.values():
        assert untrained(prompts) == []
        assert indices(prompts) == [PROMPTS.index(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompts", "reasons"),
    [
        (["speech", "speech", "sfx", "sfx"], []),
        (["speech", "vocals", "sfxbg"], []),
        (["speech"], ["1 prompt instead of 2 to 4"]),
        (["speech"] * 5, ["5 prompts instead of 2 to 4"]),
        (["sfx", "sfxbg"], ["sfx with sfxbg"]),
        (["bass", "musicbg", "bass"], ["bass more than once", "bass with musicbg"]),
        (["musicbg", "musicbg"], ["musicbg more than once"]),
    ],
)
def test_what_was_never_trained_is_named(prompts: list[str], reasons: list[str]) -> None:
    assert untrained(prompts) == reasons


def test_unknown_prompts_are_named_beside_those_there_are() -> None:
    with pytest.raises(QueryError, match=r"no prompt 'voice', 'dog'; there are: speech, sfx, .*, musicbg"):
        indices(["voice", "speech", "dog"])
    with pytest.raises(QueryError, match="no prompt given; there are: a, b"):
        indices([], ["a", "b"])
    assert indices(["b", "a", "b"], ["a", "b"]) == [1, 0, 1]


# Drawing.


def test_weights_sum_to_one_and_bans_hold_both_ways() -> None:
    assert sum(FIRST.values()) == pytest.approx(1)
    for prompt in PROMPTS:
        assert sum(NEXT[prompt].values()) == pytest.approx(1, abs=0.02)
        assert {other for other in PROMPTS if prompt in NEXT[other]} == set(NEXT[prompt])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_only_trained_combinations_are_drawn(count: int) -> None:
    rng = np.random.default_rng(count)
    drawn = [draw(rng, count, PLENTY) for _ in range(500)]
    assert all(len(prompts) == count and untrained(prompts) == [] for prompts in drawn)
    assert {prompt for prompts in drawn for prompt in prompts} == set(PROMPTS)


def test_pairs_are_as_frequent_as_their_weights() -> None:
    rng, number = np.random.default_rng(0), 8000
    pairs = Counter(tuple(draw(rng, 2, PLENTY)) for _ in range(number))
    for first, weights in NEXT.items():
        for second, weight in weights.items():
            expected = number * FIRST[first] * weight / sum(weights.values())
            assert abs(pairs[first, second] - expected) < 5 * expected**0.5 + 1


def test_supply_is_not_exceeded() -> None:
    supply = {"speech": 2, "sfx": 1, "drums": 1}
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert Counter(draw(rng, 4, supply)) == supply
    assert not drawable(5, supply)
    assert not drawable(2, {"sfx": 1, "sfxbg": 3})
    assert not drawable(2, {})


# Mixing.


def tone(hz: float, seconds: float, rate: int = RATE, level: float = 0.3) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hz * t)).astype(np.float32)


class PromptClip(NamedTuple):
    prompt: str
    audio: np.ndarray
    rate: int


class Arrays(Pool):
    """Clips that are on no disk."""

    def __init__(self, clips: Sequence[PromptClip]) -> None:
        listed = tuple(Clip(Path(f"{n}.wav"), clip.prompt, ()) for n, clip in enumerate(clips))
        super().__init__(Corpus(Path(), listed, (1.0,) * len(clips), tuple(c.rate for c in clips), ""), rate=None)
        self.audio = [clip.audio for clip in clips]

    def samples(self, index: int) -> int:
        return len(self.audio[index])

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        return self.audio[index][start:stop]


def mixer_of(
    clips: Sequence[PromptClip], samples: int, seed: int = 0, mixing: PromptMixing = PromptMixing()
) -> PromptMixer:
    return PromptMixer(Arrays(clips), range(len(clips)), samples, seed, mixing)


def clips() -> list[PromptClip]:
    """Three clips of each prompt, told apart by their pitch."""
    return [
        PromptClip(prompt, tone(200 + 100 * (3 * i + j), 0.5), RATE)
        for i, prompt in enumerate(PROMPTS)
        for j in range(3)
    ]


def pitches(source: np.ndarray) -> set[int]:
    spectrum = np.abs(np.fft.rfft(source * np.hanning(len(source))))
    peaks = np.flatnonzero(spectrum > 0.2 * spectrum.max())
    return {round(hz / 100) * 100 for hz in peaks * RATE / len(source)}


def test_batches_depend_on_seed_and_step_alone() -> None:
    first, again, other = (mixer_of(clips(), 4800, seed) for seed in (1, 1, 2))
    for step in (5, 0):
        for a, b in zip(first.batch(step, range(3)), again.batch(step, range(3)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert first.batch(0, range(3))[0].tobytes() != other.batch(0, range(3))[0].tobytes()
    assert first.batch(0, range(3))[0].tobytes() != first.batch(1, range(3))[0].tobytes()


def test_sources_are_of_their_prompts_at_trained_levels() -> None:
    mixer = mixer_of(clips(), 4800, 0)
    counts = Counter()
    for step in range(60):
        sources, ids = mixer.batch(step, range(2))
        assert sources.shape == (*ids.shape, 4800)
        assert sources.dtype == np.float32
        counts[ids.shape[1]] += 1
        for row, prompts in zip(sources, ids, strict=True):
            assert untrained([PROMPTS[i] for i in prompts]) == []
            heard = []
            for source, prompt in zip(row, prompts, strict=True):
                level = 10 * np.log10(np.square(source).mean())
                assert (-20 if PROMPTS[prompt] in ("sfx", "sfxbg", "musicbg") else -10) - 0.01 <= level <= 0.01
                allowed = {prompt}
                if PROMPTS[prompt] in ("sfxbg", "musicbg"):
                    allowed |= set(indices(("sfx",) if PROMPTS[prompt] == "sfxbg" else STEMS))
                found = pitches(source)
                assert {(hz - 200) // 300 for hz in found} <= {int(i) for i in allowed}
                heard += found
            assert len(heard) == len(set(heard))  # no clip twice in a mixture
    assert set(counts) == {2, 3, 4}


def test_backgrounds_are_recorded_or_summed() -> None:
    only_summed = mixer_of(clips(), 4800, 0, PromptMixing(counts=(2,), recorded=0, summed=(0, 0, 1)))
    sums = [
        pitches(source)
        for step in range(40)
        for row, ids in zip(*only_summed.batch(step, range(1)), strict=True)
        for source, prompt in zip(row, ids, strict=True)
        if PROMPTS[prompt] == "musicbg"
    ]
    assert sums
    assert all(len({(hz - 200) // 300 for hz in summed}) == 3 for summed in sums)  # of different stems
    made = mixer_of([clip for clip in clips() if clip.prompt in ("speech", "sfx")], 4800, 0)
    prompts = {PROMPTS[i] for step in range(40) for i in made.batch(step, range(1))[1].ravel()}
    assert prompts == {"speech", "sfx", "sfxbg"}


def test_mixtures_are_limited_to_the_lowest_rate() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 48_000)).astype(np.float32)
    mixer = mixer_of([PromptClip("speech", noise[0], RATE), PromptClip("speech", noise[1], 16_000)], 9600, 0)
    sources, _ = mixer.batch(0, range(1))
    power = np.square(np.abs(np.fft.rfft(sources[0] * np.hanning(9600))))
    above = power[:, int(8500 / RATE * 9600) :].sum(1) / power.sum(1)
    assert above.max() < 1e-4


def test_short_and_mostly_silent_clips_are_heard_whole() -> None:
    click = np.zeros(96_000, np.float32)
    click[70_000:70_100] = tone(1000, 1)[:100]
    mixer = mixer_of([PromptClip("speech", click, RATE), PromptClip("sfx", tone(500, 0.02), RATE)], 4800, 0)
    offsets = set()
    for step in range(20):
        sources, ids = mixer.batch(step, range(1))
        assert np.isfinite(sources).all()
        short = sources[0][int((ids[0] != PROMPTS.index("speech")).argmax())]
        sounding = np.flatnonzero(np.abs(short) > 0)
        assert 950 <= sounding[-1] - sounding[0] <= 960
        offsets.add(int(sounding[0]) // 100)
    assert len(offsets) > 5


def test_unusable_clips_are_named() -> None:
    silent = np.zeros(9, np.float32)
    with pytest.raises(ManifestError, match=r"silent throughout: 1\.wav, 3\.wav"):
        check_audible(Arrays([PromptClip("sfx", audio, RATE) for audio in (tone(1, 1), silent, tone(1, 1), silent)]))
    check_audible(Arrays(clips()))
    with pytest.raises(ManifestError, match=r"no 2 of the clips .*\(drums, musicbg\)"):
        mixer_of([PromptClip("drums", tone(1, 1), RATE)], 4800)


# Training.


def test_a_tiny_network_learns_from_clips_in_memory() -> None:
    rng = np.random.default_rng(0)
    low = [PromptClip("speech", tone(hz, 1), RATE) for hz in rng.uniform(150, 600, 6)]
    high = [PromptClip("sfx", tone(hz, 1), RATE) for hz in rng.uniform(4000, 9000, 6)]
    mixer = mixer_of([*low, *high], 4800, 0, PromptMixing(counts=(2,), summed=(1,)))
    torch.manual_seed(0)
    model = Tuss(TINY)

    def loss(step: int, size: int) -> torch.Tensor:
        sources, prompts = (torch.from_numpy(part) for part in mixer.batch(step, range(size)))
        return source_losses(model.separate(sources.sum(1), prompts), sources, prompts).mean()

    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = loss(999, 8).item()
    for step in range(15):
        optimiser.zero_grad()
        loss(step, 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimiser.step()
    assert loss(999, 8).item() < before - 2
