"""Media files for tests, encoded by PyAV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 4800  # samples encoded at a time
MUXERS = {".m4a": "ipod", ".aac": "adts", ".wma": "asf", ".mkv": "matroska"}  # where the suffix is not their name
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def encode(
    path: Path,
    audio: NDArray[Any] | None = None,
    rate: int = 48_000,
    codec: str = "",
    tags: Mapping[str, str] | None = None,
    depth: int = 16,
    further: Sequence[NDArray[Any]] = (),
    pictures: int = 0,
    **options: str,
) -> None:
    """Write `audio` and `further` sound tracks, `[channels, samples]`, behind some `pictures`."""
    import av

    if path.suffix == ".m4a":
        options["movflags"] = "+faststart"  # else a file cut short is none at all
    tracks = [one for one in (audio, *further) if one is not None]
    with av.open(f"file:{path}", "w", format=MUXERS.get(path.suffix, path.suffix[1:]), options=options) as container:
        container.metadata.update(tags or {})
        streams = [container.add_stream(codec, rate=rate, layout=LAYOUTS[len(one)]) for one in tracks]
        for stream in streams:
            able = [form.name for form in stream.codec_context.codec.audio_formats or ()]
            fitting = [name for name in able if name.removesuffix("p") == f"s{depth}"]
            stream.codec_context.format = (fitting or able)[0]
            stream.codec_context.bit_rate = 128_000  # for those that are lossy
        if pictures:
            video = container.add_stream("mpeg4", rate=5, width=64, height=64, pix_fmt="yuv420p")
            for number in range(pictures):
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, np.uint8))
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        for stream, one in zip(streams, tracks, strict=True):
            context = stream.codec_context
            if not context.is_open:
                context.open()
            resampler = av.AudioResampler(context.format, context.layout, rate, context.frame_size or CHUNK)
            integers = np.rint(one * 2.0 ** (depth - 1)).astype(f"i{depth // 8}")
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(integers.T).reshape(1, -1), f"s{depth}", LAYOUTS[len(one)]
            )
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            for part in (*resampler.resample(frame), *resampler.resample(None)):
                container.mux(stream.encode(part))
            container.mux(stream.encode(None))
