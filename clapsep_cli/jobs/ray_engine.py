"""Runs jobs on Ray Data: paths go in and JSON rows come out; no audio passes through Ray.

The driver makes the jobs and cuts them into small chunks. Each worker, an actor of a pool, holds the model; it plans
and runs a chunk as a single machine does (`planning`, `batch`). If a worker or node dies, Ray runs its chunk again, and
recordings that were committed are skipped. `Tally`, a small actor beside the driver, counts how often a chunk was
begun. A chunk that killed three workers is taken apart: its recordings run one by one, and one that kills three more
workers fails.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from clapsep_cli.errors import ClapsepError, DeviceError, ExtraError, ModelError, StoppedError, UsageError
from clapsep_cli.jobs.batch import run
from clapsep_cli.jobs.inputs import Input
from clapsep_cli.jobs.job import Cluster, Job, Loading, Options, Outcome, Skipped, row_of
from clapsep_cli.jobs.planning import lay_out, plan
from clapsep_cli.jobs.stores import Stage, Stored
from clapsep_cli.query import Query
from clapsep_cli.startup import set_threads

CHUNK = 8  # recordings
CHUNKS_A_WORKER, MOST_CHUNKS = 8, 10_000
DEATHS = 3  # of workers, until a chunk is taken apart
ANSWER_SECONDS = 60.0  # for a cluster to answer
LOOK_SECONDS = 1.0  # between two checks of a worker whether to stop
SHOTS = ("pos_audio", "neg_audio")

Row = dict[str, Any]


class Tally:
    """State shared by the workers: how often each chunk was begun, the first worker's model, and whether to stop."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._first: list[str] | None = None
        self._stop = False

    def begin(self, chunk: str) -> int:
        """Count a start of a chunk, and return the number of starts."""
        self._begun[chunk] += 1
        return self._begun[chunk]

    def agree(self, model: list[str]) -> list[str]:
        """Return the model and precision that the first worker loaded."""
        self._first = self._first or model
        return self._first

    def stop(self) -> None:
        """Make all workers stop after their current windows."""
        self._stop = True

    def stopped(self) -> bool:
        """Return True if the workers should stop."""
        return self._stop


class Worker:
    """An actor that holds the model. It raises no errors: one that ends the run is returned as a row."""

    def __init__(
        self, loading: Loading, options: Options, out: str | None, cluster: Cluster, folder: str, tally: Any
    ) -> None:
        with suppress(OSError):
            os.chdir(folder)  # the driver's, to which relative names refer
        set_threads(cluster.threads)
        self.tally, self.stage, self.stop = tally, Stage(cluster.scratch), threading.Event()
        self.fault: ClapsepError | None = None
        try:
            self.model = loading.load(self.stage)
            presence = options.presence and self.model.tells_likeness
            folder_out = None if out is None else self.stage.path(out)
            # After a worker died, some recordings of its chunk are done. The driver has checked all others.
            skip = options.skip_existing or not options.overwrite
            self.options = replace(options, out=folder_out, presence=presence, skip_existing=skip, shard=None)
            self._agree()
        except ClapsepError as error:
            self.fault = error
        threading.Thread(target=self._look, daemon=True).start()

    def _agree(self) -> None:
        import ray

        own = [self.model.name, self.model.identity, self.model.precision]
        first = ray.get(self.tally.agree.remote(own))
        if own != first:
            raise ModelError(f"workers have different models: {' '.join(first)}, and {' '.join(own)}; name one --model")

    def _look(self) -> None:
        import ray

        with suppress(Exception):  # the driver is gone, and Ray ends this process
            while not self.stop.is_set() and not ray.get(self.tally.stopped.remote()):
                self.stop.wait(LOOK_SECONDS)
        self.stop.set()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        import ray

        (chunk,), (text,) = batch["chunk"], batch["jobs"]
        asked = json.loads(str(text))
        if self.fault is not None:
            return _reply([{"fault": str(self.fault), "code": self.fault.exit_code}])
        if self.stop.is_set():
            return _reply([{"left": True}])
        if ray.get(self.tally.begin.remote(str(chunk))) > DEATHS:
            return _reply([{"suspect": one} for one in asked])
        return _reply(self._process(asked))

    def _process(self, asked: Sequence[Row]) -> list[Row]:
        known: dict[str, Mapping[str, Query]] = {}
        rows: list[Row] = []
        try:
            jobs: list[Job] = []
            for one in asked:
                key = json.dumps(one["targets"])
                if key not in known:
                    known[key] = _unpacked(one["targets"], self.stage)
                stored = Stored(*one["stored"]) if one["stored"] else None
                item = Input(self.stage.path(one["path"]), Path(one["below"]), None, stored)
                jobs += lay_out([(item, known[key])], self.options, self.stage)
            todo = plan(jobs, self.model, self.options, self.stage)
            ended: list[Outcome] = [*map(Skipped, todo.done), *todo.blocked]
            rows += [self._row(outcome) for outcome in ended]
            for outcome in run(todo.jobs, self.model, self.options, stop=self.stop, stage=self.stage):
                rows.append(self._row(outcome))
        except StoppedError:
            rows.append({"left": True})
        except ClapsepError as error:
            rows.append({"fault": self.stage.shown(str(error)), "code": error.exit_code})
        return rows

    def _row(self, outcome: Outcome) -> Row:
        row: Row = json.loads(self.stage.shown(json.dumps(row_of(outcome, self.model))))
        return {"row": row}


