"""The training loop: tasks, sampling, state on disk and settings."""
