"""What an answer spent its time on: spans of three tracks, as a trace that chrome://tracing and Perfetto show.

    host      opening and cutting pictures, making the prompt, choosing tokens, waiting, loading graphs to save memory
    vision    a span for each slice that is encoded
    decoder   a span for each piece of the prompt that is fed, and for each step

A span is noted in under a microsecond, so every answer has its timeline.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lensc.backends.files import write_text

TRACKS = ("host", "vision", "decoder")


class Span(NamedTuple):
    """Something that took from `start_s` to `end_s` of `time.perf_counter`. Spans of a track do not overlap."""

    track: str
    name: str
    start_s: float
    end_s: float
    details: Mapping[str, int | str] = {}


class Timeline:
    """Spans in the order in which they ended. Threads may add to it at the same time."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, str, float, float, Mapping[str, int | str]]] = []
        self.titles: dict[str, str] = {}
        """What a track is called, where that is more than its name."""

    @property
    def spans(self) -> list[Span]:
        """What was noted until now."""
        return [Span(*noted) for noted in self._noted]

    def note(self, span: Span) -> None:
        """Note what has ended before."""
        self._noted.append(span)

    def add(self, track: str, name: str, start_s: float, **details: int | str) -> float:
        """Note a span that ends now; return when that is."""
        end_s = time.perf_counter()
        self._noted.append((track, name, start_s, end_s, details))  # a plain tuple takes a third of the time of a Span
        return end_s

    @contextlib.contextmanager
    def span(self, track: str, name: str, **details: int | str) -> Iterator[None]:
        """Note what is done inside, unless it fails."""
        start_s = time.perf_counter()
        yield
        self.add(track, name, start_s, **details)

    def both_ms(self, a: str, b: str) -> float:
        """For how long two tracks were busy at the same time."""
        mine, theirs = (sorted((n[2], n[3]) for n in self._noted if n[0] == track) for track in (a, b))
        total_s, i, j = 0.0, 0, 0
        while i < len(mine) and j < len(theirs):
            total_s += max(0.0, min(mine[i][1], theirs[j][1]) - max(mine[i][0], theirs[j][0]))
            if mine[i][1] < theirs[j][1]:
                i += 1
            else:
                j += 1
        return total_s * 1e3

    def trace(self) -> dict[str, Any]:
        """In Chrome's trace event format: times in microseconds from the first span on, a thread for each track."""
        spans = sorted(self.spans, key=lambda span: span.start_s)
        begin_s = spans[0].start_s if spans else 0.0
        named = [_name("process_name", 0, "lensc")]
        named += [_name("thread_name", i, self.titles.get(track, track)) for i, track in enumerate(TRACKS)]
        named += [
            {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": i, "args": {"sort_index": i}}
            for i in range(len(TRACKS))
        ]
        events = [
            {
                "ph": "X",
                "name": span.name,
                "cat": span.track,
                "ts": round((span.start_s - begin_s) * 1e6, 3),
                "dur": round((span.end_s - span.start_s) * 1e6, 3),
                "pid": 1,
                "tid": TRACKS.index(span.track),
                "args": dict(span.details),
            }
            for span in spans
        ]
        return {"displayTimeUnit": "ms", "traceEvents": [*named, *events]}

    def write(self, path: str | Path) -> None:
        """Write the trace as JSON; a file that was there is replaced. Raises StorageError."""
        write_text(Path(path), json.dumps(self.trace()) + "\n")


def _name(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 1, "tid": thread, "args": {"name": name}}
