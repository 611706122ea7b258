"""Tests evaluation: lists of mixtures, their queries, and scores that survive a killed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, Fixed, Stub
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep_cli import Query
from clapsep_cli.cli.evaluate import _sides
from clapsep_cli.data import Clip
from clapsep_cli.errors import AudioError, ClapsepError, ManifestError, OutputError
from clapsep_cli.evaluation import evaluate as module
from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate, evaluate_into
from clapsep_cli.evaluation.mixtures import (
    EvaluationSet,
    Mixture,
    check_files,
    labelled_clips,
    make_mixtures,
    read_mixtures,
    read_shots,
    set_aside,
)
from clapsep_cli.evaluation.scores import Score, by_label, presence, summary
from clapsep_cli.metrics import si_sdr
from clapsep_cli.store.checkpoint import Model

SOUNDS = {"dog": 300, "rain": 0, "violin": 1500, "church_bell": 4000}
RELEASED = """source_file,positive_caption,noise_file,negative_caption
4-218199-F-35.wav,the sound of washing machine,5-223103-A-31.wav,the sound of mouse click
YVjSEIRnLAh8.wav,"Food is frying, and a woman talks",YynHdcJ9Oqaw.wav,Several loud whooshes
"""
RELEASED_SHOTS = """class,file
the sound of washing machine,"['2-121909-A-35.wav', '2-102567-D-35.wav', '3-135469-A-35.wav']"
The sound of mouse click,"[""1-45645-A-31.wav"", ""5-223103-A-31.wav"", ""1-95563-A-31.wav""]"
the sound of rain,2-72970-A-10.wav
the sound of rain,2-101676-A-10.wav
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sub-folder for each of four labels, with four clips each."""
    root = tmp_path_factory.mktemp("sounds")
    rng, t = np.random.default_rng(0), np.arange(16_000) / 16_000
    for label, hertz in SOUNDS.items():
        (root / label).mkdir()
        for n in range(4):
            sound = np.sin(2 * np.pi * hertz * (1 + n / 10) * t) if hertz else rng.standard_normal(len(t))
            soundfile.write(root / label / f"{n}.wav", 0.3 * sound[: 9000 + 2000 * n], 16_000)
    return root


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Mixture]:
    clips, root = labelled_clips(folder)
    rows = make_mixtures(clips, root, seed=0, per_label=1)
    return [*rows[:3], replace(rows[3], shot_file="")]


@pytest.fixture
def half() -> Model:
    """A model whose target is half of the mixture, whatever is asked, in windows of 1 s."""
    model = Stub(Fixed(0.5, 32_000))
    model.revision = ""
    return model


def test_lists_as_released_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(RELEASED)
    (tmp_path / "shots.csv").write_text(RELEASED_SHOTS)
    rows = read_mixtures(tmp_path / "list.csv")
    assert rows[1] == Mixture(
        "YVjSEIRnLAh8.wav", "Food is frying, and a woman talks", "YynHdcJ9Oqaw.wav", "Several loud whooshes"
    )
    shots = read_shots(tmp_path / "shots.csv")
    assert shots["the sound of rain"] == ("2-72970-A-10.wav", "2-101676-A-10.wav")
    options, data = EvaluationOptions(("both", "positive"), shots=(1, 2, 3)), EvaluationSet(rows, Path("a"), shots)
    asked = options.queries(rows[0], data)
    kinds = ["both", "positive", "both 1 shot", "positive 1 shot", "both text+1 shot", "positive text+1 shot"]
    assert list(asked)[:6] == kinds
    # The first of the list, and never the interferer itself: it leaves two of that class, so no third.
    assert asked["both text+2 shots"] == Query(
        "the sound of washing machine",
        "the sound of mouse click",
        [Path("a/2-121909-A-35.wav"), Path("a/2-102567-D-35.wav")],
        [Path("a/1-45645-A-31.wav"), Path("a/1-95563-A-31.wav")],
    )
    assert "positive 3 shots" in asked
    assert "both 3 shots" not in asked
    assert list(options.queries(rows[1], data)) == ["both", "positive"]
    assert not EvaluationOptions(text=False).queries(rows[0], data)


@pytest.mark.parametrize("cell", ["[__import__('os').getcwd()]", "['a.wav', 3]", "[]", "['a.wav'", "", "[" * 300])
def test_a_cell_that_is_no_list_of_files_is_a_fault(tmp_path: Path, cell: str) -> None:
    (tmp_path / "shots.csv").write_text(f'class,file\ndog,a.wav\nrain,"{cell}"\n')
    with pytest.raises(ManifestError, match="line 3: needs a class and a file"):
        read_shots(tmp_path / "shots.csv")


def test_a_list_with_empty_cells_or_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"{RELEASED}a.wav,a dog,,rain\n")
    with pytest.raises(ManifestError, match="line 4: no noise_file"):
        read_mixtures(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text(RELEASED.split("\n", 1)[0])
    with pytest.raises(ManifestError, match="no rows"):
        read_mixtures(tmp_path / "list.csv")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xyzw")), min_size=1, max_size=30), st.integers(0, 9)
)
def test_mixtures_are_of_two_sounds_and_shots_are_in_none(drawn: Sequence[tuple[str, str]], seed: int) -> None:
    caption = {label: {"a": ("one",), "b": ("one", "two")}.get(label, (label,)) for label in "abcdef"}
    clips = [Clip(Path(f"/r/{n}.wav"), label, caption[label]) for n, (label, _) in enumerate(drawn)]
    targets, shots = set_aside(clips, 2, seed)
    kept = {str(shot.path.name) for members in shots.values() for shot in members}
    assert {clip.label for clip in targets} == {clip.label for clip in clips}
    try:
        rows = make_mixtures(targets, Path("/r"), seed, per_clip=3, shots=shots)
    except ManifestError:
        assert {clip.label for clip in clips} <= {"a", "b"} or len({clip.label for clip in clips}) == 1
        return
    by_file = {clip.path.name: clip for clip in clips}
    assert {row.source_file for row in rows} == {clip.path.name for clip in targets}
    for row in rows:
        noise = by_file[row.noise_file]
        assert not set(caption[row.label]) & set(noise.captions)
        assert row.absent_caption not in (*caption[row.label], *noise.captions)
        assert not kept & {row.source_file, row.noise_file}
        assert not row.shot_file or by_file[row.shot_file] in shots[row.label]
    pairs = [(row.source_file, row.noise_file) for row in rows]
    assert len(set(pairs)) == len(pairs)
    assert rows == make_mixtures(targets, Path("/r"), seed, per_clip=3, shots=shots)


def test_half_of_the_mixture_scores_as_it_must(half: Model, folder: Path, rows: list[Mixture]) -> None:
    found = list(evaluate(half, EvaluationSet(rows, folder)))
    assert [[s.query for s in scores] for scores in found] == [
        *[["both", "positive", "negative", "shot", "absent"]] * 3,
        ["both", "positive", "negative", "absent"],
    ]
    for s in (s for scores in found for s in scores):
        # Tones and noise are all but at right angles, so half of a mixture at 0 dB leaves 3 dB of error less.
        assert s.sdri == pytest.approx(3.01, abs=0.3)
        assert s.si_sdri == s.bss_sdri == pytest.approx(0, abs=1e-3)
        assert s.level == pytest.approx(-6.02, abs=0.01)
    assert isinstance(half.separator, Fixed)
    assert len(half.separator.heard) == len(rows), "all queries of a mixture share what the encoder heard"
    table = summary(s for scores in found for s in scores)
    assert table["shot"]["mixtures"] == 3
    assert table["both"]["si_sdri_median"] == pytest.approx(0, abs=1e-3)


def test_batches_change_nothing(
    tiny: Model, folder: Path, rows: list[Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.separator.window = 32_000
    data, options = EvaluationSet(rows, folder), EvaluationOptions(bss=False)
    single = [s for scores in evaluate(tiny, data, options) for s in scores]
    monkeypatch.setattr(module, "BATCH", {"cpu": 3})
    batched = [s for scores in evaluate(tiny, data, options) for s in scores]
    assert [(s.mixture, s.query) for s in batched] == [(s.mixture, s.query) for s in single]
    for a, b in zip(single, batched, strict=True):
        assert (a.sdri, a.si_sdri, a.level) == pytest.approx((b.sdri, b.si_sdri, b.level), abs=2e-3)
        assert a.bss_sdri is None
    rest = [s for scores in evaluate(tiny, data, options, start=2) for s in scores]
    assert rest == batched[-len(rest) :]
    assert rest[0].mixture == rows[2]


def test_a_mixture_is_asked_for_as_by_extract(
    tiny: Model, folder: Path, rows: list[Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with texts and shots are those of the conditions that `Model.ask` makes; each shot is read once."""
    tiny.separator.window, read = 32_000, []
    shots = {
        caption: [f"dog/{n}.wav" for n in range(3)] for row in rows for caption in (row.label, row.negative_caption)
    }
    data = EvaluationSet(rows, folder, shots)
    options = EvaluationOptions(("both",), shots=(2,), bss=False)
    embed = tiny.audio.embed
    monkeypatch.setattr(tiny.audio, "embed", lambda audio: [read.append(len(audio)), embed(audio)][1])
    found = [s for scores in evaluate(tiny, data, options) for s in scores]
    assert len(read) <= 4, "each recording is embedded once"
    assert {s.query for s in found} == {"both", "both 2 shots", "both text+2 shots"}
    mixed = module.mixer(folder, tiny)
    for s in found:
        mixture, target = mixed(s.mixture)
        wanted = tiny.ask([options.queries(s.mixture, data)[s.query]]).targets
        (estimate,) = module.separator_of(tiny).estimate(torch.from_numpy(mixture)[None], [wanted])
        expected = si_sdr(estimate[0].detach().numpy(), target) - si_sdr(mixture, target)
        assert s.si_sdri == pytest.approx(expected, abs=1e-3)


