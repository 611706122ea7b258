"""Tests how models are chosen, installed, verified and removed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, add_family
from hub_server import HubServer
from safetensors.torch import save_file
from tiny_clapsep import ROBERTA, convert_tiny, write_checkpoints
from torch import Tensor

from clapsep_cli import registry
from clapsep_cli.errors import CheckpointError, DownloadError, ModelError
from clapsep_cli.families import mini
from clapsep_cli.families.base import load_family
from clapsep_cli.models.base import TextEncoder
from clapsep_cli.query import Query
from clapsep_cli.registry import MODELS, HubFile, WebFile
from clapsep_cli.store import checkpoint, download, library
from clapsep_cli.store.checkpoint import CachedTexts, Model, load_part, read_metadata, save_part
from clapsep_cli.store.download import amount
from clapsep_cli.store.tensors import read_tensors

LICENCE = "LAION-CLAP CC0; the separator's weights state none (its code: MIT)"


def test_the_best_model_is_fetched_once_and_then_at_hand(served: HubServer, home: Path, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[str, int, int]] = []
    model = library.load_model(None, "cpu", say=said.append, progress=lambda *at: seen.append(at))
    assert model.name == "clapsep"
    assert "clap.pt@" in model.revision
    assert model.separator.window == ROBERTA.window
    size, instead = amount(MODELS["clapsep"].download_bytes), "; without it: --model mini, smaller and bundled"
    assert said == [f"downloading clapsep: {size}; licence: {LICENCE}{instead}"]
    assert list(dict.fromkeys(file for file, _, _ in seen)) == ["clap.pt", "clapsep.ckpt"]
    assert [get.path for get in served.gets()] == ["/clap.pt", "/clapsep.ckpt"]
    assert not list((home / "downloads").iterdir()), "originals are deleted after conversion"
    assert library.load_model(None, "cpu").name == "clapsep"
    assert len(served.gets()) == 2
    notes = read_metadata(model.folder / "text.safetensors")
    sources = json.loads(notes["sources"])
    assert set(sources) == {"clap.pt", "clapsep.ckpt"}
    for remote in MODELS["clapsep"].remotes:
        assert sources[remote.name] == {"sha256": remote.sha256, "source": "pinned by clapsep"}
    assert {p.name for p in model.folder.iterdir()} == {
        "SHA256SUMS",
        "audio.safetensors",
        "separator.safetensors",
        "text.safetensors",
        "tokenizer.json",
    }


def test_originals_can_be_kept(served: HubServer, home: Path) -> None:
    folder = library.install("clapsep", keep_original=True)
    assert len(list((home / "downloads").iterdir())) == 2
    sound = set(library.verify("clapsep"))
    originals = set((home / "downloads").glob("*/*")) - set((home / "downloads").glob("*/SHA256SUMS"))
    assert originals < sound
    flip(min(originals))
    with pytest.raises(CheckpointError, match=re.escape(f"delete {min(originals).parent}")):
        library.verify("clapsep")
    shutil.rmtree(folder)
    with pytest.raises(DownloadError, match=r"is damaged: .* it was deleted, run the command again"):
        library.install("clapsep")
    assert library.install("clapsep") == folder
    assert len(served.gets()) == 3


def test_without_a_network_the_bundled_model_runs_and_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is the reason: the network, the disk, or files that are not what was released."""
    for error in (DownloadError("no network"), CheckpointError("not as released"), OSError("no room")):

        def fails(remote: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(download, "to_download", fails)
        said: list[str] = []
        assert library.load_model(None, "cpu", say=said.append).name == "mini"
        assert said == [f"using the small bundled model, mini (--model mini), without clapsep: {error}"]
        with pytest.raises(type(error), match=str(error)):
            library.load_model("clapsep", "cpu")


def test_where_the_converted_model_is_damaged_the_bundled_one_runs(served: HubServer) -> None:
    separator = library.install("clapsep") / "separator.safetensors"
    separator.write_bytes(separator.read_bytes()[:-100])
    said: list[str] = []
    assert library.load_model(None, "cpu", say=said.append).name == "mini"
    assert f"without clapsep: {separator}" in said[0]
    with pytest.raises(CheckpointError):
        library.load_model("clapsep", "cpu")


def test_a_named_model_runs_or_fails(home: Path) -> None:
    with pytest.raises(ModelError, match="no model 'huge'"):
        library.load_model("huge", "cpu")
    assert library.load_model("mini", "cpu").name == "mini"


def test_carried_files_are_converted_and_noted(home: Path, tmp_path: Path) -> None:
    clap, tuned = write_checkpoints(tmp_path, ROBERTA)
    said: list[str] = []
    folder = library.install("clapsep", [tuned, clap], say=said.append)
    assert all("is not the released file" in line for line in said)
    assert len(said) == 2
    assert clap.exists()
    sources = json.loads(read_metadata(folder / "text.safetensors")["sources"])
    assert {source["source"] for source in sources.values()} == {"given by hand"}
    assert library.path_of("clapsep") == folder
    assert set(library.verify("clapsep")) == set(folder.iterdir()) - {folder / "SHA256SUMS"}
    library.install("clapsep", [tuned], say=said.append)
    assert "here already" in said[2]
    assert library.remove("clapsep") == [folder]
    assert not folder.exists()
    with pytest.raises(ModelError, match="not here"):
        library.path_of("clapsep")
    with pytest.raises(ModelError, match="cannot be removed"):
        library.remove("mini")


def test_a_failed_conversion_leaves_nothing_that_is_believed(
    served: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(files: Sequence[Path], folder: Path, **notes: str) -> None:
        convert_tiny(files, folder, **notes)
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "converter", lambda family: fails)
    with pytest.raises(KeyboardInterrupt):
        library.install("clapsep")
    assert library.installed(MODELS["clapsep"]) is None
    assert not list((home / "models").iterdir())
    monkeypatch.setattr(library, "converter", lambda family: convert_tiny)
    assert library.install("clapsep").is_dir()


def flip(path: Path) -> None:
    """Flip the lowest bit of the last byte, as a disk would: size and time stay."""
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_damage_is_found(served: HubServer) -> None:
    folder = library.install("clapsep")
    for file in sorted(set(folder.iterdir()) - {folder / "SHA256SUMS"}):
        flip(file)
        with pytest.raises(
            CheckpointError,
            match=f"{re.escape(str(file))}: is not what SHA256SUMS in its folder says.*models rm clapsep",
        ):
            library.verify("clapsep")
        flip(file)
    library.verify("clapsep")
    text = folder / "text.safetensors"
    text.write_bytes(text.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        library.verify("clapsep")
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be read"):
        library.verify("clapsep")


def test_a_file_that_the_sums_leave_out_is_not_sound(served: HubServer) -> None:
    folder = library.install("clapsep")
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "separator" not in line))
    with pytest.raises(CheckpointError, match=r"separator\.safetensors: is not what SHA256SUMS"):
        library.verify("clapsep")


