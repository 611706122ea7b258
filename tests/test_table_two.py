"""Scores 100 AudioCaps mixtures with the released weights, beside Table II. It takes the data, a network and 2.5 GB."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clapsep_cli import load_model
from clapsep_cli.errors import DownloadError
from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate
from clapsep_cli.evaluation.mixtures import EvaluationSet, labelled_clips, make_mixtures
from clapsep_cli.evaluation.report import PUBLISHED
from clapsep_cli.evaluation.scores import summary

FOLDER = os.environ.get("CLAPSEP_AUDIOCAPS", "")
MIXTURES = 100
WITHIN_DB = 2.0  # of the paper's mean: the mixtures are others, and the mean of a hundred is known to 0.7 dB


@pytest.mark.skipif(not FOLDER, reason="set CLAPSEP_AUDIOCAPS to the folder of `clapsep mixtures fetch audiocaps`")
def test_the_released_weights_reach_table_two() -> None:
    pytest.importorskip("torchmetrics", reason="BSS-eval takes the packages of clapsep[evaluate]")
    clips, root = labelled_clips(Path(FOLDER) / "test.csv")
    try:
        model = load_model("clapsep", precision="high")
    except DownloadError as error:
        pytest.skip(f"the released weights cannot be had: {error}")
    rows = make_mixtures(clips, root, seed=0)
    chosen = rows[:: max(1, len(rows) // MIXTURES)][:MIXTURES]
    scored = evaluate(model, EvaluationSet(chosen, root), EvaluationOptions(("both",)))
    found = summary(score for scores in scored for score in scores)["both"]
    assert found["mixtures"] == MIXTURES
    # The paper defines the plain SDR, and its released test step computes that of BSS-eval: one of them has to be near.
    missed = {metric: found[metric] - PUBLISHED["AudioCaps"][0] for metric in ("sdri", "bss_sdri")}
    assert min(map(abs, missed.values())) < WITHIN_DB, missed
