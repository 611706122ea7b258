"""Tests the pipeline: target and residual have the shape and level of the input, and add up to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import Fixed, Stub
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from recordings import noise32 as noise
from stand_ins import Moody

from clapsep_cli import Query, extract, load_model, separate
from clapsep_cli.errors import AudioError, CheckpointError, DeviceError, ModelError, OutputError, QueryError, UsageError
from clapsep_cli.jobs.job import Options
from clapsep_cli.models.base import Conditions
from clapsep_cli.separation import stream
from clapsep_cli.store.checkpoint import Model

GOLDEN = Path(__file__).parent / "golden" / "end_to_end"
WANTED = Conditions(torch.ones(1, 8), (0,))

Audio = NDArray[np.float32]


def pcm(audio: Audio, bits: int) -> Audio:
    full = 2 ** (bits - 1)
    return np.asarray(np.round(audio * full) / full, np.float32)


def run(model: Model, audio: Audio, rate: int, blocks: list[int] | None = None) -> Audio:
    ends = np.cumsum(blocks or [audio.shape[1]])
    parts = [part for part in np.split(audio, [e for e in ends if e < audio.shape[1]], 1) if part.shape[1]]
    return np.concatenate([stems[0] for _, stems in stream(model, WANTED, parts, rate, len(audio))], 1)


def test_golden_end_to_end(released_folder: Path, tmp_path: Path) -> None:
    """The reference's own output, from its files to a file of ours (spec: golden/clapsep_end_to_end, seed 0)."""
    model = load_model(released_folder, "cpu", "high")
    query = Query(pos_audio=[GOLDEN / "query_pos.flac"], neg_audio=[GOLDEN / "query_neg.flac"])
    done = extract(GOLDEN / "mix.flac", query, model, tmp_path)
    target, rate = soundfile.read(done.target, dtype="float32")
    golden = np.load(GOLDEN / "target.npz")
    assert rate == 32_000
    assert target.shape == (320_000,)
    for name, part in (("strided", target[::16]), ("first", target[:4096]), ("last", target[-4096:])):
        assert np.abs(part - golden[name]).max() < 1e-4
    mixture, _ = soundfile.read(GOLDEN / "mix.flac", dtype="int16")
    written = [soundfile.read(path, dtype="int16")[0].astype(int) for path in done.outputs.values()]
    np.testing.assert_array_equal(written[0] + written[1], mixture)


@settings(max_examples=20, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 22050, 32000, 44100, 48000, 96000]),
    channels=st.integers(1, 4),
    samples=st.one_of(st.integers(1, 50), st.integers(51, 200_000)),
    gain=st.floats(0, 1),
)
def test_parts_have_the_mixtures_shape_and_sum(rate: int, channels: int, samples: int, gain: float) -> None:
    mixture = pcm(noise(channels, samples), 16)
    result = separate(mixture, rate, Query("dog"), Stub(Fixed(gain)))
    assert result.target.shape == result.residual.shape == mixture.shape
    np.testing.assert_allclose(result.target, gain * mixture, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.target + result.residual, mixture, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 11_025, 32_000, 48_000, 96_000])
def test_targets_share_the_mixture_at_every_rate_and_leave_nothing_negative(rate: int) -> None:
    """Above the model's band, across windows, and for more targets than are masked at once."""
    mixture = noise(2, 3 * rate + 17)
    ramp = torch.linspace(0.9, 0.1, 513)
    model = Stub(Fixed(ramp, window=32_000))
    targets = {str(number): Query("x" * (number + 1)) for number in range(5)}
    result = separate(mixture, rate, targets, model)
    ramps = 5 * ramp.numpy()
    left = np.fft.rfft(result.residual), np.fft.rfft(mixture)
    hertz = np.fft.rfftfreq(mixture.shape[1], 1 / rate)
    gain = 1 - np.minimum(1, np.interp(hertz, np.arange(513) * 31.25, ramps))
    gain[hertz > 16_000] = 1 - np.minimum(1, ramps)[-64:].mean()
    band = (hertz > 200) & (np.abs(hertz - 16_000) > 200)
    ratio = (left[0] * left[1].conj()).real.mean(0)[band] / np.square(np.abs(left[1])).mean(0)[band]
    assert ratio.min() > -0.02
    np.testing.assert_allclose(ratio, gain[band], rtol=0, atol=0.12)
    for stem in result.stems.values():
        np.testing.assert_array_equal(stem, result.target)


