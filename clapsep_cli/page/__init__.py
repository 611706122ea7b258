"""The page of `clapsep ui`: a recording seen and heard, extractions of it, and the server that shows them."""
