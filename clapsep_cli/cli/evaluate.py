"""`clapsep evaluate`: scores models, and the outputs of other programs, on lists of mixtures."""

from __future__ import annotations

import os
import re
from datetime import date
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli import score_tables
from clapsep_cli.cli.terminal import load_model, notes
from clapsep_cli.registry import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from clapsep_cli.evaluation.mixtures import EvaluationSet
    from clapsep_cli.evaluation.report import Example
    from clapsep_cli.evaluation.scores import Run, Score
    from clapsep_cli.store.checkpoint import Model

SCORES = "scores.csv"
PROMPTED = "tuss-medium"  # the model for lists of prompts, unless one is named
SIDES = {"both": "both", "pos": "positive", "neg": "negative"}
MOST = 1_000_000  # shots, or seconds of them
OF_PROMPTS = ("single_prompt", "segment", "shift")  # options for lists of prompts alone
OF_QUERIES = (  # options for lists of queries alone
    *("queries", "shots", "report", "estimates", "out", "labels", "refine", "skip_missing", "batch_size"),
    *("text", "bss", "condition"),
)
PROMPTS, RESULTS = "Lists of prompts", "Results"  # headings in --help

Listed = Annotated[
    list[Path],
    opt.option(
        opt.INPUT,
        "--mixtures CSV",
        "List of mixtures, by `mixtures make` or as released with CLAPSep; or mixture,prompt,reference for a model of "
        "prompts. Repeatable.",
    ),
]
Audio = Annotated[list[Path], opt.option(opt.INPUT, "--audio DIR", "Folder of the list's files; one, or one a list.")]
SkipMissing = Annotated[bool, opt.option(opt.INPUT, "--skip-missing", "Skip mixtures whose recordings are missing.")]
Estimates = Annotated[
    opt.Paths,
    opt.option(
        opt.INPUT,
        "--estimates DIR",
        "Score the outputs of another program for rendered mixtures; repeatable. Without --model, these alone.",
    ),
]
Models = Annotated[
    opt.Texts,
    opt.option(
        opt.MODEL,
        "--model NAME|PATH",
        "A model by name or folder, repeatable; by default CLAPSEP_MODEL, or the best available.",
        list(MODELS),
    ),
]
Queries = Annotated[
    opt.Text,
    opt.option(
        opt.QUERY,
        "--queries NAME,…",
        "Sides of the query: pos, neg, both; by default all that the model takes. For --estimates: the first.",
    ),
]
Condition = Annotated[
    str,
    opt.option(
        opt.QUERY,
        "--condition unit|raw",
        "Scale joined queries to length 1, as CLAPSep's released inference, or not, as its test step.",
        ("unit", "raw"),
        closed=True,
    ),
]
Words = Annotated[bool, opt.option(opt.QUERY, "--text/--no-text", "Query with texts, alone and with recordings.")]
Shots = Annotated[
    opt.Text, opt.option(opt.QUERY, "--shots K,…", "Also query with these numbers of recordings: 1,5,10.")
]
ShotLists = Annotated[
    opt.Paths, opt.option(opt.QUERY, "--shots-csv CSV", "Recordings for --shots: class,file (one, or a list).")
]
ShotFolders = Annotated[
    opt.Paths, opt.option(opt.QUERY, "--shots-audio DIR", "Further folder of the recordings of --shots; repeatable.")
]
ShotSeconds = Annotated[
    opt.Text, opt.option(opt.QUERY, "--shot-seconds S,…", "Cut these recordings to each of these lengths: 1,2,5,10.")
]
SinglePrompt = Annotated[bool, opt.option(PROMPTS, "--single-prompt", "Separate one part at a time.")]
Segment = Annotated[
    opt.Text, opt.option(PROMPTS, "--segment S|whole", "Seconds separated at once; by default as trained.")
]
Shift = Annotated[opt.Number, opt.option(PROMPTS, "--shift S", "With --segment: seconds from one segment to the next.")]
Bss = Annotated[bool, opt.option(RESULTS, "--bss/--no-bss", "Also compute BSS-eval SDR (512-tap filter).")]
Out = Annotated[
    Path | None, opt.option(RESULTS, "--out -o DIR", "Write scores.csv here; a stopped run continues from it.")
]
Report = Annotated[Path | None, opt.option(RESULTS, "--report FILE.html", "Write a report as one self-contained page.")]
Dataset = Annotated[
    opt.Text, opt.option(RESULTS, "--dataset NAME", "In the report, show the published figures of this data alone.")
]
Json = Annotated[bool, opt.option(RESULTS, "--json", "Print all summaries as one JSON object.")]
Labels = Annotated[bool, opt.option(RESULTS, "--labels", "Also print scores by label.")]


