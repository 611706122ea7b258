"""The released TUSS networks reproduce the outputs of the reference; small ones keep the contracts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_tuss import PlainTuss
from torch import Tensor
from tuss_stand_in import (
    GOLDEN,
    SHARED,
    TINY,
    audio,
    fill,
    recorded_shapes,
    released,
    save_released,
    separator,
    shapes,
    wave,
)

from clapsep_cli.errors import CheckpointError
from clapsep_cli.models import locoformer
from clapsep_cli.models.locoformer import rotations
from clapsep_cli.models.prompts import PROMPTS
from clapsep_cli.models.tuss import LARGE, MEDIUM, Tuss, TussConfig, spectrum, waveform
from clapsep_cli.store.convert_tuss import convert, convert_tuss
from clapsep_cli.store.tensors import read_tensors


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def golden(entry: str) -> Any:
    with np.load(GOLDEN / "tuss_seed0.npz") as arrays:
        return arrays[entry]


def ids(prompts: Any) -> Tensor:
    return torch.tensor(np.vectorize(PROMPTS.index)(np.asarray(prompts)))


def assert_same_wave(stems: Tensor, expected: Any, atol: float = 3e-6) -> None:
    """`stems` is thinned as the golden waves are, which go on beyond the end of the mixture."""
    assert stems.shape == (*expected.shape[:-1], stems.shape[-1])
    expected = expected[..., : stems.shape[-1]]
    np.testing.assert_allclose(stems, expected, rtol=0, atol=atol)
    assert np.linalg.norm(stems.numpy() - expected) <= 2e-5 * np.linalg.norm(expected)


# Released sizes, against the reference.


@pytest.fixture(scope="session")
def medium() -> Tuss:
    return separator(MEDIUM)


def staged(model: Tuss, mixture: Tensor, prompts: Tensor) -> dict[str, Tensor]:
    """All stages in the reference's layout, [batch, channels, time, band]."""
    seen: dict[str, list[Tensor]] = {}

    def note(stage: str, x: Tensor) -> None:
        seen.setdefault(stage, []).append(x.permute(0, 3, 1, 2))

    def note_output(stage: str) -> Callable[..., None]:
        return lambda module, inputs, output: note(stage, output)

    hooks = [model.cross.register_forward_pre_hook(lambda module, inputs: note("cross_in_head", inputs[0]))]
    hooks += [model.cross.register_forward_hook(note_output("cross_out_head"))]
    hooks += [model.conditional.register_forward_pre_hook(lambda module, inputs: note("cond_in", inputs[0]))]
    for stack, name in ((model.cross, "cross"), (model.conditional, "cond")):
        hooks += [block.register_forward_hook(note_output(f"{name}{i}")) for i, block in enumerate(stack.blocks)]
    scale = mixture.std(-1, keepdim=True)
    spec = spectrum(mixture / scale)
    frames, tokens = model.hear(spec, prompts[None])
    mask = torch.stack([model.mask(frames * tokens[:, n, None]) for n in range(tokens.shape[1])], 1)
    for hook in hooks:
        hook.remove()
    stages = {name: torch.cat(parts) for name, parts in seen.items()}
    stages |= {"stft": spec, "band_split": model.encode(spec).permute(0, 3, 1, 2), "mask": mask}
    stages["spec_out"] = mask * spec[:, None]
    stages["wave"] = waveform(stages["spec_out"][0], mixture.shape[-1]) * scale
    return stages


SLICES: dict[str, Any] = {
    "stft": np.s_[:, ::4, ::8],
    "band_split": np.s_[:, ::8, ::4, ::3],
    "cross_in_head": np.s_[:, :, :6, ::4],
    "cross_out_head": np.s_[:, :, :6, ::2],
    "cond_in": np.s_[:, ::8, ::8, ::4],
    "mask": np.s_[:, :, ::8, ::16],
    "spec_out": np.s_[:, :, ::8, ::16],
}
SLICES |= {f"{stack}{i}": np.s_[:, ::8, ::8, ::4] for stack, count in (("cross", 4), ("cond", 2)) for i in range(count)}
TOLERANCES = {"band_split": 5e-5, "mask": 1e-4}  # absolute; of other stages, relative to their maximum