@settings(max_examples=15, deadline=None)
@given(blocks=st.lists(st.integers(1, 30_000), min_size=1, max_size=12), rate=st.sampled_from([8000, 11025, 32000]))
def test_blocks_do_not_matter(blocks: list[int], rate: int) -> None:
    frames = torch.rand(101, 513, generator=torch.Generator().manual_seed(1))
    model = Stub(Fixed(frames, window=32_000))
    mixture = noise(2, 90_123)
    np.testing.assert_allclose(run(model, mixture, rate, blocks), run(model, mixture, rate), rtol=0, atol=1e-6)


def test_mono_arrays_stay_mono() -> None:
    result = separate(noise(1000), 8000, Query("dog"), Stub(Fixed(0.5)))
    assert result.target.shape == (1000,)


def test_the_model_hears_the_mean_of_the_channels_at_32_khz() -> None:
    separator = Fixed(1.0)
    t = np.arange(48_000) / 48_000
    left, right = (np.sin(2 * np.pi * f * t).astype(np.float32) for f in (440, 1000))
    separate(np.stack([left, right]), 48_000, Query("dog"), Stub(separator))
    t = np.arange(32_000) / 32_000
    expected = (np.sin(2 * np.pi * 440 * t) + np.sin(2 * np.pi * 1000 * t)) / 2
    heard = separator.heard[0].numpy()
    np.testing.assert_allclose(heard[500:31_500], expected[500:31_500], rtol=0, atol=1e-3)
    assert not heard[32_000:].any()


@pytest.mark.parametrize("blocks", [[96_000], [7, 50_000, 20_000]])
def test_in_seconds_whose_channels_cancel_the_model_hears_one_of_them(blocks: list[int]) -> None:
    separator, (left, right) = Fixed(1.0, window=96_000), noise(2, 96_000)
    right[32_000:64_000] = -1.1 * left[32_000:64_000]
    run(Stub(separator), np.stack([left, right]), 32_000, blocks)
    expected = (left + right) / 2
    expected[32_000:64_000] = left[32_000:64_000]
    np.testing.assert_allclose(separator.heard[0], expected, rtol=0, atol=1e-7)


def test_over_full_scale_the_model_hears_less_but_levels_stay() -> None:
    separator = Fixed(1.0)
    loud = 4 * noise(1, 32_000) / np.float32(0.1)
    result = separate(loud, 32_000, Query("dog"), Stub(separator))
    assert separator.heard[0].abs().max() == pytest.approx(0.9)
    np.testing.assert_allclose(result.target, loud, rtol=0, atol=2e-5)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_silence_and_dc(tiny: Model, value: float) -> None:
    result = separate(np.full((2, 40_000), value, np.float32), 16_000, Query("dog"), tiny)
    assert np.isfinite(result.target).all()
    np.testing.assert_allclose(result.target + result.residual, value, rtol=0, atol=1e-7)


def test_a_quiet_mixture_is_separated_like_a_loud_one(tiny: Model) -> None:
    mixture = noise(64_000)
    loud, quiet = (separate(scale * mixture, 32_000, Query("dog"), tiny).target for scale in (1.0, 1e-3))
    np.testing.assert_allclose(1e3 * quiet, loud, rtol=0, atol=2e-4)


def test_what_is_held_does_not_grow() -> None:
    """Samples come out at most two windows and a block after they went in, however long the recording."""
    model, rate, block = Stub(Fixed(0.5, window=32_000)), 8000, np.zeros((1, 8000), np.float32)
    fed, behind = 0, []

    def blocks():  # type: ignore[no-untyped-def]
        nonlocal fed
        for _ in range(60):
            fed += 8000
            yield block

    out = 0
    for mixture, stems in stream(model, WANTED, blocks(), rate, 1):
        assert stems.shape == (1, *mixture.shape)
        out += stems.shape[2]
        behind.append(fed - out)
    assert out == 60 * 8000
    assert max(behind) <= 3 * rate


