"""The command `evaluate`: scores of models, and of what other programs made, on lists of mixtures."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli import options, scoring
from clapsep_cli.cli.terminal import DeviceOption, ModelDirOption, QuietOption, among, downloads, notes
from clapsep_cli.registry import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from clapsep_cli.evaluation.compare import Run
    from clapsep_cli.evaluation.mixtures import EvaluationSet
    from clapsep_cli.evaluation.prompted import PartScore
    from clapsep_cli.evaluation.report import Example
    from clapsep_cli.evaluation.scores import Score
    from clapsep_cli.store.checkpoint import Model

SCORES = "scores.csv"
PROMPTED = "tuss-medium"  # the model for lists of prompts, unless one is named
SIDES = {"both": "both", "pos": "positive", "neg": "negative"}
MOST = 1_000_000  # shots, or seconds of them


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


ListedOption = Annotated[
    list[Path],
    typer.Option(
        "--mixtures",
        metavar="CSV",
        help="List of mixtures, by `mixtures make` or as released with CLAPSep; or mixture,prompt,reference for a "
        "model of prompts. Repeatable.",
    ),
]
AudioOption = Annotated[
    list[Path], typer.Option("--audio", metavar="DIR", help="Folder of the list's files; one, or one a list.")
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        autocompletion=among(*MODELS),
        help="A model by name or folder, repeatable; by default CLAPSEP_MODEL, or the best available.",
    ),
]
EstimatesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--estimates",
        metavar="DIR",
        help="Score what another program made of rendered mixtures; repeatable. Without --model, that alone.",
    ),
]
QueriesOption = Annotated[
    str | None,
    typer.Option(
        "--queries",
        metavar="NAME,…",
        help="Sides of the query: pos, neg, both; default: all that the model takes. Of --estimates: the first.",
    ),
]
ConditionOption = Annotated[
    str,
    typer.Option(
        "--condition",
        metavar="unit|raw",
        autocompletion=among("unit", "raw"),
        help="Scale joined queries to length 1, as CLAPSep's released inference, or not, as its test step.",
    ),
]
ShotsOption = Annotated[
    str | None, typer.Option("--shots", metavar="K,…", help="Also query with so many recordings: 1,5,10.")
]
ShotListsOption = Annotated[
    list[Path] | None,
    typer.Option("--shots-csv", metavar="CSV", help="Recordings for --shots: class,file (one, or a list)."),
]
ShotFoldersOption = Annotated[
    list[Path] | None,
    typer.Option("--shots-audio", metavar="DIR", help="Also look here for the recordings of --shots; repeatable."),
]
ShotSecondsOption = Annotated[
    str | None,
    typer.Option("--shot-seconds", metavar="S,…", help="Cut these recordings to each of these lengths: 1,2,5,10."),
]
TextOption = Annotated[bool, typer.Option("--text/--no-text", help="Query with texts, alone and with recordings.")]
RefineOption = Annotated[bool, typer.Option("--refine/--no-refine", help="Separate in two passes.")]
BssOption = Annotated[bool, typer.Option("--bss/--no-bss", help="Also compute BSS-eval SDR (512-tap filter).")]
SinglePromptOption = Annotated[bool, typer.Option("--single-prompt", help="With prompts: ask for one part at a time.")]
SegmentOption = Annotated[
    str | None,
    typer.Option("--segment", metavar="S|whole", help="With prompts: seconds to separate at once; as trained."),
]
ShiftOption = Annotated[
    float | None, typer.Option("--shift", metavar="S", help="With --segment: seconds from one segment to the next.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Write scores.csv here; a stopped run continues from it."),
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Write a report as one self-contained page.")
]
DatasetOption = Annotated[
    str | None,
    typer.Option("--dataset", metavar="NAME", help="In the report, show the published figures of this data alone."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print all summaries as one JSON object.")]
LabelsOption = Annotated[bool, typer.Option("--labels", help="Also print scores by label.")]
SkipMissingOption = Annotated[bool, typer.Option("--skip-missing", help="Skip mixtures whose recordings are missing.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")]


@dataclass(frozen=True)
class _How:
    """Options of loading and running models."""

    device: str
    precision: str
    refine: bool
    batch_size: int  # 0 by the device
    quiet: bool

    def load(self, name: str | None) -> Model:
        from clapsep_cli.store.library import load_model

        with downloads(self.quiet) as shown:
            return load_model(name, self.device, self.precision, say=notes(self.quiet), progress=shown)


def evaluate(
    listed: ListedOption,
    audio: AudioOption,
    model: ModelsOption = None,
    estimates: EstimatesOption = None,
    device: DeviceOption = "auto",
    precision: options.Precision = "high",
    batch_size: options.BatchSize = 0,
    _model_dir: ModelDirOption = None,
    queries: QueriesOption = None,
    condition: ConditionOption = "unit",
    shots: ShotsOption = None,
    shots_csv: ShotListsOption = None,
    shots_audio: ShotFoldersOption = None,
    shot_seconds: ShotSecondsOption = None,
    text: TextOption = True,
    refine: RefineOption = False,
    bss: BssOption = True,
    single_prompt: SinglePromptOption = False,
    segment: SegmentOption = None,
    shift: ShiftOption = None,
    out: OutOption = None,
    report: ReportOption = None,
    dataset: DatasetOption = None,
    as_json: JsonOption = False,
    labels: LabelsOption = False,
    skip_missing: SkipMissingOption = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score models on lists of mixtures of 10 s at 0 dB: SDRi, SI-SDRi and BSS-eval SDRi in dB.

    The lists released with CLAPSep work as they are. Of several models, each is compared with the first.
    """
    if bool(shots) != bool(shots_csv):
        raise typer.BadParameter("--shots and --shots-csv go together: give the number of recordings, and their list")
    _refuse({"--shots-audio": shots_audio, "--shot-seconds": shot_seconds}, not shots, "add --shots and --shots-csv")
    _refuse({"--overwrite": overwrite, "--dataset": dataset}, not report, "it is for a report: add --report FILE.html")
    if not text and not shots:
        raise typer.BadParameter("--no-text needs audio queries: add --shots and --shots-csv")
    if condition not in ("unit", "raw"):
        raise typer.BadParameter(f"--condition {condition}: use unit or raw")
    kinds = {
        "sides": _sides(queries) if queries else None,
        "text": text,
        "shots": _numbers(shots, "recordings", True),
        "bss": bss,
        "shot_seconds": _numbers(shot_seconds, "seconds", False),
        "condition": condition,
    }
    folders, shot_lists = _each(audio, len(listed), "--audio"), _each(shots_csv, len(listed), "--shots-csv")
    if report and report.exists() and not overwrite:
        from clapsep_cli.errors import OutputError

        raise OutputError(f"{report}: exists already; use --overwrite to replace it")
    how = _How(device, precision, refine, batch_size, quiet)
    of_prompts = {"--single-prompt": single_prompt, "--segment": segment, "--shift": shift}
    _refuse(of_prompts, not _are_prompted(listed), "it is for lists of prompts: mixture,prompt,reference")
    if _are_prompted(listed):
        others: dict[str, object] = {
            "--queries": queries,
            "--shots": shots,
            "--report": report,
            "--estimates": estimates,
            "--out": out,
        }
        others |= {"--labels": labels, "--refine": refine, "--skip-missing": skip_missing, "--batch-size": batch_size}
        others |= {"--no-text": not text, "--no-bss": not bss, "--condition": condition != "unit"}
        _refuse(others, True, "it has no effect on a list of prompts")
        found = _score_parts(list(zip(listed, folders, strict=True)), model, how, (single_prompt, segment, shift))
        scoring.show_parts(found, as_json, quiet)
        return
    if dataset:
        from clapsep_cli.evaluation.report import check_dataset

        check_dataset(dataset)
    sets = _sets(listed, folders, shot_lists, shots_audio or [], skip_missing, quiet)
    runs, heard = _run(sets, _models(model, bool(estimates)), estimates or [], kinds, how, out, bool(report))
    if report:
        from clapsep_cli.evaluation.report import write_report

        source = {"list": runs[0].listed, "date": f"{date.today():%d %B %Y}"}
        write_report(report, runs, heard, source, dataset)
    scoring.show(runs, as_json, labels, quiet)


