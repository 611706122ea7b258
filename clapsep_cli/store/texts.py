"""Embeddings of texts, kept on disk, so that a repeated query needs no text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clapsep_cli.files import replacing
from clapsep_cli.models.base import TextEncoder


class CachedTexts(TextEncoder):
    """Answers from `folder`, one small file a text, and asks the encoder that `load` returns for what is not there.

    `load` is called once, when it is first needed: reading the encoder takes longer than embedding many texts.
    `folder` must belong to one version of one model. A folder that cannot be written only costs time.
    """

    def __init__(self, load: Callable[[], TextEncoder], folder: Path, dim: int, device: torch.device) -> None:
        super().__init__()
        self.load, self.folder, self.dim, self.device = load, folder, dim, device

    @cached_property
    def encoder(self) -> TextEncoder:
        """What embeds texts that are not in the folder."""
        return self.load()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """As `TextEncoder.embed`; float32 `[len(texts), dim]`."""
        known = {text: found for text in texts if (found := self._read(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            for text, row in zip(missing, self.encoder.embed(missing), strict=True):
                known[text] = row
                self._write(text, row)
        return torch.stack([known[text].to(self.device) for text in texts])

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.f32"

    def _read(self, text: str) -> Tensor | None:
        try:
            values = np.frombuffer(self._path(text).read_bytes(), "<f4").astype(np.float32)
        except (OSError, ValueError):
            return None
        # A whole embedding has length 1; anything else was cut short or is not ours.
        return torch.from_numpy(values) if len(values) == self.dim and abs(values @ values - 1) < 1e-3 else None

    def _write(self, text: str, row: Tensor) -> None:
        path = self._path(text)
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_bytes(row.cpu().numpy().astype("<f4").tobytes())
