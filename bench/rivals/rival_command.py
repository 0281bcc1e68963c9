"""What the scripts of all rivals have: the verbs `build` and `serve`, and answers as lines of JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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


def say(answers: Iterable[dict[str, Any]]) -> None:
    """Print each answer when it is there."""
    for answer in answers:
        print(json.dumps(answer), flush=True)
