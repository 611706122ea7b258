"""AudioSep of the released size reproduces the reference's outputs; small ones keep their promises."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audiosep_stand_in import (
    GOLDEN,
    SHARED,
    TINY,
    condition,
    recorded_shapes,
    save_released,
    separator,
    separator_tensors,
    shapes,
    text_tensors,
    tiny_checkpoint,
)
from fill import released_shapes, signal
from plain_audiosep import PlainAudioSep
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.dsp import HOP, RATE_HZ
from clapsep_cli.errors import CheckpointError
from clapsep_cli.models.audiosep import AudioSep, AudioSepConfig, spectrum, waveform
from clapsep_cli.models.clap import ClapTextEncoder
from clapsep_cli.models.layers import FEWEST_COLUMNS, WIDE, Kernel
from clapsep_cli.models.resunet import ShiftedNorm
from clapsep_cli.store import convert_audiosep as convert_audiosep_module
from clapsep_cli.store.convert_audiosep import CLAP, SEPARATOR, convert, convert_audiosep
from clapsep_cli.store.tensors import read_tensors

shared = pytest.mark.skipif(not SHARED.is_dir(), reason="takes ../shared/golden")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Released size, against the reference.


@pytest.fixture(scope="session")
def released() -> AudioSep:
    return separator(AudioSepConfig())


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN / "audiosep_seed0.npz") as arrays:
        return dict(arrays)


def mixture(samples: int, key: int) -> Tensor:
    return signal(samples / RATE_HZ, RATE_HZ, key)[None]


def gapped() -> Tensor:
    audio = mixture(64_000, 205)
    audio[:, 16_000:48_000] = 0
    return audio


def assert_same_wave(wave: Tensor, expected: dict[str, Any], case: str, atol: float = 3e-5) -> None:
    """`wave` is `[samples]`; of the expected one either all is there or its parts."""
    parts = {"wave": slice(None), "first": slice(4096), "strided": slice(None, None, 64), "last": slice(-4096, None)}
    compared = [name for name in parts if case + name in expected]
    assert compared
    for name in compared:
        ours, theirs = wave[parts[name]].numpy(), expected[case + name]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)
        assert np.linalg.norm(ours - theirs) <= 5e-5 * np.linalg.norm(theirs)
    np.testing.assert_allclose(wave.double().square().mean().sqrt(), expected[f"{case}rms"], rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "audio", "key"),
    [
        ("small/even_", mixture(9920, 202), 3),
        ("small/least_", mixture(1025, 203), 3),
        ("small/quiet_", 1e-6 * mixture(32_000, 204), 1),
        ("small/gap_", gapped(), 2),
        ("odd/", mixture(102_944, 201), 1),
    ],
)
def test_waves(released: AudioSep, golden: dict[str, Any], case: str, audio: Tensor, key: int) -> None:
    wave = released(audio, condition(key))[0]
    assert_same_wave(wave, golden, case, atol=1e-10 if "quiet" in case else 3e-5)
    if "gap" in case:
        assert not wave[18_048:45_952].any()


def test_items_of_a_batch_have_conditions_of_their_own(released: AudioSep, golden: dict[str, Any]) -> None:
    audio = torch.cat([mixture(102_944, 201), mixture(102_944, 206)])
    waves = released(audio, torch.cat([condition(1), condition(2)]))
    assert_same_wave(waves[0], golden, "odd/")
    assert_same_wave(waves[1], golden, "odd/second_of_batch_")


@pytest.mark.parametrize(("case", "samples", "key"), [("small/even_", 9920, 202), ("odd/", 102_944, 201)])
def test_stages_and_masks(released: AudioSep, golden: dict[str, Any], case: str, samples: int, key: int) -> None:
    stages: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: stages.update({name: output[0]})

    watched = {"pre_conv": released.stem, "bottleneck": released.bottleneck, "after_conv": released.head}
    watched |= {f"encoder{k}": encoder.block for k, encoder in enumerate(released.encoders, 1)}
    watched |= {f"decoder{k}": decoder for k, decoder in enumerate(released.decoders, 1)}
    hooks = [module.register_forward_hook(note(name)) for name, module in watched.items()]
    spec, given = spectrum(mixture(samples, key)), condition(3 if "even" in case else 1)
    image = released.hear(spec)
    maps = released.maps(image, given)
    for hook in hooks:
        hook.remove()
    stages["bn0"] = released.norm(spec.abs())
    assert len(stages) == 16
    for name, stage in stages.items():
        assert list(stage.shape) == golden[f"{case}{name}_shape"].tolist()
        _, frames, bins = stage.shape
        parts = {
            "over_bins": stage[:8, frames // 2, :: max(1, bins // 16)],
            "over_frames": stage[:8, :: max(1, frames // 16), bins // 4],
            "mean_std": torch.stack([stage.double().mean(), stage.double().std(correction=0)]),
        }
        for part, values in parts.items():
            np.testing.assert_allclose(values, golden[f"{case}{name}_{part}"], rtol=0, atol=2e-4, err_msg=name)

    frames = spec.shape[1]
    mask = released.mask(image, given)[0, :frames]
    assert not mask[:, -1].any()
    thinned, heard = mask[::25, :-1:8].numpy(), spec[0, ::25, ::8]
    magnitude, cosine, sine = (golden[f"{case}mask_{part}"][:, :-1] for part in ("mag", "cos", "sin"))
    np.testing.assert_allclose(heard.abs(), golden[f"{case}magnitude"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(np.abs(thinned), magnitude, rtol=0, atol=3e-5)
    expected = magnitude * (cosine + 1j * sine)
    assert np.linalg.norm(thinned - expected) <= 5e-5 * np.linalg.norm(expected)
    turn = F.normalize(maps[0, 1:, :frames:25, ::8].tanh(), dim=0).numpy()  # some masks are 0, and turn nothing
    assert np.linalg.norm(turn - [cosine, sine]) <= 5e-5 * np.linalg.norm([cosine, sine])
    torch.testing.assert_close(mask[:, :-1].abs(), maps[0, 0, :frames].sigmoid(), rtol=0, atol=3e-5)


@shared
@pytest.mark.parametrize(
    ("case", "samples", "key", "given"), [("a_", 320_000, 200, 1), ("b_", 320_000, 200, 2), ("whole_", 384_000, 207, 1)]
)
def test_whole_golden_files(released: AudioSep, case: str, samples: int, key: int, given: int) -> None:
    with np.load(SHARED / ("chunks.npz" if case == "whole_" else "ten.npz")) as arrays:
        assert_same_wave(released(mixture(samples, key), condition(given))[0], arrays, case)


@shared
def test_shifts_of_every_norm(released: AudioSep) -> None:
    with np.load(SHARED / "ten.npz") as arrays:
        expected = arrays["a_betas"]
    norms = {
        SEPARATOR + convert_audiosep_module._released(f"{name}.beta.weight"): norm
        for name, norm in released.named_modules()
        if isinstance(norm, ShiftedNorm)
    }
    at, unused = 0, []
    for name, shape in recorded_shapes().items():
        if ".film." not in name or not name.endswith(".weight"):
            continue
        if name in norms:
            shifts = norms.pop(name).beta(condition(1))[0]
            np.testing.assert_allclose(shifts, expected[at : at + shape[0]], rtol=0, atol=1e-5, err_msg=name)
        else:
            unused.append(name)
        at += shape[0]
    assert (at, norms) == (len(expected), {})
    assert all("decoder_block" in name and "beta2" in name for name in unused)


@shared
def test_chunks_as_the_reference_joins_them(released: AudioSep) -> None:
    """Flaws that only parity needs: hard cuts, off the network's grid."""
    audio, parts = mixture(384_000, 207), []
    for start in range(0, 384_000 - 32_000, 96_000):
        chunk = released(audio[:, start : start + 160_000], condition(1))[0]
        parts.append(chunk[32_000 if start else 0 : 128_000 if start < 288_000 else None])
    joined = torch.cat(parts)
    with np.load(SHARED / "chunks.npz") as arrays:
        assert_same_wave(joined, arrays, "chunked_")
        for seam in arrays["seams"].tolist():
            around = joined[seam - 96 : seam + 96]
            np.testing.assert_allclose(around, arrays[f"chunked_around_{seam}"], rtol=0, atol=3e-5)


