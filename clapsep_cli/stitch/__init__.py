"""Windows of a recording, and how what was made of them is joined again."""
