"""The page of `clapsep ui`: shows and plays a recording, and extracts sounds from it."""
