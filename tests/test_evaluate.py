"""Tests evaluation: lists of mixtures, their queries, and scores that survive a killed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import Clapsep, Fixed, Stub
from hypothesis import given, settings
from hypothesis import strategies as st
from tuss_stand_in import TINY, released

from clapsep_cli import Query, dsp, load_model, separate
from clapsep_cli.cli.evaluate import _sides
from clapsep_cli.data import Clip
from clapsep_cli.errors import AudioError, ClapsepError, ManifestError, OutputError
from clapsep_cli.evaluation import evaluate as module
from clapsep_cli.evaluation import prompted as prompts
from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate, provenance
from clapsep_cli.evaluation.mixtures import (
    EvaluationSet,
    Mixture,
    check_files,
    labelled_clips,
    located,
    make_mixtures,
    read_mixtures,
    read_shots,
    set_aside,
    write_mixtures,
)
from clapsep_cli.evaluation.prompted import read_parts
from clapsep_cli.evaluation.scores import Score, by_label, presence, resumed, summary
from clapsep_cli.metrics import si_sdr
from clapsep_cli.query import Excerpt
from clapsep_cli.store.checkpoint import Model, save_part
from clapsep_cli.store.convert_tuss import convert
from clapsep_cli.tables import read_table

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
    estimate, sizes = type(tiny.separator).estimate, list[int]()

    def noted(self: Any, mixtures: torch.Tensor, conditions: Any) -> Any:
        sizes.append(len(mixtures))
        if len(mixtures) > 3:
            raise torch.cuda.OutOfMemoryError
        return estimate(self, mixtures, conditions)

    monkeypatch.setattr(type(tiny.separator), "estimate", noted)
    batched = [s for scores in evaluate(tiny, data, options, batch_size=3) for s in scores]
    assert sizes == [3, 1]
    short = [s for scores in evaluate(tiny, data, options, batch_size=4) for s in scores]
    assert sizes[2:] == [4, 2, 2]
    assert [s.query for s in short] == [s.query for s in batched]
    assert [(s.mixture, s.query) for s in batched] == [(s.mixture, s.query) for s in single]
    for a, b in zip(single, batched, strict=True):
        assert (a.sdri, a.si_sdri, a.level) == pytest.approx((b.sdri, b.si_sdri, b.level), abs=2e-3)
        assert a.bss_sdri is None
    rest = [s for scores in evaluate(tiny, data, options, start=2, batch_size=3) for s in scores]
    assert rest == batched[-len(rest) :]
    assert rest[0].mixture == rows[2]


def test_a_mixture_is_asked_for_as_by_extract(
    tiny: Model, folder: Path, rows: list[Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with texts and shots are those of the conditions that `Model.ask` makes; each shot is read once."""
    tiny.separator.window, read = 32_000, []
    shots = {
        caption.lower(): [f"dog/{n}.wav" for n in range(3)]
        for row in rows
        for caption in (row.label, row.negative_caption)
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
        data = EvaluationSet(rows, folder)
        kinds = [list(options.queries(row, data)) for row in rows]
        settings = provenance(half, data, options)
        kept = resumed(path, settings, rows, kinds, lambda start: evaluate(half, data, options, start))
        for n, scores in enumerate(kept):
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


def test_labels_of_a_manifest_have_the_prefix_and_captions_have_none(folder: Path, tmp_path: Path) -> None:
    lines = [f"{folder}/dog/0.wav,big_dog,", f"{folder}/rain/0.wav,rain;dog;bell,", f"{folder}/violin/0.wav,v,A violin"]
    (tmp_path / "m.csv").write_text("\n".join(["file,label,captions", *lines]))
    clips, _ = labelled_clips(tmp_path / "m.csv")
    assert [clip.captions for clip in clips] == [
        ("The sound of big dog",),
        ("The sounds of rain, dog and bell",),
        ("A violin",),
    ]


def test_sounds_are_left_out_and_interferers_are_of_few_clips(folder: Path) -> None:
    clips, root = labelled_clips(folder, excluded=["rain"])
    assert {clip.label for clip in clips} == SOUNDS.keys() - {"rain"}
    rows = make_mixtures(clips, root, seed=0, per_clip=3, interferers=6)
    assert len({row.noise_file for row in rows}) <= 6 < len({row.source_file for row in rows})
    with pytest.raises(ManifestError, match="no clip has the label snow"):
        labelled_clips(folder, excluded=["snow"])
    several = [Clip(Path(f"/r/{n}.wav"), label, (label,)) for n, label in enumerate(("dog;rain", "dog", "bell"))]
    made = make_mixtures(several, Path("/r"), seed=0, per_clip=9)
    assert {(row.source_file, row.noise_file) for row in made} == {
        ("0.wav", "2.wav"),
        ("1.wav", "2.wav"),
        ("2.wav", "0.wav"),
        ("2.wav", "1.wav"),
    }


def test_deviations_are_those_of_a_sample() -> None:
    row = Mixture("", "", "", "")
    found = summary([Score(row, "both", gain, gain, None, 0) for gain in (1.0, 2.0, -3.0)])["both"]
    assert found["sdri_std"] == pytest.approx(np.std([1.0, 2.0, -3.0], ddof=1))
    assert found["worse"] == pytest.approx(1 / 3)
    assert summary([Score(row, "both", 1.0, 1.0, None, 0)])["both"]["sdri_std"] == 0


def test_the_commands_from_a_folder_to_scores(
    clapsep: Clapsep, folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    made = clapsep("mixtures", "make", folder, "--per-clip", "2", "--shots", "2", "--per-label", "1", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith("mixtures.csv: 8 mixtures, targets of 4 labels, from 16 clips")
    listed = read_mixtures(tmp_path / "mixtures.csv")
    assert {row.label: row.positive_caption for row in listed}["church_bell"] == "The sound of church bell"
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
    fast = clapsep(*arguments, "--no-bss", "--json", "--skip-missing", "--precision", "fast", cwd=tmp_path)
    lowered = json.loads(fast.stdout)
    assert (found["settings"]["precision"], lowered["settings"]["precision"]) == ("float32", "bfloat16")
    high, low = (one["queries"]["both"]["si_sdri"] for one in (found, lowered))
    assert high != low == pytest.approx(high, abs=0.5)
    table = clapsep(*asked, "--skip-missing", "--labels", "--batch-size", "2", cwd=tmp_path)
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


def test_other_systems_stand_in_one_table(
    clapsep: Clapsep, folder: Path, tiny_folder: Path, rows: list[Mixture], tmp_path: Path
) -> None:
    """Mixtures are rendered, three "programs" separate them, and the table compares them with a model."""
    write_mixtures(tmp_path / "list.csv", rows)
    done = clapsep("mixtures", "render", "list.csv", "--audio", folder, "-o", "wavs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wavs/rendered.csv: {len(rows)} mixtures\n"
    again = clapsep("mixtures", "render", "list.csv", "--audio", folder, "-o", "wavs", cwd=tmp_path)
    assert (again.returncode, "already" in again.stderr) == (1, True)
    for program in ("half", "ideal", "slow"):
        (tmp_path / program).mkdir()
    for row in read_table(tmp_path / "wavs" / "rendered.csv", ("mixture", "target", "interferer")):
        mixture, target, interferer = (
            soundfile.read(tmp_path / "wavs" / row[1][part], dtype="float32")[0]
            for part in ("mixture", "target", "interferer")
        )
        np.testing.assert_allclose(target + interferer, mixture, atol=1e-6)
        assert len(mixture) == 320_000
        name = Path(row[1]["mixture"]).stem
        soundfile.write(tmp_path / "half" / f"{name}.wav", mixture / 2, 32_000, "FLOAT")
        spectra = [dsp.spectrum(torch.from_numpy(x)[None]) for x in (mixture, target, interferer)]
        ratio = spectra[1].abs() / (spectra[1].abs() + spectra[2].abs() + 1e-9)
        ideal = dsp.masked(spectra[0], ratio, len(mixture))[0].numpy()
        stereo = np.repeat(soxr.resample(ideal, 32_000, 44_100)[:, None], 2, 1)
        soundfile.write(tmp_path / "ideal" / f"{name}.flac", stereo / 1.001, 44_100, "PCM_24")
        soundfile.write(tmp_path / "slow" / f"{name}.wav", mixture[: len(mixture) // 2], 32_000)

    asked = ["evaluate", "--mixtures", "list.csv", "--audio", folder, "--queries", "pos", "--no-bss"]
    several = [*asked, "--model", tiny_folder, "--estimates", "half", "--estimates", "ideal"]
    done = clapsep(*several, "--json", "-o", "out", "--report", "r.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [run["system"] for run in found["runs"]] == [tiny_folder.name, "half", "ideal"]
    half, ideal = (run["queries"]["positive"] for run in found["runs"][1:])
    assert (half["sdri"], half["si_sdri"]) == pytest.approx((3.01, 0), abs=0.3)
    assert ideal["sdri"] > 10
    first = found["runs"][0]["queries"]["positive"]["sdri"]
    (difference,) = (d for d in found["differences"] if (d["system"], d["metric"]) == ("ideal", "sdri"))
    assert difference["mean"] == pytest.approx(ideal["sdri"] - first)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["worse"] == 0
    page = (tmp_path / "r.html").read_text()
    assert "Systems side by side" in page
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 3
    table = clapsep(*several, "-o", "out", cwd=tmp_path)
    assert f"ideal − {tiny_folder.name}" in table.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept
    alone = clapsep(*asked, "--estimates", "ideal", "--json", cwd=tmp_path)
    assert json.loads(alone.stdout)["queries"] == {"positive": ideal}

    for arguments, code, said in (
        (["--estimates", "slow"], 1, "lasts 5.00 s, and its mixture 10 s"),
        (["--estimates", "out"], 1, "4 of 4 estimates are missing: 00001, 00002"),
        (["--estimates", "half", "--estimates", "half"], 2, "two systems are called 'half'"),
        (["--estimates", "half", "--mixtures", "wavs/rendered.csv"], 2, "of one list"),
    ):
        refused = clapsep(*asked, *arguments, cwd=tmp_path)
        assert (refused.returncode, said in refused.stderr) == (code, True), refused.stderr


def test_several_lists_are_scored_each_in_its_folder(
    clapsep: Clapsep, folder: Path, tiny_folder: Path, rows: list[Mixture], tmp_path: Path
) -> None:
    for name, listed in (("one", rows[:1]), ("two", rows[1:3])):
        write_mixtures(tmp_path / f"{name}.csv", listed)
    lists = ["--mixtures", "one.csv", "--audio", folder, "--mixtures", "two.csv", "--audio", folder]
    asked = ["evaluate", *lists, "--model", tiny_folder, "--queries", "both", "--no-bss"]
    found = json.loads(clapsep(*asked, "--json", cwd=tmp_path).stdout)
    assert [(run["list"], run["queries"]["both"]["mixtures"]) for run in found["runs"]] == [
        ("one.csv", 1),
        ("two.csv", 2),
    ]
    assert found["differences"] == []
    refused = clapsep(*asked, "--audio", folder, cwd=tmp_path)
    assert (refused.returncode, "once for each --mixtures" in refused.stderr) == (2, True)


def test_a_raw_condition_is_not_scaled(tiny: Model, folder: Path, rows: list[Mixture]) -> None:
    query = Query("dog", "rain")
    lengths = [float(module.embedder_of(tiny, kind).condition(query).norm()) for kind in ("unit", "raw")]
    assert lengths == pytest.approx([1, 2**0.5])
    tiny.separator.window = 32_000
    data = EvaluationSet(rows[:1], folder)
    options = [EvaluationOptions(("both",), bss=False, listed=False, condition=kind) for kind in ("unit", "raw")]
    unit, raw = ([s.sdri for scores in evaluate(tiny, data, each) for s in scores] for each in options)
    assert unit[0] != raw[0]
    assert module.provenance(tiny, data, options[1])["condition"] == "raw"


def test_shots_lie_elsewhere_and_are_cut(tmp_path: Path) -> None:
    for name, seconds in (("a.wav", 3), ("b.wav", 1)):
        soundfile.write(tmp_path / name, 0.1 * np.ones(8000 * seconds), 8000)
    shots = located({"dog": ("a.wav", "b.wav", "c.wav")}, [tmp_path / "none", tmp_path])
    assert shots["dog"] == (str(tmp_path / "a.wav"), str(tmp_path / "b.wav"), "c.wav")
    row = Mixture("x.wav", "a dog", "y.wav", "rain", "dog")
    options = EvaluationOptions(("positive",), text=False, shots=(2,), shot_seconds=(1, 2))
    asked = options.queries(row, EvaluationSet([row], Path("audio"), shots))
    assert list(asked) == ["positive 2 shots of 1 s", "positive 2 shots of 2 s"]
    cut = asked["positive 2 shots of 2 s"].pos_audio
    assert cut == (Excerpt(tmp_path / "a.wav", 0, 2), tmp_path / "b.wav"), "what is shorter is used whole"


def test_embeddings_are_those_of_queries(
    clapsep: Clapsep, folder: Path, tiny_folder: Path, tiny: Model, tmp_path: Path
) -> None:
    asked = ["embed", folder / "dog" / "0.wav", folder / "rain" / "1.wav", "--text", "a dog", "--model", tiny_folder]
    done = clapsep(*asked, "-o", "e.npz", cwd=tmp_path)
    assert (done.returncode, "3 embeddings of" in done.stdout) == (0, True), done.stderr
    with np.load(tmp_path / "e.npz") as found:
        names, embeddings = found["names"].tolist(), found["embeddings"]
    assert names == [str(folder / "dog" / "0.wav"), str(folder / "rain" / "1.wav"), "a dog"]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    condition = tiny.ask([Query("a dog")]).targets[0].numpy()
    np.testing.assert_allclose(embeddings[2], condition[: embeddings.shape[1]], atol=1e-6)
    again = clapsep(*asked, "-o", "e.npz", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    assert clapsep("embed", cwd=tmp_path).returncode == 2


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TUSS of a few thousand weights, and a list of a mixture of two events in stereo and one of three parts."""
    place = tmp_path_factory.mktemp("prompted")
    (place / "model").mkdir()
    save_part(place / "model", "separator", "tuss", TINY, convert(released(TINY), TINY))
    lines, rng = ["mixture,prompt,reference,set"], np.random.default_rng(3)
    for name, rate, channels, named in (
        ("events", 44_100, 2, ("sfx", "sfx", "speech")),
        ("film", 48_000, 1, ("speech", "musicbg", "sfxbg")),
    ):
        parts = 0.1 * rng.standard_normal((len(named), 15_000, channels))
        parts[-1] *= name != "film"  # silent
        soundfile.write(place / f"{name}.wav", parts.sum(0), rate, "FLOAT")
        for n, (prompt, part) in enumerate(zip(named, parts, strict=True)):
            soundfile.write(place / f"{name}{n}.wav", part, rate, "FLOAT")
            lines.append(f"{name}.wav,{prompt},{name}{n}.wav,test")
    (place / "parts.csv").write_text("\n".join(lines))
    return place


def test_parts_are_scored_in_the_best_order_at_their_own_rate(prompted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives the references, equal prompts in the other order, scores the limit of 70 dB."""
    listed = read_parts(prompted / "parts.csv", prompted)
    assert [parts.task for parts in listed] == ["", "cinematic"]
    model = load_model(prompted / "model", "cpu", "high")
    references = {len(p.references): [soundfile.read(f, always_2d=True)[0].T for f in p.references] for p in listed[:1]}
    first, second, third = references[3]
    asked = []

    def separate(model: Model, mixture: np.ndarray, rate: int, numbers: list[int]) -> np.ndarray:
        asked.append((rate, mixture.shape, tuple(numbers)))
        return np.stack([second, first, 0.5 * third]).astype(np.float32)

    monkeypatch.setattr(prompts, "_separate", separate)
    (scores,) = prompts.evaluate_parts(model, listed[:1])
    assert asked == [(44_100, (2, 15_000), (1, 1, 0))]
    assert [(s.prompt, s.snr, s.si_snr) for s in scores[:2]] == [("sfx", 70, 70)] * 2
    assert (scores[2].snr, scores[2].si_snr) == pytest.approx((6.02, 70), abs=0.01)
    assert scores[2].snri == pytest.approx(6.02 + 3.01, abs=0.2)


def test_a_list_of_prompts_is_scored_by_the_command(clapsep: Clapsep, prompted: Path) -> None:
    asked = ["evaluate", "--mixtures", "parts.csv", "--audio", ".", "--model", "model"]
    (found,) = json.loads(clapsep(*asked, "--json", cwd=prompted).stdout)
    assert {name: s["parts"] for name, s in found["prompts"].items()} == {
        "sfx": 2,
        "speech": 2,
        "musicbg": 1,
        "task cinematic": 2,  # the third is silent
    }
    model, mixture = load_model(prompted / "model", "cpu", "high"), soundfile.read(prompted / "film.wav")[0]
    wanted = {name: Query(name) for name in ("speech", "musicbg", "sfxbg")}
    stem = separate(mixture, 48_000, wanted, model).stems["musicbg"]
    reference = soundfile.read(prompted / "film1.wav", dtype="float32")[0]
    assert found["prompts"]["musicbg"]["si_snr"] == pytest.approx(si_sdr(stem, reference), abs=1e-3)
    others = {}
    for option in ("--single-prompt", "--segment whole", "--segment 0.1", "--segment 0.1 --shift 0.1"):
        done = clapsep(*asked, *option.split(), "--json", cwd=prompted)
        others[option] = json.loads(done.stdout)[0]["prompts"]["musicbg"]["snr"]
    assert len({found["prompts"]["musicbg"]["snr"], *others.values()}) == 5, others
    assert "task cinematic" in clapsep(*asked, cwd=prompted).stdout
    for arguments, said in (
        (["--shift", "0.1"], "--shift 0.1: takes --segment"),
        (["--segment", "0.1", "--shift", "0.01"], "lies between half"),
        (["--segment", "soon"], "give seconds, or whole"),
        (["--no-bss"], "--no-bss: it has no effect"),
        (["--queries", "pos"], "--queries: it has no effect"),
    ):
        refused = clapsep(*asked, *arguments, cwd=prompted)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr


def test_a_wrong_list_of_prompts_is_refused(clapsep: Clapsep, prompted: Path, tiny_folder: Path) -> None:
    asked = ["evaluate", "--mixtures", "parts.csv", "--audio", "."]
    done = clapsep(*asked, "--model", tiny_folder, cwd=prompted)
    assert (done.returncode, "takes no prompts" in done.stderr) == (3, True), done.stderr
    (prompted / "bad.csv").write_text("mixture,prompt,reference\nfilm.wav,speech,gone.wav\nfilm.wav,,film0.wav\n")
    with pytest.raises(ManifestError, match=r"line 2: no file .*gone\.wav; line 3: no prompt"):
        read_parts(prompted / "bad.csv", prompted)
    (prompted / "other.csv").write_text("mixture,prompt,reference\nfilm.wav,speech,events0.wav\n")
    with pytest.raises(ManifestError, match=r"differs from .*film\.wav in rate, channels or length"):
        next(
            prompts.evaluate_parts(load_model(prompted / "model", "cpu"), read_parts(prompted / "other.csv", prompted))
        )


def test_sides_may_be_named_as_the_tables_name_them() -> None:
    assert _sides("pos,both") == _sides("both, positive") == ("both", "positive")
