"""Fast computations give the right results: attention, linear layers, lower precision and its choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep
from tiny_clapsep import ROBERTA, convert_tiny, write_checkpoints
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli import Query, load_model
from clapsep_cli.audio.sources import read_mono
from clapsep_cli.dsp import RATE_HZ, spectrum, waveform
from clapsep_cli.errors import UsageError
from clapsep_cli.models import layers
from clapsep_cli.models.base import MaskSeparator
from clapsep_cli.models.layers import FEW, Linear, attend
from clapsep_cli.store.checkpoint import choose_precision

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU = torch.device("cpu")


def by_definition(qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Attention of each head and item by itself, in float64."""
    batch, tokens, width = qkv.shape
    size = width // 3 // heads
    out = torch.empty(batch, tokens, width // 3, dtype=torch.float64)
    for item in range(batch):
        for head in range(heads):
            q, k, v = (qkv[item, :, part * heads * size + head * size :][:, :size].double() for part in range(3))
            weights = q @ k.T / size**0.5
            if bias is not None:
                of = bias[item % len(bias)]
                own = of[head % len(of)]
                weights = weights.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else weights + own.double()
            out[item, :, head * size :][:, :size] = weights.softmax(-1) @ v
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("few", [0, 1, 3])
def test_attention_with_and_without_a_bias_that_recurs(dtype: torch.dtype, tolerance: float, few: int) -> None:
    generator = torch.Generator().manual_seed(few)
    qkv = torch.randn(6, 7, 3 * 4 * 5, generator=generator).to(dtype)
    bias = torch.randn(few, 4, 7, 7, generator=generator).to(dtype) if few else None
    torch.testing.assert_close(attend(qkv, 4, bias).double(), by_definition(qkv, 4, bias), rtol=0, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_a_product_is_the_same_for_few_rows_and_for_many(rows: int, bias: bool) -> None:
    layer, x = Linear(48, 96, bias=bias), torch.randn(1, rows, 48, requires_grad=True)
    found, expected = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    across = torch.randn_like(expected)
    for one, other in zip(
        *(torch.autograd.grad(y, (x, *layer.parameters()), across) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_attention_leaves_out_what_must_not_be_attended_to() -> None:
    qkv = torch.randn(2, 6, 3 * 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    expected = by_definition(qkv, 2, mask.expand(2, 1, 6, 6))
    torch.testing.assert_close(attend(qkv, 2, mask).double(), expected, rtol=0, atol=1e-5)


def test_long_attention_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over long sequences it goes head by head, to the same end."""
    qkv = torch.randn(2, 40, 3 * 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    short = attend(qkv, 3)
    monkeypatch.setattr(layers, "LONG", 16)
    torch.testing.assert_close(attend(qkv, 3), short, rtol=0, atol=2e-2)
    torch.testing.assert_close(attend(qkv, 3).double(), by_definition(qkv, 3, None), rtol=0, atol=3e-2)


@pytest.mark.filterwarnings("ignore:--precision fast")  # where it is not native
@pytest.mark.parametrize(("name", "least_db"), [("clapsep", 40), ("mini", 25)])
def test_in_bfloat16_the_waveform_stays_near_float32(name: str, least_db: float, released_folder: Path) -> None:
    """On real mixtures; the released size with stand-in weights. In one of them mini is asked for what is not there."""
    nets = []
    for precision in ("high", "fast"):
        model = load_model(released_folder if name == "clapsep" else name, "cpu", precision)
        assert model.precision == {"high": "float32", "fast": "bfloat16"}[precision]
        assert isinstance(model.separator, MaskSeparator)
        nets.append(model.separator)
    wanted = model.ask([Query(pos_audio=[EXAMPLES / "another-dog.flac"], neg_audio=[EXAMPLES / "rain.flac"])]).targets
    for file in ("mix", "rain"):
        heard = torch.from_numpy(read_mono(EXAMPLES / f"{file}.flac", RATE_HZ))[: nets[0].window]
        heard = F.pad(heard, (0, nets[0].window - len(heard)))[None]
        with torch.inference_mode():
            masks = [net.spectral(net.mask(net.encode(heard), wanted)) for net in nets]
        assert {mask.dtype for mask in masks} == {torch.float32}
        exact, fast = (waveform(spectrum(heard) * mask, heard.shape[1]) for mask in masks)
        assert not torch.equal(exact, fast)
        assert 10 * torch.log10(exact.square().sum() / (fast - exact).square().sum()) > least_db
        assert 10 * torch.log10(heard.square().sum() / (fast - exact).square().sum()) > 40


def test_who_chooses_the_precision(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, released_folder: Path) -> None:
    assert choose_precision("high", CPU) == torch.float32
    assert choose_precision("fast", CPU) == torch.bfloat16
    for native in (False, True):
        monkeypatch.setattr("clapsep_cli.store.checkpoint.native_bfloat16", lambda device, native=native: native)
        assert choose_precision("auto", CPU) == (torch.bfloat16 if native else torch.float32)
        assert choose_precision("auto", CPU, near=False) == torch.float32
        assert load_model(released_folder, "cpu").precision == ("bfloat16" if native else "float32")
        assert load_model(tiny_folder, "cpu").precision == "float32"  # a mini gains little and loses more
    with pytest.raises(UsageError, match="auto, high or fast"):
        choose_precision("low", CPU)


def test_fast_where_it_is_slower_says_so(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    for native in (False, True):
        monkeypatch.setattr("clapsep_cli.store.checkpoint.native_bfloat16", lambda device, native=native: native)
        said: list[str] = []
        assert load_model(tiny_folder, "cpu", "fast", say=said.append).precision == "bfloat16"
        load_model(tiny_folder, "cpu", "high", say=said.append)
        assert [line.partition(":")[0] for line in said] == ([] if native else ["--precision fast"])


@pytest.mark.parametrize("limits", [("avx2", "AVX2"), ("default", "SSE41")], ids=["avx2", "sse41"])
def test_bfloat16_works_on_lesser_processors(limits: tuple[str, str], tmp_path: Path, clapsep: Clapsep) -> None:
    """In a process of its own, as PyTorch and oneDNN look at the processor once."""
    convert_tiny(write_checkpoints(tmp_path, ROBERTA), tmp_path / "tiny")
    query = ["--query-audio", str(EXAMPLES / "another-dog.flac"), "--model", str(tmp_path / "tiny"), "-d", "cpu"]
    command = ["extract", str(EXAMPLES / "mix.flac"), *query, "--subtype", "float", "-f", "wav"]
    process = subprocess.run(
        [sys.executable, "-m", "clapsep_cli", *command, "--precision", "fast", "-o", str(tmp_path / "fast"), "--json"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": limits[0], "ONEDNN_MAX_CPU_ISA": limits[1], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["precision"] == "bfloat16"
    assert clapsep(*command, "--precision", "high", "-o", tmp_path / "high", cwd=tmp_path).returncode == 0
    fast, high = (soundfile.read(tmp_path / name / "mix.target.wav")[0] for name in ("fast", "high"))
    assert 10 * np.log10((high**2).sum() / ((fast - high) ** 2).sum()) > 30


def test_mps_is_never_fast_by_itself() -> None:
    assert choose_precision("auto", torch.device("mps")) == torch.float32