def _reply(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {"row": [json.dumps(row) for row in rows]}


def _packed(job: Job, stage: Stage) -> Row:
    """Return a job in types that JSON has, with URLs for mirrored paths."""

    def name(path: Any) -> str:
        return stage.url(Path(path)) if stage.holds(Path(path)) else str(path)

    targets = {}
    for target, query in job.targets.items():
        sides = {side: value for side, value in vars(query).items() if side not in SHOTS}
        targets[target] = {**sides, **{side: [name(shot) for shot in getattr(query, side)] for side in SHOTS}}
    stored = job.input.stored
    return {
        "path": name(job.input.path),
        "below": str(job.input.below),
        "stored": [stored.size, stored.changed] if stored else None,
        "targets": targets,
    }


def _unpacked(targets: Mapping[str, Row], stage: Stage) -> Mapping[str, Query]:
    def query(sides: Row) -> Query:
        shots = {side: [stage.fetch(stage.path(shot)) for shot in sides[side]] for side in SHOTS}
        spans = {side: [tuple(span) for span in sides[side]] for side in ("pos_spans", "neg_spans")}
        return Query(**{**sides, **shots, **spans})

    return {name: query(sides) for name, sides in targets.items()}


def run_on_ray(
    jobs: Sequence[Job], options: Options, loading: Loading, cluster: Cluster, stage: Stage, stop: threading.Event
) -> Generator[Row, None, None]:
    """Run `jobs` on a cluster, and yield the `--json` object of each as soon as it is known, in any order.

    Args:
        jobs: from `lay_out`.
        options: the same as in `lay_out`.
        loading: the model.
        cluster: where to run.
        stage: the same as in `lay_out`.
        stop: once it is set, workers finish their current windows.

    Raises:
        ExtraError: Ray is not installed.
        UsageError: the cluster would be used without its token.
        DeviceError: the cluster does not answer.
        ModelError: a worker cannot load the model, or loads another one than the others.
        StoppedError: `stop` was set.
    """
    blocked = [job for job in jobs if job.input.fault]
    for job in blocked:
        yield {"input": str(job.input.path), "status": "failed", "error": str(job.input.fault)}
    out = None if options.out is None else stage.url(options.out) if stage.holds(options.out) else str(options.out)
    asked, alone, left = [_packed(job, stage) for job in jobs if not job.input.fault], False, False
    with _connected(cluster) as ray:
        pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        tally = ray.remote(Tally).options(num_cpus=0, scheduling_strategy=pinned).remote()
        arguments = (loading, replace(options, out=None), out, cluster, str(Path.cwd()), tally)
        while asked:
            suspects: list[Row] = []
            for told in _round(ray, asked, cluster, arguments, alone):
                if stop.is_set():
                    tally.stop.remote()
                if "fault" in told:
                    fault = ModelError(told["fault"])
                    fault.exit_code = told["code"]
                    raise fault
                if "suspect" in told:
                    suspects.append(told["suspect"])
                elif "left" in told:
                    left = True
                else:
                    yield told["row"]
            if left:
                raise StoppedError("stopped; finished recordings are kept, the same command continues from there")
            if alone:
                for one in suspects:
                    name = stage.shown(str(stage.path(one["path"])))
                    why = f"{name}: {DEATHS} workers died while they processed it; is memory short?"
                    yield {"input": name, "status": "failed", "error": why}
                return
            asked, alone = suspects, True


def _round(ray: Any, asked: Sequence[Row], cluster: Cluster, arguments: tuple[Any, ...], alone: bool) -> Iterator[Row]:
    """Yield the workers' replies to chunks of `asked`; `alone`: to chunks of one recording each."""
    workers = cluster.workers or _workers(ray, cluster)
    size = max(1, min(CHUNK, ceil(len(asked) / (workers * CHUNKS_A_WORKER))), ceil(len(asked) / MOST_CHUNKS))
    size = 1 if alone else size
    chunks = [asked[first : first + size] for first in range(0, len(asked), size)]
    items = [{"chunk": f"{alone} {n}", "jobs": json.dumps(chunk)} for n, chunk in enumerate(chunks)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    replies = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks)), max_tasks_in_flight_per_actor=2),
        fn_constructor_args=arguments,
        num_cpus=cluster.threads,
        num_gpus=cluster.gpus_per_worker or None,
    )
    for reply in replies.iter_rows():
        yield json.loads(reply["row"])