def test_several_queries_of_a_side_are_averaged_and_alpha_mixes_text_with_audio() -> None:
    model, shot = Stub(Fixed(1.0)), (noise(500), 32_000)
    texts = [model.text.embed([t])[0] for t in ("a", "bb")]
    audio = model.audio.embed(torch.from_numpy(shot[0]))
    zero = torch.zeros(4)
    cases = [
        (Query(["a", "bb"]), (texts[0] + texts[1]) / 2, zero),
        (Query(neg="a"), zero, texts[0]),
        (Query(pos_audio=[shot]), audio, zero),
        (Query("a", "bb", [shot], alpha=0.25), 0.25 * audio + 0.75 * texts[0], texts[1]),
        (Query("a", pos_audio=[shot, shot]), 0.5 * audio + 0.5 * texts[0], zero),
    ]
    for query, positive, negative in cases:
        expected = torch.nn.functional.normalize(torch.cat([positive, negative]), dim=0)
        torch.testing.assert_close(model.ask([query]).targets[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, '--pos "dog barking"'),
        ({"pos": " "}, "--pos is empty"),
        ({"neg": ["rain", ""]}, "--neg is empty"),
        ({"pos": "dog", "alpha": 1.5}, "--alpha"),
    ],
)
def test_bad_queries(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        Query(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        ("mix.wav", 44_100, "use extract"),
        (np.zeros((441_000, 2)), 44_100, r"at most 32 channels, not \[441000, 2\]; transpose it"),
        (np.zeros((2, 2, 9)), 44_100, r"\[channels, samples\].*not \[2, 2, 9\]"),
        (44_100, np.zeros(9), r"not \[\]"),
        (np.zeros(9, complex), 44_100, "type complex128"),
        (np.array(["a"]), 44_100, "type <U1"),
        (np.zeros(9), 44_100.5, "whole number of Hz"),
        (np.zeros(9), "44100", "whole number of Hz"),
        (np.zeros(9), 0, "above 0"),
    ],
)
def test_misuse_from_python_is_told_in_a_line(audio: object, rate: object, message: str, tiny: Model) -> None:
    with pytest.raises(AudioError, match=message):
        separate(audio, rate, Query("dog"), tiny)  # type: ignore[arg-type]
    if not isinstance(audio, int | str):
        with pytest.raises(AudioError, match=message):
            tiny.ask([Query(pos_audio=(audio, rate))])  # type: ignore[arg-type]


def test_more_misuse_from_python(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="give a Query"):
        separate(noise(9), 8000, "dog", tiny)  # type: ignore[arg-type]
    for call in (
        lambda: separate(noise(9), 8000, Query("dog"), "mini"),  # type: ignore[arg-type]
        lambda: extract(tmp_path / "mix.wav", Query("dog"), "mini"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match="load_model"):
            call()
    with pytest.raises(AudioError, match="for arrays, use separate"):
        extract(noise(9), Query("dog"), tiny)  # type: ignore[arg-type]
    with pytest.raises(AudioError, match=r"ends at 1.00 s: there is no 5-6 s"):
        separate(noise(8000), 8000, Query(pos_spans=(5, 6)), tiny)


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda audio: torch.from_numpy(audio).double().requires_grad_(),
        lambda audio: audio.astype(np.float64),
        lambda audio: np.round(audio * 2**31).astype(np.int32),
        lambda audio: torch.from_numpy(np.round(audio * 2**15).astype(np.int16)),
        lambda audio: audio[::-1][::-1],
    ],
)
def test_arrays_of_all_kinds_are_the_same_audio(convert: Callable[[Audio], Any]) -> None:
    mixture, model = pcm(noise(2, 9000), 16), Stub(Fixed(0.5))
    expected = separate(mixture, 16_000, Query("dog"), model)
    result = separate(convert(mixture), np.float64(16_000), Query("dog"), model)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result.target, expected.target)
    assert result.rate == 16_000
    bytes_ = separate(np.array([128, 255, 0], np.uint8), 8000, Query("dog"), model)
    np.testing.assert_allclose(bytes_.target + bytes_.residual, [0, 127 / 128, -1], atol=1e-7)


def test_files_by_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "mix.wav", noise(9000), 8000)
    done = extract(str(tmp_path / "mix.wav"), Query("dog"), Stub(Fixed(0.5)), str(tmp_path / "out"))
    assert done.target == tmp_path / "out" / "mix.target.wav"


