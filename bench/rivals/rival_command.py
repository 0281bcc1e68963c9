"""What the scripts of all rivals have: the verbs `build` and `serve`, and answers as lines of JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOM = 128
"""Tokens that a decoder has room for beyond its prompt, as our own has."""


def parsers(doc: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole command line, described by the first line of `doc`, and the parts of `build` and `serve`."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("build")
    make.add_argument("checkpoint", type=Path)
    make.add_argument("out", type=Path)
    run = verbs.add_parser("serve")
    run.add_argument("out", type=Path)
    run.add_argument("--threads", type=int, default=2)
    return parser, make, run


def decoder_answers(
    started: float, begin: Callable[[int], None], prefill: Callable[[], None], decode: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin by a decoder that was begun to be loaded at `started`, by `time.perf_counter()`.

    `begin` forgets the last prompt and makes one of so many tokens, which is not timed; `prefill` makes the first token after
    it, and `decode` one more.
    """
    # ready means that it answers, as for all that are measured: the first token, too
    begin(8)
    prefill()
    yield {"ready": True, "load_seconds": time.perf_counter() - started}
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "quit":
            return
        count = int(rest[0])
        if what == "prefill":
            begin(count)
            started = time.perf_counter()
            prefill()
        elif what == "decode":
            started = time.perf_counter()
            for _ in range(count):
                decode()
        else:
            raise SystemExit(f"error: {what!r}: expected prefill, decode or quit")
        yield {"what": line.strip(), "seconds": time.perf_counter() - started}


def say(answers: Iterable[dict[str, Any]]) -> None:
    """Print each answer when it is there."""
    for answer in answers:
        print(json.dumps(answer), flush=True)
