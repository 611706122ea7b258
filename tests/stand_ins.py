"""Separators that stand in for slow or large ones; as a program, the command with one of them: SECONDS a window."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from conftest import Fixed, Stub
from torch import Tensor

from clapsep_cli.dsp import HOP, N_FFT
from clapsep_cli.models.base import Conditions, go_on
from clapsep_cli.store import library


class Moody(Fixed):
    """Masks a window by its content and by what is asked for; notes how many windows it got at once.

    A window takes it as many seconds as the environment's SECONDS.
    """

    def __init__(self, window: int = 32_000) -> None:
        super().__init__(0.0, window)
        self.encoded: list[int] = []
        self.batches: list[int] = []

    def infer(self, windows: Tensor, wanted: Conditions, check: Callable[[], None] = go_on) -> Tensor:
        time.sleep(float(os.environ.get("SECONDS", 0)))
        self.batches.append(len(windows))
        return super().infer(windows, wanted, check)

    def encode(self, mixture: Tensor) -> Tensor:
        self.encoded.append(len(mixture))
        return mixture

    def mask(self, features: Tensor, condition: Tensor) -> Tensor:
        frames, bins = torch.arange(self.window // HOP + 1), torch.arange(N_FFT // 2 + 1)
        phase = 50 * features.abs().amax(1)[:, None, None] + condition.sum(1)[:, None, None]
        return 0.5 + 0.4 * torch.sin(phase + frames[:, None] / 10 + bins / 50)


if __name__ == "__main__":
    from clapsep_cli.cli.app import run

    torch.set_num_threads(1)
    library.load_model = lambda *_, **__: Stub(Moody())  # type: ignore[assignment]
    run()
