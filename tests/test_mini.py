"""The mini family keeps the contracts, and its text encoder understands words outside the training data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_MINI
from numpy.typing import NDArray

from clapsep_cli import Query, dsp, extract, load_model, separate
from clapsep_cli.errors import ModelError, QueryError
from clapsep_cli.families.base import load_family
from clapsep_cli.jobs.job import Options
from clapsep_cli.metrics import si_sdr
from clapsep_cli.models import trunk
from clapsep_cli.models.base import Conditions, MaskSeparator, condition
from clapsep_cli.models.mini import Mini, band_matrix, rows_to_bands
from clapsep_cli.models.mini_queries import MiniAudio
from clapsep_cli.models.refined import Refined
from clapsep_cli.query import Excerpt
from clapsep_cli.query import mutual as alternatives
from clapsep_cli.registry import weights_folder
from clapsep_cli.store.checkpoint import Model

LABELS = {
    "dog barking": ["puppy", "a hound", "dogs", "DOG!", "the sound of a dog's bark"],
    "rain falling": ["downpour", "heavy rain on a roof", "a rainstorm"],
    "keyboard typing": ["typing on a computer", "keystrokes"],
    "a helicopter": ["chopper", "a hovering chopper"],
    "a rooster crowing": ["cockerel"],
    "a person speaking": ["someone talks", "speech"],
    "a violin": ["violinist", "a fiddle playing a violin tune"],
}


@pytest.mark.parametrize(("wanted", "said"), [(label, text) for label, texts in LABELS.items() for text in texts])
def test_words_from_outside_the_manifest_find_their_label(wanted: str, said: str, tiny: Model) -> None:
    similarity = tiny.text.embed(list(LABELS)) @ tiny.text.embed([said])[0]
    assert list(LABELS)[int(similarity.argmax())] == wanted


def test_embeddings_have_length_1_and_depend_on_their_own_text_alone(tiny: Model) -> None:
    together = tiny.text.embed(["dog barking", "rain"])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(together[1:], tiny.text.embed(["rain"]))
    for samples in (1, 700, 32_000, 700_001):
        embedded = tiny.audio.embed(torch.randn(samples, generator=torch.Generator().manual_seed(0)))
        assert embedded.shape == (TINY_MINI.dim,)
        assert embedded.norm() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("the sound of rain", "rain"),
        ("A recording of a dog barking.", "dog barking"),
        ("sounds of the sea", "sea"),
        ("the noise of an engine", "engine"),
        ("rain sounds", "rain"),
        ("white noise", "white noise"),
        ("noise", "Noise!"),
        ("the sound", "the sound"),
        ("hammering and construction", "hammering construction"),
    ],
)
def test_words_that_say_nothing_of_a_sound_count_for_nothing(said: str, meant: str, tiny: Model) -> None:
    first, second = tiny.text.embed([said, meant])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    noise, white = tiny.text.embed(["noise", "white noise"])
    assert first.norm() == pytest.approx(1)
    assert float(noise @ white) < 0.99


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("dgo barking", {"dgo": "dog"}),
        ("the xylophne of a cat", {"xylophne": "xylophone"}),
        ("barkng dog, raein", {"barkng": "barking", "raein": "rain"}),
        ("犬 barking qwxzz", {"犬": None, "qwxzz": None}),
        ("a dog's bark, 2 × I", {}),
    ],
)
def test_unknown_words_are_named_with_the_nearest_known(text: str, unknown: dict[str, str | None], tiny: Model) -> None:
    assert tiny.text.unknown(text) == unknown
    mixture = 0.1 * np.random.default_rng(0).standard_normal(9000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        separate(mixture, 16_000, Query("rain", text), tiny)
    assert [str(warning.message).split("does not know ")[1].split(" ")[0] for warning in caught] == [
        repr(word) for word in unknown
    ]
    assert all(warning.filename == __file__ for warning in caught)


def test_a_query_of_unknown_words_alone_is_refused_with_what_may_be_meant(tiny: Model) -> None:
    with pytest.raises(QueryError, match=r"knows no word of the query 'dgo': did you mean 'dog'\?"):
        tiny.ask([Query("dgo")])


def test_all_of_a_long_shot_counts(tiny: Model) -> None:
    audio = torch.randn(800_000, generator=torch.Generator().manual_seed(0))
    changed = audio.clone()
    changed[-1000:] *= 10
    assert not torch.equal(tiny.audio.embed(audio), tiny.audio.embed(changed))


def test_bands_share_out_every_bin() -> None:
    matrix = band_matrix(64, 16)
    torch.testing.assert_close(matrix.sum(0), torch.ones(513))
    assert (matrix >= 0).all()
    assert (matrix.sum(1) > 0).all()
    torch.testing.assert_close(matrix[:15, :15], torch.eye(15))


def test_masks_lie_between_0_and_1_whatever_the_batch() -> None:
    torch.manual_seed(0)
    net = Mini(TINY_MINI).eval()
    mixtures, wanted = 0.1 * torch.randn(2, net.window), condition(torch.randn(2, TINY_MINI.dim), None)
    with torch.no_grad():
        both = net.spectral(net.mask(net.encode(mixtures), wanted))
        alone = net.spectral(net.mask(net.encode(mixtures[1:]), wanted[1:]))
        shared = net.spectral(net.mask(net.encode(mixtures), wanted[1:]))
    assert both.shape == (2, net.window // 320 + 1, 513)
    assert both.min() >= 0
    assert both.max() <= 1
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared[1:], alone, rtol=0, atol=1e-5)


def test_targets_share_bands_and_with_them_bins() -> None:
    torch.manual_seed(0)
    net = Mini(TINY_MINI).eval()
    window, wanted = 0.1 * torch.randn(1, net.window), condition(torch.randn(5, TINY_MINI.dim), None)
    with torch.no_grad():
        masks = net.infer(window, Conditions(wanted, (3, 0, 1, 2, 4)))
        alone = net.mask(net.encode(window), wanted[3:4])
        total = net.spectral(masks)[0].sum(0)
    assert masks.shape == (1, 5, net.window // 320 + 1, TINY_MINI.bands)
    assert total.max() == pytest.approx(1)
    assert (masks[0, 0] < alone[0]).any()
    assert (masks[0, 0] <= alone[0] + 1e-5).all()


def test_fused_for_inference_it_masks_the_same(tiny: Model) -> None:
    torch.manual_seed(0)
    net = Mini(TINY_MINI).eval()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        for tensor, low, high in ((norm.weight, 0.5, 2), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
            assert tensor is not None
            torch.nn.init.uniform_(tensor, low, high)
        assert norm.running_var is not None
        norm.running_var.uniform_(0.5, 2)
    mixture, wanted = 0.1 * torch.randn(1, net.window), condition(*torch.randn(2, 1, TINY_MINI.dim))
    with torch.no_grad():
        before = net.mask(net.encode(mixture), wanted)
        net.fuse()
        torch.testing.assert_close(net.mask(net.encode(mixture), wanted), before, rtol=0, atol=1e-5)
    assert norms
    for fused in (net, tiny.separator):  # a loaded model is fused
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("samples", [513, 50_123])
def test_spectra_some_frames_at_a_time_are_those_of_the_stft(samples: int) -> None:
    audio = torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cat(list(dsp.spectra(audio)), 1), dsp.spectrum(audio), rtol=0, atol=1e-4)
    short = trunk.Trunk().analysis
    assert int((short > 0).sum()) == trunk.ANALYSIS - 1  # a periodic Hann window begins with 0
    stft = torch.stft(audio, 1024, 320, window=short, pad_mode="constant", return_complex=True)
    torch.testing.assert_close(torch.cat(list(dsp.spectra(audio, short)), 1), stft.mT, rtol=0, atol=1e-4)


def test_condition_has_length_1_and_zeros_for_a_missing_side() -> None:
    side = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(condition(side, None), torch.tensor([[0.6, 0.8, 0, 0]]))
    torch.testing.assert_close(condition(None, side), torch.tensor([[0, 0, 0.6, 0.8]]))
    torch.testing.assert_close(condition(side, side), torch.tensor([[0.6, 0.8, 0.6, 0.8]]) / math.sqrt(2))
    with pytest.raises(ValueError, match="positive or a negative"):
        condition(None, None)


def test_the_bundled_model_is_small() -> None:
    assert sum(path.stat().st_size for path in weights_folder().rglob("*")) <= 64_000_000
    assert load_model("mini", "cpu").family == "mini"


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("query", "least"),
    [
        (Query("dog barking", "rain"), 6.0),
        (Query("a puppy", "downpour"), 4.0),
        (Query("dog barking"), 4.0),
        (Query(neg="rain"), 4.0),
        (Query(pos_audio=[EXAMPLES / "another-dog.flac"]), 4.0),
    ],
)
def test_the_bundled_model_lifts_the_dog_out_of_the_rain(query: Query, least: float) -> None:
    """SI-SDRi against the clean dog, in dB; no clip of it was heard in training."""
    mixture, dog = (soundfile.read(EXAMPLES / name, dtype="float32")[0] for name in ("mix.flac", "dog.flac"))
    target = separate(mixture, 44_100, query, load_model("mini", "cpu")).target
    assert si_sdr(target, dog) - si_sdr(mixture, dog) >= least


@pytest.mark.parametrize("query", [Query("dog barking"), Query("dog barking", "rain"), Query(neg="rain")])
def test_a_second_pass_leaves_what_sounds_like_what_the_first_one_left(query: Query) -> None:
    """The mask is the mean of both passes', of each window for itself."""
    model = load_model("mini", "cpu")
    mixture = soundfile.read(EXAMPLES / "mix.flac", dtype="float32")[0]
    windows = torch.from_numpy(np.resize(mixture, (2, model.separator.window)))
    wanted, once = model.ask([query]), model.identity
    first = model.infer(list(windows), wanted)[:, 0]
    separator = model.separator
    assert isinstance(separator, Mini)
    left = dsp.masked(dsp.spectrum(windows), 1 - separator.spectral(first), windows.shape[1])
    texts = {side: model.text.embed(words) for side, words in (("pos", query.pos), ("neg", query.neg)) if words}
    asked = []
    for one in left:
        heard = model.audio.embed(one)[None]
        negative = torch.nn.functional.normalize(texts["neg"] + heard) if "neg" in texts else heard
        asked.append(condition(texts.get("pos"), negative))
    second = separator.mask(separator.encode(windows), torch.cat(asked))
    level = 10 * torch.log10((windows - left).square().sum(1) / windows.square().sum(1))
    share = ((level + 12) / 6).clamp(0, 1)[:, None, None] / 2  # none where the first pass found nothing
    assert share.max() > 0
    model.refine()
    expected = first + share * (second - first)
    torch.testing.assert_close(model.infer(list(windows), wanted)[:, 0], expected, atol=1e-4, rtol=0)
    assert model.identity != once


