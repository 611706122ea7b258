"""Shows the parts of a recording in a notebook: players and a spectrogram, with nothing from outside the page."""

from __future__ import annotations

import html
import io
from base64 import b64encode
from collections.abc import Mapping

import numpy as np
import soundfile
import soxr

from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import ExtraError
from clapsep_cli.listening.plot import Picture, check_installed

PLAYED_SECONDS = 60.0  # of each part; the page of a notebook holds all of it
PLAYED_HZ = 48_000  # higher rates are resampled, as browsers do not play them
PLAYED_CHANNELS = 2


def show(parts: Mapping[str, Audio], rate: int, queries: Mapping[str, str]) -> str:
    """Return HTML with a player for each part, above their spectrograms.

    Args:
        parts: float32 `[channels, samples]`, by name. All are played at one gain, with which none clips.
        rate: in Hz.
        queries: description of the query of each part that has one.
    """
    peak = max(1.0, *(float(np.abs(part).max()) for part in parts.values()))
    rows = "".join(
        f"<tr><td>{html.escape(name)}<br><small>{html.escape(queries.get(name, ''))}</small></td><td>"
        f'<audio controls preload="none" src="data:audio/flac;base64,{_flac(part / np.float32(peak), rate)}"></audio>'
        "</td></tr>"
        for name, part in parts.items()
    )
    seconds = next(iter(parts.values())).shape[1] / rate
    cut = f"<p>The first {PLAYED_SECONDS:g} of {seconds:.0f} s.</p>" if seconds > PLAYED_SECONDS else ""
    return f"<div><table>{rows}</table>{cut}{_picture(parts, rate, queries)}</div>"


def _flac(audio: Audio, rate: int) -> str:
    played = audio[:, : round(PLAYED_SECONDS * rate)].T
    if played.shape[1] > PLAYED_CHANNELS:
        played = played.mean(1, keepdims=True)
    if rate > PLAYED_HZ:
        played, rate = soxr.resample(played, rate, PLAYED_HZ), PLAYED_HZ
    file = io.BytesIO()
    soundfile.write(file, played, rate, "PCM_16", format="FLAC")
    return b64encode(file.getvalue()).decode()


def _picture(parts: Mapping[str, Audio], rate: int, queries: Mapping[str, str]) -> str:
    try:
        check_installed()
    except ExtraError as error:
        return f"<p><small>Without a spectrogram: {html.escape(str(error).removeprefix('--plot '))}</small></p>"
    picture = Picture(rate)
    picture.add(parts)
    title = "; ".join(queries.values())
    source = b64encode(picture.png(title)).decode()
    return f'<img style="max-width: 100%" alt="spectrograms" src="data:image/png;base64,{source}">'
