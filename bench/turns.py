"""Contenders that take turns, the rows that this makes, and how such a benchmark ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from lensc.backends.bundle import load_manifest
from lensc.backends.errors import LensError, StorageError, UnsupportedError
from lensc.contender import Contender

from . import record

Starts = Mapping[str, Callable[[], Contender]]
"""How to start each contender, `ours` among them."""


def in_turn(
    contenders: Mapping[str, Contender], asked: Sequence[tuple[str, str]], repeat: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by who, and by what a line is asked for; everybody answers a line before the next one is asked."""
    took: dict[str, dict[str, list[float]]] = {who: {what: [] for what, _ in asked} for who in contenders}
    for _ in range(repeat):
        for what, line in asked:
            for who, contender in contenders.items():
                took[who][what].append(contender.seconds(line))
    return took


def loads(starts: Starts, files: Mapping[str, Sequence[Path]], repeat: int) -> dict[str, list[float]]:
    """Seconds until each is ready, with its `files` in the page cache."""
    took: dict[str, list[float]] = {who: [] for who in starts}
    for _ in range(repeat):
        for who, start in starts.items():
            into_page_cache(files[who])
            with start() as contender:
                took[who].append(contender.load_s)
    return took


def compared(
    what: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    rival: str,
    limit: float | None = None,
) -> record.Row:
    """The row of what both reached in turn."""
    up = unit in record.HIGHER_IS_BETTER
    ratios = [a / b if up else b / a for a, b in zip(ours, theirs, strict=True)]
    several = len(ours) > 1
    return record.Row(
        what,
        unit,
        median(ours),
        (min(ours), max(ours)) if several else None,
        rival=rival,
        rival_value=median(theirs),
        rival_spread=(min(theirs), max(theirs)) if several else None,
        pair_ratio=median(ratios) if several and unit != "dB" else None,
        ratio_spread=(min(ratios), max(ratios)) if several else None,
        limit=limit,
        parity="pass",
    )


def into_page_cache(files: Sequence[Path]) -> None:
    """Read `files` once, so that loading them is not reading the disk."""
    piece = bytearray(16 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def files_of(bundle: Path, graph: str, target: str) -> list[Path]:
    """Those of a bundle that the engine opens for a graph. Raises UnsupportedError if it has none for the target."""
    found = (a for a in load_manifest(bundle).artifacts if a.graph == graph and str(a.target) == target)
    artifact = next(found, None)
    if artifact is None:
        raise UnsupportedError(f"{bundle}: no {graph} for {target}; build it with --target {target}")
    return [bundle / file.path for file in artifact.files]


@contextmanager
def told_errors() -> Iterator[None]:
    """End the process with one line for what goes wrong inside, and with its exit code."""
    try:
        yield
    except OSError as error:
        print(f"error: {StorageError(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        sys.exit(1)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def show(section: str, rows: Sequence[record.Row], reach: Mapping[str, float]) -> None:
    """Print a section."""
    print(f"\n{section}: " + ", ".join(f"{name} {value:.0f}" for name, value in reach.items()))
    for row in rows:
        value = f"{row.what:48} {row.lensc:8.3f} {row.unit}"
        if row.ratio is not None and row.rival_value is not None:
            spread = f" ({row.ratio_spread[0]:.2f} to {row.ratio_spread[1]:.2f})" if row.ratio_spread else ""
            value += f"   {row.ratio:.2f}x of {row.rival}: {row.rival_value:.3f}{spread}"
        if row.of_limit is not None:
            value += f"   {row.of_limit:.2f} of the limit {row.limit:.3g}"
        print(value, flush=True)
