"""The released networks reproduce the outputs of the reference; small ones keep the contracts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import checkpoint_shapes
import numpy as np
import pytest
import torch
from fill import checkpoints, golden, noise, released_shapes, signal
from released import released_parts
from tiny_clapsep import TINY, WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli.dsp import N_FFT, RATE_HZ, Resampler, spectrum, waveform
from clapsep_cli.errors import CheckpointError
from clapsep_cli.models import htsat
from clapsep_cli.models.base import condition
from clapsep_cli.models.clap import ClapAudioEncoder, ClapTextEncoder
from clapsep_cli.models.clapsep import CLAPSep, CLAPSepConfig, Features
from clapsep_cli.models.htsat import BinNorm
from clapsep_cli.store.convert_clapsep import LORA_RANK, convert

Parts = dict[str, dict[str, Tensor]]
Module = TypeVar("Module", bound=nn.Module)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def loaded(module: Module, state: dict[str, Tensor]) -> Module:
    module.load_state_dict(state, assign=True)
    return module.eval()


# Released size, against the reference.


@pytest.fixture(scope="session")
def parts() -> Parts:
    return released_parts()


@pytest.fixture(scope="session")
def separator(parts: Parts) -> CLAPSep:
    with torch.device("meta"):
        return loaded(CLAPSep(CLAPSepConfig()), parts["separator"])


@pytest.fixture(scope="session")
def mixture() -> Tensor:
    return signal(10, RATE_HZ, 200)[None]


@pytest.fixture(scope="session")
def features(separator: CLAPSep, mixture: Tensor) -> Features:
    with torch.no_grad():
        return separator.encode(mixture)


def test_text_embeddings(parts: Parts) -> None:
    with torch.device("meta"):
        text = ClapTextEncoder(CLAPSepConfig(), None)
    embeddings = loaded(text, parts["text"]).embed_ids(
        *(torch.from_numpy(golden(f"text_{n}")) for n in ("ids", "mask"))
    )
    np.testing.assert_allclose(embeddings, golden("text_embed"), rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def hearing(parts: Parts) -> ClapAudioEncoder:
    with torch.device("meta"):
        return loaded(ClapAudioEncoder(CLAPSepConfig()), parts["audio"])


@pytest.mark.parametrize(("entry", "seconds"), [("q10", 10), ("q3", 3), ("q0p5", 0.5)])
def test_audio_embeddings(hearing: ClapAudioEncoder, entry: str, seconds: float) -> None:
    embedding = hearing.embed(signal(seconds, hearing.rate, 100))
    # Tight enough to tell whether the audio was quantised, which shifts the embeddings by 1e-6.
    np.testing.assert_allclose(embedding, golden(f"audio_embed_{entry}"), rtol=0, atol=3e-7)


def test_resampling(mixture: Tensor) -> None:
    resampled = Resampler(RATE_HZ, htsat.RATE_HZ)(mixture)[0]
    assert len(resampled) == 480_000
    np.testing.assert_allclose(resampled[:2048], golden("resampled_48k_first"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(resampled[-2048:], golden("resampled_48k_last"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 15, 16, 17, 250])
def test_resampling_any_length(samples: int) -> None:
    """As if silence followed."""
    resampler = Resampler(RATE_HZ, htsat.RATE_HZ)
    sound = torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    resampled = resampler(sound)
    assert resampled.shape == (2, math.ceil(samples * 1.5))
    followed = resampler(F.pad(sound, (0, 640)))[:, : resampled.shape[1]]
    torch.testing.assert_close(resampled, followed, rtol=0, atol=1e-6)


def test_features(features: Features) -> None:
    assert len(features.encoder) == 5
    for i, feature in enumerate([features.magnitude[:, None], *(f.flatten(1, 2) for f in features.encoder)]):
        assert list(feature.shape) == golden(f"feature{i}_shape").tolist()
        corner = feature[0, 0] if feature.dim() == 4 else feature[0]
        expected = golden(f"feature{i}_slice")
        np.testing.assert_allclose(corner[:8, :64], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        statistics = [feature.mean(), feature.std(correction=0)]
        np.testing.assert_allclose(statistics, golden(f"feature{i}_mean_std"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["pos_neg", "pos", "neg"])
def test_masks_and_waveforms(separator: CLAPSep, features: Features, mixture: Tensor, case: str) -> None:
    positive, negative = (F.normalize(torch.from_numpy(noise(512, key)), dim=0)[None] for key in (1, 2))
    given = condition(positive if "pos" in case else None, negative if "neg" in case else None)
    mask = separator.mask(features, given)
    np.testing.assert_allclose(mask[0, ::25, ::4], golden(f"mask_{case}"), rtol=0, atol=1e-5)
    np.testing.assert_allclose([mask.mean(), mask.std()], golden(f"mask_{case}_mean_std"), rtol=0, atol=1e-5)
    target = waveform(mask * spectrum(mixture), mixture.shape[1])[0]
    np.testing.assert_allclose(target[:4096], golden(f"wav_{case}_first"), rtol=0, atol=2e-6)
    np.testing.assert_allclose(target[::64], golden(f"wav_{case}_strided"), rtol=0, atol=2e-6)
    np.testing.assert_allclose(target.square().mean().sqrt(), golden(f"wav_{case}_rms"), rtol=0, atol=1e-6)


def test_shapes_of_any_size_are_the_recorded_ones_for_the_released_size() -> None:
    assert checkpoint_shapes.clap(CLAPSepConfig()) == released_shapes("clap")
    assert checkpoint_shapes.clapsep(CLAPSepConfig()) == released_shapes("clapsep")


# Small networks of the same classes.


@pytest.fixture
def tiny_checkpoints() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return checkpoints(TINY)


@pytest.fixture  # made anew for each test: networks share these tensors, and training writes to them
def tiny_parts() -> Parts:
    return convert(*checkpoints(TINY), TINY)


@pytest.fixture
def tiny(tiny_parts: Parts) -> CLAPSep:
    return loaded(CLAPSep(TINY), tiny_parts["separator"])


@pytest.fixture
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


@pytest.fixture
def reading(tiny_parts: Parts, tokenizer: Tokenizer) -> ClapTextEncoder:
    return loaded(ClapTextEncoder(TINY, tokenizer), tiny_parts["text"])


@pytest.fixture
def tiny_hearing(tiny_parts: Parts) -> ClapAudioEncoder:
    return loaded(ClapAudioEncoder(TINY), tiny_parts["audio"])


def two_mixtures() -> Tensor:
    return torch.stack([0.3 * torch.from_numpy(noise(TINY.window, key)) for key in (5, 6)])


def two_conditions() -> Tensor:
    return condition(*(F.normalize(torch.from_numpy(noise(2 * TINY.dim, key)).view(2, -1), dim=1) for key in (7, 8)))


def test_encode_and_mask_keep_the_contract(tiny: CLAPSep) -> None:
    features = tiny.encode(two_mixtures())
    mask = tiny.mask(features, two_conditions()[:1])
    frames = TINY.window // 320 + 1
    assert features.magnitude.shape == mask.shape == (2, frames, 513)
    assert [f.shape for f in features.encoder] == [(2, 16, 16, 8), (2, 8, 8, 16), (2, 8, 8, 16)]
    assert mask.dtype == torch.float32
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask.std() > 0.01


def test_a_batch_equals_its_members(tiny: CLAPSep) -> None:
    mixtures, conditions = two_mixtures(), two_conditions()
    singly = [tiny.mask(tiny.encode(m[None]), c[None]) for m, c in zip(mixtures, conditions, strict=True)]
    together = tiny.mask(tiny.encode(mixtures), conditions)
    torch.testing.assert_close(together, torch.cat(singly), rtol=0, atol=1e-5)
    assert (singly[0] - singly[1]).abs().max() > 1e-2


def test_one_mixture_and_one_condition_are_broadcast(tiny: CLAPSep) -> None:
    mixtures, conditions = two_mixtures(), two_conditions()
    one_condition = tiny.mask(tiny.encode(mixtures), conditions[:1])
    torch.testing.assert_close(one_condition, tiny.mask(tiny.encode(mixtures), conditions[[0, 0]]), rtol=0, atol=1e-5)
    one_mixture = tiny.mask(tiny.encode(mixtures[:1]), conditions)
    torch.testing.assert_close(one_mixture, tiny.mask(tiny.encode(mixtures[[0, 0]]), conditions), rtol=0, atol=1e-5)


def test_training_reaches_every_parameter(tiny: CLAPSep) -> None:
    with torch.enable_grad():
        tiny.train()
        tiny.mask(tiny.encode(two_mixtures()), two_conditions()).square().mean().backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in tiny.named_parameters() if p.grad is None] == []


def test_new_weights_replace_the_kept_position_bias(tiny: CLAPSep) -> None:
    mixture, given = two_mixtures()[:1], two_conditions()[:1]
    tiny.mask(tiny.encode(mixture), given)
    other = {name: tensor * 1.5 if "bias_table" in name else tensor for name, tensor in tiny.state_dict().items()}
    tiny.load_state_dict(other)
    fresh = loaded(CLAPSep(TINY), other)
    torch.testing.assert_close(tiny.mask(tiny.encode(mixture), given), fresh.mask(fresh.encode(mixture), given))


def test_built_on_the_meta_device_it_is_the_same(tiny: CLAPSep, tiny_parts: Parts) -> None:
    with torch.device("meta"):
        other = CLAPSep(TINY)
    loaded(other, tiny_parts["separator"])
    mixture, given = two_mixtures()[:1], two_conditions()[:1]
    assert torch.equal(other.mask(other.encode(mixture), given), tiny.mask(tiny.encode(mixture), given))


def test_bin_norm_is_batch_normalisation() -> None:
    x = torch.from_numpy(noise(2 * 7 * 5, 9)).view(2, 7, 5)
    ours, theirs = BinNorm(5), nn.BatchNorm1d(5)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.transpose(1, 2)).transpose(1, 2))


def test_waveform_inverts_spectrum() -> None:
    x = torch.from_numpy(noise(32_123, 10))[None]
    spec = spectrum(x)
    assert spec.shape == (1, 32_123 // 320 + 1, N_FFT // 2 + 1)
    assert spec.dtype == torch.complex64
    torch.testing.assert_close(waveform(spec, 32_000), x[:, :32_000], rtol=0, atol=1e-5)


def test_config_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="window fits the image"):
        replace(TINY, window=48_000)
    with pytest.raises(ValueError, match="heads divide the widths"):
        replace(TINY, heads=(3, 4))


def test_a_text_embeds_the_same_alone_and_in_a_batch(reading: ClapTextEncoder) -> None:
    texts = ["rain", "a dog barking on"]
    together = reading.embed(texts)
    assert together.shape == (2, TINY.dim)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(together, torch.cat([reading.embed([text]) for text in texts]), rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_a_long_text_is_cut_and_keeps_its_end_mark(reading: ClapTextEncoder) -> None:
    assert torch.equal(reading.embed(["a dog barking on roof rain rain"]), reading.embed(["a dog barking on"]))
    assert reading.tokenizer is not None
    assert reading.tokenizer.encode("a dog barking on roof rain").ids == [0, 3, 4, 5, 7, 2]


def test_text_encoder_refuses_what_it_cannot_read(reading: ClapTextEncoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="9 tokens instead of 10"):
        ClapTextEncoder(replace(TINY, vocabulary=10), tokenizer)
    with pytest.raises(ValueError, match="at least one text"):
        reading.embed([])


def test_a_short_recording_is_repeated_whole(tiny_hearing: ClapAudioEncoder) -> None:
    short = 0.3 * torch.from_numpy(noise(25_000, 11)).clamp(-3, 3)
    repeated = F.pad(short.repeat(2), (0, tiny_hearing.window - 50_000))
    torch.testing.assert_close(tiny_hearing.embed(short), tiny_hearing.embed(repeated))
    torch.testing.assert_close(tiny_hearing.embed(short[:1]).norm(), torch.tensor(1.0))


def test_all_of_a_long_recording_counts(tiny_hearing: ClapAudioEncoder) -> None:
    window = tiny_hearing.window
    recording = 0.3 * torch.from_numpy(noise(5 * window + 1, 12)).clamp(-3, 3)
    whole = tiny_hearing.embed(recording)
    starts = [i * (4 * window + 1) // 5 for i in range(6)]
    pieces = torch.stack([tiny_hearing.embed(recording[start : start + window]) for start in starts])
    torch.testing.assert_close(whole, F.normalize(pieces.mean(0), dim=0), rtol=0, atol=1e-5)
    for end in (slice(0, 2000), slice(-2000, None)):
        changed = recording.clone()
        changed[end] = 0
        assert (tiny_hearing.embed(changed) - whole).abs().max() > 1e-5


@pytest.mark.parametrize("shape", [(0,), (2, 100)])
def test_audio_encoder_refuses_what_is_not_mono(tiny_hearing: ClapAudioEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mono recording"):
        tiny_hearing.embed(torch.zeros(shape))


# Conversion.


def test_conversion_takes_both_spellings(
    tiny_checkpoints: tuple[dict[str, Tensor], dict[str, Tensor]], tiny_parts: Parts
) -> None:
    clap, tuned = ({f"module.{name}": tensor for name, tensor in file.items()} for file in tiny_checkpoints)
    clap["module.text_branch.embeddings.position_ids"] = torch.arange(TINY.text_positions)[None]
    for part, tensors in convert(clap, tuned, TINY).items():
        assert tensors.keys() == tiny_parts[part].keys()
        assert all(torch.equal(tensor, tiny_parts[part][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("file", ["LAION-CLAP", "CLAPSep"])
@pytest.mark.parametrize("fault", ["missing", "misshapen", "unexpected"])
@pytest.mark.parametrize("sort", ["fused or merged", "plain"])
def test_conversion_names_what_does_not_fit(
    tiny_checkpoints: tuple[dict[str, Tensor], dict[str, Tensor]], file: str, fault: str, sort: str
) -> None:
    clap, tuned = tiny_checkpoints
    tensors, names = {
        "LAION-CLAP": (clap, ("text_branch.encoder.layer.1.attention.self.key.weight", "audio_branch.norm.bias")),
        "CLAPSep": (tuned, ("audio_branch.layers.1.blocks.2.attn.proj.lora_B", "decoder_model.skip.1.norm.weight")),
    }[file]
    name = names[sort == "plain"]
    if fault == "missing":
        del tensors[name]
    elif fault == "misshapen":
        tensors[name] = tensors[name][:-1]
    else:
        name = f"{name}.more"
        tensors[name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=rf"{file} checkpoint .*; {fault}: {name}"):
        convert(clap, tuned, TINY)


def test_conversion_names_only_the_first_few(
    tiny_checkpoints: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    clap, tuned = tiny_checkpoints
    with pytest.raises(CheckpointError, match=r"missing: [^,]+, [^,]+, [^,]+ and \d+ more$"):
        convert(clap, {name: tensor for name, tensor in tuned.items() if "lora" not in name}, TINY)


def test_merged_lora_equals_lora_at_run_time(
    tiny: CLAPSep, tiny_checkpoints: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    clap, tuned = tiny_checkpoints
    without = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tuned.items()}
    unmerged = loaded(CLAPSep(TINY), convert(clap, without, TINY)["separator"])
    mixtures = two_mixtures()
    plain = unmerged.encode(mixtures).encoder

    for name, layer in unmerged.encoder.named_modules():
        if name.endswith(("attn.qkv", "attn.proj")):
            down, up = (tuned[f"audio_branch.{name}.lora_{matrix}"] for matrix in "AB")
            layer.register_forward_hook(lambda _, x, y, a=down, b=up: y + x[0] @ a.T @ b.T / LORA_RANK)
    merged, at_run_time = tiny.encode(mixtures).encoder, unmerged.encode(mixtures).encoder
    torch.testing.assert_close(merged, at_run_time, rtol=1e-4, atol=1e-4)
    assert (merged[-1] - plain[-1]).abs().max() > 0.05


def test_lora_and_its_biases_leave_the_audio_tower_alone(
    tiny_checkpoints: tuple[dict[str, Tensor], dict[str, Tensor]], tiny_parts: Parts
) -> None:
    clap, tuned = tiny_checkpoints
    layer = "layers.0.blocks.1.attn.qkv"
    for leaf in ("weight", "bias"):
        assert torch.equal(tiny_parts["audio"][f"htsat.{layer}.{leaf}"], clap[f"audio_branch.{layer}.{leaf}"])
    # The stand-in of a name is the same in both files, so only a changed bias tells them apart.
    changed = {**tuned, f"audio_branch.{layer}.bias": tuned[f"audio_branch.{layer}.bias"] + 1}
    parts = convert(clap, changed, TINY)
    assert torch.equal(parts["separator"][f"encoder.{layer}.bias"], changed[f"audio_branch.{layer}.bias"])
    assert torch.equal(parts["audio"][f"htsat.{layer}.bias"], clap[f"audio_branch.{layer}.bias"])