def _workers(ray: Any, cluster: Cluster) -> int:
    """Return the number of workers that the cluster has room for."""
    there = ray.cluster_resources()
    by_gpus = [there.get("GPU", 0) / cluster.gpus_per_worker] if cluster.gpus_per_worker else []
    return max(1, int(min(there.get("CPU", 1) / cluster.threads, *by_gpus, 65536)))


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    _check_token(cluster)
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    try:
        import logging

        import ray
        import ray.data
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ExtraError('--engine ray needs more packages: pip install "clapsep[ray]"') from error
    if cluster.address:
        _check_answer(cluster.address)
        where: Row = {"address": cluster.address}
    else:
        where = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        for number, handler in handlers.items():  # Ray's own would end the run at once
            signal.signal(number, handler)
    except Exception as error:  # Ray raises bare ones
        what = f"--address {cluster.address}: cannot connect" if cluster.address else "--engine ray: cannot start here"
        raise DeviceError(f"{what} ({(str(error).splitlines() or [type(error).__name__])[0]})") from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_token(cluster: Cluster) -> None:
    """Make Ray require a token; a cluster that is started here gets a new one."""
    saved = (Path.home() / ".ray" / "auth_token").is_file()
    has_token = saved or any(os.environ.get(f"RAY_AUTH_TOKEN{kind}") for kind in ("", "_PATH"))
    if not cluster.address:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not has_token:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif not cluster.insecure:
        if not has_token or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            raise UsageError(
                f"--address {cluster.address}: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token; "
                "--insecure connects without one"
            )
        os.environ["RAY_AUTH_MODE"] = "token"
    elif not has_token:
        os.environ["RAY_AUTH_MODE"] = "disabled"


def _check_answer(address: str) -> None:
    """Raise `DeviceError` unless the cluster answers; Ray itself would wait forever."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), 10).close()
        except OSError as error:
            raise DeviceError(f"--address {address}: no answer ({error.strerror or error})") from error
    probe = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", probe, address], capture_output=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"--address {address}: no answer within {ANSWER_SECONDS:g} s") from error
    if asked.returncode:
        last = (asked.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise DeviceError(f"--address {address}: cannot connect ({last})")
