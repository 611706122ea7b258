"""Tests runs over many recordings: shared batches, separate results, and failures of single ones."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import Stub
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from recordings import noise32 as noise
from stand_ins import Moody
from torch import Tensor

from clapsep_cli import Query, extract, load_model, separate, startup
from clapsep_cli.audio.encoding import Encoding
from clapsep_cli.errors import DeviceError, OutputError, QueryError, StoppedError, TakenError, UsageError
from clapsep_cli.files import clear_unfinished, unfinished
from clapsep_cli.jobs import recording
from clapsep_cli.jobs.batch import MAX_OPEN, run
from clapsep_cli.jobs.inputs import Input
from clapsep_cli.jobs.job import Extraction, Failure, Job, Options
from clapsep_cli.jobs.planning import Todo, lay_out, plan
from clapsep_cli.models.base import TARGETS_AT_ONCE, Conditions, go_on
from clapsep_cli.separation import Workers
from clapsep_cli.store.checkpoint import Model

DOG, RAIN = Query("dog"), Query("rain")
Audio = NDArray[np.float32]


def record(folder: Path, name: str, samples: int = 9000, rate: int = 8000, seed: int = 0) -> Input:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(samples, 2, seed=seed), rate, "PCM_16")
    return Input(path, Path(name))


def planned(
    items: Sequence[tuple[Input, Query]],
    model: Model,
    options: Options = Options(),
) -> Todo:
    shared = {query: {"target": query} for _, query in items}
    return plan(lay_out([(item, shared[q]) for item, q in items], options), model, options)


def outcomes(
    items: Sequence[tuple[Input, Query]], model: Model, folder: Path, options: Options = Options()
) -> list[Extraction | Failure]:
    return list(run(planned(items, model, replace(options, out=folder)).jobs, model, options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 24, "FLOAT": None, "DOUBLE": None}  # 32: as float32 has
WRITTEN = {"pcm16": 16, "pcm24": 24, "float": None}


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from([8000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000]),
    channels=st.integers(1, 3),
    samples=st.one_of(st.integers(1, 60), st.integers(61, 120_000)),
    window=st.sampled_from([9600, 32_000, 320_000]),
    depth=st.sampled_from(sorted(BITS)),
    subtype=st.sampled_from([None, *WRITTEN]),
    seconds=st.floats(0.05, 5),
    count=st.integers(1, 3),
)
def test_parts_of_files_have_their_shape_and_add_up(
    rate: int, channels: int, samples: int, window: int, depth: str, subtype: str | None, seconds: float, count: int
) -> None:
    targets = {f"t{number}": Query("x" * (number + 1)) for number in range(count)}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "BLOCK_SECONDS", seconds)
        path = Path(name) / "mix.wav"
        soundfile.write(path, noise(samples, channels) / count, rate, depth)
        options = Options(subtype=subtype)
        done = extract(path, targets, Stub(Moody(window)), options=options)
        assert not any(done.clipped.values())
        mixture = soundfile.read(path, dtype="float64", always_2d=True)[0]
        total = np.zeros_like(mixture)
        for output in done.outputs.values():
            audio, written_rate = soundfile.read(output, dtype="float64", always_2d=True)
            assert (written_rate, audio.shape) == (rate, mixture.shape)
            total += audio
        bits = max(16, BITS[depth] or 0) if subtype is None and BITS[depth] else WRITTEN.get(subtype or "float")
        if bits and BITS[depth] and bits >= (BITS[depth] or 0) and depth != "PCM_32":
            np.testing.assert_array_equal(total, mixture)
        else:
            np.testing.assert_allclose(total, mixture, rtol=0, atol=2.0 ** (1 - bits) if bits else 1e-7)


@settings(max_examples=15, deadline=None)
@given(seconds=st.lists(st.floats(0.01, 4), min_size=2, max_size=2), rate=st.sampled_from([8000, 11_025, 44_100]))
def test_where_blocks_fall_does_not_matter(seconds: list[float], rate: int) -> None:
    written = []
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        soundfile.write(Path(name) / "mix.wav", noise(5 * rate + 17, 2), rate, "FLOAT")
        for number, one in enumerate(seconds):
            patch.setattr(recording, "BLOCK_SECONDS", one)
            done = extract(Path(name) / "mix.wav", DOG, Stub(Moody()), Path(name) / str(number))
            written.append(soundfile.read(done.target)[0])
    np.testing.assert_allclose(written[0], written[1], rtol=0, atol=1e-6)


def test_the_encoder_runs_once_a_window_for_all_targets(tmp_path: Path) -> None:
    item = record(tmp_path, "mix.wav", samples=5 * 8000)
    for count in (1, 3):
        separator = Moody()
        targets = {f"t{number}": Query("x" * (number + 1)) for number in range(count)}
        extract(item.path, targets, Stub(separator), tmp_path / str(count))
        assert sum(separator.encoded) == 9  # windows of 1 s, half a second apart


def test_a_target_is_the_same_whether_others_are_written_or_not(tmp_path: Path) -> None:
    item, model = record(tmp_path, "mix.wav", samples=20_000), Stub(Moody())
    targets = {f"t{number}": Query("x" * (number + 1)) for number in range(6)}
    for only in ((), ("t1", "t4"), ("t4",)):
        options = Options(out=tmp_path / f"{len(only)}", only=only, residual=not only)
        (done,) = run(plan(lay_out([(item, targets)], options), model, options).jobs, model)
        assert isinstance(done, Extraction)
        assert set(done.outputs) == (set(only) or {*targets, "residual"})
    whole, some, one = (contents(tmp_path / str(number)) for number in (0, 2, 1))
    # The headers name what was asked for, and that is not the same.
    assert one["mix.t4.wav"][-30_000:] == some["mix.t4.wav"][-30_000:] == whole["mix.t4.wav"][-30_000:]
    assert some["mix.t1.wav"][-30_000:] == whole["mix.t1.wav"][-30_000:]


@pytest.mark.parametrize("batch", [2, 5, 64])
def test_windows_of_several_recordings_share_a_batch(tmp_path: Path, batch: int) -> None:
    items = [(record(tmp_path, f"{n}.wav", 3000 + 4000 * n, seed=n), DOG) for n in range(9)]
    single, several = Moody(), Moody()
    first = outcomes(items, Stub(single), tmp_path / "one", Options(batch_size=1))
    second = outcomes(items, Stub(several), tmp_path / "many", Options(batch_size=batch))
    assert all(isinstance(outcome, Extraction) for outcome in (*first, *second))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert sum(single.batches) == sum(several.batches) == len(single.batches)
    assert len(several.batches) == -(-sum(single.batches) // batch)


def test_a_long_recording_fills_batches_by_itself(tmp_path: Path) -> None:
    separator = Moody()
    outcomes([(record(tmp_path, "long.wav", 80_000), DOG)], Stub(separator), tmp_path, Options(batch_size=4))
    assert separator.batches == [4, 4, 4, 4, 3]


def test_outcomes_come_in_the_order_of_jobs(tmp_path: Path) -> None:
    lengths = [30_000, 500, 20_000, 9000, 100]
    items = [(record(tmp_path, f"{n}.wav", length), DOG) for n, length in enumerate(lengths)]
    done = outcomes(items, Stub(Moody()), tmp_path / "out", Options(batch_size=1))
    assert [outcome.mixture.name for outcome in done] == [f"{n}.wav" for n in range(5)]


def test_different_queries_share_no_batch_and_are_each_understood_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, asked, separator = (DOG, RAIN, Query("siren")), [], Moody()
    model = Stub(separator)
    ask = model.ask
    monkeypatch.setattr(model, "ask", lambda queries, kept: [asked.append(queries), ask(queries, kept)][1])
    items = [(record(tmp_path, f"{n}.wav", 4000, seed=n), queries[n % 3]) for n in range(12)]
    done = outcomes(items, model, tmp_path / "mixed", Options(batch_size=4))
    assert len(done) == 12
    assert len(asked) == 3
    assert max(separator.batches) > 1
    for number, (item, query) in enumerate(items):
        alone = extract(item.path, query, Stub(Moody()), tmp_path / str(number))
        for path in alone.outputs.values():
            assert (tmp_path / "mixed" / path.name).read_bytes()[200:] == path.read_bytes()[200:]


def test_one_that_fails_fails_alone(tmp_path: Path) -> None:
    """Whatever is wrong with it: the file, in its middle, the query, the place of its output."""
    good = [(record(tmp_path, f"good{n}.wav"), DOG) for n in range(3)]
    (tmp_path / "none.wav").write_bytes(b"RIFF")
    nan = noise(60_000, 1)
    nan[50_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 8000, "FLOAT")
    cut = record(tmp_path, "cut.wav", 90_000)
    cut.path.write_bytes(cut.path.read_bytes()[:300_000])
    bad = [(Input(tmp_path / f"{name}.wav", Path(f"{name}.wav")), DOG) for name in ("none", "nan")]
    bad += [(cut, DOG), (record(tmp_path, "asks.wav"), Query("bark", "bark"))]
    items = [good[0], bad[0], bad[1], good[1], bad[2], bad[3], good[2]]
    done = outcomes(items, Stub(Moody()), tmp_path / "out", Options(batch_size=3))
    failed = {outcome.mixture.name: str(outcome.error) for outcome in done if isinstance(outcome, Failure)}
    assert set(failed) == {"none.wav", "nan.wav", "cut.wav", "asks.wav"}
    assert "sample 50000" in failed["nan.wav"]
    assert "both a positive and a negative query" in failed["asks.wav"]
    assert sorted(contents(tmp_path / "out")) == sorted(
        f"good{n}.{part}.wav" for n in range(3) for part in ("target", "residual")
    )


def test_shared_queries_that_cannot_be_used_end_the_run_at_once(tmp_path: Path) -> None:
    items = [(record(tmp_path, f"{n}.wav"), Query("bark", "bark")) for n in range(3)]
    with pytest.raises(QueryError, match="both a positive and a negative query"):
        outcomes(items, Stub(Moody()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Small(Moody):
    """Has memory for so many windows."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def infer(self, windows: Tensor, wanted: Conditions, check: Callable[[], None] = go_on) -> Tensor:
        if len(windows) > self.room:
            raise torch.cuda.OutOfMemoryError
        return super().infer(windows, wanted, check)


