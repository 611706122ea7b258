"""Copies the reference's small golden numbers into tests/golden: `make golden`. Its output is committed.

python tests/make_golden.py GOLDEN_DIR
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

HERE = Path(__file__).parent / "golden"
TUSS_CASES = {
    "a": "medium_a_speech_sfxbg_musicbg",
    "b": "medium_b_speech_sfx_sfx_musicbg",
    "quiet": "medium_quiet_batch2",
    "large": "large_speech_sfx_sfxbg",
    "css_silent": "css_seg2_shift2_silent_middle",
    "css_recursive": "css_seg2_shift0p5",
}
MOST = 1024  # values kept of a stage of TUSS


def main(golden: Path) -> None:
    shutil.copy(golden / "clapsep_seed0.npz", HERE)
    for name in ("clap-checkpoint.csv", "clapsep-checkpoint.csv", "audiosep-checkpoint.csv"):
        data = (golden.parent / "spec" / name).read_bytes()
        (HERE / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
    target, _ = soundfile.read(golden / "clapsep_end_to_end" / "target.wav", dtype="float32")
    (HERE / "end_to_end").mkdir(exist_ok=True)
    np.savez_compressed(
        HERE / "end_to_end" / "target.npz", strided=target[::16], first=target[:4096], last=target[-4096:]
    )
    for name in ("mix", "query_pos", "query_neg"):
        audio, rate = soundfile.read(golden / "clapsep_end_to_end" / f"{name}.wav", dtype="int16")
        soundfile.write(HERE / "end_to_end" / f"{name}.flac", audio, rate, subtype="PCM_16")
    tuss(golden / "tuss")
    audiosep(golden / "audiosep")


def audiosep(golden: Path) -> None:
    """The short cases, and the text embeddings, in one file."""
    kept = {}
    for file in ("small", "odd", "text"):
        with np.load(golden / f"{file}.npz") as arrays:
            kept |= {f"{file}/{key}": arrays[key] for key in arrays if "wave" not in key or file == "small"}
    np.savez_compressed(HERE / "audiosep_seed0.npz", **kept)


def tuss(golden: Path) -> None:
    """Thinned: of each waveform every 16th sample, of each stage about a thousand values; all in one file."""
    kept = {}
    for case, name in TUSS_CASES.items():
        with np.load(golden / f"{name}.npz") as arrays:
            stages = [key for key in arrays if key not in ("input_int16", "wave_fp64_as_fp32")]
            kept |= {f"{case}/{key}": thinned(key, arrays[key]) for key in stages}
    with np.load(golden / "loss_cases.npz") as arrays:
        kept |= {f"loss/{key}": arrays[key] for key in arrays}
    np.savez_compressed(HERE / "tuss_seed0.npz", **kept)
    shutil.copy(golden / "loss_cases.json", HERE / "tuss_loss_cases.json")
    for size in ("medium", "large"):
        data = (golden / f"shapes_{size}.json").read_bytes()
        (HERE / f"tuss-{size}.json.gz").write_bytes(gzip.compress(data, mtime=0))


def thinned(key: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if key == "wave":
        return values[..., ::16]
    if key.startswith(("wave", "win", "prompts", "energy")):
        return values
    flat = values.ravel()
    return flat[:: max(1, flat.size // MOST) | 1]  # an odd step, to stay off any one column


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: make_golden.py GOLDEN_DIR, the folder with clapsep_seed0.npz and clapsep_end_to_end/")
    main(Path(sys.argv[1]))
