"""From what a user asks for to recordings that are read, separated and written."""
