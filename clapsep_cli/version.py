"""The version of this package, which outputs, scores and trained models state."""

__version__ = "0.1.0"
