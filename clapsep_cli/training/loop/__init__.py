"""The training loop: what it runs, what it draws, its state on disk and its settings."""