def test_where_the_first_pass_finds_nothing_there_is_no_second() -> None:
    model = load_model("mini", "cpu")
    window, wanted = [0.1 * torch.randn(model.separator.window)], model.ask([Query("dog barking")])
    for quiet, passes in ((0.2, 1), (1.0, 2)):
        separator = Faint(model.separator, quiet)
        refined = Refined(separator, model.audio)
        refined.infer(torch.stack(window), wanted)
        assert separator.asked == passes


class Faint(MaskSeparator):
    """Masks everything by one factor, and counts how often it is asked."""

    def __init__(self, like: Any, factor: float) -> None:
        super().__init__()
        self.rate, self.window, self.factor, self.asked = like.rate, like.window, factor, 0

    def lower(self, dtype: torch.dtype) -> None: ...

    def encode(self, mixture: torch.Tensor) -> torch.Tensor:
        return mixture

    def mask(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.full((len(condition), self.window // dsp.HOP + 1, 513), self.factor)


def test_silence_has_nothing_for_a_second_pass() -> None:
    model = load_model("mini", "cpu")
    window, wanted = [torch.zeros(model.separator.window)], model.ask([Query("dog barking")])
    first = model.infer(window, wanted)
    model.refine()
    torch.testing.assert_close(model.infer(window, wanted), first)


def test_refining_reads_no_network_before_it_is_used_and_counts_once() -> None:
    model, once = load_model("mini", "cpu"), load_model("mini", "cpu").identity
    model.refine(False)
    assert model.identity == once
    model.refine()
    model.refine()
    assert not {"separator", "audio"} & set(vars(model))
    assert model.identity == f"{once} refined"
    assert isinstance(model.separator, Refined)
    assert isinstance(model.separator.separator, Mini)


def test_a_second_pass_takes_a_model_that_hears_recordings() -> None:
    model = load_model("mini", "cpu")
    model.kind = load_family("tuss")
    with pytest.raises(ModelError, match="takes no recordings as queries"):
        model.refine()


def test_what_is_absent_is_not_found() -> None:
    mixture = soundfile.read(EXAMPLES / "mix.flac", dtype="float32")[0]
    target = separate(mixture, 44_100, Query("a violin"), load_model("mini", "cpu")).target
    assert 10 * np.log10(np.square(target).sum() / np.square(mixture).sum()) < -3


def test_how_a_shot_is_heard(tiny: Model) -> None:
    """At any level, below a second with silence behind it; and every 5 s of a long one count alike."""
    short = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    heard = tiny.audio.embed(short)
    torch.testing.assert_close(tiny.audio.embed(torch.nn.functional.pad(short, (0, 12_000))), heard)
    torch.testing.assert_close(tiny.audio.embed(0.01 * short), heard, rtol=0, atol=1e-5)
    parts = torch.randn(6, 160_000, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1, 6)[:, None]
    assert isinstance(tiny.audio, MiniAudio)
    mean = torch.stack([tiny.audio.hear(part) for part in parts]).mean(0)
    torch.testing.assert_close(tiny.audio.hear(parts.flatten()), mean)
    torch.testing.assert_close(tiny.audio.embed(parts.flatten()), tiny.audio.keys.project(mean[None])[0])


def test_what_the_bundled_trunk_hears_in_a_chirp() -> None:
    """Its front end is the one that its weights were trained with: the maps are pinned."""
    time = torch.arange(48_000, dtype=torch.float64) / 32_000
    chirp = 0.1 * torch.sin(2 * torch.pi * (200 * time + 2000 * time**2)).float()[None]
    audio, separator = (getattr(load_model("mini", "cpu"), part) for part in ("audio", "separator"))
    weights = separator.trunk.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in audio.trunk.state_dict().items())
    with torch.no_grad():
        bands = audio.trunk.hear(chirp)
        maps = audio.trunk(bands)
    figures = [(each.mean().item(), each.std().item()) for each in (bands, *maps)]
    expected = [(-5.21384, 2.73861), (0.678081, 1.300682), (0.662011, 1.450462), (0.03056, 0.046161)]
    np.testing.assert_allclose(figures, [*expected, (0.126951, 0.496745)], rtol=1e-3)
    assert [tuple(each.shape) for each in maps] == [
        (1, channels, 160 // stride, 64 // stride)
        for stride, channels in zip(trunk.STRIDES, trunk.MAPS.values(), strict=True)
    ]
    assert trunk.pooled(maps, 150).mean().item() == pytest.approx(0.14708, rel=1e-3)


@pytest.mark.parametrize("hertz", [300, 1000, 3000, 7000])
def test_a_tone_lies_where_its_band_does(hertz: int, tiny: Model) -> None:
    """In the trunk's rows, and in the decoder's bands that are made of them."""
    time = torch.arange(32_000, dtype=torch.float64) / 32_000
    tone = torch.sin(2 * torch.pi * hertz * time).float()[None]
    separator = tiny.separator
    assert isinstance(separator, Mini)
    row = int(separator.trunk.hear(tone)[0, 0, 50].argmax())
    centres = trunk.mel_centres(64)
    assert abs(float(torch.log2(centres[row] / hertz))) < 0.15
    band = int((dsp.power(dsp.spectrum(tone)) @ separator.bands.T)[0, 50].argmax())
    share = rows_to_bands(64, 64, TINY_MINI)
    torch.testing.assert_close(share.sum(0), torch.ones(64))
    assert abs(float((share[:, band] * torch.arange(64)).sum()) - row) <= 1


def test_what_is_untold_reaches_the_maps_of_likeness_alone() -> None:
    torch.manual_seed(0)
    net = Mini(TINY_MINI).eval()
    features = net.encode(0.1 * torch.randn(1, net.window))
    first, second = (condition(torch.randn(1, TINY_MINI.dim), None) for _ in range(2))
    heard: list[torch.Tensor] = []
    net.query.register_forward_hook(lambda module, arguments, output: heard.append(output))
    with torch.no_grad():
        masks = [
            net.band_mask(features, asked, told)
            for told in (None, torch.ones(1, 1), torch.zeros(1, 1))
            for asked in (first, second)
        ]
    assert torch.equal(heard[0], heard[2])
    assert not torch.equal(heard[0], heard[1])
    assert torch.equal(heard[4], heard[5])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[4], masks[5])  # the maps of likeness know one from the other


@pytest.mark.parametrize("samples", [1600, 32_000, 50_123])
def test_mixtures_of_any_length_are_heard_as_in_training(samples: int) -> None:
    torch.manual_seed(0)
    net = Mini(TINY_MINI).eval()
    with torch.no_grad():
        features = net.encode(0.1 * torch.randn(2, samples))
        mask = net.band_mask(features, condition(torch.randn(2, TINY_MINI.dim), None))
    assert mask.shape == (2, -(-(samples // dsp.HOP + 1) // 32) * 16, TINY_MINI.bands)


def test_a_silent_window_is_masked_like_any_other() -> None:
    torch.manual_seed(0)
    net = Mini(TINY_MINI).eval()
    wanted = condition(torch.randn(2, TINY_MINI.dim), None)
    for dtype in (torch.float32, torch.bfloat16):
        net.lower(dtype)
        with torch.no_grad():
            masks = net.mask(net.encode(torch.zeros(1, net.window)), wanted)
        assert masks.dtype == torch.float32
        assert bool(((masks >= 0) & (masks <= 1)).all())


def test_channels_that_cancel_are_present_like_those_that_agree(tmp_path: Path) -> None:
    mixture, rate = soundfile.read(EXAMPLES / "mix.flac", dtype="float32")
    model, scores = load_model("mini", "cpu"), []
    for name, other in (("agree", mixture), ("cancel", -mixture)):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([mixture, other], 1), rate, "FLOAT")
        done = extract(tmp_path / f"{name}.wav", Query("dog barking", "rain"), model, options=Options(min_presence=0.0))
        assert done.presence["target"] is not None
        assert sorted(done.outputs) == ["residual", "target"]
        scores.append(done.presence["target"]["score"])
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert scores[0] > 0.1


def test_a_shot_whose_channels_cancel_is_heard_like_one_channel(tiny: Model, tmp_path: Path) -> None:
    rate, sound = 16_000, 0.1 * np.random.default_rng(0).standard_normal(25 * 16_000).astype(np.float32)
    both = np.stack([sound, -sound])
    path = tmp_path / "shot.wav"
    soundfile.write(path, both.T, rate, "FLOAT")
    expected = tiny.ask([Query(pos_audio=[(sound, rate)])]).targets
    for shot in (path, (both, rate)):
        torch.testing.assert_close(tiny.ask([Query(pos_audio=[shot])]).targets, expected, rtol=0, atol=1e-4)
    part = tiny.ask([Query(pos_audio=[(sound[: 5 * rate], rate)])]).targets
    torch.testing.assert_close(tiny.ask([Query(pos_audio=[Excerpt(path, 0, 5)])]).targets, part, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mutual", [True, False])
def test_parts_of_three_sounds_and_the_rest_are_real(mutual: bool) -> None:
    """No part holds any of the sounds with its polarity reversed, as what is left does where masks overlap freely."""
    dog, rain = (soundfile.read(EXAMPLES / f"{name}.flac", dtype="float32")[0] for name in ("dog", "rain"))
    time = np.arange(len(dog)) / 44_100
    tone = sum(np.sin(2 * np.pi * 660 * n * time) / n for n in range(1, 8)) * np.std(rain)
    sounds = np.stack([dog, rain, tone]).astype(np.float32)
    mixture, model = sounds.sum(0), load_model("mini", "cpu")
    targets = {name: Query(name) for name in ("dog barking", "rain", "a flute")}
    together = separate(mixture, 44_100, targets, model, mutual)
    asked = alternatives(targets) if mutual else targets
    alone = [separate(mixture, 44_100, query, model).target for query in asked.values()]

    def quality(stems: Iterable[NDArray[np.float32]]) -> float:
        return float(np.mean([si_sdr(stem, sound) for stem, sound in zip(stems, sounds, strict=True)]))

    def least_gain(parts: Iterable[NDArray[np.float32]]) -> float:
        return min(float(np.linalg.lstsq(sounds.T, part, rcond=None)[0].min()) for part in parts)

    assert least_gain([*together.stems.values(), together.residual]) >= 0
    if (
        mutual
    ):  # masks that know of each other's targets overlap here; those that do not happen to leave each other room
        assert least_gain([*alone, mixture - sum(alone)]) < -0.05
        assert quality(together.stems.values()) > quality(alone) + 0.1
