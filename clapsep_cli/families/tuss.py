"""Defines the family TUSS: processes a set of prompts jointly; some of them become stems."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clapsep_cli.errors import QueryError
from clapsep_cli.families.base import Family, ModelLike
from clapsep_cli.models.prompts import TASKS, indices, untrained
from clapsep_cli.models.tuss import Prompted, Tuss, TussConfig
from clapsep_cli.query import Query
from clapsep_cli.stitch.stems import StemStream


def prompts(model: ModelLike[TussConfig], queries: Sequence[Query], kept: Sequence[int]) -> Prompted:
    """Make a set of prompts from the positive texts of queries, and from each different negative one.

    No model was trained on a single prompt: it is completed by the other prompts of the first task that has it.

    Args:
        model: a TUSS.
        queries: the queries, each with one positive text that names a prompt.
        kept: positions of the queries that become stems.

    Returns:
        The prompts, and `kept`.

    Raises:
        QueryError: for a query of another kind.
    """
    numbers = indices(_set(queries), model.config.prompts)
    return Prompted(torch.tensor(numbers, device=model.device), tuple(kept))


def stream(separator: Tuss, wanted: Prompted, rate: int, channels: int, device: torch.device) -> StemStream:
    """Make the stream that joins the stems of a recording of `channels` at `rate` Hz."""
    numbers = wanted.prompts.tolist()
    kept = [numbers[at] for at in wanted.kept]
    return StemStream(separator.window, kept, rate, separator.rate, channels, device, separator.overlap)


def untrained_sets(model: ModelLike[TussConfig], queries: Sequence[Query]) -> list[str]:
    """Return reasons why the released models were not trained on these prompts. Raises `QueryError` as `prompts`."""
    indices(_set(queries), model.config.prompts)
    return [f"the released models were not trained on {reason}" for reason in untrained(_set(queries))]


def _set(queries: Sequence[Query]) -> list[str]:
    names = [_name(query) for query in queries]
    for query in queries:
        names += [text for text in query.neg if text not in names]
    if len(names) == 1:
        task = next((list(task) for task in TASKS.values() if names[0] in task), list(names))
        task.remove(names[0])
        names += task
    return names


def _name(query: Query) -> str:
    if len(query.pos) != 1:
        raise QueryError("this model separates by prompts: give each target one --pos that names a prompt")
    return query.pos[0]


FAMILY = Family(
    config=TussConfig,
    separator=Tuss,
    ask=prompts,
    stream=stream,
    window_bytes=220_000_000,  # measured at most, with five prompts as with two
    doubts=untrained_sets,
    mutual=False,
)