def test_batches_shrink_to_what_the_device_has_memory_for(tmp_path: Path) -> None:
    items = [(record(tmp_path, f"{n}.wav", 20_000, seed=n), DOG) for n in range(5)]
    separator = Small(3)
    done = outcomes(items, Stub(separator), tmp_path / "small", Options(batch_size=16))
    assert all(isinstance(outcome, Extraction) for outcome in done)
    assert set(separator.batches[:-1]) == {2}
    outcomes(items, Stub(Moody()), tmp_path / "one", Options(batch_size=1))
    assert contents(tmp_path / "small") == contents(tmp_path / "one")
    with pytest.raises(DeviceError, match="memory for a window"):
        outcomes(items, Stub(Small(0)), tmp_path / "none", Options(batch_size=1))
    assert contents(tmp_path / "none") == {}


def test_few_recordings_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = 0, 0

    class Counted(recording.Source):
        def __init__(self, *arguments: object) -> None:
            nonlocal now, most
            super().__init__(*arguments)  # type: ignore[arg-type]
            now += 1
            most = max(most, now)

        def __exit__(self, *error: object) -> None:
            nonlocal now
            now -= 1
            super().__exit__(*error)

    monkeypatch.setattr(recording, "Source", Counted)
    items = [(record(tmp_path, f"{n}.wav", 400), DOG) for n in range(80)]
    for batch, least, limit in ((1, 2, 2), (64, MAX_OPEN, MAX_OPEN)):
        most = 0
        outcomes(items, Stub(Moody()), tmp_path / str(batch), Options(batch_size=batch))
        assert least <= most <= limit
        assert now == 0