def evaluate(
    listed: Listed,
    audio: Audio,
    model: Models = None,
    estimates: Estimates = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "high",
    batch_size: opt.BatchSize = 0,
    _model_dir: opt.ModelDir = None,
    queries: Queries = None,
    condition: Condition = "unit",
    shots: Shots = None,
    shots_csv: ShotLists = None,
    shots_audio: ShotFolders = None,
    shot_seconds: ShotSeconds = None,
    text: Words = True,
    refine: opt.Refine = False,
    bss: Bss = True,
    single_prompt: SinglePrompt = False,
    segment: Segment = None,
    shift: Shift = None,
    out: Out = None,
    report: Report = None,
    dataset: Dataset = None,
    json: Json = False,
    labels: Labels = False,
    skip_missing: SkipMissing = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score models on lists of mixtures of 10 s at 0 dB: SDRi, SI-SDRi and BSS-eval SDRi in dB.

    The lists released with CLAPSep work as they are. Of several models, each is compared with the first.
    """
    given = locals()
    if bool(shots) != bool(shots_csv):
        raise typer.BadParameter("--shots and --shots-csv go together: give the number of recordings, and their list")
    if not shots:
        _refuse(given, ("shots_audio", "shot_seconds"), "add --shots and --shots-csv")
    if not report:
        _refuse(given, ("overwrite", "dataset"), "it is for a report: add --report FILE.html")
    if not text and not shots:
        raise typer.BadParameter("--no-text needs audio queries: add --shots and --shots-csv")
    kinds = {
        "sides": _sides(queries) if queries else None,
        "text": text,
        "shots": _numbers(shots, "recordings", True),
        "bss": bss,
        "shot_seconds": _numbers(shot_seconds, "seconds", False),
        "condition": condition,
    }
    folders, shot_lists = _each(audio, len(listed), "--audio"), _each(shots_csv, len(listed), "--shots-csv")
    if report:
        opt.check_free(report, overwrite)
    if _are_prompted(listed):
        _refuse(given, OF_QUERIES, "it has no effect on a list of prompts")
        _evaluate_prompted(dict(zip(listed, folders, strict=True)), given)
        return
    _refuse(given, OF_PROMPTS, "it is for lists of prompts: mixture,prompt,reference")
    if dataset:
        from clapsep_cli.evaluation.report import check_dataset

        check_dataset(dataset)
    sets = _sets(listed, folders, shot_lists, shots_audio or [], skip_missing, quiet)
    runs, heard = _run(sets, kinds, given)
    if report:
        from clapsep_cli.evaluation.report import write_report

        write_report(report, runs, heard, {"list": runs[0].listed, "date": f"{date.today():%d %B %Y}"}, dataset)
    score_tables.show(runs, json, labels, quiet)


def _refuse(given: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    """Raise `BadParameter` for the first of the options `names` that is given; `why` it has no effect."""
    for name in names:
        default = signature(evaluate).parameters[name].default
        if (given[name] or None) != (default or None):  # an empty list is none
            raise typer.BadParameter(f"--{'no-' if default is True else ''}{name.replace('_', '-')}: {why}")


def _sides(text: str) -> tuple[str, ...]:
    short = {name: side for side, name in SIDES.items()}  # accept the long names of the tables, too
    chosen = {short.get(part.strip(), part.strip()) for part in text.split(",")}
    if not chosen <= set(SIDES):
        raise typer.BadParameter(f"{text!r}: name one or more of {', '.join(SIDES)}, separated by commas")
    return tuple(name for side, name in SIDES.items() if side in chosen)


def _numbers(text: str | None, what: str, whole: bool) -> tuple[float, ...]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    try:
        numbers = {int(part) if whole else float(part) for part in parts}
    except ValueError:
        numbers = {0}
    if not all(0 < number < MOST for number in numbers):
        raise typer.BadParameter(f"{text!r}: give numbers of {what}, separated by commas: 1,5,10")
    return tuple(sorted(numbers))


def _each(values: Sequence[Path] | None, count: int, option: str) -> list[Path]:
    """Return a value for each of `count` lists: as many as given, or one for all."""
    if not values:
        return []
    if len(values) not in (1, count):
        raise typer.BadParameter(f"{option}: give it once, or once for each --mixtures, in their order")
    return list(values) * (count if len(values) == 1 else 1)


def _are_prompted(listed: Sequence[Path]) -> bool:
    """Return True if the lists are of prompts. Raises `BadParameter` if only some are."""
    from clapsep_cli.evaluation.prompted import is_prompted

    kinds = {is_prompted(path) for path in listed}
    if len(kinds) > 1:
        raise typer.BadParameter("lists of prompts and lists of queries cannot be scored together")
    return kinds.pop()


def _load(name: str | None, given: Mapping[str, Any]) -> Model:
    return load_model(name, given["device"], given["precision"], given["quiet"])


def _evaluate_prompted(lists: Mapping[Path, Path], given: Mapping[str, Any]) -> None:
    """Score models of prompts on lists with their folders, and print the scores."""
    from clapsep_cli.evaluation import prompted

    segment = given["segment"]
    try:
        length = segment if segment in (None, prompted.WHOLE) else float(segment)
    except ValueError:
        raise typer.BadParameter(f"--segment {segment}: give seconds, or {prompted.WHOLE}") from None
    options, found = prompted.PromptOptions(given["single_prompt"], length, given["shift"]), []
    read = {path: prompted.read_parts(path, folder) for path, folder in lists.items()}
    for name in given["model"] or [os.environ.get("CLAPSEP_MODEL") or PROMPTED]:
        model = _load(name, given)
        for path, parts in read.items():
            scored = prompted.evaluate_parts(model, parts, options)
            found.append((path.name, model.name, score_tables.collect(scored, len(parts), path.name, given["quiet"])))
    score_tables.show_parts(found, given["json"], given["quiet"])


def _sets(
    listed: Sequence[Path],
    folders: Sequence[Path],
    shot_lists: Sequence[Path],
    shot_folders: Sequence[Path],
    skip_missing: bool,
    quiet: bool,
) -> dict[str, EvaluationSet]:
    """Read and check lists, by name."""
    from clapsep_cli.evaluation.mixtures import EvaluationSet, check_files, located, read_mixtures, read_shots

    sets: dict[str, EvaluationSet] = {}
    names = [path.name for path in listed]
    for at, (path, folder) in enumerate(zip(listed, folders, strict=True)):
        shots = located(read_shots(shot_lists[at]), shot_folders) if shot_lists else {}
        every = EvaluationSet(read_mixtures(path), folder, shots)
        data = check_files(every, skip_missing)
        if skipped := len(every.rows) - len(data.rows):
            notes(quiet)(f"{path}: skipped {skipped} of {len(every.rows)} mixtures, their recordings are missing")
        name = path.name if names.count(path.name) == 1 else path.as_posix()
        if name in sets:
            raise typer.BadParameter(f"--mixtures {path} is given twice")
        sets[name] = data
    return sets


def _run(
    sets: Mapping[str, EvaluationSet], kinds: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[list[Run], list[Example]]:
    """Score all systems on all lists.

    Args:
        sets: the lists by name.
        kinds: arguments of `EvaluationOptions.suited`.
        given: the arguments of the command.

    Returns:
        The runs, and for a report examples of the first one.
    """
    from clapsep_cli.evaluation import external
    from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate, provenance
    from clapsep_cli.evaluation.report import examples
    from clapsep_cli.evaluation.scores import Run, resumed

    out, estimates = given["out"], given["estimates"] or []
    models = given["model"] or ([] if estimates else [os.environ.get("CLAPSEP_MODEL") or None])
    runs: list[Run] = []
    heard: list[Example] = []
    single = len(sets) * (len(models) + len(estimates)) == 1

    def add(
        listed: str,
        system: str,
        settings: dict[str, object],
        queries: Sequence[Sequence[str]],
        scored: Callable[[int], Iterator[list[Score]]],
    ) -> None:
        if any((run.listed, run.system) == (listed, system) for run in runs):
            raise typer.BadParameter(f"two systems are called {system!r}: give folders of different names")
        rows = sets[listed].rows
        stem = SCORES if single else re.sub(r"[^\w.-]+", "_", f"{listed}-{system}") + ".csv"
        found = resumed(out / stem, settings, rows, queries, scored) if out else scored(0)
        runs.append(Run(listed, system, score_tables.collect(found, len(rows), listed, given["quiet"]), settings))

    if estimates and len(sets) > 1:
        raise typer.BadParameter("--estimates are of one list: give --mixtures once")
    first, side = next(iter(sets.values())), (kinds["sides"] or ("both",))[0]
    outside = [(path, external.provenance_of(path, first, side, kinds["bss"])) for path in estimates]
    for name in models:
        model = _load(name, given)
        suited = EvaluationOptions.suited(model, **kinds)
        model.refine(given["refine"])
        for listed, data in sets.items():
            queries = [list(suited.queries(row, data)) for row in data.rows]
            scored = partial(evaluate, model, data, suited, batch_size=given["batch_size"])
            add(listed, model.name, provenance(model, data, suited), queries, scored)
            if given["report"] and len(runs) == 1:
                heard = examples(model, runs[0].scores, data, suited)
    for path, settings in outside:
        scored = partial(external.score_estimates, path, first, side, kinds["bss"])
        add(next(iter(sets)), str(settings["model"]), settings, [[side]] * len(first.rows), scored)
    return runs, heard
