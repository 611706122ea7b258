"""Tests the planning of jobs: inputs, manifests, names of outputs, resuming, times and targets."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from clapsep_cli.errors import (
    AudioError,
    ClapsepError,
    ClapsepWarning,
    ManifestError,
    OutputError,
    QueryError,
    UsageError,
)
from clapsep_cli.jobs import resume
from clapsep_cli.jobs.inputs import STDIN, Input, expand
from clapsep_cli.jobs.outputs import NAME_BYTES, QUERY_BYTES, check_outputs, output_paths, safe_name
from clapsep_cli.jobs.requests import parse_target, parse_targets, read_requests
from clapsep_cli.jobs.resume import finished, first_conflict, signature
from clapsep_cli.query import Query, parse_span, parse_time

CELLS = [*'*[@-",;\n\r\\é', "**", "..", "file", "pos", "neg", "query_audio", "a.wav"]
ROOT = Path(__file__).parents[1]
BOTH = ("target", "residual")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes files in the current folder, which is empty before."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(name.encode("utf-8", "surrogateescape"))

    return make


def names(inputs: list[Input]) -> list[str]:
    return [item.path.as_posix() for item in inputs]


def test_files_folders_and_patterns_in_natural_order(tree: Callable[..., None]) -> None:
    tree(
        "b/take 10.wav",
        "b/take 2.WAV",
        "b/notes.txt",
        "b/.hidden.wav",
        "b/._take 2.wav",
        "z.bin",
        "a1.flac",
        "b/c/d.wav",
    )
    assert names(expand(["z.bin", "b", "a1.flac"])) == ["z.bin", "b/take 2.WAV", "b/take 10.wav", "a1.flac"]
    assert names(expand(["b/*"])) == ["b/take 2.WAV", "b/take 10.wav"]
    assert names(expand(["**/*.wav"])) == ["b/c/d.wav", "b/take 10.wav"]
    assert names(expand(["b/take ?.*"])) == ["b/take 2.WAV"]
    assert names(expand(["b/.*.wav"])) == ["b/._take 2.wav", "b/.hidden.wav"]
    assert names(expand(["b/.hidden.wav"])) == ["b/.hidden.wav"]
    assert names(expand(["b"], recursive=True)) == ["b/c/d.wav", "b/take 2.WAV", "b/take 10.wav"]
    assert names(expand([str(Path.cwd() / "b" / "*.wav")])) == [(Path.cwd() / "b" / "take 10.wav").as_posix()]


def test_outputs_mirror_what_was_named(tree: Callable[..., None]) -> None:
    tree("music/jazz/a.wav", "music/b.wav")
    for argument in ("music", "music/**/*.wav"):
        assert {item.below for item in expand([argument], recursive=True)} == {Path("jazz/a.wav"), Path("b.wav")}
    assert [item.below for item in expand(["music/jazz/a.wav"])] == [Path("a.wav")]
    (item,) = expand(["music/jazz"])
    assert output_paths(item, BOTH, Path("out"))["target"] == Path("out/a.target.wav")
    item = expand(["music"], recursive=True)[1]
    assert output_paths(item, BOTH, Path("out"))["residual"] == Path("out/jazz/a.residual.wav")
    assert output_paths(item, BOTH, None)["target"] == Path("music/jazz/a.target.wav")


def test_a_name_that_exists_is_no_pattern(tree: Callable[..., None]) -> None:
    tree("Live [2020]/1.wav", "L/1.wav", "what?.wav", "whats.wav", "@list.wav", "-", "@none/x.wav")
    assert names(expand(["Live [2020]/*.wav"])) == ["Live [2020]/1.wav"]
    assert names(expand(["what?.wav"])) == ["what?.wav"]
    assert names(expand(["what[s].wav"])) == ["whats.wav"]
    assert names(expand(["@list.wav", "@none"])) == ["@list.wav", "@none/x.wav"]
    (dash,) = expand(["./-"])
    assert dash.path != STDIN
    assert dash.path.samefile("./-")
    with pytest.raises(AudioError, match=r"2\.wav: no such file"):
        expand(["Live [2020]/2.wav"])


def test_stdin_comes_alone(tree: Callable[..., None]) -> None:
    tree("a.wav")
    (item,) = expand(["-"])
    assert item.path == STDIN
    assert output_paths(item, BOTH, None)["target"] == Path("stdin.target.wav")
    assert output_paths(item, BOTH, Path("out"))["target"] == Path("out/stdin.target.wav")
    with pytest.raises(AudioError, match="only input"):
        expand(["-", "a.wav"])


def test_nothing_is_done_twice_and_loops_end(tree: Callable[..., None]) -> None:
    tree("m/a.wav", "m/sub/b.wav")
    Path("m/sub/loop").symlink_to(Path("m").absolute())
    Path("m/again").symlink_to(Path("m/sub").absolute())
    Path("m/link.wav").symlink_to(Path("m/a.wav").absolute())
    Path("m/broken.wav").symlink_to(Path("nowhere").absolute())
    Path("m/self.wav").symlink_to("self.wav")
    expected = ["m/a.wav", "m/sub/b.wav"]
    assert names(expand(["m"], recursive=True)) == expected
    assert names(expand(["m/a.wav", "./m/../m/a.wav", str(Path("m/a.wav").absolute()), "m"])) == expected[:1]
    matched = expand(["m/*.wav"])
    assert [item.path.name for item in matched if item.fault] == ["broken.wav", "self.wav"]
    for name in ("broken", "self"):
        Path(f"m/{name}.wav").unlink()
    assert names(expand(["m", "m/**/*.wav", "m/again"], recursive=True)) == expected
    Path("m/hard.wav").hardlink_to("m/a.wav")  # a file of its own, with outputs of its own
    assert names(expand(["m/*.wav"])) == ["m/a.wav", "m/hard.wav"]
    Path("outside").mkdir()
    tree("elsewhere/c.wav")
    Path("outside/there").symlink_to(Path("elsewhere").absolute())
    assert names(expand(["outside"], recursive=True)) == ["outside/there/c.wav"]


def test_a_folder_that_cannot_be_listed_is_said(tree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tree("m/a.wav", "m/closed/b.wav")
    listed = Path.iterdir

    def iterdir(self: Path) -> object:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.warns(
        ClapsepWarning, match=r"^m/closed: this folder cannot be listed \(Permission denied\) and is left"
    ):
        assert names(expand(["m"], recursive=True)) == ["m/a.wav"]
    with pytest.raises(AudioError, match="cannot be listed"):
        expand(["m/closed"])


def test_lists(tree: Callable[..., None]) -> None:
    tree("lists/a.wav", "b.wav", "lists/many/c1.wav", "lists/many/c2.wav", "lists/ä/d.wav", "lists/many/x10.wav")
    lines = ["#EXTM3U", "a.wav", "", "  b.wav  ", "many/c*.wav", "ä\\d.wav", str(Path("b.wav").absolute()), "many"]
    expected = [
        "lists/a.wav",
        "b.wav",
        *(f"lists/many/c{n}.wav" for n in (1, 2)),
        "lists/ä/d.wav",
        "lists/many/x10.wav",
    ]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for end in ("\n", "\r\n"):
            Path("lists/l.txt").write_bytes(end.join(lines).encode(encoding))
            assert names(expand(["@lists/l.txt"])) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "list cannot be read"),
        (b"", "names no recordings"),
        (b"# nothing\n", "names no recordings"),
        ("ä.wav".encode("latin-1"), "not UTF-8"),
        (b"\nb.wav\n\nc.wav\n", "line 2: b.wav: no such file; line 4: c.wav: no such file"),
        (b"a\0.wav", "line 1"),
        (b"\n".join(b"none%d" % n for n in range(12)), "line 10: none9: no such file; and 2 more"),
    ],
)
def test_lists_with_faults(tree: Callable[..., None], content: bytes | None, message: str) -> None:
    tree("a.wav")
    if content is not None:
        Path("l.txt").write_bytes(content)
    with pytest.raises(ManifestError, match=message) as raised:
        expand(["@l.txt"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "recursive", "message"),
    [
        ("none.wav", False, "none.wav: no such file"),
        ("", False, "empty name"),
        ("x" * 300, False, "name too long"),
        ("empty", False, "empty: no recordings in this folder$"),
        ("empty", True, "no recordings in this folder or below it"),
        ("deep", False, "-r looks in the folders below"),
        ("*.mp3", False, "nothing matches"),
        ("none/*.mp3", False, "nothing matches"),
        ("t*.txt", False, "matches no recordings, only text.txt"),
        ("text.txt/*", False, "nothing matches"),
        ("text.txt/a", False, "[Nn]ot a directory"),
    ],
)
def test_arguments_that_name_nothing(tree: Callable[..., None], argument: str, recursive: bool, message: str) -> None:
    tree("text.txt", "deep/sub/a.wav")
    Path("empty").mkdir()
    with pytest.raises(AudioError, match=message) as raised:
        expand([argument], recursive)
    assert "\n" not in str(raised.value)


def test_outputs_of_other_inputs_are_left_out(tree: Callable[..., None]) -> None:
    tree("m/a.wav", "m/a.target.wav", "m/a.residual.flac", "m/b.target.wav", "m/a.take2.wav", "m/a_dog.wav", "m/ab.wav")
    expected = ["m/a.take2.wav", "m/a.wav", "m/a_dog.wav", "m/ab.wav", "m/b.target.wav"]
    for arguments in (["m"], ["m/*"], sorted(p.as_posix() for p in Path("m").iterdir())):
        with pytest.warns(ClapsepWarning, match="^left out, as outputs of other inputs: m/a.residual.flac and 1 more$"):
            assert sorted(names(expand(arguments))) == expected
    written = {"m/a_dog.wav", "m/ab.wav", "m/b.target.wav", "m/a.wav"}  # as their tags say
    with pytest.warns(ClapsepWarning, match="and 3 more"):
        found = names(expand(["m"], written=lambda p: p.as_posix() in written))
    assert found == ["m/a.take2.wav", "m/a.wav", "m/b.target.wav"]
    # Named without what it was made of, an output is an input like any other.
    assert names(expand(["m/a.target.wav"], written=lambda p: True)) == ["m/a.target.wav"]


def test_a_folder_of_outputs_below_the_inputs_is_left_out(tree: Callable[..., None]) -> None:
    tree("m/a.wav", "m/jazz/b.wav", "m/out/a.target.wav", "m/out/jazz/b.residual.wav", "m/out/jazz/c.wav")
    kept = ["m/a.wav", "m/jazz/b.wav", "m/out/jazz/c.wav"]
    with pytest.warns(ClapsepWarning, match="left out"):
        assert names(expand(["m"], True, out=Path("m/out"))) == kept
    assert len(expand(["m"], True)) == 5

    def unreadable(path: Path) -> bool:
        raise AudioError("no")

    tree("m/ab.wav")
    assert "m/ab.wav" in names(expand(["m"], True, written=unreadable))


def test_manifest(tree: Callable[..., None]) -> None:
    tree("set/x/a.wav", "b.wav", "set/bark.wav", "set/barks/1.wav", "set/c\\d.wav")
    Path("set/jobs.csv").write_bytes(
        "\ufeffFile, pos,neg,query_audio\r\n"
        'x\\a.wav,"dog; puppy","rain, heavy",\r\n'
        "\r\n"
        "../b.wav,,,bark.wav; barks\r\n"
        ",,,\r\n"
        "c\\d.wav,犬 🐶,,\r\n".encode()
    )
    asked = read_requests(Path("set/jobs.csv"), {"neg": "wind"})
    (first, one), (second, two), (third, three) = asked
    assert first == Input(Path("set/x/a.wav"), Path("x/a.wav"))
    assert one == {"target": Query(("dog", "puppy"), "rain, heavy")}
    assert second.below == Path("b.wav")
    assert two == {"target": Query(neg="wind", pos_audio=(Path("set/bark.wav"), Path("set/barks")))}
    assert third.path == Path("set/c\\d.wav")
    assert three == {"target": Query("犬 🐶", "wind")}


@pytest.mark.parametrize(
    "content",
    [
        b'file;pos;neg\na.wav;"dog; puppy";rain, heavy\n',
        b"file\tpos\tneg\na.wav\tdog; puppy\train, heavy\n",
        'file;pos;neg\r\na.wav;"dog; puppy";rain, heavy\r\n'.encode("utf-8-sig"),
        "file\tpos\tneg\r\na.wav\tdog; puppy\train, heavy\r\n".encode("utf-16"),
    ],
)
def test_manifests_as_spreadsheets_write_them(
    tree: Callable[..., None], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree("a.wav")
    Path("jobs.csv").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for path in (Path("jobs.csv"), Path("-")):
        ((item, targets),) = read_requests(path)
        assert (item.path, targets) == (Path("a.wav"), {"target": Query(("dog", "puppy"), "rain, heavy")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pos,neg\ndog,rain\n", "no column file; it has: pos,neg"),
        (b"file\na.wav\n", "no column with a query"),
        (b"file,pos,negs\na.wav,dog,rain\n", "unknown column 'negs'; the columns are file,pos,"),
        (b"file,pos,pos\na.wav,dog,rain\n", "more than one column 'pos'"),
        (b"file;pos\na.wav;dog;rain\n", "line 2: more cells than columns; put texts with semicolons in quotes"),
        (b"file,pos\n", "no rows"),
        (b"", "no column file"),
        (b"file,pos\na.wav,dog,rain\n", "line 2: more cells than columns"),
        (b"file,pos\n,dog\n", "line 2: no file named"),
        (b"file,pos\nsub,dog\n", "line 2: sub is a folder"),
        (b"file,query_audio\nnone.wav,x.wav;a.wav\n", "line 2: query_audio: no such file x.wav"),
        (b"file,pos\n\nnone.wav,dog\n,\nnone2.wav,dog", "line 3: no such file none.wav; line 5: no such"),
        (b"file,pos\n" + b"none.wav,dog\n" * 12, "line 11: no such file none.wav; and 2 more$"),
        ("file,pos\nä.wav,dog\n".encode("latin-1"), "not UTF-8"),
        (b"file,pos\na\0.wav,dog\n", "NUL|no such file"),
        (None, "jobs.csv: no such file"),
    ],
)
def test_manifests_with_faults(tree: Callable[..., None], content: bytes | None, message: str) -> None:
    tree("a.wav", "sub/b.wav")
    if content is not None:
        Path("jobs.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=message) as raised:
        read_requests(Path("jobs.csv"))
    assert "\n" not in str(raised.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.one_of(st.binary(), st.lists(st.sampled_from(CELLS)).map(lambda cells: "".join(cells).encode())))
def test_any_list_and_manifest_is_read_or_refused(tree: Callable[..., None], content: bytes) -> None:
    tree("a.wav")
    path = Path("jobs")
    path.write_bytes(content)
    for read in (lambda path: read_requests(path, {"pos": "x"}), lambda path: expand([f"@{path}"])):
        with suppress(ManifestError):
            assert read(path)


def test_templates() -> None:
    item = Input(Path("in/a b.c.wav"), Path("sub/a b.c.wav"))

    def written(template: str, parts: tuple[str, ...] = BOTH, query: str = "dog / rain?") -> list[str]:
        return [p.as_posix() for p in output_paths(item, parts, Path("o"), template, "flac", query).values()]

    assert written("{stem}.{part}.{ext}") == ["o/sub/a b.c.target.flac", "o/sub/a b.c.residual.flac"]
    assert written("{query}/{part}/{stem}.flac", ("target",)) == ["o/sub/dog_rain/target/a b.c.flac"]
    assert written("{part}\\{stem}.{ext}", ("dog",)) == ["o/sub/dog/a b.c.flac"]
    assert written("{stem}{{1}}.{ext}", ("dog",)) == ["o/sub/a b.c{1}.flac"]
    assert written("{name}.{ext}", ("dog",)) == ["o/sub/a b.c.wav.flac"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{stem}.{ext}", "target, residual would be one file"),
        ("{title}.{part}.{ext}", r"no \{title\}.*\{stem\}, \{name\}, \{part\}, \{ext\}, \{query\}"),
        ("{}.{part}.{ext}", "no {}"),
        ("{stem.parent}.{part}.{ext}", "there is no"),
        ("{stem!r}.{part}.{ext}", "there is no"),
        ("{stem:{part}}.{part}.{ext}", "Windows"),
        ("{stem.{part}.{ext}", "cannot be used"),
        ("stem}.{part}.{ext}", "cannot be used"),
        ("../{stem}.{part}.{ext}", "leads out"),
        ("a\\..\\..\\{stem}.{part}.{ext}", "leads out"),
        ("/tmp/{stem}.{part}.{ext}", "leads out"),
        ("\\\\host\\{stem}.{part}.{ext}", "leads out"),
        ("C:\\{stem}.{part}.{ext}", "Windows"),
        ("{stem}\n.{part}.{ext}", "Windows"),
        ("{stem}\0.{part}.{ext}", "Windows"),
        ("{stem}.{part}.wav", r"does not end in \.flac"),
        ("{stem}.{part}.{ext}/", r"does not end in \.flac"),
        ("", "would be one file"),
        ("x" * 300 + "{part}.{ext}", "too long"),
    ],
)
def test_templates_that_cannot_be_used(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        output_paths(Input(Path("a.wav"), Path("a.wav")), BOTH, None, template, "flac")
    assert "\n" not in str(raised.value)


LETTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
NAMES = st.text(LETTERS, min_size=1).filter(lambda name: len(name.encode()) < 200)
HARD = st.sampled_from(
    ["CON", "nul.wav", "aux ", "..", ".", "/", "a/../b", "x" * 500, "é" * 90, "🐶\u200d🦺", "\udcff"]
)


RESERVED = {"CON", "PRN", "AUX", "NUL", *(port + digit for port in ("COM", "LPT") for digit in "123456789¹²³")}


@given(st.one_of(st.text(), HARD))
@example("Com¹.txt")
@example("dog\u202egnikrab")
@example("-rf")
def test_any_query_makes_a_safe_name(query: str) -> None:
    name = safe_name(query)
    assert 0 < len(name.encode()) <= QUERY_BYTES
    assert PurePosixPath(name).name == PureWindowsPath(name).name == name
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Cn") or letter in '<>:"|?*' for letter in name)
    assert name[0] not in ".-~ "
    assert name[-1] not in ". "
    assert name.split(".")[0].upper() not in RESERVED
    assert safe_name(name) == name


@given(st.one_of(NAMES, HARD.map(lambda n: n.replace("/", ""))), st.one_of(st.text(), HARD), st.data())
def test_any_output_stays_in_its_folder(stem: str, query: str, data: st.DataObject) -> None:
    assume(stem)
    template = data.draw(st.sampled_from(["{stem}.{part}.{ext}", "{query}/{stem}-{part}.{ext}", "{stem}/{part}.{ext}"]))
    recording = Path(f"{stem}.wav")
    item = Input(Path("in") / recording, recording)
    try:
        path = output_paths(item, BOTH, Path("out"), template, query=query)["target"]
    except UsageError:
        assert recording.stem == ".."  # as a folder's name, that would lead out
        return
    inside = os.path.normpath(path)
    assert inside.startswith(f"out{os.sep}")
    assert all(len(part.encode(errors="surrogatepass")) <= NAME_BYTES for part in path.parts)
    assert path.name.endswith("target.wav")


@given(st.lists(NAMES, min_size=2, max_size=5, unique=True), st.booleans())
@example(["a", "A"], False)
@example(["é", "e\u0301"], False)
@example(["x" * 230, "x" * 229 + "y"], False)
@example(["a", "b"], True)
def test_different_inputs_never_share_an_output_unsaid(stems: list[str], by_query: bool) -> None:
    recordings = [Path(f"{stem}.wav") for stem in stems]
    template = "{query}.{part}.{ext}" if by_query else "{stem}.{part}.{ext}"
    planned = []
    for recording in recordings:
        item = Input(Path("/nowhere/in") / recording, recording)
        planned.append((item, output_paths(item, BOTH, Path("/nowhere/out"), template, query="dog" * by_query)))
    composed = [unicodedata.normalize("NFC", str(path)) for _, paths in planned for path in paths.values()]
    written = [unicodedata.normalize("NFC", "".join(map(str.lower, path))) for path in composed]
    if len(set(written)) == len(written):
        check_outputs(planned)
    else:
        with pytest.raises(OutputError, match="would write it"):
            check_outputs(planned)


def planned(*recordings: str, folder: Path | None = None, **options: str) -> list[tuple[Input, dict[str, Path]]]:
    inputs = [Input(Path(name), Path(Path(name).name)) for name in recordings]
    return [(item, output_paths(item, BOTH, folder, **options)) for item in inputs]


def test_outputs_are_checked_before_anything_runs(tree: Callable[..., None]) -> None:
    tree("a/x.wav", "b/x.flac", "b/X.wav", "file", "a/y.wav")
    check_outputs(planned("a/x.wav", "b/X.wav"))
    with pytest.raises(OutputError, match=r'would write it; rename one, or use --filename "\{name\}\.\{part\}'):
        check_outputs(planned("a/x.wav", "a/x.mp3"))
    check_outputs(planned("a/x.wav", "a/x.mp3", filename="{name}.{part}.{ext}"))
    check_outputs(planned("a/x.wav", "a/y.wav", folder=Path("new/deep")))
    with pytest.raises(OutputError, match=r"both a/x.wav and b/x.flac would write it; rename"):
        check_outputs(planned("a/x.wav", "b/x.flac", folder=Path("o")), overwrite=True)
    with pytest.raises(OutputError, match=r"for some systems the same as x\.target\.wav"):
        check_outputs(planned("a/x.wav", "b/X.wav", folder=Path("o")))
    Path("alias").symlink_to("b")
    with pytest.raises(OutputError, match="would write it"):
        check_outputs(planned("b/x.flac", "alias/x.wav"))
    with pytest.raises(OutputError, match=r"file is not a folder"):
        check_outputs(planned("a/x.wav", folder=Path("file/deep")))
    Path("a/x.residual.wav").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_outputs(planned("a/x.wav"), overwrite=True)
    twice = Input(Path("a/y.wav"), Path("y.wav"))
    with pytest.raises(OutputError, match=r"two parts of a/y\.wav"):
        check_outputs([(twice, output_paths(twice, ("dog", "Dog"), None))])


def test_an_output_never_replaces_an_input(tree: Callable[..., None]) -> None:
    tree("a.wav", "store/b.wav", "a.flac")
    own = Input(Path("a.wav"), Path("a.wav"))
    with pytest.raises(OutputError, match=r"a\.wav: is an input"):
        check_outputs([(own, output_paths(own, ("target",), None, "{stem}.{ext}"))], overwrite=True)
    Path("link.wav").symlink_to("store/b.wav")
    inputs = [Input(Path("a.flac"), Path("b.flac")), Input(Path("link.wav"), Path("link.wav"))]
    plan = [(item, output_paths(item, ("target",), Path("store"), "{stem}.{ext}")) for item in inputs]
    with pytest.raises(OutputError, match=r"store/b\.wav: is an input \(link\.wav\)"):
        check_outputs(plan, overwrite=True)


def test_outputs_in_the_way(tree: Callable[..., None]) -> None:
    tree("a.wav", "a.target.wav", "a.residual.wav")
    with pytest.raises(OutputError, match=r"a\.target\.wav: exists already \(and 1 more\); use --overwrite"):
        check_outputs(planned("a.wav"))
    check_outputs(planned("a.wav"), overwrite=True)
    check_outputs(planned("a.wav"), skip=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_found_before(tree: Callable[..., None]) -> None:
    tree("a.wav", "closed/b.wav")
    Path("closed").chmod(0o555)
    with pytest.raises(OutputError, match="no permission to write to closed"):
        check_outputs(planned("a.wav", folder=Path("closed/new")))


def test_a_signature_stands_for_all_that_decides_the_output(tree: Callable[..., None]) -> None:
    tree("a.wav", "shot.wav", "shots/1.wav", "shots/2.wav")
    os.utime("a.wav", (0, 1000))
    samples = np.ones(8, np.float32)
    base = Query("dog", "rain", ["shot.wav", "shots", (samples, 8000)], [(samples, 16000)], 0.5)

    def key(query: Query = base, model: str = "mini bundled", name: str = "target", **settings: str) -> str:
        return signature(Path("a.wav"), {name: query}, model, settings)

    first = key()
    assert first == key()
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    others = [
        key(Query("Dog", "rain", base.pos_audio, base.neg_audio)),
        key(Query("dog", (), base.pos_audio, base.neg_audio)),
        key(Query(("dog", "rain"), (), base.pos_audio, base.neg_audio)),
        key(Query("dog", "rain", base.pos_audio, base.neg_audio, 0.25)),
        key(Query("dog", "rain", base.pos_audio[:2], base.neg_audio)),
        key(Query("dog", "rain", [*base.pos_audio[:2], (samples, 16000)], base.neg_audio)),
        key(Query("dog", "rain", base.neg_audio, base.pos_audio)),
        key(model="mini other"),
        key(name="dog"),
        key(format="flac"),
        key(format="wav"),
    ]
    Path("shots/2.wav").write_bytes(b"another dog")
    others.append(key())
    Path("shots/3.wav").write_bytes(b"one more dog")
    others.append(key())
    os.utime("a.wav", (0, 1001))
    others.append(key())
    Path("a.wav").write_bytes(b"longer than before")
    os.utime("a.wav", (0, 1001))
    others.append(key())
    assert len({first, *others}) == len(others) + 1
    with pytest.raises(AudioError, match="none"):
        signature(Path("none.wav"), {}, "mini", {})


def test_a_signature_outlives_names_and_order(tree: Callable[..., None]) -> None:
    tree("a.wav", "s/1.wav", "s/2.wav")
    query = Query(("dog", "puppy"), (), ["s/1.wav", "s/2.wav"])
    first = signature(Path("a.wav"), {"target": query}, "mini", {"x": "1", "y": "2"})
    Path("moved").mkdir()
    moved = Path("a.wav").rename("moved/b.wav")
    Path("s/1.wav").rename("s/3.wav")
    again = Query(("puppy", "dog"), (), ["s"])
    assert signature(moved, {"target": again}, "mini", {"y": "2", "x": "1"}) == first


def test_finished_means_all_of_it_for_the_same_key(tree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {
        "a": "clapsep 0.2.0 key=0123456789abcdef (libsndfile-1.2.2)",
        "b": "clapsep 0.2.0 key=0123456789abcdef",
        "c": "clapsep 0.2.0 key=0123456789abcdef0",
        "d": "",
        "e": "clapsep key=ffffffffffffffff monkey=0123456789abcdef",
        "bad": "",
    }
    tree(*tags)
    key = "0123456789abcdef"

    def read_software(path: Path) -> str:
        if path.name == "bad":
            raise AudioError("damaged")
        return tags[path.name]

    monkeypatch.setattr(resume, "read_software", read_software)

    def done(*paths: str) -> bool:
        return finished(map(Path, paths), key)

    def obstacle(*paths: str) -> Path | None:
        return first_conflict(map(Path, paths), key)

    assert done("a", "b")
    for path in ("c", "d", "e", "bad"):
        assert not done("a", path)
        assert obstacle("a", path) == Path(path)
    assert not done("a", "missing")
    assert obstacle("a", "missing") is None


@given(st.integers(0, 99), st.integers(0, 59), st.floats(0, 59.999))
def test_times_round_trip(hours: int, minutes: int, seconds: float) -> None:
    total = pytest.approx(3600 * hours + 60 * minutes + seconds, abs=1e-6)
    assert parse_time(f"{hours}:{minutes:02}:{seconds:09.6f}") == total
    assert parse_time(f"{60 * hours + minutes}:{seconds:.6f}") == total
    assert parse_time(f"{3600 * hours + 60 * minutes + seconds:.6f}") == total


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("83.5", 83.5), ("1:23.5", 83.5), ("1:02:03", 3723), (".5", 0.5), ("2.", 2), (" 90:00 ", 5400)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1:60", "1:60:00", "1:2:3:4", "1,5", "nan", "inf", "1e3", ":5", "5:", "9" * 400]
)
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(QueryError, match="is not a time"):
        parse_time(text)


def test_spans() -> None:
    assert parse_span("3.2-4.5") == (3.2, 4.5)
    assert parse_span("1:02 – 1:04") == (62, 64)
    for text in ("3.2", "-3", "3-", "4-3", "3-3", "1-2-3", ""):
        with pytest.raises(QueryError, match="is not a"):
            parse_span(text)


@given(st.text())
@example("1" * 5000)
@example("0:1-2:\u0663")
def test_any_text_is_a_time_a_span_a_target_or_a_clear_error(text: str) -> None:
    calls = (parse_time, text), (parse_span, text), (parse_target, text), (parse_target, f"a={text}")
    for parse, argument in calls:
        with suppress(QueryError, AudioError):
            parse(argument)


def test_targets(tree: Callable[..., None]) -> None:
    tree("siren.wav", "barks/1.wav")
    assert parse_target("dog=dog barking = loud") == ("dog", "dog barking = loud")
    assert parse_target("siren=siren.wav") == ("siren", Path("siren.wav"))
    assert parse_target("Hündin-2=barks") == ("Hündin-2", Path("barks"))
    assert parse_target("bell=3.2-1:04.5") == ("bell", (3.2, 64.5))
    assert parse_target("plane=747-400-8") == ("plane", "747-400-8")
    assert list(parse_targets(["dog=a", "siren=b"])) == ["dog", "siren"]
    faults = {
        "dog": "give a name",
        "dog=": "give a name",
        "=dog": "part of a file's name",
        "a/b=dog": "part of a file's name",
        "../x=dog": "part of a file's name",
        "con=dog": "part of a file's name",
        "a b=dog": "part of a file's name",
        "Residual=dog": "reserved",
        "siren=none.wav": "no such file",
        "bell=4-3": "end after its start",
    }
    for argument, message in faults.items():
        with pytest.raises(ClapsepError, match=message):
            parse_target(argument)
    with pytest.raises(QueryError, match="two targets"):
        parse_targets(["dog=a", "Dog=b"])


def test_no_torch_is_needed() -> None:
    modules = ", ".join(
        f"clapsep_cli.{m}" for m in ("jobs.inputs", "jobs.outputs", "jobs.requests", "jobs.resume", "query", "tables")
    )
    subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True, cwd=ROOT
    )