def test_weights_that_are_not_finite_are_not_converted(home: Path, tmp_path: Path) -> None:
    clap, tuned = write_checkpoints(tmp_path, ROBERTA)
    state = torch.load(tuned)
    state["decoder_model.mask_net.3.bias"][0] = torch.nan
    torch.save(state, tuned)
    with pytest.raises(CheckpointError, match=r"not finite: decoder_model\.mask_net\.3\.bias"):
        library.install("clapsep", [clap, tuned])


def test_the_bundled_model_is_what_was_released(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled = library.place(MODELS["mini"])
    assert {path.name for path in library.verify("mini")} == {
        *("audio.safetensors", "separator.safetensors", "text.safetensors", "tokenizer.json")
    }
    shutil.copytree(bundled, tmp_path / "mini")
    monkeypatch.setattr(library, "weights_folder", lambda: tmp_path)
    for path in library.verify("mini"):
        flip(path)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: is not what .*: install clapsep again"):
            library.verify("mini")
        flip(path)


def test_verify_finds_any_flipped_tensor_whatever_computes(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where models keep their weights in another form in memory."""
    monkeypatch.setattr("clapsep_cli.store.checkpoint.native_bfloat16", lambda device: True)
    separator = library.install("clapsep") / "separator.safetensors"
    whole, tensors = separator.read_bytes(), read_tensors(separator)
    for name in list(tensors)[::20]:
        save_file(tensors | {name: -tensors[name] - 1}, separator, read_metadata(separator))
        with pytest.raises(CheckpointError, match="separator"):
            library.verify("clapsep")
        separator.write_bytes(whole)


def test_what_coreutils_say_of_the_sums(served: HubServer) -> None:
    folder = library.install("clapsep")
    sha256sum = shutil.which("sha256sum")
    if not sha256sum:
        pytest.skip("sha256sum is not installed here")
    command = [sha256sum, "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    flip(folder / "separator.safetensors")
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_all_that_is_left_of_a_model_is_removed(served: HubServer, home: Path) -> None:
    models = home / "models"
    others = [models / "clapsep-large-0123456789ab", models / "clapsep-mine", home / "texts" / "0123456789ab"]
    older, killed = models / "clapsep-0123456789ab", models / ".clapsep-0123456789ab.partial"
    for folder in (*others, older, killed):
        folder.mkdir(parents=True)
    here, texts = library.install("clapsep"), home / "texts" / library.pin(MODELS["clapsep"])
    texts.mkdir()
    assert set(library.remove("clapsep")) == {here, older, killed, texts}
    assert sorted([*models.iterdir(), *(home / "texts").iterdir()]) == sorted(others)
    with pytest.raises(ModelError, match="nothing of clapsep here"):
        library.remove("clapsep")


def test_a_family_without_query_encoders(
    home: Path, tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a separator and no more: the other parts are neither written nor asked for."""
    config = tiny.config
    network = load_part(tiny.folder, "separator", "mini", config)

    def alone(files: Sequence[Path], folder: Path, **notes: str) -> None:
        save_part(folder, "separator", "alone", config, network.state_dict(), **notes)

    family = replace(mini.FAMILY, text=None, audio=None)
    add_family(monkeypatch, "alone", registry.Traits(("separator",), ("text",)), family, alone)
    monkeypatch.setitem(MODELS, "one", replace(MODELS["clapsep"], name="one", family="alone"))
    carried = tmp_path / "model.pth"
    carried.write_bytes(b"weights")
    folder = library.install("one", [carried])
    assert {path.name for path in folder.iterdir()} == {"separator.safetensors", "SHA256SUMS"}
    assert library.verify("one") == [folder / "separator.safetensors"]
    model = library.load_model("one", "cpu")
    assert set(model.separator.state_dict()) == set(tiny.separator.state_dict())
    for part in ("text", "audio"):
        with pytest.raises(ModelError, match=f"'alone' take no {part} queries"):
            getattr(model, part)


def test_a_home_that_cannot_be_written_serves_what_is_there(
    served: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = library.install("clapsep")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for method in ("mkdir", "write_bytes", "write_text", "unlink", "replace", "touch"):
        monkeypatch.setattr(Path, method, read_only)
    monkeypatch.setattr(os, "open", read_only)
    model = library.load_model("clapsep", "cpu")
    assert model.text.embed(["dog"]).shape == (1, ROBERTA.dim)
    assert library.verify("clapsep")
    assert library.path_of("clapsep") == folder
    monkeypatch.setitem(MODELS, "clapsep", replace(MODELS["clapsep"], remotes=MODELS["clapsep"].remotes[:1]))
    with pytest.raises(
        DownloadError, match=r"cannot write to .* \(Read-only file system\): free space there, or set CLAPSEP_HOME"
    ):
        library.install("clapsep")


def test_what_is_pinned_is_pinned() -> None:
    remotes = [remote for entry in MODELS.values() for remote in entry.remotes]
    for remote in remotes:
        assert re.fullmatch(r"[0-9a-f]{64}", remote.sha256)
        assert remote.size > 1_000_000
        if isinstance(remote, HubFile):
            assert re.fullmatch(r"[0-9a-f]{40}", remote.revision)
        if isinstance(remote, WebFile):
            assert re.fullmatch(r"https://[^?#]+/[0-9a-f]{40}/[^?#]+", remote.url)
    assert len({remote.sha256[:12] for remote in remotes}) == len(remotes)  # their folders
    assert len({library.pin(entry) for entry in MODELS.values()}) == len(MODELS)
    for entry in MODELS.values():
        assert entry.licence
        assert entry.family in registry.FAMILIES
        assert (find_spec(f"clapsep_cli.store.convert_{entry.family}") is not None) == bool(entry.remotes)


def test_what_is_said_of_a_family_is_true_of_it() -> None:
    for name, traits in registry.FAMILIES.items():
        family = load_family(name)
        assert traits.parts == tuple(part for part in ("separator", "text", "audio") if getattr(family, part))
        assert ("audio" in traits.takes) == (family.audio is not None)
        assert ("negatives" in traits.takes) <= family.mutual


def test_another_pin_is_another_model(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = library.install("clapsep")
    entry = MODELS["clapsep"]
    newer = replace(entry, remotes=(replace(entry.remotes[0], sha256="1" * 64), entry.remotes[1]))
    monkeypatch.setitem(MODELS, "clapsep", newer)
    assert library.installed(newer) is None
    assert library.place(newer) != folder


class Counting(TextEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Tensor:
        self.asked.append(list(texts))
        return torch.nn.functional.one_hot(torch.tensor([len(t) % 5 for t in texts]), 5).float()


def test_a_repeated_text_needs_no_encoder(tmp_path: Path) -> None:
    encoder = Counting()

    def cached() -> CachedTexts:
        return CachedTexts(lambda: encoder, tmp_path / "texts", 5, torch.device("cpu"))

    first = cached().embed(["dog", "rain", "dog"])
    torch.testing.assert_close(first, Counting().embed(["dog", "rain", "dog"]))
    assert encoder.asked == [["dog", "rain"]]
    torch.testing.assert_close(cached().embed(["rain", "a cat"])[0], first[1])
    assert encoder.asked == [["dog", "rain"], ["a cat"]]
    for path in (tmp_path / "texts").iterdir():
        path.write_bytes(path.read_bytes()[:-2])  # cut short: not to be believed
    torch.testing.assert_close(cached().embed(["dog"]), first[:1])
    assert encoder.asked[-1] == ["dog"]


def test_the_text_encoder_is_read_once(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many new texts there are, in however many calls; once more if there are others after the separator."""
    model = library.load_model("clapsep", "cpu", "high")
    read: list[str] = []

    def counted(folder: Path, part: str, *more: object) -> object:
        read.append(part)
        return load_part(folder, part, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "load_part", counted)
    targets = {"dog": Query(pos="dog", neg="wind"), "rain": Query(pos="rain", neg="a cat")}
    model.ask(list(model.apart(targets).values()))
    model.ask([Query(pos="a bird")])
    assert read == ["text"]
    text = weakref.ref(model.text.encoder)  # type: ignore[attr-defined]
    assert model.separator.rate > 0
    assert text() is None, "the text encoder stays in memory beside the separator"
    model.ask([Query(pos="a car")])
    assert read == ["text", "separator", "text"]


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    texts = CachedTexts(Counting, tmp_path / "file" / "texts", 5, torch.device("cpu"))
    assert texts.embed(["dog"]).shape == (1, 5)


def test_models_commands(served: HubServer, home: Path, clapsep: Clapsep, tmp_path: Path) -> None:
    listed = clapsep("models", "list", cwd=tmp_path)
    assert "not here" in listed.stdout
    rows = json.loads(clapsep("models", "list", "--json", cwd=tmp_path).stdout)
    assert {row["name"]: row["here"] for row in rows} == {name: name == "mini" for name in MODELS}
    assert clapsep("models", "verify", "mini", cwd=tmp_path).stdout.count(": intact") == 4
    assert clapsep("models", "path", "clapsep", cwd=tmp_path).returncode == 3
    got = clapsep("models", "download", "clapsep", cwd=tmp_path)
    assert got.returncode == 0
    assert "licence" in got.stderr
    folder = Path(got.stdout.strip())
    assert folder.is_dir()
    assert clapsep("models", "path", "clapsep", cwd=tmp_path).stdout.strip() == str(folder)
    assert ": intact" in clapsep("models", "verify", "clapsep", cwd=tmp_path).stdout
    elsewhere = clapsep("models", "path", "clapsep", "--model-dir", tmp_path / "other", cwd=tmp_path)
    assert elsewhere.returncode == 3
    removed = clapsep("models", "rm", "clapsep", "--model-dir", home, cwd=tmp_path).stdout
    assert removed == f"{folder}: removed\n"
    assert not folder.exists()


def test_convert_command(home: Path, clapsep: Clapsep, tmp_path: Path) -> None:
    clap, tuned = write_checkpoints(tmp_path, ROBERTA)
    done = clapsep("models", "convert", "clapsep", "--from", clap, tuned, cwd=tmp_path)
    assert done.returncode == 0
    assert Path(done.stdout.strip()).is_dir()
    again = clapsep("models", "convert", "clapsep", "--from", tmp_path / "none", cwd=tmp_path)
    assert again.returncode == 0
    assert "here already, so the files were not read; to replace it: clapsep models rm clapsep" in again.stderr
    bundled = clapsep("models", "convert", "mini", "--from", tmp_path / "none", cwd=tmp_path)
    assert (bundled.returncode, "models rm" in bundled.stderr) == (3, False)
    assert bundled.stderr == "clapsep: mini comes with clapsep: there is nothing to convert\n"
    assert "convert [OPTIONS] {NAME} [FILE]..." in clapsep("models", "convert", "--help", cwd=tmp_path).stdout
    clapsep("models", "rm", "clapsep", cwd=tmp_path)
    failed = clapsep("models", "convert", "clapsep", "--from", tmp_path / "none", cwd=tmp_path)
    assert failed.returncode == 3
    assert failed.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_too_little_memory_for_torch_is_one_line(tmp_path: Path) -> None:
    """At 300 MB of address space its library cannot be mapped."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (300_000_000,) * 2); "
    limited += "from clapsep_cli.cli.app import main; main()"
    path = tmp_path / "mix.wav"
    soundfile.write(path, np.zeros(8000), 8000)
    command = [sys.executable, "-c", limited, "extract", str(path), "--pos", "dog", "--model", "mini"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("clapsep: ")
    assert (done.stderr.count("\n"), "is memory short" in done.stderr) == (1, True)


EXTRACT = """
import json, sys
from dataclasses import replace
from clapsep_cli import registry

given = json.loads(sys.argv[1])
remotes = tuple(registry.HubFile(**remote) for remote in given["remotes"])
registry.MODELS["clapsep"] = replace(registry.MODELS["clapsep"], remotes=remotes)
from clapsep_cli.store import convert_clapsep
from tiny_clapsep import convert_tiny
convert_clapsep.convert_clapsep = convert_tiny
from clapsep_cli.cli.app import main
sys.argv = ["clapsep", "extract", *given["arguments"]]
main()
"""


def test_from_an_empty_home_through_the_hub_to_a_target(tmp_path: Path) -> None:
    """Two processes ask at once: one downloads and converts, both extract; later ones need neither Hub nor encoder."""
    paths = write_checkpoints(tmp_path / "released", ROBERTA)
    mix = tmp_path / "mix.wav"
    soundfile.write(mix, 0.1 * np.random.default_rng(0).standard_normal(8000), 8000)
    with HubServer() as server:
        remotes = []
        for path in paths:
            data, place = path.read_bytes(), {"repo": "some/one", "repo_type": "model", "revision": "0" * 40}
            sha256 = server.add_file(*place.values(), path.name, data)
            remotes.append({**place, "path": path.name, "size": len(data), "sha256": sha256})
        environment = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "CLAPSEP_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))),
            "OMP_NUM_THREADS": "1",
        }

        def start(out: str, **more: str) -> subprocess.Popen[str]:
            given = {"remotes": remotes, "arguments": [str(mix), "--pos", "dog barking", "-o", str(tmp_path / out)]}
            command = [sys.executable, "-c", EXTRACT, json.dumps(given)]
            pipe = subprocess.PIPE
            return subprocess.Popen(command, env=environment | more, stdout=pipe, stderr=pipe, text=True)

        both = [start("a"), start("b")]
        said = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    later = start("c", HF_HUB_OFFLINE="1")
    out, err = later.communicate(timeout=120)
    assert (later.returncode, err) == (0, "")
    assert "some/one@000000000000" in out
    written = [(tmp_path / folder / "mix.target.wav").read_bytes() for folder in "abc"]
    assert written[0] == written[1] == written[2]
    assert len(list((tmp_path / "home" / "models").iterdir())) == 1
    assert sum("downloading clapsep" in err for _, err in said) == 1
