"""Defines the family CLAPSep: texts and recordings, positive and negative, embedded by CLAP."""

from clapsep_cli.families.base import Family
from clapsep_cli.families.embedding import Embedder, conditions, likeness, stream
from clapsep_cli.models.clap import ClapAudioEncoder, ClapTextEncoder
from clapsep_cli.models.clapsep import CLAPSep, CLAPSepConfig

FAMILY = Family(
    config=CLAPSepConfig,
    separator=CLAPSep,
    text=ClapTextEncoder,
    audio=ClapAudioEncoder,
    ask=conditions,
    stream=stream,
    window_bytes=340_000_000,  # measured at most: 120 MB for one target, 340 for four; in bfloat16 less
    embedder=Embedder,
    likeness=likeness,
    near_in_bfloat16=True,
)
