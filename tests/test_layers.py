"""The house rules that no linter knows: who may import whom, who prints, who may touch a pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clapsep_cli"

LAYERS = [  # from the ground up; a module imports only from lines above its own
    {"errors", "files", "metrics", "dsp", "startup", "stems"},
    {
        "audio",
        "query",
        "registry",
        "windows",
        "objective",
        "schedules",
        "whole",
        "objective_tuss",
        "times",
        "tables",
        "models.attention",
        "models.packed",
        "prompts",
    },
    {"masking", "stem_stream", "transfer"},
    {"models.base", "hub_client", "web_client"},
    {"models.htsat", "models.mini", "models.locoformer", "hub"},
    {"models.clapsep", "models.tuss"},
    {"models.clap"},
    {"texts"},
    {"checkpoint"},
    {"wav", "levels", "convert", "adapters", "augment", "task"},
    {"containers", "convert_tuss"},
    {"mpeg"},
    {"decoders", "media", "plot"},
    {"sources", "encoding"},
    {"writers", "inputs", "embedding", "prompting"},
    {"jobs", "outputs", "resume"},
    {"targets", "pipeline"},
    {"tasks"},
    {"recording"},
    {"batch"},
    {"planning", "library", "training"},
    {"data", "environment", "figures"},
    {"mixtures", "pool"},
    {"scores", "sampling", "validation", "prompt_mixing"},
    {"evaluate", "conditions", "record"},
    {"train", "report"},
    {"recipes", "train_mini", "train_clapsep", "train_tuss"},
    {"terminal"},
    {"cli_options", "cli_models", "cli_evaluate", "cli_train"},
    {"cli_run"},
    {"cli_extract", "cli_separate"},
    {"cli"},
    {"__main__"},
]
UNLAYERED = {"__init__", "models.__init__"}  # the first only names the public interface, lazily
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES = 400


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_place() -> None:
    assert set(MODULES) - UNLAYERED == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_nothing_imports_upward(name: str) -> None:
    used = {used.removeprefix("clapsep_cli.") for used in imports(ast.parse(MODULES[name].read_text()))}
    higher = sorted(u for u in used & set(LEVEL) if LEVEL[u] >= LEVEL[name])
    assert not higher, f"{name} imports {higher}, which do not lie below it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_cli_prints_and_only_convert_unpickles(name: str) -> None:
    source = MODULES[name].read_text()
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    if not name.startswith("cli") and name != "terminal":
        assert not called & {"print", "typer.echo", "sys.stdout.write", "sys.stderr.write"}
    if name != "convert":
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "np.load", "torch.save"}
    if name != "registry":
        assert "family ==" not in source
    assert source.count("\n") <= MAX_LINES
