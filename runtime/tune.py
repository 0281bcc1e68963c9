"""Searches the settings with which a graph of a bundle is fastest on this machine.

What is timed is a graph's part of a request (`tune_work`): for vision one slice of whole size, for the decoder a prompt and an
answer, reckoned from a prefill and steps as long as the budget has room for.

The search goes along one coordinate at a time (tokens fed at once, threads, each setting of the engine), from the settings that
are best so far, and round again while something was gained. Numbers are climbed from where they stand, first down, then up;
of words each is tried. A candidate is loaded beside the incumbent and both are run in turn, in pairs whose order alternates:
what else the machine does hits both. The figure is the median of the pairs' ratios, its interval two standard errors of a median
to either side, by the median deviation, and at least `LEAST_ERROR`. Pairs end after `LEAST_PAIRS` if the interval lies below `GAIN`
(nothing gained), after `SOME_PAIRS` if it lies above (the candidate is the new incumbent) or its median below, else after
`MOST_PAIRS`, or when time is up.

Of many candidates some look better by luck. So at the end the best are run beside the defaults once more, in pairs of their
own, and are kept only if their interval is above `GAIN` again.

A candidate that computes something else than the defaults, by its golden probes or by the outputs of the work itself, is
refused: the tolerance is that of the probes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Literal, Self

import numpy as np

from lensc.backends import registry
from lensc.backends.base import Array, Artifact, Session, TunableBackend
from lensc.backends.bundle import Manifest
from lensc.backends.errors import LensError, ParityError
from lensc.backends.load_options import PREFILL_CHUNK, Choices
from lensc.profiles import probe

from . import selftest
from .embedding import EmbeddingTable
from .speculation import GAIN as GUESS_GAIN
from .speculation import MOST_DRAFTED, SIZES
from .tune_work import PROMPT_SLICES, DecoderWork, VisionWork
from .tuned import Settings

GAIN = 1.01
LEAST_ERROR = 0.002
LEAST_PAIRS, SOME_PAIRS, MOST_PAIRS, LAST_PAIRS = 3, 5, 12, 8
ROUNDS = 3
RESERVE = 0.25
"""The share of the budget that is left for the comparison at the end."""
CHECKING = 4
"""Runs that a candidate takes before its pairs: golden probes, its outputs, the first of both."""
LOADED = 1.2
"""Times the bytes of an artifact's files: the memory that a session takes."""
RIGHT = 0.95
"""How often guesses are right where text is copied, which is where most pay. Where fewer are right, an answer takes fewer by
itself (`speculation`): a smaller limit would only stand in its way."""

Verdict = Literal["kept", "no gain", "refused", "not tried"]


@dataclass(frozen=True)
class Trial:
    """One candidate. `times`: how many times as fast as what it was run beside; None where it was not."""

    graph: str
    settings: str
    verdict: Verdict
    times: float | None = None
    interval: tuple[float, float] | None = None
    pairs: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Found:
    """The best settings of a graph, and what they brought beside the defaults; `settings` are the defaults if nothing did."""

    graph: str
    target: str
    settings: Settings
    default_ms: float
    times: float
    interval: tuple[float, float]
    pairs: int
    work: str