def test_the_time_spent_on_recordings_adds_up_to_no_more_than_there_was(tmp_path: Path) -> None:
    items = [(record(tmp_path, f"{n}.wav", 3000), DOG) for n in range(20)]
    began = time.perf_counter()
    done = outcomes(items, Stub(Moody()), tmp_path / "out", Options(batch_size=8))
    spent = [outcome.elapsed for outcome in done if isinstance(outcome, Extraction)]
    assert len(spent) == 20
    assert min(spent) > 0
    assert sum(spent) <= time.perf_counter() - began


class Patient(Moody):
    """Goes on with the first window only when the second block is read, with the fifth when the first are written."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.written = threading.Semaphore(0), threading.Semaphore(0)

    def infer(self, windows: Tensor, wanted: Conditions, check: Callable[[], None] = go_on) -> Tensor:
        assert len(self.batches) != 0 or self.read.acquire(timeout=20)
        assert len(self.batches) != 4 or self.written.acquire(timeout=20)
        return super().infer(windows, wanted, check)


def test_reading_and_writing_go_on_while_the_model_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separator = Patient()

    class Told(recording.Source):
        def blocks(self, seconds: float) -> Iterator[Audio]:
            for number, block in enumerate(super().blocks(seconds)):
                if number == 1:  # the first two windows are in the first block
                    separator.read.release()
                yield block

    class Writer(recording.Outputs):
        def write(self, parts: Mapping[str, Audio]) -> None:
            super().write(parts)
            separator.written.release()

    monkeypatch.setattr(recording, "Source", Told)
    monkeypatch.setattr(recording, "Outputs", Writer)
    monkeypatch.setattr(recording, "BLOCK_SECONDS", 1.5)
    item = record(tmp_path, "mix.wav", samples=round(1.5 * 8000) * 4)
    (done,) = outcomes([(item, DOG)], Stub(separator), tmp_path / "out", Options(batch_size=1))
    assert isinstance(done, Extraction)
    assert len(separator.batches) == 11


def test_progress_rises_to_the_length(tmp_path: Path) -> None:
    items = [(record(tmp_path, f"{n}.wav", 100_000), DOG) for n in range(2)]
    told: dict[str, list[float]] = {"0.wav": [], "1.wav": []}

    def progress(job: Job, done: float, total: float) -> None:
        assert total == 100_000 / 8000
        told[job.input.path.name].append(done)

    model = Stub(Moody())
    list(run(planned(items, model).jobs, model, Options(batch_size=1), progress))
    for seconds in told.values():
        assert len(seconds) > 2
        assert seconds == sorted(set(seconds))
        assert seconds[-1] == 100_000 / 8000


def test_once_stopped_what_was_done_stays_and_nothing_else(tmp_path: Path) -> None:
    items = [(record(tmp_path, f"{n}.wav", 20_000), DOG) for n in range(6)]
    model, stop = Stub(Moody()), threading.Event()
    running = run(planned(items, model, Options(out=tmp_path / "out")).jobs, model, Options(batch_size=1), stop=stop)
    first = next(running)
    stop.set()
    with pytest.raises(StoppedError, match="--skip-existing"):
        next(running)
    assert isinstance(first, Extraction)
    assert sorted(contents(tmp_path / "out")) == ["0.residual.wav", "0.target.wav"]


def test_a_stop_does_not_wait_for_all_targets(tmp_path: Path) -> None:
    item, stop, masked = record(tmp_path, "mix.wav", 4000), threading.Event(), []

    class Many(Moody):
        def mask(self, features: Tensor, condition: Tensor) -> Tensor:
            masked.append(len(condition))
            stop.set()
            return super().mask(features, condition)

    model, targets = Stub(Many()), {str(number): Query("x" * (number + 1)) for number in range(40)}
    jobs = plan(lay_out([(item, targets)], Options(out=tmp_path / "out")), model).jobs
    with pytest.raises(StoppedError):
        next(run(jobs, model, stop=stop))
    assert sum(masked) == TARGETS_AT_ONCE
    assert contents(tmp_path / "out") == {}


def test_each_text_and_each_shot_is_embedded_once_however_many_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, model, texts, shots = record(tmp_path, "mix.wav", 4000), Stub(Moody()), [], []
    embed_text, embed_audio = model.text.embed, model.audio.embed
    monkeypatch.setattr(model.text, "embed", lambda wanted: [texts.extend(wanted), embed_text(wanted)][1])
    monkeypatch.setattr(model.audio, "embed", lambda audio: [shots.append(audio), embed_audio(audio)][1])
    spoken = {f"t{number}": Query("x" * (number + 1)) for number in range(8)}
    heard = {f"s{n}": Query(pos_audio=record(tmp_path, f"{n}.wav", seed=n).path) for n in range(4)}
    spans = {"span": Query(pos_spans=(0.1, 0.2)), "samples": Query(pos_audio=(noise(90), 8000))}
    extract(item.path, {**spoken, **heard, **spans}, model, tmp_path / "out")
    assert sorted(texts) == sorted(query.pos[0] for query in spoken.values())
    assert len(shots) == 6


def test_whoever_goes_away_leaves_nothing_open(tmp_path: Path) -> None:
    items = [(record(tmp_path, f"{n}.wav", 20_000), DOG) for n in range(4)]
    model = Stub(Moody())
    running = run(planned(items, model, Options(out=tmp_path / "out")).jobs, model)
    next(running)
    running.close()
    assert sorted(contents(tmp_path / "out")) == ["0.residual.wav", "0.target.wav"]


def test_a_stalled_pipe_does_not_keep_from_stopping(tmp_path: Path) -> None:
    fifo, stop = tmp_path / "fifo.wav", threading.Event()
    os.mkfifo(fifo)
    item, model = Input(fifo, Path("fifo.wav")), Stub(Moody())
    (job,) = lay_out([(item, {"target": DOG})], Options(out=tmp_path / "out"))
    running = run([job], model, stop=stop)
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    try:
        with pytest.raises(StoppedError):  # though nobody ever writes into the pipe
            next(running)
    finally:
        timer.join()
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # lets the reader go
    assert not (tmp_path / "out").exists()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path, other = tmp_path / "a.wav", tmp_path / "b.wav"
    left, foreign, similar = unfinished(path), unfinished(other), tmp_path / ".a.wav.partial"
    elsewhere, long_ago = tmp_path / ".a.wav.000000-00000000.partial", tmp_path / ".a.wav.000000-00000001.partial"
    for debris in (left, foreign, similar, elsewhere, long_ago):
        debris.touch()
    os.utime(long_ago, (1, 1))
    with recording.Outputs({"target": path}, 8000, 1, Encoding("wav", 16)):
        before = set(tmp_path.iterdir())
        clear_unfinished([path])
        assert before - set(tmp_path.iterdir()) == {left, long_ago}
    assert set(tmp_path.iterdir()) == {foreign, similar, elsewhere}
    clear_unfinished([path, other, tmp_path / "none" / "c.wav"])
    assert set(tmp_path.iterdir()) == {similar, elsewhere}


def test_two_writers_never_share_an_unfinished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    path, encoding = tmp_path / "a.wav", Encoding("wav", 16)
    with (
        recording.Outputs({"a": path}, 8000, 1, encoding) as one,
        recording.Outputs({"a": path}, 8000, 1, encoding) as two,
    ):
        one.write({"a": np.zeros((1, 800), np.float32)})
        two.write({"a": np.zeros((1, 400), np.float32)})
        one.commit()
        with pytest.raises(TakenError):
            two.commit()
    assert soundfile.info(path).frames == 800
    assert list(tmp_path.iterdir()) == [path]


# What was done before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        record(tmp_path, f"in/{number}.wav", seed=number)
    return tmp_path


def again(folder: Path, model: Model | None = None, query: Query = DOG, **options: object) -> Todo:
    items = [(Input(path, Path(path.name)), query) for path in sorted((folder / "in").iterdir())]
    chosen = Options(out=folder / "out", skip_existing=not options.get("overwrite"), **options)  # type: ignore[arg-type]
    model = model or Stub(Moody())
    todo = planned(items, model, chosen)
    assert len(todo.jobs) + len(todo.done) + len(todo.blocked) == 3
    assert all(isinstance(outcome, Extraction) for outcome in run(todo.jobs, model, chosen))
    return todo


def test_what_is_done_is_skipped_and_what_is_not_is_done(folder: Path) -> None:
    assert len(again(folder).jobs) == 3
    whole = contents(folder / "out")
    assert len(again(folder).done) == 3
    (folder / "out" / "0.target.wav").unlink()
    (folder / "out" / "1.residual.wav").unlink()
    todo = again(folder)
    assert [job.input.path.name for job in todo.jobs] == ["0.wav", "1.wav"]
    assert contents(folder / "out") == whole


@pytest.mark.parametrize(
    "change",
    [
        {"query": RAIN},
        {"start": 0.25},
        {"end": 0.5},
        {"subtype": "float"},
        {"clip": "rescale"},
        {"consistent": True},
        {"min_presence": -9.0},
    ],
)
def test_what_was_done_for_something_else_is_in_the_way(folder: Path, change: dict[str, object]) -> None:
    again(folder)
    before = contents(folder / "out")
    todo = again(folder, **change)  # type: ignore[arg-type]
    assert len(todo.blocked) == 3
    assert "--overwrite" in str(todo.blocked[0].error)
    assert contents(folder / "out") == before
    again(folder, overwrite=True, **change)  # type: ignore[arg-type]
    assert contents(folder / "out").keys() == before.keys()
    assert contents(folder / "out") != before
    assert len(again(folder, **change).done) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"jobs": 1}, {"presence": True}, {"lenient": True}])
def test_what_changes_no_output_does_not_count(folder: Path, change: dict[str, object]) -> None:
    again(folder)
    assert len(again(folder, **change).done) == 3  # type: ignore[arg-type]


def test_another_model_precision_or_recording_is_something_else(folder: Path) -> None:
    again(folder)
    other, lower = Stub(Moody()), Stub(Moody())
    other.__dict__["identity"] = "another"
    lower.dtype = torch.bfloat16
    assert len(again(folder, other).blocked) == len(again(folder, lower).blocked) == 3
    record(folder, "in/1.wav", seed=7)
    assert [failure.mixture.name for failure in again(folder).blocked] == ["1.wav"]


def test_a_file_of_somebody_else_is_never_replaced_unasked(folder: Path) -> None:
    (folder / "out").mkdir()
    for name in ("0.target.wav", "1.residual.wav", "2.png"):
        (folder / "out" / name).write_text("precious")
    before = contents(folder / "out")
    todo = again(folder, plot=True)
    assert [failure.mixture.name for failure in todo.blocked] == ["0.wav", "1.wav", "2.wav"]
    assert contents(folder / "out") == before
    items = [(Input(path, Path(path.name)), DOG) for path in sorted((folder / "in").iterdir())]
    with pytest.raises(OutputError, match="exists already"):
        planned(items, Stub(Moody()), Options(out=folder / "out"))


def test_options_that_extract_cannot_follow_are_refused(folder: Path) -> None:
    model, path = Stub(Moody()), folder / "in" / "0.wav"
    for options, named in (
        (Options(clip="loud"), "--clip 'loud'"),  # type: ignore[arg-type]
        (Options(format="flack"), "flack"),
        (Options(start=2, end=1), "--end"),
        (Options(remove=True, residual=False), "--remove"),
        (Options(skip_existing=True), "skip_existing"),
        (Options(only=["cat"]), "only: cat"),
    ):
        with pytest.raises(UsageError, match=named):
            extract(path, DOG, model, folder / "out", options)
    assert not (folder / "out").exists()
    done = extract(path, DOG, model, options=Options(out=folder / "out", format="flac", remove=True))
    assert sorted(contents(folder / "out")) == [done.target.name] == ["0.residual.flac"]
    done = extract(
        path, DOG, model, str(folder / "out"), Options(format="flac", overwrite=True, filename="{part}.{ext}")
    )
    assert {path.name for path in done.outputs.values()} == {"target.flac", "residual.flac"}


def test_a_picture_that_is_missing_is_made(folder: Path) -> None:
    again(folder)
    assert len(again(folder, plot=True).jobs) == 3
    assert len(again(folder, plot=True).done) == 3
    assert len(list((folder / "out").glob("*.png"))) == 3


@pytest.fixture
def cores() -> Iterator[Callable[[int], None]]:
    """Pretends to have so many cores, until the test is over."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_queries_on_several_cores_give_the_same_bits(cores: Callable[[int], None]) -> None:
    mini, shot = load_model("mini", "cpu", "high"), (noise(7 * 48_000, 1)[:, 0], 48_000)
    asked = []
    for count in (1, 2):
        cores(count)
        asked.append(mini.ask([Query("dog", pos_audio=[shot])]).targets)
        assert torch.get_num_threads() == count
    assert torch.equal(*asked)


