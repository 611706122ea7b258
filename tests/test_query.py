"""Tests queries: their checks, and how they are combined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clapsep_cli.errors import QueryError
from clapsep_cli.query import MAX_TARGETS, Query, check_targets, mutual


def test_each_target_leaves_all_that_the_others_ask_for_and_what_it_left_before() -> None:
    targets = {
        "dog": Query(pos=("dog", "bark"), neg="wind", alpha=0.3),
        "bell": Query(pos_audio=[Path("bell.wav")], neg_audio=[Path("hum.wav")]),
        "voice": Query(pos_spans=[(1.0, 2.0)], neg_spans=[(3.0, 4.0)]),
    }
    apart = mutual(targets)
    assert list(apart) == list(targets)
    assert apart["dog"] == Query(
        pos=("dog", "bark"), neg=("wind",), neg_audio=[Path("bell.wav")], neg_spans=[(1.0, 2.0)], alpha=0.3
    )
    assert apart["bell"] == Query(
        pos_audio=[Path("bell.wav")],
        neg=("dog", "bark"),
        neg_audio=[Path("hum.wav")],
        neg_spans=[(1.0, 2.0)],
    )
    assert apart["voice"] == Query(
        pos_spans=[(1.0, 2.0)], neg=("dog", "bark"), neg_audio=[Path("bell.wav")], neg_spans=[(3.0, 4.0)]
    )


def test_one_target_is_left_as_it_is() -> None:
    query = Query(pos="dog", neg="rain")
    assert mutual({"target": query}) == {"target": query}


def test_spans_become_stretches_of_the_mixture_on_their_own_sides() -> None:
    query = Query(pos="dog", pos_spans=[(1.0, 2.0)], neg_audio=[Path("hum.wav")], neg_spans=[(3.0, 4.0)])
    heard = query.within(lambda start, end: Path(f"{start:g}-{end:g}"))
    assert heard == Query(pos="dog", pos_audio=[Path("1-2")], neg_audio=[Path("hum.wav"), Path("3-4")])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "no query"),
        ({"pos": " "}, "a text of --pos is empty"),
        ({"pos": "dog", "neg": ["rain", ""]}, "a text of --neg is empty"),
        ({"pos": "dog", "alpha": 1.01}, "--alpha is 1.01"),
        ({"neg_spans": [(2.0, 2.0)]}, "--neg-span 2-2: ends before it begins"),
        ({"pos": 3}, "pos: is a text, or a list of them, not 3"),
        ({"pos": None}, "pos: is a text"),
        (
            {"pos_audio": np.zeros(9)},
            r"pos_audio: is a path, or samples and their rate in Hz, \(array, 44100\).*not an array of shape .9.",
        ),
        ({"neg_audio": [("a", "b")]}, r"neg_audio: .*not \('a', 'b'\)"),
        ({"pos_spans": "1-2"}, "pos_spans: is from and to in seconds"),
        ({"pos": "dog", "alpha": "much"}, "--alpha is much"),
    ],
)
def test_a_query_that_means_nothing_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(QueryError, match=said):
        Query(**wrong)  # type: ignore[arg-type]


def test_one_of_a_kind_needs_no_list() -> None:
    shot = (np.zeros(9, np.float32), 44_100)
    for kind, one in (("pos", "dog"), ("pos_audio", "bark.wav"), ("pos_audio", Path("b")), ("pos_audio", shot)):
        assert getattr(Query(**{kind: one}), kind) == (one,)
    assert Query(neg_spans=(1.0, 2.5)).neg_spans == ((1.0, 2.5),)


def test_a_run_has_a_limited_number_of_queries_by_name() -> None:
    many = {str(number): Query("dog") for number in range(MAX_TARGETS + 1)}
    for wrong, said in (
        ({}, "no target"),
        (many, "at most 64"),
        ("dog", "give a Query"),
        ({"a": "dog"}, "give a Query"),
    ):
        with pytest.raises(QueryError, match=said):
            check_targets(wrong)
