"""The pipeline: audio → windows → query embedding → separator → stitched mask → target and residual."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

from clapsep_cli.audio import PEAK, Audio, check_finite, on_grid, to_rate
from clapsep_cli.checkpoint import Model
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.encoding import choose_encoding
from clapsep_cli.errors import AudioError, OutputError
from clapsep_cli.masking import MaskedStream
from clapsep_cli.models.base import condition
from clapsep_cli.query import Query, Shot
from clapsep_cli.sources import Source, read_mono, recordings
from clapsep_cli.windows import MaskTrack, Windower, downmix
from clapsep_cli.writers import Outputs

BLOCK_SECONDS = 5.0  # of audio read at a time
PARTS = ("target", "residual")

Progress = Callable[[float, float], None]  # is told how many seconds of audio are done, and how many there are


@dataclass(frozen=True)
class Separation:
    """Target and residual, float32, of the mixture's shape and `rate` (Hz); their sum is the mixture."""

    target: Audio
    residual: Audio
    rate: int


@dataclass(frozen=True)
class Extraction:
    """What was written for one file. `clipped`: samples per part that its integer format could not hold."""

    mixture: Path
    target: Path
    residual: Path
    seconds: float  # of audio
    elapsed: float  # seconds of wall time
    clipped: dict[str, int]


@torch.inference_mode()
def embed_query(model: Model, query: Query) -> Tensor:
    """The condition that asks `model` for `query`, float32 `[1, 2 · dim]`.

    Raises `AudioError` for a shot that cannot be read or is silent, `QueryError` for a text it cannot understand.
    """
    positive = _embed_side(model, query.pos, query.pos_audio, query.alpha)
    negative = _embed_side(model, query.neg, query.neg_audio, query.alpha)
    return condition(positive, negative)


def _embed_side(model: Model, texts: Sequence[str], shots: Sequence[Shot], alpha: float) -> Tensor | None:
    # Means of unit vectors, not scaled to length 1 again: so were the released weights trained.
    text = model.text.embed(list(texts)).mean(0, keepdim=True) if texts else None
    files = [file for shot in shots for file in ([shot] if isinstance(shot, tuple) else recordings(Path(shot)))]
    audio = torch.stack([_embed_shot(model, file) for file in files]).mean(0, keepdim=True) if files else None
    if text is None or audio is None:
        return text if audio is None else audio
    return alpha * audio + (1 - alpha) * text


def _embed_shot(model: Model, shot: Path | tuple[Audio, int]) -> Tensor:
    rate = model.audio.rate
    if isinstance(shot, Path):
        name, mono = str(shot), read_mono(shot, rate)
    else:
        samples = np.atleast_2d(np.asarray(shot[0], np.float32))
        name = "a recording given as a query"
        check_finite(samples, name, shot[1])
        mono = to_rate(samples.mean(0), shot[1], rate) if samples.size else np.zeros(0, np.float32)
    if not np.any(mono):
        raise AudioError(f"{name}: is silent; a query needs a recording of the sound")
    return model.audio.embed(torch.from_numpy(np.ascontiguousarray(mono)).to(model.device))