@shared
@pytest.mark.parametrize(("case", "embedding"), [("wave_", "text_embed"), ("phrase_wave_", "phrase_embed")])
def test_waves_for_texts(released: AudioSep, case: str, embedding: str) -> None:
    with np.load(SHARED / "text.npz") as arrays:
        wave = released(mixture(102_944, 201), torch.from_numpy(arrays[embedding][:1]))[0]
        assert_same_wave(wave, arrays, case)


def test_text_embeddings(golden: dict[str, Any]) -> None:
    tensors = separator_tensors(TINY) | text_tensors(released_shapes("clap"))
    config = replace(AudioSepConfig(), widths=TINY.widths)
    with torch.device("meta"):
        text = ClapTextEncoder(config, None)
    film = {name: torch.zeros(shape) for name, shape in shapes(config).items()}  # of a condition of 512
    tensors |= {SEPARATOR + name: tensor for name, tensor in film.items()}
    text.load_state_dict(convert(tensors, config)["text"], assign=True)
    text.eval()
    for case in ("text", "phrase", "long"):
        ids = torch.from_numpy(golden[f"text/{case}_ids"])
        mask = torch.from_numpy(golden["text/text_mask"]) if case == "text" else torch.ones_like(ids)
        np.testing.assert_allclose(text.embed_ids(ids, mask), golden[f"text/{case}_embed"], rtol=0, atol=1e-6)