@pytest.mark.parametrize("folder", ["tiny_folder", "audiosep_folder"])
def test_queries_are_embedded_on_one_thread(
    request: pytest.FixtureRequest, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    model, used = load_model(request.getfixturevalue(folder), "cpu", "high"), []
    embed = model.text.embed
    monkeypatch.setattr(model.text, "embed", lambda texts: (used.append(torch.get_num_threads()), embed(texts))[1])
    cores(2)
    model.ask([Query("dog")])
    assert (used, torch.get_num_threads()) == ([1], 2)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_windows_on_several_cores_give_the_same_bits(
    tmp_path: Path, tiny: Model, cores: Callable[[int], None], count: int
) -> None:
    lengths = (30_000, 400_000, 2_000)  # 3.75, 50 and 0.25 s
    items = [(record(tmp_path, f"{n}.wav", length, seed=n), DOG) for n, length in enumerate(lengths)]
    first = outcomes(items, tiny, tmp_path / "one", Options(presence=True))
    cores(count)
    second = outcomes(items, tiny, tmp_path / "many", Options(presence=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert [(o.mixture, o.levels, o.presence) for o in first] == [(o.mixture, o.levels, o.presence) for o in second]
    assert torch.get_num_threads() == count


def test_a_window_has_one_thread_unless_there_are_fewer_windows_than_cores(
    tmp_path: Path, tiny: Model, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[tuple[str, int]] = set()
    infer = Model.infer

    def watched(self: Model, *arguments: Any) -> Tensor:
        used.add((threading.current_thread().name.rpartition("_")[0], torch.get_num_threads()))
        return infer(self, *arguments)

    monkeypatch.setattr(Model, "infer", watched)
    short, long = (record(tmp_path, f"{n}.wav", samples) for n, samples in enumerate((30_000, 400_000)))
    for items, threads in (([short], 4), ([long], 1), ([short, long], 1)):
        used.clear()
        cores(4)
        outcomes([(item, DOG) for item in items], tiny, tmp_path / f"{len(items)} {items[0].path.name}", Options())
        assert used == {("clapsep-window", threads)}
    used.clear()
    cores(4)
    separate(noise(1, 400_000), 8000, DOG, tiny)
    assert used == {("clapsep-window", 1)}


def test_where_memory_is_short_fewer_windows_are_computed_at_once(
    tiny: Model, cores: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(8)
    need = tiny.kind.window_bytes
    for free, count in ((0, 1), (2.5 * need, 2), (1000 * need, 8)):
        monkeypatch.setattr(startup, "free_bytes", lambda free=free: int(free))
        with Workers(tiny) as workers:
            assert workers.count == count
    monkeypatch.undo()
    assert startup.free_bytes() > 2**20
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    500 kB\n")
    assert startup.free_bytes(tmp_path) == 500 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert startup.free_bytes(tmp_path) == 500 * 1024
    (group / "memory.max").write_text("3000\n")
    assert startup.free_bytes(tmp_path) == 2000


def test_what_fails_on_a_core_ends_the_run_and_the_user_can_stop(
    tmp_path: Path, tiny: Model, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(2)
    items, stop = [(record(tmp_path, "long.wav", 400_000), DOG)], threading.Event()
    running = run(planned(items, tiny, Options(out=tmp_path)).jobs, tiny, Options(), lambda *_: stop.set(), stop)
    with pytest.raises(StoppedError):
        list(running)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(tiny.separator, "infer", broken)
    with pytest.raises(RuntimeError, match="broken"):
        outcomes(items, tiny, tmp_path / "out", Options())
    assert not [path for path in tmp_path.rglob("*") if "target" in path.name]
    assert torch.get_num_threads() == 2
