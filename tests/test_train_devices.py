"""A run gives the same weights on one device, in accumulated parts, and on two devices."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_clips
from linear_recipe import LinearRecipe

from clapsep_cli.errors import DeviceError
from clapsep_cli.store.tensors import read_tensors
from clapsep_cli.training.loop.train import Hardware, train

pytest.importorskip("lightning_fabric", reason="training takes the packages of clapsep[train]")


def losses(folder: Path) -> list[float]:
    with (folder / "log.csv").open() as file:
        return [float(row[3]) for row in csv.reader(file) if row[2] == "loss"]


def same(first: Path, second: Path) -> None:
    assert len(losses(first)) == 4
    np.testing.assert_allclose(losses(first), losses(second), rtol=1e-5)
    left, right = (read_tensors(folder / "state.safetensors") for folder in (first, second))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        # First moments are sums of gradients; Adam makes steps of one size of even the smallest.
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_batch_may_be_shared_by_devices_or_computed_in_parts(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path)
    one, parts, two = (tmp_path / name for name in ("one", "parts", "two"))
    train(manifest, one, LinearRecipe())
    train(manifest, parts, LinearRecipe(accumulate=4))
    same(one, parts)
    script = Path(__file__).with_name("linear_recipe.py")
    # Warnings are not errors there: PyTorch's own, of gloo, differ from one version to the next.
    done = subprocess.run(
        [sys.executable, str(script), str(manifest), str(two), "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["follows", "leads"]
    same(one, two)
    (call,) = json.loads((two / "run.json").read_text())["calls"]
    assert call["devices"] == 2


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path)
    for hardware in (Hardware("tpu-of-mine"), Hardware("cpu", "many"), Hardware("cpu", "0")):
        with pytest.raises(DeviceError, match="cannot train on these devices"):
            train(manifest, tmp_path / "out", LinearRecipe(), hardware=hardware)
    assert not (tmp_path / "out").exists()
