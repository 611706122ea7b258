"""The version of this package: what outputs, scores and trained models say they were made by."""

__version__ = "0.1.0"
