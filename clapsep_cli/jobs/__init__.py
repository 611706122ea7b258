"""Turns requests into jobs, and runs them: recordings are read, separated and written."""