def test_a_list_may_name_a_silent_shot_and_one_caption_twice(half: Model, folder: Path, tmp_path: Path) -> None:
    """Extract refuses both, where they are mistakes. In a released list they must not end a run of hours."""
    for name in ("dog/0.wav", "rain/0.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16_000)
    row = Mixture("dog/0.wav", "noise", "rain/0.wav", "noise", "dog", "silent.wav")
    (scores,) = evaluate(half, EvaluationSet([row], tmp_path), EvaluationOptions(bss=False))
    assert [s.query for s in scores] == ["both", "positive", "negative", "shot"]
    with pytest.raises(AudioError, match=r"silent\.wav: is silent"):
        half.ask([Query(pos_audio=tmp_path / "silent.wav")])


def test_a_killed_run_goes_on_to_the_same_bytes(half: Model, folder: Path, rows: list[Mixture], tmp_path: Path) -> None:
    def run(path: Path, options: EvaluationOptions = EvaluationOptions(), stop: int = 99) -> list[Score]:
        found = []
        for n, scores in enumerate(evaluate_into(path, half, EvaluationSet(rows, folder), options)):
            found += scores
            if n + 1 == stop:
                break
        return found

    whole, cut = tmp_path / "whole.csv", tmp_path / "new" / "cut.csv"
    expected = run(whole)
    run(cut, stop=2)
    partial = cut.with_name("cut.csv.partial")
    assert not cut.exists()
    written = partial.read_bytes()
    assert isinstance(half.separator, Fixed)
    for end in (len(written) - 7, len(written) - 80, 20, 0):  # in the last line, in the one before, in the head
        partial.write_bytes(written[:end])
        half.separator.heard.clear()
        assert run(cut) == expected
        assert cut.read_bytes() == whole.read_bytes()
        assert len(half.separator.heard) == (3 if end > 20 else 4)
        cut.rename(partial)
    partial.rename(cut)
    half.separator.heard.clear()
    assert run(cut) == expected
    assert not half.separator.heard, "a finished run is read, not computed"
    with pytest.raises(OutputError, match=r"other settings \(sides\); delete it"):
        run(cut, EvaluationOptions(("both",)))
    cut.write_text(cut.read_text()[:-30])
    with pytest.raises(OutputError, match="is damaged"):
        run(cut)


def test_what_cannot_be_measured_is_said_before_anything_is_computed(
    half: Model, folder: Path, rows: list[Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = [replace(row, shot_file="") for row in rows]
    with pytest.raises(ManifestError, match="there is no query"):
        next(evaluate(half, EvaluationSet(bare, folder), EvaluationOptions(text=False)))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ClapsepError, match=r"pip install 'clapsep\[evaluate\]'"):
        next(evaluate(half, EvaluationSet(rows, folder)))
    assert isinstance(half.separator, Fixed)
    assert not half.separator.heard
    assert next(evaluate(half, EvaluationSet(rows, folder), EvaluationOptions(bss=False)))


def test_presence_is_the_area_under_the_curve() -> None:
    row = Mixture("", "", "", "")
    levels = {"positive": [-1.0, -2.0, -5.0], "absent": [-2.0, -9.0]}
    scores = [Score(row, query, 0, 0, None, level) for query, values in levels.items() for level in values]
    # Of six pairs four are in order, and one is a draw.
    assert presence(scores) == {"present_level": -2.0, "absent_level": -5.5, "roc_area": pytest.approx(4.5 / 6)}
    assert presence(scores[:3]) == {}


def test_labels_are_sorted_by_score() -> None:
    rows = [Mixture("", caption, "", "", label) for label, caption in (("dog", "a dog"), ("", "rain"), ("dog", "bark"))]
    scores = [Score(row, "both", 0, gain, None, 0) for row, gain in zip(rows, (1.0, 3.0, 2.0), strict=True)]
    table = by_label(scores, "both")
    assert [(label, s["si_sdri"], s["mixtures"]) for label, s in table.items()] == [("rain", 3.0, 1), ("dog", 1.5, 2)]


def test_missing_recordings_are_named_or_left_out(folder: Path, rows: list[Mixture]) -> None:
    lost = replace(rows[0], noise_file="gone.wav")
    with pytest.raises(ManifestError, match=r"2 of \d+ files are missing: gone.wav, lost.wav; --skip-missing"):
        check_files(EvaluationSet([lost, *rows], folder, {"dog": ["lost.wav"]}))
    data = EvaluationSet([lost, *rows], folder, {"dog": ["lost.wav", "dog/1.wav"]})
    assert check_files(data, skip=True) == EvaluationSet(rows, folder, {"dog": ["dog/1.wav"]})
    with pytest.raises(ManifestError, match=r"gone\.wav$"):
        check_files(EvaluationSet([lost], folder), skip=True)


def test_captions_of_a_folder_have_the_papers_prefix_or_another(clapsep: Clapsep, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"file,label\n{folder}/dog/0.wav,dog\n")
    for prefix, expected in (("", "church bell"), ("a recording of", "a recording of church bell")):
        made = clapsep("mixtures", "make", folder, "--prefix", prefix, "--overwrite", cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        rows = read_mixtures(tmp_path / "mixtures.csv")
        assert {row.label: row.positive_caption for row in rows}["church_bell"] == expected
    refused = clapsep("mixtures", "make", "m.csv", "--prefix", "", "--overwrite", cwd=tmp_path)
    assert (refused.returncode, "--prefix is for" in refused.stderr) == (2, True)


def test_the_commands_from_a_folder_to_scores(
    clapsep: Clapsep, folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    made = clapsep("mixtures", "make", folder, "--per-clip", "2", "--shots", "2", "--per-label", "1", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith("mixtures.csv: 8 mixtures, targets of 4 labels, from 16 clips")
    listed = read_mixtures(tmp_path / "mixtures.csv")
    assert {row.label: row.positive_caption for row in listed}["church_bell"] == "the sound of church bell"
    shots = read_shots(tmp_path / "mixtures.shots.csv")
    used = {file for row in listed for file in (row.source_file, row.noise_file)}
    assert not used & {file for files in shots.values() for file in files}
    again = clapsep("mixtures", "make", folder, cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)

    lines = (tmp_path / "mixtures.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join([*lines[:3], lines[3].replace(listed[2].source_file, "gone.wav")]))
    arguments = ["evaluate", "--mixtures", "few.csv", "--audio", folder, "--model", tiny_folder, "--queries", "both"]
    asked = [*arguments, "--shots", "1", "--shots-csv", "mixtures.shots.csv", "--no-bss", "--out", "out"]
    stopped = clapsep(*asked, cwd=tmp_path)
    assert (stopped.returncode, "1 of" in stopped.stderr) == (1, True)
    done = clapsep(*asked, "--json", "--skip-missing", cwd=tmp_path)
    assert done.returncode == 0
    assert "skipped 1 of 3 mixtures" in done.stderr
    found = json.loads(done.stdout)
    assert list(found["queries"]) == ["both", "both 1 shot", "both text+1 shot"]
    assert found["settings"]["mixtures"] == found["queries"]["both"]["mixtures"] == 2
    assert "bss_sdri" not in found["queries"]["both"]
    assert (tmp_path / "out" / "scores.csv").read_text().count("\n") == 2 + 2 * 3
    table = clapsep(*asked, "--skip-missing", "--labels", cwd=tmp_path)
    assert "both text+1 shot" in table.stdout
    assert "by label, both 1 shot" in table.stdout
    reported = clapsep(*asked, "--skip-missing", "--quiet", "--report", "r.html", cwd=tmp_path)
    assert (reported.returncode, reported.stdout) == (0, "")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<audio") == page.count("data:image/png") == 9
    for wrong, said in (
        (["--shots", "1"], "go together"),
        (["--queries", "all"], "one or more of"),
        (["--shots", "1,x", "--shots-csv", "mixtures.shots.csv"], "give numbers"),
    ):
        other = clapsep(*arguments, *wrong, cwd=tmp_path)
        assert (other.returncode, said in other.stderr) == (2, True)


def test_sides_may_be_named_as_the_tables_name_them() -> None:
    assert _sides("pos,both") == _sides("both, positive") == ("both", "positive")
