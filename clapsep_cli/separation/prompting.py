"""From queries to what a TUSS is asked for: a set of prompts, and which of them become stems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clapsep_cli.errors import QueryError
from clapsep_cli.models.prompts import TASKS, indices, untrained
from clapsep_cli.models.tuss import Asked
from clapsep_cli.query import Query
from clapsep_cli.stitch.stem_stream import StemStream

if TYPE_CHECKING:
    from clapsep_cli.store.checkpoint import Model


def prompts(model: Model, queries: Sequence[Query], kept: Sequence[int]) -> Asked:
    """What asks `model`, a TUSS, for those of `queries` that are `kept`: each one's positive text names a prompt.

    The set is all that the queries name on their positive sides and, once each, on their negative ones. A set of a
    single prompt, which no model was trained on, is made complete by the first task in which the prompt occurs.
    Raises `QueryError` where a query is anything else.
    """
    numbers = indices(_set(queries), model.config.prompts)
    return Asked(torch.tensor(numbers, device=model.device), tuple(kept))


def stream(model: Model, wanted: Asked, rate: int, channels: int) -> StemStream:
    """A recording of `channels` at `rate` Hz, to be separated into stems."""
    numbers, separator = wanted.prompts.tolist(), model.separator
    kept = [numbers[at] for at in wanted.kept]
    return StemStream(separator.window, kept, rate, separator.rate, channels, model.device)


def doubts(model: Model, queries: Sequence[Query]) -> list[str]:
    """Why the released models know no mixture of what `queries` name. Raises `QueryError` as `prompts` does."""
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
    if query.pos_audio or query.neg_audio or query.pos_spans or query.neg_spans:
        raise QueryError("this model separates by prompts, not by examples: use --pos with the name of a prompt")
    if len(query.pos) != 1:
        raise QueryError("this model separates by prompts: give each target one --pos that names a prompt")
    return query.pos[0]
