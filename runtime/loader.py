"""The graphs of a bundle, loaded where the plan puts them; elsewhere where an engine refuses, answers wrongly or fails.

What was requested by name is never replaced: there a failure is an error. Everything else that happens is an `Event`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lensc.backends import registry
from lensc.backends.base import Probe, Session, Target
from lensc.backends.bundle import Manifest
from lensc.backends.errors import (
    CompatibilityError,
    ExecutionError,
    LensError,
    MemoryLimitError,
    ParityError,
    UnavailableError,
    UsageError,
)

from . import selftest as golden
from . import tuned as kept
from .answered import check_probe
from .conversation import Identity
from .events import Event
from .placement import Found
from .plan import Placement, Plan, Timing, plan, probe_of
from .sequential import fits_at_once
from .trial import Refusal
from .tuned import Settings

SelfTest = Literal["replace", "error", "warn", "off"]
OnFailure = Literal["replan", "error"]


@dataclass(frozen=True)
class Policy:
    """What is done about a graph that cannot be trusted where it is."""

    selftest: SelfTest = "replace"
    """A golden probe fails: take another candidate, where the choice was open and there is one, else an error; an error;
    go on and say so, unless it was never answered, which is as for `replace`; do not run probes at all."""
    on_failure: OnFailure = "replan"
    """A device fails while it loads or answers: take another candidate, where the choice was open and there is one; or an
    error."""

    @classmethod
    def of(cls, selftest: bool | str, on_failure: str) -> Policy:
        """The policy of `lensc.load`'s arguments. Raises UsageError."""
        named = {True: "replace", False: "off"}.get(selftest, selftest) if isinstance(selftest, bool) else selftest
        if named not in get_args(SelfTest):
            raise UsageError(f"selftest={selftest!r}: expected one of {', '.join(get_args(SelfTest))}, True or False")
        if on_failure not in get_args(OnFailure):
            raise UsageError(f"on_failure={on_failure!r}: expected one of {', '.join(get_args(OnFailure))}")
        return cls(named, on_failure)  # type: ignore[arg-type]  # checked above


