"""Finds the recordings that arguments name: files, folders, patterns and lists."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from clapsep_cli.audio.sources import STDIN, SUFFIXES
from clapsep_cli.errors import AudioError, ClapsepError, ClapsepWarning, ManifestError
from clapsep_cli.files import is_there
from clapsep_cli.jobs.stores import Stage, Stored, is_pattern
from clapsep_cli.query import RESIDUAL, TARGET
from clapsep_cli.tables import check_faults, decoded


@dataclass(frozen=True)
class Input:
    """A recording to process.

    Args:
        path: of its file; `-` for standard input.
        below: its path relative to the argument that named it (a folder, the fixed part of a pattern, the folder of a
            manifest), which outputs mirror; for a file that was named itself, its name.
        fault: the reason why it cannot be used, if it is already known.
        stored: size and time of a file in a store; None for a file of this machine.
    """

    path: Path
    below: Path
    fault: ClapsepError | None = None
    stored: Stored | None = None


def in_shard(item: Input, k: int, n: int) -> bool:
    """Return True if a recording belongs to shard `k` of `n`, counted from 0. Its relative name decides."""
    name = unicodedata.normalize("NFC", item.below.as_posix())
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest(), "big") % n == k


def expand(
    arguments: Sequence[str],
    recursive: bool = False,
    out: Path | None = None,
    written: Callable[[Path], bool] = lambda path: False,
    stage: Stage = Stage(),
) -> list[Input]:
    """Find the recordings that `arguments` name, each once, in the order given; those of a folder in natural order.

    Outputs that an earlier run wrote for another of these recordings are left out, with a `ClapsepWarning`: files
    beside it, or in its folder below `out`, that begin with its name and end in `.target` or `.residual`, or that are
    `written` by us.

    Args:
        arguments: each a file, of any suffix; a folder; a pattern with `*`, `?`, `[…]` or `**`, unless a file has that
            very name; a URL of these; `@list.txt`, a list of such arguments; or `-` alone, for standard input. Hidden
            files are only found by name.
        recursive: search folders with all their subfolders. Links are followed, no folder is entered twice.
        out: the output folder.
        written: returns True if this program wrote a file.
        stage: mirrors the stores of URLs.

    Returns:
        The inputs. A file that does not exist is an input with a `fault`, so that the others are processed.

    Raises:
        AudioError: an argument is empty, or no input can be used.
        ManifestError: a list cannot be used.
    """
    if "-" in arguments:
        if len(arguments) > 1:
            raise AudioError("- (standard input) must be the only input")
        return [Input(STDIN, Path("stdin"))]
    found: dict[tuple[int, int, str], Input] = {}
    for argument in arguments:
        if not argument:
            raise AudioError("an input has an empty name; is a variable not set?")
        if argument.startswith("@") and not is_there(Path(argument)):
            inputs = _listed(stage.path(argument[1:]), recursive, stage)
        else:
            try:
                inputs = _named(argument, Path(), recursive, stage)
            except AudioError as error:
                inputs = [_faulty(argument, error)]
        for item in inputs:
            found.setdefault(_identity(item), item)
    faults = [item.fault for item in found.values() if item.fault]
    if faults and len(faults) == len(found):
        raise faults[0]
    return _without_outputs(list(found.values()), out, written)


def folded(name: str) -> str:
    """Return `name` as file systems that ignore case and Unicode composition compare it.

    Letter by letter, so that names stay different where such systems keep them apart: `ß` and `ss`, `ı` and `i`.
    """
    letters = (letter.lower() for letter in unicodedata.normalize("NFC", name))
    return unicodedata.normalize("NFC", "".join(letters))


def natural(path: Path) -> list[tuple[list[str | int], str]]:
    """Return a key that sorts paths by their numbers: `take 2` before `take 10`."""
    pieces = ((part, re.split(r"([0-9]+)", folded(part))) for part in path.parts)
    # `split` returns text and digits by turns, so text is never compared with a number.
    return [([int(p) if at % 2 else p for at, p in enumerate(split)], part) for part, split in pieces]


def _identity(item: Input) -> tuple[int, int, str]:
    # Hard links count as different files; spellings that the system treats as one name do not.
    if item.fault or item.stored:
        return 0, 0, str(item.path)
    status = item.path.stat()
    return status.st_dev, status.st_ino, folded(str(item.path.resolve()))


def _faulty(argument: str, fault: AudioError) -> Input:
    return Input(Path(argument), Path(Path(argument).name), fault)


def _named(argument: str, folder: Path, recursive: bool, stage: Stage) -> list[Input]:
    path = stage.path(argument, folder)
    if stage.holds(path):
        return _stored(path, recursive, stage)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if is_pattern(argument):
            return _matches(path)
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise AudioError(f"{path}: {reason}") from error
    if path.is_dir():
        return _in_folder(path, recursive)
    return [Input(path.absolute() if path == STDIN else path, Path(path.name))]  # a file may be called "-"


def _stored(path: Path, recursive: bool, stage: Stage) -> list[Input]:
    """Find the recordings that a URL names: a file, a folder, or a pattern."""
    pattern = is_pattern(stage.shown(str(path)))
    if not pattern and (stored := stage.look(path)) is not None:
        return [Input(path, Path(path.name), None, stored)]
    found = stage.matches(path) if pattern else stage.files(path, recursive)
    root = path
    while is_pattern(stage.shown(str(root))):
        root = root.parent
    heard = {
        file: fault
        for file, fault in found.items()
        if fault
        or (file.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in file.relative_to(root).parts))
    }
    if not heard:
        where = "matches it" if pattern else ("is in this folder or below it" if recursive else "is in this folder")
        raise AudioError(f"{path}: no recording {where}{'' if pattern or recursive else '; -r looks below it'}")
    ordered = sorted(heard, key=lambda file: natural(file.relative_to(root)))
    return [
        Input(file, file.relative_to(root), heard[file], None if heard[file] else stage.look(file)) for file in ordered
    ]


def _matches(pattern: Path) -> list[Input]:
    root, rest = Path(), pattern
    while rest.parts and (not is_pattern(rest.parts[0]) or is_there(root / rest.parts[0])):
        # An existing name such as "Live [2020]" is not a pattern.
        root, rest = root / rest.parts[0], Path(*rest.parts[1:])
    if not rest.parts:
        raise AudioError(f"{pattern}: no such file")
    try:
        found = [match.relative_to(root) for match in root.glob(str(rest))]
    except (ValueError, OSError) as error:
        raise AudioError(f"{pattern}: cannot be used as a pattern ({error})") from error
    if not any(part.startswith(".") for part in rest.parts):
        found = [match for match in found if not any(part.startswith(".") for part in match.parts)]
    if not found:
        raise AudioError(f"{pattern}: no such file, and nothing matches it as a pattern")
    # A broken link matches, too, and fails later, as when the shell expands the pattern.
    files = (below for below in found if (root / below).is_file() or not is_there(root / below))
    recordings = [below for below in files if below.suffix.lower() in SUFFIXES]
    if not recordings:
        raise AudioError(f"{pattern}: matches no recordings, only {min(found, key=natural)} and the like")
    inputs = ((root / below, below) for below in sorted(recordings, key=natural))
    return [
        Input(path, below, None if is_there(path) else AudioError(f"{path}: no such file")) for path, below in inputs
    ]


def _in_folder(root: Path, recursive: bool) -> list[Input]:
    found: list[Path] = []
    subfolders = False
    waiting, entered = deque([root]), set()
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
            found += [path for path in visible if path.suffix.lower() in SUFFIXES and path.is_file()]
            folders = [path for path in visible if path.is_dir()]
        except OSError as error:
            fault = f"{folder}: this folder cannot be listed ({error.strerror or error})"
            if folder == root:
                raise AudioError(fault) from error
            warnings.warn(f"{fault} and is left out", ClapsepWarning, stacklevel=2)
            continue
        subfolders = subfolders or bool(folders)
        if recursive:  # links last, so that a recording is mirrored at its real path
            waiting.extend(path for path in folders if not path.is_symlink())
            waiting.extendleft(path for path in folders if path.is_symlink())
    if not found:
        place = "folder or below it" if recursive else "folder"
        hint = "; -r looks in the folders below it" if subfolders and not recursive else ""
        raise AudioError(f"{root}: no recordings in this {place}{hint}")
    return [Input(root / below, below) for below in sorted((path.relative_to(root) for path in found), key=natural)]


def _listed(path: Path, recursive: bool, stage: Stage) -> list[Input]:
    """Find the inputs that a list names: one argument a line; lines that begin with `#` are comments.

    Names are relative to the folder of the list, or to the current one where they do not exist there.
    """
    found: list[Input] = []
    try:
        text = decoded(stage.fetch(path).read_bytes())  # UTF-16 is what PowerShell writes with ">"
    except OSError as error:
        raise ManifestError(f"{path}: this list cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: this list is not UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        argument = line.strip()
        if not argument or argument.startswith("#"):
            continue
        try:
            found += _named_in_list(argument, path.parent, recursive, stage)
        except AudioError as error:
            found.append(_faulty(argument, AudioError(f"{path}: line {number}: {error}")))
    if not found:
        raise ManifestError(f"{path}: this list names no recordings")
    faults = [str(item.fault).removeprefix(f"{path}: ") for item in found if item.fault]
    if len(faults) == len(found):
        check_faults(path, faults)
    return found


def _named_in_list(argument: str, folder: Path, recursive: bool, stage: Stage) -> list[Input]:
    try:
        return _named(argument, folder, recursive, stage)
    except AudioError as beside:
        try:
            return _named(argument, Path(), recursive, stage)
        except AudioError:
            raise beside from None


def _without_outputs(inputs: Sequence[Input], out: Path | None, written: Callable[[Path], bool]) -> list[Input]:
    resolved = lru_cache(maxsize=None)(Path.resolve)
    stems: dict[Path, set[str]] = defaultdict(set)  # by folder: names of the recordings whose outputs would be in it
    for item in inputs:
        for folder in (item.path.parent, *([out / item.below.parent] if out else ())):
            stems[resolved(folder)] |= {item.path.stem, item.path.name}

    def is_output(path: Path) -> bool:
        others = stems[resolved(path.parent)]
        whole, _, part = path.stem.rpartition(".")
        if part in (TARGET, RESIDUAL) and whole in others:
            return True
        if not any(path.stem[:end] in others for end in range(1, len(path.stem))):
            return False
        try:
            return written(path)
        except ClapsepError:
            return False

    left = {item: None for item in inputs if not item.fault and is_output(item.path)}  # an ordered set
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        line = f"left out, as outputs of other inputs: {next(iter(left)).path}{more}"
        warnings.warn(line, ClapsepWarning, stacklevel=3)
    return [item for item in inputs if item not in left]
