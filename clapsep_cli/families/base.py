"""Defines a family of models: its networks, the input made from queries, and the stream that joins the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from clapsep_cli.audio.samples import Audio
from clapsep_cli.models.base import AudioEncoder, Separator, TextEncoder, Wanted
from clapsep_cli.query import Query
from clapsep_cli.stitch.windows import Stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Config = TypeVar("Config")  # sizes of the networks, a frozen dataclass
ConfigOf = TypeVar("ConfigOf", covariant=True)
Network = TypeVar("Network", bound=Separator[Any])


class ModelLike(Protocol[ConfigOf]):
    """Interface of a model for the functions of its family. `store.checkpoint.Model` implements it."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def config(self) -> ConfigOf:
        """The sizes of its networks."""

    @property
    def device(self) -> torch.device:
        """The device of its networks."""

    @property
    def text(self) -> TextEncoder:
        """The text encoder. Raises `ModelError` if the family has none."""

    @property
    def audio(self) -> AudioEncoder:
        """The audio encoder. Raises `ModelError` if the family has none."""


class QueryEmbedder(Protocol):
    """Embeds queries of single targets, each text and each recording once.

    `unit`: scale joined conditions to length 1; where a family joins no sides, it has no effect.
    """

    unit: bool

    def embed_texts(self, texts: Iterable[str]) -> None:
        """Embed `texts`, many at a time. Raises `QueryError` for one that the model does not understand."""

    def condition(self, query: Query) -> Tensor:
        """Make the condition for a query, float32 `[1, dim]`, as `ConditionedSeparator.estimate` takes it."""

    def positive(self, query: Query) -> Tensor:
        """Embed the positive side of a query, float32 `[1, dim]`."""


@dataclass(frozen=True, kw_only=True)
class Family(Generic[Config, Network, Wanted]):
    """Describes a family: its networks and the functions that use them.

    Attributes:
        config: makes the configuration from the values that a model's files hold.
        separator: makes the separator from the configuration.
        text: makes the text encoder from the configuration and a tokenizer; None if the family has none.
        audio: makes the audio encoder from the configuration; None if the family has none.
        ask: takes a model, queries, and the positions of those that become stems; returns `wanted`, the separator's
            input. Raises `QueryError` or `AudioError` for a query that cannot be used.
        stream: takes the separator, `wanted`, a recording's rate in Hz, its number of channels and a device; returns
            the stream that joins the separator's results.
        doubts: takes a model and queries; returns a line for each reason why results may be poor.
        likeness: takes a model, `wanted`, the number of a stem, a rate in Hz, a recording at that rate (float32
            `[samples]`), and True to compare its most alike moment, not the whole; returns the cosine of recording and
            query, or None if it is unknown.
        embedder: takes a model, and True to accept silent recordings; returns the embedder of single targets' queries.
            None if targets are only separated together.
        mutual: True if targets become negative queries of one another by default.
        window_bytes: memory in bytes to separate a window on one thread, at the released size.
        near_in_bfloat16: True if bfloat16 is within 40 dB or more of float32, so that `auto` may choose it.
    """

    config: Callable[..., Config]
    separator: Callable[[Config], Network]
    text: Callable[[Config, Tokenizer], TextEncoder] | None = None
    audio: Callable[[Config], AudioEncoder] | None = None
    ask: Callable[[ModelLike[Config], Sequence[Query], Sequence[int]], Wanted]
    stream: Callable[[Network, Wanted, int, int, torch.device], Stream]
    doubts: Callable[[ModelLike[Config], Sequence[Query]], list[str]] | None = None
    likeness: Callable[[ModelLike[Config], Wanted, int, int, Audio, bool], float | None] | None = None
    embedder: Callable[[ModelLike[Config], bool], QueryEmbedder] | None = None
    mutual: bool = True
    window_bytes: int
    near_in_bfloat16: bool = False


def load_family(name: str) -> Family[Any, Any, Any]:
    """Import the family of that name: `FAMILY` of the module `families.NAME`."""
    return cast("Family[Any, Any, Any]", import_module(f"clapsep_cli.families.{name}").FAMILY)
