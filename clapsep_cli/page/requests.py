"""Reads the requests of the page; makes from them queries, a description, and the command that does the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from clapsep_cli.errors import UsageError
from clapsep_cli.jobs.requests import parse_targets
from clapsep_cli.query import MAX_TARGETS, TARGET, Query, Span

Shots = Mapping[str, tuple[str, Path]]  # examples by id: the name each was given, and where it lies

MAX_LETTERS = 1000  # of a text, at most
MAX_ITEMS = 64  # of a side, at most
# Least presence scores for these words. With mini, six in ten of the present sounds reach the second, and six in ten of
# the absent sounds are below the last.
IN_WORDS = ((0.15, "clearly there"), (-0.05, "probably there"), (-0.2, "doubtful"))
ABSENT_IN_WORDS = "probably not in this recording"


def _in_order(span: Span) -> Span:
    if span[1] <= span[0]:
        raise ValueError("ends before it begins")
    return span


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_LETTERS)]
Seconds = Annotated[float, Field(ge=0, lt=1e9), AfterValidator(lambda time: round(time, 3))]
Stretch = Annotated[tuple[Seconds, Seconds], AfterValidator(_in_order)]


class _Read(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Side(_Read):
    """One side of a query: texts, ids of examples, and stretches of the mixture in seconds."""

    texts: Annotated[tuple[Text, ...], Field(max_length=MAX_ITEMS)] = ()
    shots: Annotated[tuple[str, ...], Field(max_length=MAX_ITEMS)] = ()
    spans: Annotated[tuple[Stretch, ...], Field(max_length=MAX_ITEMS)] = ()

    def describe(self, shots: Shots) -> str:
        """Describe the side in words."""
        examples = [f"like {shots[key][0]}" for key in self.shots]
        return ", ".join([*self.texts, *examples, *(f"like {_stretch(span, '–')} s" for span in self.spans)])


class Target(Side):
    """A target: the positive side of a query, and a name."""

    name: str


class Request(_Read):
    """A request: the model, the targets, and the negative side of all of them; `refine` as in `Model.refine`."""

    model: str
    refine: bool = False
    targets: tuple[Target, ...] = Field(min_length=1, max_length=MAX_TARGETS)
    leave: Side = Side()

    @staticmethod
    def read(text: bytes | str, shots: Shots) -> Request:
        """Read and check a request in JSON. Raises `UsageError` or, for an impossible target, `QueryError`."""
        try:
            request = Request.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise UsageError(f"the request cannot be read: {': '.join(filter(None, (place, fault['msg'])))}") from error
        if any(key not in shots for side in (*request.targets, request.leave) for key in side.shots):
            raise UsageError("an example no longer exists: add it again")
        sizes = [len(side.texts) + len(side.shots) + len(side.spans) for side in request.targets]
        if not request.single and set(sizes) != {1}:
            raise UsageError("a target with a name is one text, one example or one stretch")
        request.queries(shots)
        return request

    @property
    def single(self) -> bool:
        """True for a single target, which needs no name."""
        return [target.name for target in self.targets] == [TARGET]

    def named(self) -> dict[str, Target]:
        """Return the targets by name, as in file names. Raises `QueryError` for an impossible name."""
        if self.single:
            return {TARGET: self.targets[0]}
        return dict(zip(parse_targets(f"{target.name}=x" for target in self.targets), self.targets, strict=True))

    def queries(self, shots: Shots) -> dict[str, Query]:
        """Return the queries by name. Raises `QueryError` for an empty one."""
        return {
            name: Query(
                pos=side.texts,
                neg=self.leave.texts,
                pos_audio=[shots[key][1] for key in side.shots],
                neg_audio=[shots[key][1] for key in self.leave.shots],
                pos_spans=side.spans,
                neg_spans=self.leave.spans,
            )
            for name, side in self.named().items()
        }

    def describe(self, shots: Shots) -> str:
        """Describe the request in words, for the list of attempts."""
        kept = {name: side.describe(shots) for name, side in self.named().items()}
        told = [words if self.single or name == words else f"{name}: {words}" for name, words in kept.items()]
        left = self.leave.describe(shots)
        return " without ".join(filter(None, ("; ".join(filter(None, told)) or "everything", left)))


def command_line(request: Request, shots: Shots, given: str, form: str, device: str, stream: int | None = None) -> str:
    """Return the command that writes the same files, for a POSIX shell.

    Args:
        request: the request.
        shots: the examples; those dropped on the page appear under their file names.
        given: name of the recording.
        form: format of the outputs.
        device: name of the device, as for `load_model`.
        stream: number of the sound track, from 1; None for the first.
    """
    words = ["clapsep", "extract", _as_argument(given)]
    for name, side in request.named().items():
        if request.single:
            words += _side(side, shots, "--pos", "--query-audio", "--pos-span")
        else:
            (query,) = (*side.texts, *(shots[key][0] for key in side.shots), *map(_stretch, side.spans))
            words += ["--target", f"{name}={query}"]
    words += _side(request.leave, shots, "--neg", "--neg-audio", "--neg-span")
    words += ["--model", request.model]
    words += ["--refine"] if request.refine else []
    words += [] if stream is None else ["--stream", str(stream)]
    words += ["--format", form] if form != "wav" else []
    words += ["--device", device] if device != "auto" else []
    return shlex.join(words)


def _side(side: Side, shots: Shots, text: str, shot: str, span: str) -> list[str]:
    pairs = [(text, one) for one in side.texts]
    pairs += [(shot, _as_argument(shots[key][0])) for key in side.shots]
    pairs += [(span, _stretch(one)) for one in side.spans]
    # Only with "=" may a text begin with a hyphen.
    words = [[f"{name}={value}"] if value.startswith("-") else [name, value] for name, value in pairs]
    return [word for pair in words for word in pair]


def _stretch(span: Span, dash: str = "-") -> str:
    return dash.join(f"{time:.3f}".rstrip("0").rstrip(".") for time in span)


def _as_argument(name: str) -> str:
    return f"./{name}" if name.startswith(("-", "@")) else name


def presence_in_words(score: float | None) -> str:
    """Describe a presence score; None stands for a model that cannot tell."""
    if score is None:
        return "not known"
    return next((words for least, words in IN_WORDS if score >= least), ABSENT_IN_WORDS)
