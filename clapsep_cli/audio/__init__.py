"""Recordings in and out: formats, decoders, writers."""