@torch.inference_mode()
def stream(
    model: Model, wanted: Tensor, blocks: Iterable[Audio], rate: int, channels: int
) -> Iterator[tuple[Audio, Audio]]:
    """Separate a recording that arrives in `blocks` (float32 `[channels, samples]` at `rate` Hz).

    `wanted` is the condition from `embed_query`. Yields pairs (mixture, target) that join to the whole recording;
    what is held at any time does not grow with its length, and the result does not depend on the blocks.
    """
    to_model = soxr.ResampleStream(rate, RATE_HZ, channels, "float32", "HQ") if rate != RATE_HZ else None
    windower, track = Windower(model.separator.window, channels), MaskTrack()
    masked = MaskedStream(rate, channels, model.device)
    waiting = np.zeros((channels, 0), np.float32)  # the mixture whose target is still to come
    samples = 0

    def hear(block: Audio, last: bool) -> None:
        heard = block if to_model is None else to_model.resample_chunk(block.T, last=last).reshape(-1, channels).T
        windows = [*windower.push(heard), *(windower.finish() if last else ())]
        for start, window in windows:
            final = track.add(start, _window_mask(model, downmix(window), wanted))
            if final is not None:
                masked.push_mask(final)

    for block in blocks:
        samples += block.shape[1]
        waiting = np.concatenate([waiting, block], 1)
        masked.push(torch.from_numpy(block).to(model.device))
        hear(block, last=False)
        target = masked.pull().cpu().numpy()
        if target.shape[1]:
            yield waiting[:, : target.shape[1]], target
            waiting = waiting[:, target.shape[1] :]
    hear(waiting[:, :0], last=True)
    rest = track.finish()
    assert rest is not None, "a recording has at least one window"
    masked.push_mask(rest)
    # A recording shorter than a window is heard with silence behind it, not with its end reflected.
    padding = -(-model.separator.window * rate // RATE_HZ) - samples
    masked.push(torch.zeros(channels, max(0, padding), device=model.device))
    yield waiting, masked.finish(samples).cpu().numpy()


def _window_mask(model: Model, window: Audio, wanted: Tensor) -> Tensor:
    peak = float(np.abs(window).max())
    heard = torch.from_numpy(window if peak <= 1 else window * np.float32(PEAK / peak))[None].to(model.device)
    return model.separator.mask(model.separator.encode(heard), wanted)[0]


def separate(audio: Audio, rate: int, query: Query, model: Model) -> Separation:
    """Separate a recording in memory.

    `audio`: float32 `[samples]` or `[channels, samples]`, full scale ±1, at `rate` Hz. Raises `AudioError` for an empty
    recording and for samples that are not finite numbers, and whatever `embed_query` raises.
    """
    mixture = np.atleast_2d(np.asarray(audio, np.float32))
    if mixture.ndim != 2 or not mixture.size:
        raise AudioError(f"audio is [samples] or [channels, samples], at least one of each, not {list(audio.shape)}")
    check_finite(mixture, "audio", rate)
    wanted = embed_query(model, query)
    size = max(1, round(BLOCK_SECONDS * rate))
    blocks = (np.ascontiguousarray(mixture[:, at : at + size]) for at in range(0, mixture.shape[1], size))
    target = np.concatenate([part for _, part in stream(model, wanted, blocks, rate, len(mixture))], 1)
    target = target.reshape(np.shape(audio))
    return Separation(target, np.asarray(audio, np.float32) - target, rate)


def output_paths(mixture: Path, folder: Path | None) -> dict[str, Path]:
    """Where target and residual of `mixture` are written: beside it, or in `folder`."""
    parent = mixture.parent if folder is None else folder
    return {part: parent / f"{mixture.stem}.{part}.wav" for part in PARTS}


def check_outputs(mixtures: Sequence[Path], folder: Path | None, overwrite: bool) -> None:
    """Raise `OutputError` if two mixtures would write one file, or a file is in the way."""
    writers: dict[Path, Path] = {}
    for mixture in mixtures:
        for path in output_paths(mixture, folder).values():
            absolute = path.absolute()
            if absolute in writers:
                raise OutputError(
                    f"{path}: both {writers[absolute]} and {mixture} would write it; use -o for one of them"
                )
            writers[absolute] = mixture
            if path.exists() and not overwrite:
                raise OutputError(f"{path}: exists already; use --overwrite to replace it, or -o for another folder")


def extract(
    mixture: Path,
    wanted: Tensor,
    model: Model,
    folder: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Extraction:
    """Separate the file `mixture` into a target and a residual file; `wanted` is the condition from `embed_query`.

    Outputs have the input's rate, channels, length and depth (at least 16 bit; float where the input is lossy or
    float). Nothing is left behind by a run that fails. Raises `AudioError` and `OutputError`.
    """
    began = time.perf_counter()
    check_outputs([mixture], folder, overwrite)
    paths, samples = output_paths(mixture, folder), 0
    with Source(mixture) as source:
        encoding = choose_encoding("wav", None, source)
        with Outputs(paths, source.rate, source.channels, encoding, overwrite=overwrite) as outputs:
            for heard, target in stream(model, wanted, source.blocks(BLOCK_SECONDS), source.rate, source.channels):
                # Rounded before it is subtracted, the target leaves a residual that adds up to the input exactly.
                rounded = on_grid(target, encoding.bits)
                outputs.write({"target": rounded, "residual": heard - rounded})
                samples += heard.shape[1]
                progress(samples / source.rate, source.frames / source.rate)
            written = outputs.commit()
        seconds = samples / source.rate
    return Extraction(
        mixture, paths["target"], paths["residual"], seconds, time.perf_counter() - began, written.clipped
    )