class Loader:
    """Loads one graph at a time; `plan` and `events` say what came of it."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        probes: Sequence[Probe],
        requested: Mapping[str, Target] | None = None,
        threads: int | None = None,
        policy: Policy | None = None,
        max_memory_bytes: int | None = None,
        found: Found | None = None,
        tuned: bool = True,
    ) -> None:
        """`found`: what is known of candidates; `tuned`: use what `lensc tune` has kept. Raises UnavailableError, ParityError where
        golden probes are to blame, or MemoryLimitError if the plan does not fit.
        """
        found = found or Found()
        self.events: list[Event] = found.events
        self._folder = folder
        self._manifest = manifest
        self._probes = probes
        self._requested = requested
        self._threads = threads
        self._tuned = tuned
        self._settings: dict[tuple[str, Target], Settings] = {}
        """What `lensc tune` found for candidates that were planned."""
        self._policy = policy or Policy()
        self._limit_bytes = max_memory_bytes
        self._timings = {key: o for key, o in found.outcomes.items() if isinstance(o, Timing)}
        out = {key: o for key, o in found.outcomes.items() if isinstance(o, Refusal)}
        wrong = [o.text for o in out.values() if o.kind == "self-test"]
        if wrong and self._policy.selftest == "error":
            raise ParityError(wrong[0])
        replaces = self._policy.selftest == "replace"
        self._refused = {key: o.text for key, o in out.items() if replaces or o.kind == "refused"}
        self._doubtful: set[str] = set()
        """Graphs whose golden probe failed and which serve all the same."""
        try:
            self.plan: Plan = self._planned()
        except UnavailableError as error:
            raise ParityError(str(error)) if wrong else error from None
        self.takes_turns = max_memory_bytes is not None and not fits_at_once(manifest, self.plan, max_memory_bytes)
        """Whether graphs have room one at a time only."""

    def open_all(self) -> dict[str, Session]:
        """Every graph of the plan."""
        sessions: dict[str, Session] = {}
        try:
            for graph in self._manifest.graphs:
                sessions[graph] = self.open(graph)
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        return sessions

    def open(self, graph: str) -> Session:
        """Load a graph where it is planned, and check it; another candidate in its place where the policy says so.

        Raises what the engine raised, ParityError for a golden probe, or UnavailableError once no candidate is left.
        """
        while True:
            placement = self.plan[graph]
            backend = registry.get(placement.effective.backend)
            spec = self._manifest.graphs[graph].spec
            try:
                settings = self.settings(placement)
                session = backend.load(placement.artifact, spec, self._folder, settings.options)
            except (CompatibilityError, UnavailableError, ExecutionError) as error:
                may = self._policy.on_failure == "replan" or not isinstance(error, ExecutionError)
                self._refuse(placement, "refused", error, may)
                continue
            try:
                failure = self._probe_failure(placement, session, settings)
            except BaseException:
                session.close()
                raise
            if failure is None:
                self._doubtful.discard(graph)
                return session
            silent = isinstance(failure, golden.SilentError)  # something is still running in it
            if self._policy.selftest == "warn" and not silent:
                self._doubtful.add(graph)
                self.events.append(
                    Event("self-test", graph, str(placement.effective), f"{failure}; it is used all the same")
                )
                return session
            if not silent:
                with contextlib.suppress(LensError):  # it has failed already
                    session.close()
            self._refuse(placement, "self-test", failure, self._policy.selftest != "error")

    def settings(self, placement: Placement) -> Settings:
        """How a graph runs: as `lensc tune` found best, but with the threads that were asked for."""
        found = self._settings.get((placement.graph, placement.effective), Settings())
        return found if self._threads is None else dataclasses.replace(found, threads=self._threads)

    def give_up(self, graph: str, error: ExecutionError) -> str:
        """A device failed in the middle of an answer: plan the graph elsewhere; return what is to be said about it.

        Raises `error` if the policy forbids that, the target was requested, or no candidate is left.
        """
        return self._refuse(self.plan[graph], "failed", error, self._policy.on_failure == "replan")

    def trusted(self, graph: str) -> bool:
        """Whether a graph was judged on its target when the bundle was built, and has passed its golden probe here."""
        target = str(self.plan[graph].effective)
        judged = any(p.graph == graph and p.target == target and p.passed for p in self._manifest.parity)
        return judged and graph not in self._doubtful

    def identity(self) -> Identity:
        """Whose conversations can be gone on with: the checkpoint's; whose KV caches: those of the same graphs and decoder."""
        decoder = self.plan["decoder"]
        options = hashlib.sha256(json.dumps(decoder.artifact.options, sort_keys=True).encode()).hexdigest()
        graphs = {name: record.sha256[:12] for name, record in self._manifest.graphs.items()}
        made_by = f"decoder {graphs['decoder']} on {decoder.effective} ({options[:8]}) with vision {graphs['vision']}"
        return Identity(self._manifest.provenance.checkpoint_sha256, made_by)

    def _planned(self) -> Plan:
        chosen = plan(self._manifest, self._probes, self._requested, self._refused, self._timings)
        return Plan(tuple(self._with_tuned(p) for p in chosen.placements)) if self._tuned else chosen

    def _with_tuned(self, placement: Placement) -> Placement:
        """`placement`, whose reason says how it was tuned; looked up, and an event, once."""
        graph, target = key = placement.graph, placement.effective
        if key not in self._settings:
            self._settings[key], problem = kept.settings_for(placement.artifact, probe_of(target, self._probes))
            told = self._settings[key]
            if problem or told != Settings():
                text = problem or f"{graph} on {target} runs as lensc tune found best here: {told}"
                self.events.append(Event("tuned", graph, str(target), text))
        if self._settings[key] == Settings():
            return placement
        return dataclasses.replace(placement, reason=f"{placement.reason}; tuned: {self.settings(placement)}")

    def _refuse(
        self, placement: Placement, kind: Literal["refused", "self-test", "failed"], error: LensError, may_replace: bool
    ) -> str:
        """Plan a graph without a candidate that does not work, and say so. Raises `error`, or UnavailableError with what all
        candidates failed of, if nothing takes its place.
        """
        graph, target = placement.graph, placement.effective
        if placement.requested is not None or not may_replace:
            raise error
        self._refused[graph, target] = str(error)
        try:
            chosen = self._planned()
            while problem := self._no_room(chosen):
                self._refused[graph, chosen[graph].effective] = problem
                chosen = self._planned()
        except UnavailableError as nothing_left:
            alone = [g for g, _ in self._refused].count(graph) == 1
            if kind == "failed" or (alone and not isinstance(error, CompatibilityError | UnavailableError)):
                raise error from None
            if kind == "self-test":
                raise ParityError(str(nothing_left)) from error
            raise nothing_left from error
        self.plan = chosen
        text = f"{graph} on {target}: {error}" if str(target) not in str(error) else str(error)
        text += f"; {chosen[graph].effective} takes its place"
        self.events.append(Event(kind, graph, str(target), text))
        return text

    def _no_room(self, chosen: Plan) -> str | None:
        """Why a plan for a graph anew does not fit the memory that is allowed, as the other graphs are loaded."""
        if self._limit_bytes is None:
            return None
        try:
            if fits_at_once(self._manifest, chosen, self._limit_bytes) or self.takes_turns:
                return None
            return "takes more than max_memory beside the other graphs"
        except MemoryLimitError as error:
            return str(error)

    def _probe_failure(self, placement: Placement, session: Session, settings: Settings) -> ParityError | None:
        """What is wrong with a graph by its golden probe, within the policy. What is to be said about a right answer goes into the
        plan's reason.
        """
        if self._policy.selftest == "off":
            return None
        graph, artifact = placement.graph, placement.artifact
        try:
            limit_s = golden.limit_s(artifact, placement.state)
            told = check_probe(self._folder, self._manifest, artifact, session, self._probes, settings.options, limit_s)
        except golden.SilentError as error:
            return golden.SilentError(f"self-test failed: {graph} on {placement.effective}: {error}")
        except ExecutionError as error:
            return ParityError(f"self-test failed: {graph} on {placement.effective}: {error}")
        except ParityError as error:
            return error
        if told and told not in placement.reason:
            said = dataclasses.replace(placement, reason=f"{placement.reason}; {told}")
            self.plan = Plan(tuple(said if p == placement else p for p in self.plan.placements))
        return None
