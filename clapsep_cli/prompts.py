"""Prompts, as data: what the released TUSS models were trained to tell apart, and in which combinations."""

from __future__ import annotations

# In the order of the released files; a model's own configuration may name others.
PROMPTS = ("speech", "sfx", "sfxbg", "drums", "bass", "vocals", "other", "musicbg")
