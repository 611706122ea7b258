"""Holds rules that no linter knows: which module may import which, print, or read a pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clapsep_cli"

# Rooms from the ground up: a module imports from rooms listed before its own, and within its own room from sets listed
# before its own. "" is the package's own folder; what lies on the ground there is open to all.
ROOMS: list[tuple[str, list[set[str]]]] = [
    ("", [{"dsp", "errors", "metrics", "registry", "startup", "version"}, {"files"}, {"query", "tables"}]),
    (
        "audio",
        [
            {"samples"},
            {"wav"},
            {"containers"},
            {"decoders"},
            {"film", "sources"},
            {"encoding"},
            {"writers"},
        ],
    ),
    (
        "models",
        [
            {"base", "layers", "locoformer", "prompts", "trunk"},
            {"htsat", "mini", "refined", "resunet", "tuss"},
            {"clapsep", "mini_queries"},
            {"audiosep", "clap"},
        ],
    ),
    ("stitch", [{"windows"}, {"complex_masks", "masking", "stems"}]),
    ("families", [{"base"}, {"embedding"}, {"audiosep", "clapsep", "mini", "tuss"}]),
    (
        "store",
        [
            {"download", "tensors"},
            {"checkpoint"},
            {"adapters", "released"},
            {"convert_clapsep", "convert_tuss", "library"},
            {"convert_audiosep"},
        ],
    ),
    ("listening", [{"levels", "plot"}, {"events", "hearing", "notebook"}]),
    ("", [{"separation"}]),
    (
        "jobs",
        [
            {"stores"},
            {"inputs"},
            {"outputs"},
            {"resume"},
            {"job"},
            {"exchange"},
            {"recording", "requests"},
            {"batch", "results", "watch"},
            {"planning"},
            {"ray_engine"},
        ],
    ),
    ("page", [{"overview", "requests"}, {"session"}, {"server"}]),
    ("", [{"data"}]),
    ("evaluation", [{"mixtures"}, {"datasets", "scores"}, {"evaluate"}, {"external", "prompted", "report"}]),
    (
        "training.loop",
        [
            {"optimisation", "settings"},
            {"record", "sampling", "task"},
            {"state"},
            {"train"},
        ],
    ),
    (
        "training.recipes",
        [
            {"augment", "objective"},
            {"conditions", "prompt_mixing", "space", "validation"},
            {"audiosep", "clapsep", "mini", "tuss"},
            {"presets"},
        ],
    ),
    (
        "cli",
        [
            {"terminal"},
            {"options", "score_tables"},
            {"embed", "env", "evaluate", "mixtures", "models", "results", "run", "ui"},
            {"extract", "hear", "separate", "train"},
            {"demo"},
            {"app"},
        ],
    ),
    ("", [{"__main__"}]),
]
LAYERS = [{f"{room}.{name}".lstrip(".") for name in names} for room, layers in ROOMS for names in layers]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
DOORS = {name for name in MODULES if name.endswith("__init__")}  # of packages; the first is the public interface
MAX_LINES = 400
MAX_IN_A_ROOM = 18


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_place() -> None:
    assert set(MODULES) - DOORS == set(LEVEL)


def test_no_room_is_crowded() -> None:
    for room in {path.parent for path in MODULES.values()}:
        assert len(list(room.glob("*.py"))) - 1 <= MAX_IN_A_ROOM, room.name


@pytest.mark.parametrize("name", sorted(DOORS - {"__init__"}))
def test_a_door_holds_nothing_but_a_line_on_the_room(name: str) -> None:
    (line,) = ast.parse(MODULES[name].read_text()).body
    assert isinstance(line, ast.Expr)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_nothing_imports_upward(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    doors = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "clapsep_cli"]
    assert {alias.name for door in doors for alias in door.names} <= set(LEVEL), "the public interface is for users"
    used = {used.removeprefix("clapsep_cli.") for used in imports(tree)}
    higher = sorted(u for u in used & set(LEVEL) if LEVEL[u] >= LEVEL[name])
    assert not higher, f"{name} imports {higher}, which do not lie below it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_cli_prints_and_only_one_file_unpickles(name: str) -> None:
    source = MODULES[name].read_text()
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    if not name.startswith("cli."):
        assert not called & {"print", "typer.echo", "sys.stdout.write", "sys.stderr.write"}
    if name != "store.released":
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "np.load", "torch.save"}
    if name != "registry":
        assert "family ==" not in source
    assert source.count("\n") <= MAX_LINES


PLAIN = ("audio", "cli", "evaluation", "page", "store", "training")  # rooms


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith(PLAIN)))
def test_a_docstring_says_what_a_thing_is_or_does(name: str) -> None:
    """It does not begin with a question, which makes readers guess."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, kinds)]
    first = [(ast.get_docstring(node) or "").partition(" ")[0] for node in nodes]
    assert not {"What", "How", "Whether", "Where", "Which", "When"} & set(first)