def test_shapes_of_any_size_are_the_recorded_ones_for_the_released_size() -> None:
    recorded = recorded_shapes()
    ours = {SEPARATOR + name: shape for name, shape in shapes(AudioSepConfig()).items()}
    assert ours == {name: shape for name, shape in recorded.items() if name.startswith(SEPARATOR)}
    text = {CLAP + name: shape for name, shape in released_shapes("clap").items() if name.startswith("text_")}
    assert text.items() <= recorded.items()


# Small networks of the same classes.


@pytest.fixture
def tiny() -> AudioSep:
    return separator()


@pytest.mark.parametrize("frames", [1, 4, 32, 34, 64, 67, 132])
@pytest.mark.parametrize("widths", [(4, 6, 8), (5, 5), (3, 3, 7, 4)])
def test_any_size_equals_the_plain_network(frames: int, widths: tuple[int, ...]) -> None:
    """For inference, piece by piece, and as it is trained."""
    config = replace(TINY, widths=widths)
    tensors, model = separator_tensors(config), separator(config)
    plain = PlainAudioSep({name.removeprefix(SEPARATOR): tensor for name, tensor in tensors.items()}, len(widths))
    audio = mixture(max(1025, (frames - 1) * HOP), 5)
    expected = plain.separate(audio, condition(1, config.dim))
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(audio, condition(1, config.dim)), expected, rtol=0, atol=1e-5)
    image = model.hear(spectrum(audio))
    maps = model.maps(image, condition(1, config.dim))
    torch.testing.assert_close(maps, plain.stages["after_conv"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 32])
@pytest.mark.parametrize(("into", "out"), [(3, 5), (WIDE, WIDE), (2 * WIDE, WIDE + 4)])
@pytest.mark.parametrize("columns", [FEWEST_COLUMNS - 1, FEWEST_COLUMNS])
def test_wide_convolutions_are_convolutions(rows: int, into: int, out: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(out, into, 3, 3, generator=generator) / (9 * into) ** 0.5
    x, bias = torch.randn(2, into, rows + 2, columns, generator=generator), torch.randn(out, generator=generator)
    kernel = Kernel(weight, columns)
    assert len(kernel.weights) == (6 if into >= WIDE and columns == FEWEST_COLUMNS else 1)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=(0, 1))
    convolved = kernel(x.contiguous(memory_format=torch.channels_last), bias)
    torch.testing.assert_close(convolved.double(), expected, rtol=0, atol=4e-5)


def test_what_was_folded_is_forgotten_with_the_weights(tiny: AudioSep) -> None:
    audio, given = mixture(20_000, 5), condition(1, TINY.dim)
    before = tiny(audio, given)
    other = separator(TINY, separator_tensors(TINY, seed=1))
    tiny.load_state_dict(other.state_dict())
    assert torch.equal(tiny(audio, given), other(audio, given))
    tiny.train()
    tiny.encoders[0].block.conv1.weight.mul_(1.5)
    changed = tiny.eval()(audio, given)
    assert (changed - other(audio, given)).abs().max() > 1e-4
    assert (changed - before).abs().max() > 1e-4


