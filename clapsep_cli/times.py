"""Times and stretches of a recording as people type them."""

from __future__ import annotations

import re

from clapsep_cli.errors import QueryError

_TIME = re.compile(r"(?:(?:(?P<h>[0-9]{1,6}):)?(?P<m>[0-9]{1,6}):)?(?P<s>[0-9]{1,9}(?:\.[0-9]*)?|\.[0-9]+)")


def parse_time(text: str) -> float:
    """Seconds of a time given as seconds (`83.5`), `m:s` (`1:23.5`) or `h:m:s` (`1:02:03`). Raises `QueryError`."""
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise QueryError(f"{text!r} is not a time: give seconds (83.5), m:s (1:23.5) or h:m:s (1:02:03)")
    hours, minutes, seconds = match["h"], match["m"], float(match["s"])
    if (minutes is not None and seconds >= 60) or (hours is not None and int(minutes) >= 60):
        raise QueryError(f"{text!r} is not a time: what follows a colon lies below 60")
    return int(hours or 0) * 3600.0 + int(minutes or 0) * 60.0 + seconds


def is_span(text: str) -> bool:
    """Return True for two times with a dash between them, which `parse_span` reads unless they are out of order."""
    times = text.replace("–", "-").split("-")
    return len(times) == 2 and all(_TIME.fullmatch(time.strip()) for time in times)


def parse_span(text: str) -> tuple[float, float]:
    """Start and end in seconds of a stretch such as `3.2-4.5` or `1:02-1:04`. Raises `QueryError`."""
    start, dash, end = text.replace("–", "-").partition("-")
    if not (dash and start.strip() and end.strip()):
        raise QueryError(f"{text!r} is not a stretch: give its start and end, as in 3.2-4.5 or 1:02-1:04")
    span = parse_time(start), parse_time(end)
    if span[1] <= span[0]:
        raise QueryError(f"{text!r} is not a stretch: it has to end after its start")
    return span
