"""Averages the separators of two mini models of one run and its continuation.

    python weights/average.py FIRST SECOND SHARE OUT

OUT gets (1 − SHARE) of FIRST's weights and SHARE of SECOND's, and SECOND's encoders, which both have to have.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from clapsep_cli.errors import ModelError
from clapsep_cli.store.tensors import read_notes, read_tensors, save_tensors

ENCODERS = ("text.safetensors", "audio.safetensors", "tokenizer.json")
SEPARATOR = "separator.safetensors"


def main(first: Path, second: Path, share: float, out: Path) -> None:
    for name in ENCODERS:
        if (first / name).read_bytes() != (second / name).read_bytes():
            raise ModelError(f"{second / name}: is not that of {first}, so queries mean something else")
    earlier, later = read_tensors(first / SEPARATOR), read_tensors(second / SEPARATOR)
    joined = {name: earlier[name].float().lerp(each.float(), share).to(each.dtype) for name, each in later.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(joined, out / SEPARATOR, read_notes(second / SEPARATOR))
    for name in ENCODERS:
        shutil.copyfile(second / name, out / name)


if __name__ == "__main__":
    first, second, share, out = sys.argv[1:]
    main(Path(first), Path(second), float(share), Path(out))
