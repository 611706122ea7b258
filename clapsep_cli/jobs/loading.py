"""How the model of a run is loaded, here or in a worker elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clapsep_cli.jobs.stores import Stage, is_url

if TYPE_CHECKING:
    from clapsep_cli.store.checkpoint import Model


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Loading:
    """What to load, named as the options of the commands; `model` and `adapter` may be URLs."""

    model: str | None = None
    adapter: str | None = None
    device: str = "auto"
    precision: str = "auto"
    refine: bool = False

    def load(
        self, stage: Stage, say: Callable[[str], None] = _nothing, progress: Callable[..., None] = _nothing
    ) -> Model:
        """Load the model with its adapter.

        Args:
            stage: mirrors the stores of URLs.
            say: is told in a line what the user should know.
            progress: is told of downloads (see `load_model`).

        Raises:
            ModelError: there is no such model.
        """
        from clapsep_cli.store.library import load_model

        name = str(stage.fetch(stage.path(self.model))) if self.model and is_url(self.model) else self.model
        model = load_model(name, self.device, self.precision, say=say, progress=progress)
        if self.adapter:
            from clapsep_cli.store.adapters import apply

            apply(model, stage.fetch(stage.path(self.adapter)))
        model.refine(self.refine)
        return model