def test_targets_leave_one_another_s_sounds_unless_told_not_to(tmp_path: Path) -> None:
    model = Stub(Moody())
    mixture, targets = noise(32_000), {"dog": Query("dog"), "rain": Query("rain")}
    soundfile.write(tmp_path / "mix.wav", mixture, 16_000, "FLOAT")
    both = {"dog": Query("dog", "rain"), "rain": Query("rain", "dog")}
    for mutual, same in ((True, both), (False, targets)):
        result = separate(mixture, 16_000, targets, model, mutual)
        expected = separate(mixture, 16_000, same, model, mutual=False)
        done = extract(tmp_path / "mix.wav", targets, model, tmp_path / str(mutual), Options(mutual=mutual))
        for name in targets:
            np.testing.assert_array_equal(result.stems[name], expected.stems[name])
            written = soundfile.read(done.outputs[name], dtype="float32")[0]
            np.testing.assert_allclose(written, result.stems[name], rtol=0, atol=1e-6)
    assert np.abs(result.stems["dog"] - separate(mixture, 16_000, targets, model).stems["dog"]).max() > 1e-4


def test_unknown_words_are_an_error(tiny: Model) -> None:
    with pytest.raises(QueryError, match="xqzzy"):
        tiny.ask([Query("xqzzy")])


def test_audio_that_is_none() -> None:
    model = Stub(Fixed(1.0))
    with pytest.raises(AudioError, match=r"sample 5 \(0.005 s\) of channel 2"):
        separate(np.array([[0.0] * 9, [0.0] * 5 + [np.nan] * 4], np.float32), 1000, Query("a"), model)
    with pytest.raises(AudioError, match="at least one"):
        separate(np.zeros((2, 0), np.float32), 1000, Query("a"), model)
    with pytest.raises(AudioError, match="silent"):
        model.ask([Query(pos_audio=[(np.zeros(10, np.float32), 1000)])])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_files_keep_rate_channels_length_and_depth_and_add_up(
    tiny: Model, tmp_path: Path, subtype: str, rate: int
) -> None:
    path = tmp_path / "mix.wav"
    soundfile.write(path, noise(20_001, 2), rate, subtype=subtype)
    mixture, _ = soundfile.read(path, dtype="float64")
    done = extract(path, Query("dog barking", "rain"), tiny)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mix.residual.wav", "mix.target.wav", "mix.wav"]
    total = np.zeros_like(mixture)
    for part in done.outputs.values():
        info = soundfile.info(part)
        assert (info.samplerate, info.channels, info.frames) == (rate, 2, 20_001)
        assert info.subtype == {"PCM_U8": "PCM_16"}.get(subtype, subtype)
        audio = soundfile.read(part, dtype="float64")[0]
        assert np.abs(audio).max() > 1e-3
        total += audio
    np.testing.assert_allclose(total, mixture, rtol=0, atol=0 if subtype in ("PCM_U8", "PCM_16", "PCM_24") else 1e-7)


def test_clipped_samples_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "mix.wav"
    square = np.where(np.arange(32_000) % 200 < 100, 0.999, -0.999)
    soundfile.write(path, square, 32_000, subtype="PCM_16")
    low = torch.zeros(513)
    low[:10] = 1  # the partials of a square wave add up to less than its first ones alone
    done = extract(path, Query("dog"), Stub(Fixed(low)))
    assert done.clipped["target"] > 0


def test_nothing_is_overwritten_unasked_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "mix.wav"
    soundfile.write(path, noise(5000), 8000)
    model = Stub(Fixed(0.5))
    (tmp_path / "mix.residual.wav").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        extract(path, Query("dog"), model)
    assert (tmp_path / "mix.residual.wav").read_text() == "precious"
    extract(path, Query("dog"), model, options=Options(overwrite=True))
    assert soundfile.info(tmp_path / "mix.residual.wav").frames == 5000

    broken = tmp_path / "broken.wav"
    bad = noise(5000)
    bad[4000] = np.inf
    soundfile.write(broken, bad, 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match="sample 4000"):
        extract(broken, Query("dog"), model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_models_that_are_none(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="mini"):
        load_model("maxi")
    with pytest.raises(CheckpointError, match=r"separator\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(DeviceError, match="auto"):
        load_model(tiny_folder, "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="0 CUDA devices"):
            load_model(tiny_folder, "cuda")
    (tmp_path / "separator.safetensors").write_bytes((tiny_folder / "audio.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not a separator"):
        _ = load_model(tmp_path, "cpu").separator
