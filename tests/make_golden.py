"""Copies the reference's small golden numbers into tests/golden: `make golden`. Its output is committed.

python tests/make_golden.py GOLDEN_DIR
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile

HERE = Path(__file__).parent / "golden"


def main(golden: Path) -> None:
    shutil.copy(golden / "clapsep_seed0.npz", HERE)
    for name in ("clap-checkpoint.csv", "clapsep-checkpoint.csv"):
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


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: make_golden.py GOLDEN_DIR, the folder with clapsep_seed0.npz and clapsep_end_to_end/")
    main(Path(sys.argv[1]))
