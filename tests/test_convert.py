"""Tests converters: every nesting is read, no code of a pickle is run, and the written weights are exact."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fill import checkpoints
from tiny_clapsep import TINY, write_checkpoints
from torch import Tensor

from clapsep_cli.errors import CheckpointError
from clapsep_cli.models.base import condition
from clapsep_cli.store.checkpoint import Model, read_metadata
from clapsep_cli.store.convert_clapsep import convert, convert_clapsep
from clapsep_cli.store.released import read_checkpoint
from clapsep_cli.store.tensors import read_tensors


def test_released_nesting_to_a_model_that_runs(tmp_path: Path) -> None:
    clap, tuned = write_checkpoints(tmp_path)
    for order, folder in (((clap, tuned), tmp_path / "a"), ((tuned, clap), tmp_path / "b")):
        convert_clapsep(order, folder, TINY, revision="abc")
        expected = convert(*checkpoints(TINY), TINY)
        for part, tensors in expected.items():
            path = folder / f"{part}.safetensors"
            assert read_metadata(path)["revision"] == "abc"
            written = read_tensors(path)
            assert set(written) == set(tensors)
            assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    model = Model("tiny", tmp_path / "a", torch.device("cpu"))
    assert model.config == TINY
    with torch.no_grad():
        features = model.separator.encode(0.1 * torch.randn(1, TINY.window))
        mask = model.separator.mask(features, condition(torch.randn(1, TINY.dim), None))
    assert mask.shape == (1, TINY.window // 320 + 1, 513)


@pytest.mark.parametrize("nest", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"model": t, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_nesting_of_the_tuned_tensors(
    tmp_path: Path, nest: Callable[[Any], Any], prefix: str, zipped: bool
) -> None:
    _, tuned = checkpoints(TINY)
    path = tmp_path / "x.ckpt"
    torch.save(nest({prefix + k: v for k, v in tuned.items()}), path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert set(read) == set(tuned)
    assert all(torch.equal(read[name], tuned[name]) for name in tuned)


class Evil:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "nest",
    [
        lambda evil, tensors: evil,
        lambda evil, tensors: {**tensors, "evil": evil},
        lambda evil, tensors: {"state_dict": {**tensors, "evil": evil}},
        lambda evil, tensors: {"state_dict": tensors, "optimizer": {0: evil}},
        lambda evil, tensors: {"model": tensors, "epoch": evil},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, nest: Callable[[Any, Any], Any], zipped: bool) -> None:
    mark, path = tmp_path / "owned", tmp_path / "evil.pt"
    torch.save(nest(Evil(mark), {"a": torch.zeros(1)}), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than weights.*refused"):
        read_checkpoint(path)
    assert not mark.exists()


def test_a_bare_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    mark, path = tmp_path / "owned", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor a zip", bytes(1000)])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="none"):
        read_checkpoint(tmp_path / "none.pt")


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    path, _ = write_checkpoints(tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"clap\.pt"):
        read_checkpoint(path)


def test_both_checkpoints_are_needed_and_nothing_else_will_do(tmp_path: Path) -> None:
    clap, tuned = write_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"best_model\.ckpt is not among"):
        convert_clapsep([clap], tmp_path / "out", TINY)
    with pytest.raises(CheckpointError, match=r"music_audioset\S+ is not among"):
        convert_clapsep([tuned], tmp_path / "out", TINY)
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="neither LAION-CLAP's checkpoint nor CLAPSep's"):
        convert_clapsep([clap, other], tmp_path / "out", TINY)
    with pytest.raises(CheckpointError, match="misshapen"):
        convert_clapsep([clap, tuned], tmp_path / "out")


def test_lora_is_merged_as_peft_merges_it() -> None:
    peft = pytest.importorskip("peft", reason="peft is the oracle of the merge; it is not installed here")
    clap, tuned = checkpoints(TINY)
    name = "audio_branch.layers.1.blocks.2.attn.qkv"
    weight: Tensor = clap[f"{name}.weight"]

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(weight.shape[1], weight.shape[0])

    holder = Holder()
    holder.load_state_dict({"qkv.weight": weight, "qkv.bias": tuned[f"{name}.bias"]})
    config = peft.LoraConfig(r=16, lora_alpha=1, target_modules=["qkv"])
    tuned_holder = peft.inject_adapter_in_model(config, holder)
    tuned_holder.qkv.lora_A["default"].weight.data = tuned[f"{name}.lora_A"]
    tuned_holder.qkv.lora_B["default"].weight.data = tuned[f"{name}.lora_B"]
    tuned_holder.qkv.merge()
    merged = convert(clap, tuned, TINY)["separator"]["encoder.layers.1.blocks.2.attn.qkv.weight"]
    torch.testing.assert_close(merged, tuned_holder.qkv.base_layer.weight.data, rtol=0, atol=1e-6)