class Clock:
    """A budget."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.seconds = seconds

    def left_s(self) -> float:
        """Until it is spent; negative afterwards."""
        return self._end - time.monotonic()


class Search:
    """The search for one graph. Use it as a context manager, which closes what it has loaded."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        artifact: Artifact,
        table: EmbeddingTable,
        budget_s: float,
        report: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        """Loads the graph with its defaults and times it; runs are as long as `budget_s` in all has room for.

        Raises what `Backend.load` does, and ParityError.
        """
        self._manifest, self._folder, self._artifact = manifest, folder, artifact
        self._graph = artifact.graph
        self._report = report
        self._backend = registry.get(artifact.target.backend)
        self.choices: Choices = self._backend.choices(artifact) if isinstance(self._backend, TunableBackend) else {}
        self._tolerance = _tolerance(manifest, artifact)
        self._loaded: dict[tuple[int | None, tuple[tuple[str, str], ...]], Session] = {}
        self._load_s = 0.0
        self._clock = Clock(0.0)
        self._tried = [Settings()]
        """What is behind: an incumbent is only ever followed by a faster one."""
        self.spent = False
        """Whether the budget ended the search."""
        try:
            first = self._session(Settings())
            vision = self._graph == "vision"
            self._work = VisionWork(manifest) if vision else DecoderWork(manifest, table, first, budget_s)
            self._expected = self._run(Settings())[1]
            started = time.monotonic()
            self.default_ms, _ = self._run(Settings())
            self._run_s = time.monotonic() - started
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all sessions."""
        for session in self._loaded.values():
            session.close()
        self._loaded.clear()

    def best(self, seconds: float) -> Found:
        """Search until nothing is gained or so much time is spent."""
        best, self._clock = Settings(), Clock(seconds)
        for _ in range(ROUNDS):
            before = best
            for name, values in self._coordinates().items():
                best = self._along(best, name, values)
            if best == before:
                break
        found = self._confirmed(best)
        drafted = None if self._graph == "vision" else self._drafted(found.settings)
        return replace(found, settings=replace(found.settings, drafted=drafted))

    def _coordinates(self) -> dict[str, Sequence[str]]:
        """What is searched, and the values, those of numbers in order."""
        found: dict[str, Sequence[str]] = {}
        for name, values in self.choices.items():
            found[name] = sorted(values, key=int) if all(value.isdigit() for value in values) else list(values)
        if isinstance(self._work, DecoderWork) and PREFILL_CHUNK in found:
            prompt, usual = self._work.prompt, int(self.choices[PREFILL_CHUNK][0])
            found[PREFILL_CHUNK] = [v for v in found[PREFILL_CHUNK] if int(v) < prompt or int(v) == usual]
        if self._artifact.target.processor == "cpu":
            found["threads"] = _thread_counts()
        return found

    def _along(self, best: Settings, name: str, values: Sequence[str]) -> Settings:
        """The best of `best` with other values of one coordinate."""
        now = self._value(best, name)
        if not all(value.isdigit() for value in values):
            for value in values:
                if value != now and self._is_better(best, changed := self._with(best, name, value)):
                    best, now = changed, value
            return best
        for step in (-1, 1):
            at, climbed = values.index(now), False
            while 0 <= at + step < len(values):
                changed = self._with(best, name, values[at + step])
                if not self._is_better(best, changed):
                    break
                best, at, climbed = changed, at + step, True
            if climbed:
                break
        return best

    def _value(self, settings: Settings, name: str) -> str:
        if name == "threads":
            return str(settings.threads or probe.machine().cores)
        return settings.engine.get(name, self.choices[name][0])

    def _with(self, settings: Settings, name: str, value: str) -> Settings:
        """`settings` with another value; a default is not named."""
        if name == "threads":
            return replace(settings, threads=None if int(value) == probe.machine().cores else int(value))
        engine = {**settings.engine, name: value}
        return replace(settings, engine={n: v for n, v in engine.items() if v != self.choices[n][0]})

    def _is_better(self, incumbent: Settings, candidate: Settings) -> bool:
        """Whether a candidate is faster beyond noise; says what came of it."""
        if self.spent or candidate in self._tried:
            return False
        made = partial(Trial, self._graph, str(candidate))
        left_s = self._clock.left_s() - RESERVE * self._clock.seconds
        if self._load_s + (2 * LEAST_PAIRS + CHECKING) * self._run_s > left_s:
            self._report(made("not tried", reason="the budget is spent"))
            self.spent = True
            return False
        self._tried.append(candidate)
        missing = self._no_room(candidate)
        if missing:
            self._report(made("not tried", reason=missing))
            return False
        try:
            self._check(candidate)
            ratios = list(self._pairs(incumbent, candidate, MOST_PAIRS, left_s))
        except LensError as error:
            self._report(made("refused", reason=str(error)))
            return False
        interval = interval_of(ratios)
        verdict: Verdict = "kept" if interval[0] > GAIN else "no gain"
        self._report(made(verdict, median(ratios), interval, len(ratios)))
        self._release({self._key(Settings()), self._key(candidate if verdict == "kept" else incumbent)})
        return verdict == "kept"

    def _confirmed(self, best: Settings) -> Found:
        """The best beside the defaults once more; the defaults where that does not hold."""
        found = partial(
            Found, self._graph, str(self._artifact.target), default_ms=self.default_ms, work=self._work.text
        )
        if best == Settings():
            return found(best, times=1.0, interval=(1.0, 1.0), pairs=0)
        try:
            ratios = list(self._pairs(Settings(), best, LAST_PAIRS, self._clock.left_s(), to_the_end=True))
        except LensError as error:
            self._report(Trial(self._graph, str(best), "refused", reason=str(error)))
            return found(Settings(), times=1.0, interval=(1.0, 1.0), pairs=0)
        interval = interval_of(ratios)
        kept = interval[0] > GAIN
        reason = "beside the defaults, once more" if kept else "beside the defaults, once more: it was luck"
        verdict: Verdict = "kept" if kept else "no gain"
        self._report(Trial(self._graph, str(best), verdict, median(ratios), interval, len(ratios), reason))
        return found(best if kept else Settings(), times=median(ratios), interval=interval, pairs=len(ratios))

    def _drafted(self, settings: Settings) -> int | None:
        """How many tokens to guess at most; None for the default. Reckoned: what a step of n tokens takes, and how many it
        brings on text that repeats itself.
        """
        assert isinstance(self._work, DecoderWork)
        session = self._session(settings)
        try:
            ratios = self._work.step_ratios(session, max(0.0, self._clock.left_s()))
        except LensError as error:
            self._report(Trial(self._graph, "draft", "refused", reason=str(error)))
            return None
        if ratios is None:
            self._report(
                Trial(self._graph, "draft", "not tried", reason="no room in the context, or the budget is spent")
            )
            return None
        brings = {size: (1 - RIGHT**size) / (1 - RIGHT) for size in SIZES}
        times = {size: [brings[size] / ratio for ratio in of_size] for size, of_size in ratios.items()}
        usual = MOST_DRAFTED + 1
        best = max(times, key=lambda size: median(times[size]))
        if all(interval_of(of_size)[1] < GUESS_GAIN for of_size in times.values()):
            best = 1
        elif interval_of([a / b for a, b in zip(times[best], times[usual], strict=True)])[0] < GAIN:
            best = usual
        for size, of_size in times.items():
            verdict: Verdict = "kept" if size == best else "no gain"
            reason = (
                f"reckoned: {size} tokens take {median(ratios[size]):.2f} of one, {100 * RIGHT:.0f} % of guesses right"
            )
            made = Trial(self._graph, f"draft {size - 1}", verdict, median(of_size), interval_of(of_size), len(of_size))
            self._report(replace(made, reason=reason))
        return None if best == usual else best - 1

    # --- running ------------------------------------------------------------------------------------------------------

    def _pairs(
        self, one: Settings, other: Settings, most: int, limit_s: float, to_the_end: bool = False
    ) -> Iterator[float]:
        """Times of `one` over times of `other`, until they say enough."""
        started = time.monotonic()
        ratios: list[float] = []
        self._run(one), self._run(other)
        while len(ratios) < most and (len(ratios) < LEAST_PAIRS or time.monotonic() - started < limit_s):
            order = (one, other) if len(ratios) % 2 else (other, one)
            times = {id(settings): self._run(settings)[0] for settings in order}
            ratios.append(times[id(one)] / times[id(other)])
            yield ratios[-1]
            low, high = interval_of(ratios)
            clear = len(ratios) >= SOME_PAIRS and (low > GAIN or median(ratios) < GAIN)
            if not to_the_end and (clear or (len(ratios) >= LEAST_PAIRS and high < GAIN)):
                return

    def _run(self, settings: Settings) -> tuple[float, Array]:
        chunk = settings.engine.get(PREFILL_CHUNK)
        return self._work.run(self._session(settings), None if chunk is None else int(chunk))

    def _check(self, candidate: Settings) -> None:
        """Raise ParityError if a candidate computes something else than the defaults."""
        session = self._session(candidate)
        results = selftest.run_selftest(
            self._manifest.probes, {self._graph: session}, self._folder, {self._graph: self._tolerance}
        )
        selftest.check(results, {self._graph: f"{self._artifact.target} with {candidate}"})
        difference = float(np.max(np.abs(self._run(candidate)[1].astype(np.float64) - self._expected)))
        if not difference <= self._tolerance:
            raise ParityError(f"outputs differ by {difference:.3g}, tolerance {self._tolerance:.3g}")

    def _session(self, settings: Settings) -> Session:
        """The session of `settings`, loaded if it is not. How a prompt is cut needs none of its own."""
        key = self._key(settings)
        if key not in self._loaded:
            engine = {name: value for name, value in settings.engine.items() if name != PREFILL_CHUNK}
            started = time.monotonic()
            spec = self._manifest.graphs[self._graph].spec
            options = replace(settings, engine=engine).options
            self._loaded[key] = self._backend.load(self._artifact, spec, self._folder, options)
            self._load_s = time.monotonic() - started
        return self._loaded[key]

    def _key(self, settings: Settings) -> tuple[int | None, tuple[tuple[str, str], ...]]:
        return settings.threads, tuple(sorted((n, v) for n, v in settings.engine.items() if n != PREFILL_CHUNK))

    def _release(self, keep: set[tuple[int | None, tuple[tuple[str, str], ...]]]) -> None:
        """Close the sessions that are not needed any more."""
        for key in [key for key in self._loaded if key not in keep]:
            self._loaded.pop(key).close()

    def _no_room(self, candidate: Settings) -> str:
        """Why one more session does not fit into memory, or nothing."""
        if self._key(candidate) in self._loaded or self._artifact.target.processor != "cpu":
            return ""
        needed = LOADED * sum(record.bytes for record in self._artifact.files)
        available = probe.free_memory()[0]
        if available is None or needed < available:
            return ""
        return f"one more session takes about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"


def interval_of(ratios: Sequence[float]) -> tuple[float, float]:
    """Two standard errors to either side of the median, which are 1.2533 · 1.4826 · MAD / √n for normal noise."""
    middle = median(ratios)
    deviation = median(abs(ratio - middle) for ratio in ratios)
    error = max(2 * 1.2533 * 1.4826 * deviation / len(ratios) ** 0.5, LEAST_ERROR)
    return middle - error, middle + error


def _thread_counts() -> list[str]:
    """Numbers of threads to try, in order: all of few, halves and quarters of many."""
    machine = probe.machine()
    cores, threads = machine.cores, machine.threads
    if threads <= 4:
        return [str(n) for n in range(1, threads + 1)]
    counts = {1, cores // 4, cores // 2, 3 * cores // 4, cores - 1, cores, threads}
    return [str(n) for n in sorted(counts) if n]


def _tolerance(manifest: Manifest, artifact: Artifact) -> float:
    """How far off outputs may be: what the golden probe of the artifact may show."""
    if own := selftest.tolerances_of(artifact):
        return own[artifact.graph]
    tolerances = [p.tolerance for p in manifest.probes if p.graph == artifact.graph]
    if not tolerances:
        raise ParityError(
            f"no golden probe of {artifact.graph}: what a setting changes cannot be judged; build it again"
        )
    return min(tolerances)


def shares(default_ms: Mapping[str, float]) -> dict[str, float]:
    """The share of the budget of each graph: as of a request of ten slices, but at least a quarter of an equal one."""
    times = {graph: ms * (PROMPT_SLICES if graph == "vision" else 1) for graph, ms in default_ms.items()}
    floor = 0.25 / len(times)
    total = sum(times.values())
    return {graph: floor + (1 - floor * len(times)) * ms / total for graph, ms in times.items()}