def _refuse(values: Mapping[str, object], where: bool, why: str) -> None:
    """Raise `BadParameter` for an option that is given `where` it has no effect."""
    given = [option for option, value in values.items() if value]
    if where and given:
        raise typer.BadParameter(f"{given[0]}: {why}")


def _are_prompted(listed: Sequence[Path]) -> bool:
    """Tell whether the lists are of prompts; all of them are, or none."""
    from clapsep_cli.evaluation.prompted import is_prompted

    kinds = {is_prompted(path) for path in listed}
    if len(kinds) > 1:
        raise typer.BadParameter("lists of prompts and lists of queries cannot be scored together")
    return kinds.pop()


def _models(named: Sequence[str] | None, others: bool) -> list[str | None]:
    """Return the models to score: those named, or else the default one unless there are `others` to score."""
    return list(named) if named else [] if others else [os.environ.get("CLAPSEP_MODEL") or None]


def _score_parts(
    lists: Sequence[tuple[Path, Path]],
    named: Sequence[str] | None,
    how: _How,
    cut: tuple[bool, str | None, float | None],
) -> list[tuple[str, str, list[PartScore]]]:
    """Score models of prompts; returns the names of list and model, and the scores."""
    from clapsep_cli.evaluation import prompted

    single, segment, shift = cut
    try:
        length = segment if segment in (None, prompted.WHOLE) else float(str(segment))
    except ValueError:
        raise typer.BadParameter(f"--segment {segment}: give seconds, or {prompted.WHOLE}") from None
    wanted, found = prompted.PromptOptions(single, length, shift), []
    read = {path: prompted.read_parts(path, folder) for path, folder in lists}
    for name in _models(named, False) if named else [os.environ.get("CLAPSEP_MODEL") or PROMPTED]:
        loaded = how.load(name)
        for path, parts in read.items():
            scored = prompted.evaluate_parts(loaded, parts, wanted)
            found.append((path.name, loaded.name, scoring.collect(scored, len(parts), path.name, how.quiet)))
    return found


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
    sets: Mapping[str, EvaluationSet],
    models: Sequence[str | None],
    estimates: Sequence[Path],
    kinds: Mapping[str, Any],
    how: _How,
    out: Path | None,
    listen: bool,
) -> tuple[list[Run], list[Example]]:
    """Score all systems on all lists; returns the runs and, to `listen` to, examples of the first one."""
    from clapsep_cli.evaluation import external
    from clapsep_cli.evaluation.compare import Run
    from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate, provenance
    from clapsep_cli.evaluation.report import examples
    from clapsep_cli.evaluation.scores import resumed

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
        runs.append(Run(listed, system, scoring.collect(found, len(rows), listed, how.quiet), settings))

    if estimates and len(sets) > 1:
        raise typer.BadParameter("--estimates are of one list: give --mixtures once")
    first, side = next(iter(sets.values())), (kinds["sides"] or ("both",))[0]
    outside = [(path, external.provenance_of(path, first, side, kinds["bss"])) for path in estimates]
    for name in models:
        loaded = how.load(name)
        suited = EvaluationOptions.suited(loaded, **kinds)
        loaded.refine(how.refine)
        for listed, data in sets.items():
            queries = [list(suited.queries(row, data)) for row in data.rows]
            scored = partial(evaluate, loaded, data, suited, batch_size=how.batch_size)
            add(listed, loaded.name, provenance(loaded, data, suited), queries, scored)
            if listen and len(runs) == 1:
                heard = examples(loaded, runs[0].scores, data, suited)
    for path, settings in outside:
        scored = partial(external.score_estimates, path, first, side, kinds["bss"])
        add(next(iter(sets)), str(settings["model"]), settings, [[side]] * len(first.rows), scored)
    return runs, heard
