"""`lensc tune`: the settings with which a bundle is fastest on this machine, searched within a budget and kept."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lensc.backends.errors import StorageError, UnavailableError, UsageError
from lensc.profiles import probe

from . import console

if TYPE_CHECKING:
    from lensc.backends.base import Target
    from lensc.backends.bundle import Manifest
    from lensc.runtime.tune import Found, Trial

BUDGET = "60s"
LEAST_S, MOST_S = 5.0, 86400.0
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
LOCK = ".lock"
BUSY = 0.1
"""Of all processors: where others take more, what is fastest now is not what is fastest then."""


def add_tune(verb: argparse.ArgumentParser) -> None:
    """The arguments of `tune`."""
    verb.add_argument("bundle", metavar="BUNDLE")
    text = "backend:processor[:arch] for all, or vision=TARGET,decoder=TARGET; default: where lensc run would run it"
    verb.add_argument("--device", "--target", metavar="DEVICE", dest="target", help=text)
    text = f"how long to search once the bundle is loaded, e.g. 90s or 5min (default: {BUDGET})"
    verb.add_argument("--budget", metavar="TIME", default=BUDGET, help=text)
    verb.add_argument(
        "--busy", action="store_true", help="keep what was found though others used the machine meanwhile"
    )
    verb.add_argument("--reset", action="store_true", help="forget what was found, and search nothing")


def tune(options: argparse.Namespace) -> int:
    """Search, print each trial, keep the best."""
    import lensc
    from lensc.backends.bundle import load_manifest
    from lensc.runtime import tune as searching
    from lensc.runtime import tuned
    from lensc.runtime.embedding import open_table

    budget_s = _seconds(options.budget)
    folder = Path(options.bundle)
    manifest = load_manifest(folder)
    if options.reset:
        return _reset(options, manifest)
    trials: list[Trial] = []
    with _alone(), console.Progress() as progress:
        progress.show(f"loading {folder}")
        with lensc.load(folder, options.target, tuned=False) as vlm:
            assert vlm.plan is not None
            placements = vlm.plan.placements
        keys = {p.graph: tuned.key_of(p.artifact, _engine(p.effective)) for p in placements}
        notes: list[str] = []
        others = Others()

        def report(trial: Trial) -> None:
            trials.append(trial)
            progress.line("  " + "  ".join(_row(trial)))

        table = open_table(folder, manifest.tables)
        found: list[Found] = []
        with ExitStack() as opened:
            searches = {}
            for placement in placements:
                progress.show(f"timing {placement.graph}")
                search = searching.Search(manifest, folder, placement.artifact, table, budget_s, report)
                searches[placement.graph] = opened.enter_context(search)
            shares = searching.shares({graph: search.default_ms for graph, search in searches.items()})
            for graph in sorted(shares, key=lambda graph: shares[graph]):
                progress.show(f"tuning {graph}")
                found.append(searches[graph].best(shares[graph] * budget_s))
                searches[graph].close()
                share = others.share()
                kept = share <= BUSY or options.busy
                if kept:
                    _keep(keys[graph], found[-1])
        if not kept:
            notes.append(
                f"others took {100 * share:.0f} % of this machine meanwhile, so nothing is kept: run it again when the machine is "
                "idle, or with --busy if it never is"
            )
        if any(search.spent for search in searches.values()):
            notes.append(f"the budget of {options.budget} ended the search; more may be found with more")
    if options.json:
        document = {"bundle": str(folder), "budget_s": budget_s, "kept": kept, "notes": notes}
        document |= {"trials": [dataclasses.asdict(t) for t in trials], "found": [dataclasses.asdict(f) for f in found]}
        console.print_json(document)
    else:
        print(text_of(trials, found, kept))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return 0


def _reset(options: argparse.Namespace, manifest: Manifest) -> int:
    """Forget what was found for the artifacts of a bundle, those of `--device` if that is given."""
    from lensc.backends import registry
    from lensc.runtime import tuned
    from lensc.runtime.plan import parse_devices

    asked = None if options.target is None else parse_devices(options.target, manifest.graphs)
    count = 0
    for artifact in manifest.artifacts:
        known = artifact.target.backend in registry.names()
        if known and (asked is None or asked.get(artifact.graph) == artifact.target):
            count += tuned.drop(tuned.key_of(artifact, _engine(artifact.target)))
    if options.json:
        console.print_json({"bundle": options.bundle, "forgotten": count})
    else:
        print(f"{count} of {len(manifest.artifacts)} artifacts were tuned here; forgotten")
    return 0


def _engine(target: Target) -> str:
    """What the engine says of itself, as it says it to a load."""
    from lensc.backends import registry
    from lensc.runtime.plan import probe_of

    found = probe_of(target, registry.get(target.backend).probe())
    return "" if found is None else found.reason


def _keep(key: dict[str, str], found: Found) -> None:
    """Write what was found, or forget what was there if that is the defaults."""
    from lensc.runtime import tuned

    if found.settings == tuned.Settings():
        tuned.drop(key)
        return
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    tuned.keep(
        tuned.Tuned(
            format=tuned.FORMAT,
            key=key,
            settings=found.settings,
            times=found.times,
            interval=found.interval,
            pairs=found.pairs,
            default_ms=found.default_ms,
            created=created,
        )
    )


def text_of(trials: Sequence[Trial], found: Sequence[Found], kept: bool) -> str:
    """Each trial, and what came of it; `kept`: for later loads."""
    end = "kept for later loads" if kept else "not kept"
    lines = []
    for one in found:
        rows: list[tuple[str, ...]] = [("settings", "times as fast", "interval", "pairs", "", "")]
        rows += [_row(trial) for trial in trials if trial.graph == one.graph]
        lines += [f"{one.graph} on {one.target}: {one.work}, {one.default_ms:.4g} ms with the defaults"]
        lines += [console.table([[console.printable(cell) for cell in row] for row in rows], "  "), ""]
    for one in found:
        low, high = one.interval
        if str(one.settings) == "defaults":
            lines.append(f"{one.graph}: nothing beats the defaults beyond the noise; they are kept")
        elif low > 1:
            times = (
                f"{one.times:.2f} times as fast as the defaults ({low:.2f} to {high:.2f}, {one.pairs} pairs of runs)"
            )
            lines.append(f"{one.graph}: {one.settings}: {times}; {end}")
        else:
            lines.append(f"{one.graph}: {one.settings}: {end}")
    return "\n".join(lines)


def _row(trial: Trial) -> tuple[str, ...]:
    times = "" if trial.times is None else f"{trial.times:.3f}"
    interval = "" if trial.interval is None else f"{trial.interval[0]:.3f} to {trial.interval[1]:.3f}"
    return trial.settings, times, interval, str(trial.pairs or ""), trial.verdict, trial.reason


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)(s|min|h)?", text.strip(), re.ASCII)
    seconds = float(match[1]) * UNITS[match[2] or "s"] if match else 0.0
    if not LEAST_S <= seconds <= MOST_S:
        raise UsageError(f"--budget {text}: expected {LEAST_S:.0f}s to 24h, e.g. 60s or 5min")
    return seconds


class Others:
    """What else the machine does, from when this was made."""

    def __init__(self) -> None:
        self._started, self._busy_s, self._ours_s = time.monotonic(), probe.busy_s(), time.process_time()

    def share(self) -> float:
        """Of all processors, taken by other processes; 0 where the system does not say."""
        busy_s, seconds = probe.busy_s(), time.monotonic() - self._started
        if busy_s is None or self._busy_s is None:
            return 0.0
        others_s = busy_s - self._busy_s - (time.process_time() - self._ours_s)
        return max(0.0, others_s / (seconds * (os.cpu_count() or 1)))


@contextmanager
def _alone() -> Iterator[None]:
    """Keep the folder of what is found to ourselves. Raises StorageError if it cannot be written, UnavailableError if another
    process tunes on this machine: each would measure the other.
    """
    from lensc.runtime import tuned

    folder = tuned.folder()
    if folder is None:
        raise StorageError("there is no home folder to keep what is found in; set XDG_DATA_HOME")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115  (open as long as it is held)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written: {error.strerror or error}; set XDG_DATA_HOME to another folder"
        ) from error
    with lock:
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UnavailableError(
                "another lensc tune runs on this machine, and each would measure the other; wait until it has ended"
            ) from None
        yield