@pytest.mark.parametrize("case", ["a", "b"])
def test_medium_and_its_stages(medium: Tuss, case: str) -> None:
    mixture = audio(wave(71_777, 0))
    prompts = golden(f"{case}/prompts")
    stages = staged(medium, mixture, ids(prompts))
    for stage, part in SLICES.items():
        expected = golden(f"{case}/{stage}")
        values = stages[stage][part].flatten().numpy()
        values = values[:: max(1, len(values) // 1024) | 1]
        tolerance = TOLERANCES.get(stage, 1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance, err_msg=stage)
    assert_same_wave(stages["wave"][:, ::16], golden(f"{case}/wave"))
    if case == "a":  # asked for alone, and asked for through the front door
        kept = medium.separate(mixture, ids(prompts), [2])
        assert_same_wave(kept[0, :, ::16], golden("a/wave")[[2]])


def test_a_batch_with_a_quiet_row_and_prompts_of_its_own(medium: Tuss) -> None:
    quiet = np.round(wave(20_011, 2) * (20 / 32_768)).astype(np.int16)  # peaks at −64 dB
    mixture = audio(np.stack([quiet, wave(20_011, 3)]))
    stems = medium.separate(mixture, ids(golden("quiet/prompts")))[..., ::16]
    for row, expected in zip(stems, golden("quiet/wave"), strict=True):
        assert_same_wave(row, expected, atol=2e-5 * np.abs(expected).max())


def test_large() -> None:
    mixture = audio(wave(14_400, 4))
    stems = separator(LARGE).separate(mixture, ids(golden("large/prompts")))
    assert_same_wave(stems[0, :, ::16], golden("large/wave"))


def joined_as_the_reference_does(model: Tuss, mixture: Tensor, prompts: Tensor, segment: int, shift: int) -> Tensor:
    """Segments zero-padded at the end, overlaps averaged with what came before: flaws that only parity needs."""
    overlap, length = segment - shift, mixture.shape[-1]
    joined = torch.zeros(len(prompts), 0)
    for at in range(0, length - overlap, shift):
        valid = min(segment, length - at)
        heard = torch.nn.functional.pad(mixture[:, at : at + segment], (0, segment - valid))
        stems = model.separate(heard, prompts)[0] if heard.any() else torch.zeros(len(prompts), segment)
        if at:
            middle = (joined[:, joined.shape[1] - overlap :] + stems[:, :overlap]) / 2
            joined = torch.cat([joined[:, : joined.shape[1] - overlap], middle, stems[:, overlap:valid]], 1)
        else:
            joined = stems
    return joined


CSS = {  # samples of the mixture, seconds of segment and shift
    "css_seg2_shift0p5": ("css_recursive", 139_200, 2, 0.5),
    "css_seg2_shift2_silent_middle": ("css_silent", 216_000, 2, 2),
    "css_seg2_shift1": ("", 254_400, 2, 1),
}


@pytest.mark.parametrize("file", list(CSS))
def test_long_recordings_as_the_reference_joins_them(medium: Tuss, file: str) -> None:
    case, samples, segment, shift = CSS[file]
    if case:
        with np.load(GOLDEN / "tuss_seed0.npz") as arrays:
            expected = {key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{case}/")}
    elif SHARED.is_dir():
        expected = dict(np.load(SHARED / f"{file}.npz"))
    else:
        pytest.skip("takes ../shared/golden")
    mixture = audio(wave(254_400, 1)[:samples])
    if "silent" in file:
        mixture[:, 96_000:192_000] = 0
    stems = joined_as_the_reference_does(
        medium, mixture, ids(expected["prompts"]), round(segment * 48_000), round(shift * 48_000)
    )
    np.testing.assert_allclose(stems[:, ::16], expected["wave_every16"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(stems.double().square().sum(1), expected["energy"], rtol=1e-4)
    for key in expected:
        if key.startswith("win_"):
            at = int(key.removeprefix("win_"))
            np.testing.assert_allclose(stems[:, at - 96 : at + 96], expected[key], rtol=0, atol=5e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason="takes ../shared/golden")
@pytest.mark.parametrize("file", ["medium_a_speech_sfxbg_musicbg", "large_speech_sfx_sfxbg"])
def test_whole_golden_files(medium: Tuss, file: str) -> None:
    with np.load(SHARED / f"{file}.npz") as arrays:
        pcm, prompts, expected = (arrays[key] for key in ("input_int16", "prompts", "wave"))
    np.testing.assert_array_equal(wave(len(pcm), 0 if "medium" in file else 4), pcm)
    model = medium if "medium" in file else separator(LARGE)
    assert_same_wave(model.separate(audio(pcm), ids(prompts))[0], expected)


@pytest.mark.parametrize(
    ("size", "config", "parameters"), [("medium", MEDIUM, 11_132_352), ("large", LARGE, 38_210_112)]
)
def test_sizes_are_the_released_ones(size: str, config: TussConfig, parameters: int) -> None:
    assert shapes(config) == recorded_shapes(size)
    with torch.device("meta"):
        model = Tuss(config)
    rotary = config.cross_attention // config.heads + config.conditional_attention // config.heads  # twice half of each
    assert sum(p.numel() for p in model.parameters()) == parameters - rotary


# Small networks of the same classes.


@pytest.fixture
def tiny() -> Tuss:
    return separator(TINY)


MIXTURE = audio(np.stack([wave(9600, 5), wave(9600, 6)]))
SCENE = ids(["speech", "speech", "sfxbg"])


@pytest.mark.parametrize("positions", ["exact", "bf16"])
@pytest.mark.parametrize("kernels", [((4, 1), (4, 4)), ((1, 3), (2, 1))])
def test_any_size_equals_the_plain_network(positions: Any, kernels: Sequence[tuple[int, int]]) -> None:
    config = replace(TINY, positions=positions, cross_kernels=kernels[0], conditional_kernels=kernels[1])
    tensors = released(config)
    mixture = audio(wave(140_000, 7)) if positions == "bf16" else MIXTURE  # long enough to be rounded
    plain = PlainTuss({name.removeprefix("model."): t for name, t in tensors.items()}, 4, 2, positions == "bf16")
    expected = plain.separate(mixture, ["speech", "speech", "sfxbg"])
    torch.testing.assert_close(separator(config, tensors).separate(mixture, SCENE), expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3


def test_what_is_kept_does_not_change_it(tiny: Tuss) -> None:
    everything = tiny.separate(MIXTURE, SCENE)
    assert everything.shape == (2, 3, 9600)
    assert torch.equal(tiny.separate(MIXTURE, SCENE, [2, 0]), everything[:, [2, 0]])
    left, right, background = everything[0]
    assert (left - right).abs().max() > 1e-3  # equal prompts are told apart by their position
    assert (left - background).abs().max() > 1e-3
    without = tiny.separate(MIXTURE, SCENE[1:])
    assert (without - everything[:, 1:]).abs().max() > 1e-4  # each stem depends on all that is asked for


def test_only_what_is_kept_is_computed(tiny: Tuss) -> None:
    calls = []
    tiny.conditional.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    tiny.separate(MIXTURE, SCENE, [1])
    assert calls == [2]
    tiny.separate(torch.stack([MIXTURE[0], torch.zeros(9600)]), SCENE, [1])
    tiny.separate(torch.zeros(2, 9600), SCENE)
    assert calls == [2, 1]  # nothing for rows that are silent


def test_a_batch_equals_its_members(tiny: Tuss) -> None:
    prompts = ids([["speech", "sfxbg"], ["bass", "other"]])
    together = tiny.separate(MIXTURE, prompts)
    singly = [tiny.separate(MIXTURE[[row]], prompts[row]) for row in range(2)]
    torch.testing.assert_close(together, torch.cat(singly), rtol=0, atol=1e-6)


def test_the_result_does_not_depend_on_how_paths_are_sliced(tiny: Tuss, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.separate(MIXTURE, SCENE)
    for positions in (1, 100, 10**6):
        monkeypatch.setattr(locoformer, "POSITIONS_AT_ONCE", positions)
        torch.testing.assert_close(tiny.separate(MIXTURE, SCENE), expected, rtol=0, atol=1e-6)


def test_levels_scale_and_the_input_is_left_alone(tiny: Tuss) -> None:
    mixture = MIXTURE.clone()
    stems = tiny.separate(mixture, SCENE)
    assert torch.equal(mixture, MIXTURE)
    torch.testing.assert_close(tiny.separate(1e-3 * mixture, SCENE), 1e-3 * stems, rtol=0, atol=1e-7)


def test_silence_gives_silence_and_disturbs_nothing(tiny: Tuss) -> None:
    alone = tiny.separate(MIXTURE[:1], SCENE)
    stems = tiny.separate(torch.stack([MIXTURE[0], torch.zeros(9600)]), SCENE)
    assert not stems[1].any()
    torch.testing.assert_close(stems[:1], alone, rtol=0, atol=1e-6)
    constant = tiny.separate(torch.full((1, 9600), 0.25), SCENE)
    assert constant.isfinite().all()


@pytest.mark.parametrize("samples", [2, 511, 512, 513, 1025])
def test_any_length_is_kept(tiny: Tuss, samples: int) -> None:
    stems = tiny.separate(MIXTURE[:, 4000 : 4000 + samples], SCENE)
    assert stems.shape == (2, 3, samples)
    assert stems.isfinite().all()


def test_unfit_shapes_are_refused(tiny: Tuss) -> None:
    for mixture in (MIXTURE[0], MIXTURE[:, :1]):
        with pytest.raises(ValueError, match="two samples or more"):
            tiny.separate(mixture, SCENE)
    for prompts in (SCENE[:0], SCENE.expand(3, -1)):
        with pytest.raises(ValueError, match="one or more"):
            tiny.separate(MIXTURE, prompts)


def test_spectrum_and_waveform_are_inverse() -> None:
    for samples in (9600, 9601, 10_239):
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, samples), np.float32))
        spec = spectrum(x)
        assert spec.shape == (2, math.ceil(samples / 512) + 1, 1025)
        torch.testing.assert_close(waveform(spec, samples), x, rtol=0, atol=1e-5)


def test_positions_are_rounded_as_in_training() -> None:
    exact, rounded = (rotations(600, 12, counter, torch.device("cpu"))[:, 0, 0] for counter in ("exact", "bf16"))
    torch.testing.assert_close(exact[:257], rounded[:257])
    at = torch.tensor([510, 512, 512, 512, 512, 516])
    torch.testing.assert_close(rounded[510:516], exact[at])
    torch.testing.assert_close(exact[3, 1], torch.polar(torch.tensor(1.0), torch.tensor(3 * 10_000 ** (-1 / 6))))


def test_half_precision_is_close_and_ends_in_single(tiny: Tuss) -> None:
    expected = tiny.separate(MIXTURE, SCENE)
    with torch.autocast("cpu", torch.bfloat16):
        stems = tiny.separate(MIXTURE, SCENE)
    assert stems.dtype == torch.float32
    error = (stems - expected).square().sum() / expected.square().sum()
    assert 1e-9 < error < 10**-2.5


def test_training_reaches_every_parameter(tiny: Tuss) -> None:
    with torch.enable_grad():
        tiny.train()
        mixture = torch.stack([MIXTURE[0], torch.zeros(9600)])
        everything = torch.arange(len(PROMPTS)).view(2, -1)
        tiny.separate(mixture, everything).square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in tiny.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()] == []


def test_config_rejects_nonsense_and_survives_json() -> None:
    for wrong, rule in (
        ({"groups": 5}, "groups divide the width"),
        ({"heads": 3}, "a head has an even number"),
        ({"positions": "half"}, "positions are exact or bf16"),
        ({"prompts": ("speech", "speech")}, "each once"),
        ({"cross_blocks": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=rule):
            replace(TINY, **wrong)  # type: ignore[arg-type]
    read = json.loads(json.dumps(asdict(LARGE)))
    assert TussConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}) == LARGE


# Conversion.


@pytest.mark.parametrize("config", [TINY, MEDIUM])
def test_a_released_file_becomes_the_separator(tmp_path: Path, config: TussConfig) -> None:
    tensors = released(config)
    save_released(tmp_path / "model.pth", tensors)
    # Of a released size, the file itself says which.
    convert_tuss([tmp_path / "model.pth"], tmp_path / "new", None if config == MEDIUM else config, revision="r1")
    model = Tuss(config)
    model.load_state_dict(read_tensors(tmp_path / "new" / "separator.safetensors"))
    expected = separator(config, tensors).separate(MIXTURE, SCENE)
    assert torch.equal(model.eval().separate(MIXTURE, SCENE), expected)


@pytest.mark.parametrize("config", [MEDIUM, LARGE])
def test_the_size_is_read_off_the_file(tmp_path: Path, config: TussConfig) -> None:
    start = {"model.separator.sos_token": fill("separator.sos_token", (config.width, 1, 1))}
    save_released(tmp_path / "model.pth", start)
    absent = len(shapes(config)) - 1 - sum(name.endswith("rope.freqs") for name in shapes(config))
    with pytest.raises(CheckpointError, match=rf"missing: .* and {absent - 3} more"):
        convert_tuss([tmp_path / "model.pth"], tmp_path)
    save_released(tmp_path / "model.pth", {"model.separator.sos_token": torch.zeros(16, 1, 1)})
    with pytest.raises(CheckpointError, match="not a released TUSS checkpoint"):
        convert_tuss([tmp_path / "model.pth"], tmp_path)


def test_rotary_frequencies_may_be_absent_but_not_others() -> None:
    tensors = released(TINY)
    without = {name: tensor for name, tensor in tensors.items() if "rope" not in name}
    assert convert(without, TINY).keys() == convert(tensors, TINY).keys()
    name = next(name for name in tensors if "rope" in name)
    with pytest.raises(CheckpointError, match=f"rotary frequencies of its own: {name.removeprefix('model.')}"):
        convert({**tensors, name: tensors[name] * 1.01}, TINY)


@pytest.mark.parametrize(
    "name",
    [
        "separator.sos_token",
        "separator.prompts.bass",
        "separator.cond_tse_module.0.frame_path.ffn.1.deconv1d.weight",
        "separator.cross_prompt_module.1.freq_path.attn.qkv.weight",
        "separator.band_split_module.bandwise_decoding_module.60.5.bias",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "misshapen", "unexpected"])
def test_conversion_names_what_does_not_fit(name: str, fault: str) -> None:
    tensors = released(TINY)
    if fault == "missing":
        del tensors[f"model.{name}"]
    elif fault == "misshapen":
        tensors[f"model.{name}"] = tensors[f"model.{name}"][:-1]
    else:
        name = f"{name}.more"
        tensors[f"model.{name}"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=rf"TUSS checkpoint .*; {fault}: {name}"):
        convert(tensors, TINY)


def test_tensors_of_another_network_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"unexpected: optimiser\.step$"):
        convert({**released(TINY), "optimiser.step": torch.zeros(1)}, TINY)


def test_nothing_but_tensors_is_read(tmp_path: Path) -> None:
    save_released(tmp_path / "model.pth", {**released(TINY), "model.extra": Path("x")})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="holds more than weights"):
        convert_tuss([tmp_path / "model.pth"], tmp_path, TINY)
    with pytest.raises(CheckpointError, match="one checkpoint, not 2"):
        convert_tuss([tmp_path / "model.pth"] * 2, tmp_path, TINY)
