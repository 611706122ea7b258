"""Reads and writes recordings: formats, decoders, writers."""
