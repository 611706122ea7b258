"""Downloads, converts, checks and loads models."""
