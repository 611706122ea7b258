"""Scores 100 AudioCaps mixtures with the released weights, beside Table II. It takes the data, a network and 2.5 GB.

The same steps run on stand-ins of weights and data, so that what is only run by hand is known to work.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from data_sets import VIDEOS, serve_data_sets, sound
from hub_server import HubServer

from clapsep_cli import load_model
from clapsep_cli.errors import DownloadError
from clapsep_cli.evaluation.datasets import fetch
from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate
from clapsep_cli.evaluation.mixtures import EvaluationSet, labelled_clips, make_mixtures
from clapsep_cli.evaluation.report import PUBLISHED
from clapsep_cli.evaluation.scores import summary
from clapsep_cli.store import download

FOLDER = os.environ.get("CLAPSEP_AUDIOCAPS", "")
MIXTURES = 100
WITHIN_DB = 2.0  # of the paper's mean: the mixtures are others, and the mean of a hundred is known to 0.7 dB

pytest.importorskip("torchmetrics", reason="BSS-eval takes the packages of clapsep[evaluate]")


def table_two(folder: Path, mixtures: int) -> dict[str, float]:
    """Score mixtures of a folder of `clapsep mixtures fetch audiocaps`; skip the test where no weights can be had."""
    clips, root = labelled_clips(folder / "test.csv")
    try:
        model = load_model("clapsep", precision="high")
    except DownloadError as error:
        pytest.skip(f"the released weights cannot be had: {error}")
    rows = make_mixtures(clips, root, seed=0)
    chosen = rows[:: max(1, len(rows) // mixtures)][:mixtures]
    scored = evaluate(model, EvaluationSet(chosen, root), EvaluationOptions(("both",)))
    found = summary(score for scores in scored for score in scores)["both"]
    assert found["mixtures"] == mixtures
    return found


def missed(found: dict[str, float]) -> float:
    """Return how far the nearer mean lies from the paper's, in dB.

    The paper defines the plain SDR, and its released test step computes that of BSS-eval: one of them has to be near.
    """
    return min(abs(found[metric] - PUBLISHED["AudioCaps"][0]) for metric in ("sdri", "bss_sdri"))


@pytest.mark.skipif(not FOLDER, reason="set CLAPSEP_AUDIOCAPS to the folder of `clapsep mixtures fetch audiocaps`")
def test_the_released_weights_reach_table_two() -> None:
    assert missed(table_two(Path(FOLDER), MIXTURES)) < WITHIN_DB


def test_the_steps_run_on_stand_ins(served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_data_sets(served, monkeypatch)
    for n, name in enumerate(VIDEOS):
        path = tmp_path / "audiocaps" / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sound(30 + n))
    fetch("audiocaps", tmp_path / "audiocaps")
    found = table_two(tmp_path / "audiocaps", 2)
    assert math.isfinite(found["sdri"])
    assert missed(found) > WITHIN_DB, "random weights do not reach it"


def test_without_weights_it_is_skipped(served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSES_S", (0.0,))
    served.stop()
    (tmp_path / "test.csv").write_text("file_name,caption\na.wav,A dog\nb.wav,Rain\n")
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(sound(1))
    with pytest.raises(pytest.skip.Exception, match="the released weights cannot be had"):
        table_two(tmp_path, 2)