def test_training_reaches_every_parameter_and_moves_the_statistics(tiny: AudioSep) -> None:
    audio = torch.cat([mixture(20_000, 5), mixture(20_000, 6)])
    with torch.enable_grad():
        tiny.train()
        tiny(audio, torch.cat([condition(1, TINY.dim), condition(2, TINY.dim)])).square().mean().backward()
    assert [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    fresh = separator().state_dict()
    moved = {name for name, tensor in tiny.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved == {name for name in fresh if "running" in name or "num_batches" in name}


def test_masks_of_several_stems_and_windows(tiny: AudioSep) -> None:
    windows = torch.cat([mixture(TINY.window, 5), mixture(TINY.window, 6)])
    wanted = torch.cat([condition(key, TINY.dim) for key in (1, 2, 3)])
    masks = tiny.infer(windows, wanted)
    assert masks.shape == (2, 3, TINY.window // HOP + 1, 1025)
    assert masks.dtype == torch.complex64
    assert masks.abs().max() <= 1 + 1e-6  # rounded
    for window, masks_of_it in zip(windows, masks, strict=True):
        for given, mask in zip(wanted, masks_of_it, strict=True):
            expected = tiny(window[None], given[None])
            torch.testing.assert_close(waveform(mask * spectrum(window[None]), TINY.window), expected)


@pytest.mark.parametrize("samples", [1, 320, 1024, 1025, 5000, 12_801])
def test_any_length_is_kept(tiny: AudioSep, samples: int) -> None:
    wave = tiny(mixture(samples, 5), condition(1, TINY.dim))
    assert wave.shape == (1, samples)
    assert wave.isfinite().all()
    assert not tiny(torch.zeros(1, samples), condition(1, TINY.dim)).any()


def test_half_precision_is_close_and_ends_in_single(tiny: AudioSep) -> None:
    audio, given = mixture(20_000, 5), condition(1, TINY.dim)
    expected = tiny(audio, given)
    tiny.lower(torch.bfloat16)
    half = tiny(audio, given)
    assert half.dtype == torch.float32
    error = (half - expected).square().sum() / expected.square().sum()
    assert 1e-9 < error < 0.1


def test_config_rejects_nonsense_and_survives_json() -> None:
    for wrong, rule in (
        ({"widths": (4, 0)}, "positive"),
        ({"window": 640}, "reflected"),
        ({"window": 32_001}, "multiple of the hop"),
        ({"widths": (4,) * 11}, "halved at every level"),
    ):
        with pytest.raises(ValueError, match=rule):
            replace(TINY, **wrong)  # type: ignore[arg-type]
    read = json.loads(json.dumps(asdict(AudioSepConfig())))
    assert AudioSepConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}) == AudioSepConfig()
    assert AudioSepConfig().grid == 10_240


# Conversion.


TEXT_SHAPES = {name: shape for name, shape in recorded_shapes().items() if name.startswith(CLAP + "text_")}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_file_becomes_separator_and_text_tower(tmp_path: Path, prefix: str) -> None:
    save_released(tmp_path / "a.ckpt", {prefix + name: tensor for name, tensor in tiny_checkpoint().items()})
    convert_audiosep([tmp_path / "a.ckpt"], tmp_path / "new", TINY, revision="r1")
    model = AudioSep(TINY)
    model.load_state_dict(read_tensors(tmp_path / "new" / "separator.safetensors"))
    audio, given = mixture(20_000, 5), condition(1, TINY.dim)
    assert torch.equal(model.eval()(audio, given), separator()(audio, given))
    text = ClapTextEncoder(TINY, None)
    text.load_state_dict(read_tensors(tmp_path / "new" / "text.safetensors"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["separator.safetensors", "text.safetensors"]


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        (SEPARATOR, "base.bn0.running_mean"),
        (SEPARATOR, "base.encoder_block2.conv_block1.shortcut.bias"),
        (SEPARATOR, "base.decoder_block3.conv1.weight"),
        (SEPARATOR, "film.conv_block7a->conv_block1->beta2.weight"),
        (SEPARATOR, "film.decoder_block1->beta1.bias"),
        (CLAP, "text_branch.encoder.layer.1.attention.self.key.weight"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "misshapen", "unexpected"])
def test_conversion_names_what_does_not_fit(prefix: str, name: str, fault: str) -> None:
    tensors = tiny_checkpoint()
    if fault == "missing":
        del tensors[prefix + name]
    elif fault == "misshapen":
        tensors[prefix + name] = tensors[prefix + name][:-1]
    else:
        name = f"{name}.more"
        tensors[prefix + name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=rf"AudioSep checkpoint .*; {fault}: {name}"):
        convert(tensors, TINY)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected: decoder_model\.norm$"):
        convert({**tiny_checkpoint(), "decoder_model.norm": torch.zeros(1)}, TINY)
    save_released(tmp_path / "a.ckpt", {**tiny_checkpoint(), "extra": Path("x")})
    with pytest.raises(CheckpointError, match="holds more than weights"):
        convert_audiosep([tmp_path / "a.ckpt"], tmp_path, TINY)
    with pytest.raises(CheckpointError, match="one checkpoint, not 2"):
        convert_audiosep([tmp_path / "a.ckpt"] * 2, tmp_path, TINY)
