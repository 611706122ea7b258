"""clapsep: extract the sound you describe from a recording.

from clapsep_cli import Query, load_model, separate
result = separate(audio, rate, Query(pos="dog barking", neg="rain"), load_model())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clapsep_cli.version import __version__

if TYPE_CHECKING:
    from clapsep_cli.errors import ClapsepError
    from clapsep_cli.jobs.job import Options
    from clapsep_cli.jobs.planning import extract
    from clapsep_cli.query import Query
    from clapsep_cli.separation import Separation, separate
    from clapsep_cli.store.checkpoint import Model
    from clapsep_cli.store.library import load_model

_HOMES = {  # imported when first used: the command's --help must not wait for torch
    "ClapsepError": "errors",
    "Model": "store.checkpoint",
    "Options": "jobs.job",
    "Query": "query",
    "Separation": "separation",
    "extract": "jobs.planning",
    "load_model": "store.library",
    "separate": "separation",
}
__all__ = [
    "ClapsepError",
    "Model",
    "Options",
    "Query",
    "Separation",
    "__version__",
    "extract",
    "load_model",
    "separate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
