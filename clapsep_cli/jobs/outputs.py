"""Names the output files of a recording, and checks that they can be written."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter

from clapsep_cli.audio.sources import STDIN
from clapsep_cli.errors import OutputError, UsageError
from clapsep_cli.files import is_there
from clapsep_cli.jobs.inputs import Input, folded
from clapsep_cli.jobs.stores import Stage

MARKS = "_clapsep"  # folder for markers, below the output folder
TEMPLATE = "{stem}.{part}.{ext}"
FIELDS = ("stem", "name", "part", "ext", "query")
NAME_BYTES = 224  # systems allow 255; temporary names are longer
QUERY_BYTES = 96
MARK_DIGITS = 8  # digits of the hash in a shortened name

FORBIDDEN = '<>:"/\\|?*'  # in file names on Windows
FORBIDDEN_IN_TEMPLATES = set(FORBIDDEN) - set("/")
DEVICES = re.compile(r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[0-9¹²³]|LPT[0-9¹²³])(?:\.|$)", re.IGNORECASE)
JOINERS = "\u200c\u200d"  # part of some scripts and many emoji

Paths = Mapping[str, Path]  # of the outputs of one input, by part


def safe_name(text: str, limit: int = QUERY_BYTES) -> str:
    """Return `text` as (a part of) a file name that any system takes, of 1 to `limit` bytes.

    Letters of all scripts stay. Short texts may share a name; long ones are told apart by a hash.
    """
    # Category C: unassigned code points, lone surrogates, and characters that are invisible or change the direction.
    letters = (
        letter if letter in JOINERS or (letter not in FORBIDDEN and unicodedata.category(letter)[0] != "C") else " "
        for letter in unicodedata.normalize("NFC", text)
    )
    name = "_".join("".join(letters).split()).lstrip(".-_~").rstrip("._") or "_"
    return shortened(f"_{name}" if DEVICES.match(name) else name, limit)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # names that are not UTF-8 have lone surrogates in Python


def shortened(name: str, limit: int) -> str:
    """Return `name` in at most `limit` bytes; of a longer one its beginning, and a hash for the rest."""
    encoded = _bytes(name)
    if len(encoded) <= limit:
        return name
    mark = hashlib.sha256(encoded).hexdigest()[:MARK_DIGITS]
    return f"{encoded[: max(0, limit - MARK_DIGITS - 1)].decode(errors='ignore')}~{mark}"


def output_paths(
    item: Input,
    parts: Sequence[str],
    out: Path | None,
    filename: str = TEMPLATE,
    extension: str = "wav",
    query: str = "",
) -> dict[str, Path]:
    """Return the path of each part of `item`.

    Args:
        item: the recording.
        parts: their names.
        out: output folder, in which outputs mirror the tree of inputs; None for the folder of the recording.
        filename: template with `{stem}` or `{name}` (the recording's name without or with its suffix), `{ext}`,
            `{part}` (needed for several parts), `{query}`, and `/` for folders. Names that are too long for file
            systems keep their beginning, and a hash of the rest.
        extension: the value of `{ext}`.
        query: the value of `{query}`.

    Raises:
        UsageError: the template cannot be used, or leads out of the folder.
    """
    template = filename.replace("\\", "/")
    _check_template(template, parts)
    parent = item.path.parent if out is None else out / item.below.parent
    values = {"ext": extension, "query": safe_name(query)}
    return {part: parent / _filled(template, item.below, {**values, "part": part}) for part in parts}


def _check_template(template: str, parts: Sequence[str]) -> None:
    where = f"--filename {template!r}"
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UsageError(f"{where}: cannot be used ({error}); write {{{{ for a brace") from error
    if any(letter in FORBIDDEN_IN_TEMPLATES or unicodedata.category(letter) == "Cc" for letter in template):
        raise UsageError(f"{where}: has characters that Windows forbids in file names")
    for _, name, spec, conversion in fields:
        if name not in FIELDS or spec or conversion:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise UsageError(f"{where}: there is no {{{name}}}; use {known}")
    if len(parts) > 1 and "part" not in {field[1] for field in fields}:
        raise UsageError(f"{where}: {', '.join(parts)} would be one file; use {{part}}")


def _filled(template: str, below: Path, values: Mapping[str, str]) -> Path:
    where = f"--filename {template!r}"
    own = {"stem": below.stem, "name": below.name}
    filled = template.format(**own, **values)
    excess = max(len(_bytes(name)) for name in filled.split("/")) - NAME_BYTES
    if excess > 0:
        own = {field: shortened(text, max(0, len(_bytes(text)) - excess)) for field, text in own.items()}
        filled = template.format(**own, **values)
    names = filled.split("/")
    if any(len(_bytes(name)) > NAME_BYTES for name in names):
        raise UsageError(f"{where}: makes names that are too long for a file system")
    if not names[0] or ".." in names:
        raise UsageError(f"{where}: leads out of the folder for outputs; use -o to choose another")
    if not names[-1].endswith(f".{values['ext']}"):
        raise UsageError(f"{where}: gives {names[-1]!r}, which does not end in .{values['ext']}; end it in .{{ext}}")
    return Path(*names)


def check_outputs(
    planned: Iterable[tuple[Input, Paths]],
    overwrite: bool = False,
    skip: bool = False,
    stage: Stage = Stage(),
    own: Callable[[Input], bool] = lambda item: True,
) -> None:
    """Check that all outputs can be written. Names that differ in case or Unicode composition alone count as the same.

    Args:
        planned: each input with the paths of its outputs.
        overwrite: existing outputs will be replaced.
        skip: inputs with existing outputs will be skipped.
        stage: mirrors the stores of outputs.
        own: returns True if this process writes the outputs of an input; those of other processes may exist.

    Raises:
        OutputError: two outputs are one file; an output is an input or a folder, its folder cannot be written, or it
            exists and neither `overwrite` nor `skip` is set.
    """
    planned, places = list(planned), _Places()
    inputs = [item.path for item, _ in planned if item.path != STDIN]
    read = {places.of(name): path for path in inputs for name in (path, path.resolve())}
    writers: dict[str, tuple[Path, Path]] = {}
    existing = []
    for item, paths in planned:
        for path in paths.values():
            place = places.of(path)
            if place in writers:
                other, named = writers[place]
                also = "" if other.name == path.name else f" (for some systems the same as {other.name})"
                both = f"both {named} and {item.path}" if named != item.path else f"two parts of {item.path}"
                way = 'use --filename "{name}.{part}.{ext}"' if named.stem == item.path.stem else "use -o or --filename"
                raise OutputError(f"{path}: {both} would write it{also}; rename one, or {way}")
            if place in read:
                raise OutputError(
                    f"{path}: is an input ({read[place]}) and would be written for {item.path}; use -o or --filename"
                )
            writers[place] = path, item.path
            if not own(item):
                continue
            _check_folder(path)
            if not (overwrite or skip) and stage.is_there(path):
                existing.append(path)
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise OutputError(
            f"{existing[0]}: exists already{more}; use --overwrite to replace it, or --skip-existing to keep it"
        )


class _Places(dict[Path, str]):
    """Identifies paths: by the folder without links and the name, both `folded`."""

    def __missing__(self, folder: Path) -> str:
        self[folder] = folded(str(folder.resolve()))
        return self[folder]

    def of(self, path: Path) -> str:
        # An existing link is itself replaced, so only links to folders are followed.
        return f"{self[path.parent]}/{folded(path.name)}"


def _check_folder(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: is a folder and cannot be written")
    above = next(folder for folder in path.parents if is_there(folder))
    if not above.is_dir():
        raise OutputError(f"{path}: cannot be written, as {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise OutputError(f"{path}: no permission to write to {above}; choose another folder with -o")
