"""Defines the family of the bundled small model: known words and recordings, positive and negative."""

from clapsep_cli.families.base import Family
from clapsep_cli.families.embedding import Embedder, conditions, likeness, stream, unknown_words
from clapsep_cli.models.mini import Mini, MiniConfig
from clapsep_cli.models.mini_queries import MiniAudio, MiniText

FAMILY = Family(
    config=MiniConfig,
    separator=Mini,
    text=MiniText,
    audio=MiniAudio,
    ask=conditions,
    stream=stream,
    window_bytes=80_000_000,  # measured at most: 50 MB for one target, 80 for four
    embedder=Embedder,
    doubts=unknown_words,
    likeness=likeness,
)
