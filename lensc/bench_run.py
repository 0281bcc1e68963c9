"""How requests are measured on several placements side by side: in turn, each in a process of its own.

A repetition asks every process for every request before the next one begins, and who comes first changes, so that what else the
machine does meets all alike and ratios of one repetition mean something. Where all of them together have no room in memory they
are measured one after the other, which the record says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lensc.backends.base import sha256_file
from lensc.backends.bundle import MANIFEST, Manifest
from lensc.backends.errors import ExecutionError, LensError, ParityError, PictureError, UnavailableError, UsageError
from lensc.export import memory
from lensc.profiles import measure as rates
from lensc.profiles import probe
from lensc.profiles.profile import Figure as Known
from lensc.profiles.profile import Processor
from lensc.runtime.measure import Measured, Values, Work, prompt_of, summed_up
from lensc.runtime.picture import SlicePlan, open_picture, plan_slices
from lensc.runtime.plan import answers, parse_devices
from lensc.runtime.prompt import Tokenizer
from lensc.runtime.result import Metrics
from lensc.runtime.roofline import Model, Request, Stored, limits, predict

from . import measured, planning
from .bench_record import BundleId, Figure, Image, Placed, Row
from .contender import Contender

Report = Callable[[str, tuple[int, int] | None], None]

LEAST_PROBE_BYTES, PROBE_BYTES = 16 << 20, 1 << 30
"""What is read to see how fast the machine reads: enough that starting threads does not count, and at most several times what
the largest cache of a server's share holds.
"""
PROBE_S = 0.5
"""How long each of its rates is tried, at least once."""
CACHED_BYTES = 256 << 20
"""Weights of fewer bytes may lie in a cache, which is faster than the memory that a profile describes."""
BESIDE_BYTES = 300 << 20
"""What a process takes beside its artifacts' files."""


# --- what is asked ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request: a picture by name, its slices' patches, tokens of text and of answer, and how long the prompt is."""

    image: str
    patches: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    prompt_tokens: int


def cases_of(
    manifest: Manifest, folder: Path, images: Sequence[str], prompts: Sequence[int], answers: Sequence[int]
) -> tuple[Case, ...]:
    """Every picture with every length of prompt and answer. Raises PictureError, and UsageError for what the model's
    context has no room for: nothing is loaded for a request that cannot be answered.
    """
    spec, tokenizer = manifest.model, Tokenizer.from_file(folder / manifest.tokenizer)
    found = []
    for name in images:
        plan = cut(name, manifest)
        patches = () if plan is None else plan.patches(spec.picture.patch_size)
        for text in prompts:
            for new in answers:
                prompt = prompt_of(plan, tokenizer, spec, Work(text, new))
                found.append(Case(name, patches, text, new, len(prompt.ids)))
    return tuple(found)


def cut(name: str, manifest: Manifest) -> SlicePlan | None:
    """How the picture called `name` is cut; None for none. Raises PictureError."""
    spec = manifest.model.picture
    if name == measured.NO_PICTURE:
        return None
    if (size := measured.size_of(name)) is not None:
        return plan_slices(*size, spec, name)
    picture = open_picture(name)
    return plan_slices(*picture.size, spec, picture.name)


def image_of(name: str) -> Image:
    """A picture as a record holds it: a file with its path in full and its hash. Raises PictureError."""
    if name == measured.NO_PICTURE or measured.size_of(name) is not None:
        return Image(name)
    path = Path(name).resolve()
    try:
        return Image(str(path), sha256_file(path))
    except OSError as error:
        raise PictureError(f"{name}: cannot be read: {error.strerror}") from error


def bundle_id(folder: Path, manifest: Manifest) -> BundleId:
    """Which bundle `folder` is. Raises OSError."""
    made = manifest.provenance
    digest = sha256_file(folder / MANIFEST)
    return BundleId(str(folder.resolve()), manifest.model.name, made.scheme, made.checkpoint_sha256, digest)


def devices_of(manifest: Manifest) -> list[str]:
    """Every target of a bundle as `--device` names it. One that not all graphs were compiled for says which it is for."""
    targets = dict.fromkeys(str(a.target) for a in manifest.artifacts)
    found = []
    for target in targets:
        graphs = [a.graph for a in manifest.artifacts if str(a.target) == target]
        whole = set(graphs) == set(manifest.graphs)
        found.append(target if whole else ",".join(f"{graph}={target}" for graph in graphs))
    return found


def check_device(device: str, manifest: Manifest, folder: Path) -> None:
    """Raise UsageError for a device that is none, or that the bundle was not built for."""
    for graph, wanted in parse_devices(device, manifest.graphs).items():
        built = [a.target for a in manifest.artifacts if a.graph == graph]
        if not any(answers(target, wanted) for target in built):
            known = ", ".join(sorted(map(str, built))) or "no target"
            raise UsageError(f"--device {device}: {folder} has {graph} for {known}, not for {wanted}")


# --- who is asked -------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A bundle on a device, in a process while it is measured. `failed` says why it gives no figures."""

    bundle: Path
    manifest: Manifest
    device: str
    threads: int | None = None
    tuned: bool = True
    contender: Contender | None = None
    plan: tuple[Placed, ...] = ()
    load_ms: float | None = None
    failed: str = ""
    skipped: bool = False
    runs: dict[Case, list[Metrics]] = field(default_factory=dict)
    peaks: dict[Case | None, int | None] = field(default_factory=dict)
    """The largest resident size of its process: while it was loaded (None), and in each case."""

    def start(self, stack: ExitStack, lenient: bool) -> None:
        """Load it. What computes something else, or crashes, is remembered as `failed`; so is what cannot run here if that
        is allowed (`lenient`). Raises LensError otherwise.
        """
        try:
            contender = measured.start(
                self.device or "lensc", self.bundle, self.device or None, self.threads, self.tuned
            )
        except LensError as error:
            wrong = isinstance(error, ParityError | ExecutionError)
            if not (wrong or lenient):
                raise
            self.failed, self.skipped = str(error), not wrong
            return
        self.contender = stack.enter_context(contender)
        self.plan = tuple(Placed(**placed) for placed in contender.ready["plan"])
        self.load_ms, self.peaks[None] = contender.load_s * 1e3, contender.ready["peak_bytes"]

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What its process answers. Raises LensError, and remembers it as `failed`."""
        assert self.contender is not None
        try:
            return self.contender.ask(json.dumps(question))
        except LensError as error:
            self.failed = str(error)
            raise

    def run(self, case: Case, prompt_lookup_num_tokens: int) -> Metrics:
        """Do the work of `case` once. Slices are encoded once only where that is an emulation, which is no time."""
        emulates = any(p.graph == "vision" and p.state == "emulated" for p in self.plan)
        answer = self.ask(
            {
                "picture": case.image,
                "prompt_tokens": case.text_tokens,
                "new_tokens": case.new_tokens,
                "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
                "keep": "pictures" if emulates else "nothing",
            }
        )
        self.peaks[case] = max(self.peaks.get(case) or 0, answer["peak_bytes"] or 0) or None
        return metrics_of(answer)

    def peak_bytes(self, case: Case) -> int | None:
        """Of its process, loading it and in a case; None where the system does not tell."""
        found = [peak for peak in (self.peaks.get(None), self.peaks.get(case)) if peak is not None]
        return max(found, default=None)


def metrics_of(answer: Mapping[str, Any]) -> Metrics:
    """The `Metrics` in an answer, which JSON has made lists of."""
    told: dict[str, Any] = answer["metrics"]
    told.pop("events", None)  # there are none: what fails is an error here
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return Metrics(**values)


def needed_bytes(subject: Subject) -> int:
    """About what loading takes: the artifacts' files, and what is beside them."""
    wanted = parse_devices(subject.device, subject.manifest.graphs) if subject.device else {}
    total = BESIDE_BYTES
    for graph in subject.manifest.graphs:
        sizes = [
            sum(file.bytes for file in a.files)
            for a in subject.manifest.artifacts
            if a.graph == graph and (graph not in wanted or answers(a.target, wanted[graph]))
        ]
        total += max(sizes, default=0)
    return total


def measure(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    repetitions: int,
    warmup: int,
    prompt_lookup_num_tokens: int,
    report: Report,
    lenient: bool,
    afterwards: Callable[[Subject], None] = lambda subject: None,
) -> bool:
    """Fill in the `runs` of the subjects; return whether they took turns. `afterwards` may ask each for more, while its
    process is there.

    Raises LensError for one that cannot be loaded and was asked for by name (not `lenient`).
    """
    in_turn = len(subjects) == 1 or sum(map(needed_bytes, subjects)) <= _available_bytes()
    total = (warmup + repetitions) * len(cases) * len(subjects)
    done = 0
    for group in [subjects] if in_turn else [[subject] for subject in subjects]:
        with started(group, report, lenient):
            for number in range(warmup + repetitions):
                for case in cases:
                    for subject in group if number % 2 == 0 else group[::-1]:
                        done += 1
                        if subject.failed:
                            continue
                        report(_doing(subject, case, number - warmup + 1, repetitions), (done, total))
                        try:
                            run = subject.run(case, prompt_lookup_num_tokens)
                        except LensError:
                            continue
                        if number >= warmup:
                            subject.runs.setdefault(case, []).append(run)
            for subject in group:
                if not subject.failed:
                    afterwards(subject)
    return in_turn


@contextmanager
def started(subjects: Sequence[Subject], report: Report, lenient: bool) -> Iterator[None]:
    """Their processes, for as long as they are asked."""
    with ExitStack() as stack:
        for subject in subjects:
            report(f"loading {subject.bundle.name} on {subject.device or 'the best usable device'}", None)
            subject.start(stack, lenient)
        yield


def _available_bytes() -> int:
    try:
        return memory.available_bytes()
    except UnavailableError:
        return 0


def _doing(subject: Subject, case: Case, run: int, of: int) -> str:
    which = f"run {run} of {of}" if run > 0 else "warm-up"
    return f"{subject.device or subject.bundle.name}: {case.prompt_tokens} tokens, {case.new_tokens} new, {which}"


# --- what could be reached ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """The machine's limits for a bundle's model, by kind of processor, and its profile if it has one."""

    model: Model
    stored: Stored
    cpu: Processor
    profile: Mapping[str, Processor]

    def known(self) -> dict[str, Known]:
        """The figures that limits are made of."""
        found = {}
        for processor in self._limiting().values():
            if processor.bandwidth_gb_s is not None:
                found[f"{processor.kind} bandwidth_gb_s"] = processor.bandwidth_gb_s
            found |= {f"{processor.kind} peak_tops.{name}": peak for name, peak in processor.peak_tops.items()}
        return found

    def of(self, case: Case, plan: Sequence[Placed]) -> tuple[dict[str, float], dict[str, float]]:
        """Limits, and predictions, of a case by name of the figure."""
        spent = len(case.patches) * (self.model.queries + 2)
        request = Request(case.patches, case.prompt_tokens - spent, case.prompt_tokens + case.new_tokens)
        kinds = {placed.graph: placed.target.split(":")[1] for placed in plan}
        limiting = self._limiting()
        most: dict[str, float | None] = {}
        expected: dict[str, float | None] = {}
        vision, decoder = kinds.get("vision", ""), kinds.get("decoder", "")
        if vision in limiting:
            most["image_ms"] = limits(self.model, self.stored, limiting[vision], request).image_ms
        if decoder in limiting:
            found = limits(self.model, self.stored, limiting[decoder], request)
            most |= {"prefill_tokens_s": found.prefill_tokens_s, "decode_tokens_s": found.decode_tokens_s}
        if vision in self.profile and case.patches:
            expected["image_ms"] = predict(self.model, self.stored, self.profile[vision], request).image_ms
        if decoder in self.profile:
            foreseen = predict(self.model, self.stored, self.profile[decoder], request)
            expected |= {"prefill_tokens_s": foreseen.prefill_tokens_s, "decode_tokens_s": foreseen.decode_tokens_s}
            image = expected.get("image_ms", None if case.patches else 0.0)
            if foreseen.ttft_ms is not None and foreseen.image_ms is not None and image is not None:
                expected["ttft_ms"] = foreseen.ttft_ms - foreseen.image_ms + image
        return _present(most), _present(expected)

    def _limiting(self) -> dict[str, Processor]:
        found = {kind: processor for kind, processor in self.profile.items() if processor.bandwidth_gb_s is not None}
        cpu = found.get("cpu", self.cpu)
        if self.stored.decoder_bytes(self.model) < CACHED_BYTES:
            cpu = replace(cpu, bandwidth_gb_s=self.cpu.bandwidth_gb_s)
        return found | {"cpu": cpu}


def _present(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value}


def _probe_bytes(read_by_a_token: int) -> int:
    return min(PROBE_BYTES, max(LEAST_PROBE_BYTES, read_by_a_token)) // 8 * 8


def probed(bundle: Path, threads: int) -> dict[str, float]:
    """What the machine reaches right now: it reads as many bytes as a token of the model does, 16 MiB to 1 GiB, and multiplies
    in registers. About two seconds.
    """
    import numpy as np

    model, (stored,), _, _ = planning.model_of(str(bundle), [])
    nbytes = _probe_bytes(stored.decoder_bytes(model))
    data = rates.random_bytes(nbytes).view(np.int64)
    ways = (0, *(rates.STREAMS if rates.kernels() else ()))
    found = {"bandwidth_gb_s": _best(lambda: max(rates.read_gb_s(data, threads, streams) for streams in ways))}
    for product in ("int8", "float32"):
        if reached := _best(partial(rates.product_gop_s, product, threads)):
            found[f"{product}_tops"] = reached / 1e3
    return found


def _best(rate: Callable[[], float | None]) -> float:
    """The best of some tries: what else the machine does must not look like a limit."""
    until = time.perf_counter() + PROBE_S
    best = rate() or 0.0
    while best and time.perf_counter() < until:
        best = max(best, rate() or 0.0)
    return best


def roof_of(
    bundle: Path, threads: int, reached: Mapping[str, tuple[float, float]], profile: Mapping[str, Processor]
) -> Roof:
    """The limits that `reached` before and after says, and those of a profile where it goes further."""
    model, (stored,), _, _ = planning.model_of(str(bundle), [])
    nbytes = _probe_bytes(stored.decoder_bytes(model))
    with_threads = f"{threads} thread{'s' * (threads > 1)}, in this run"
    how = {"bandwidth_gb_s": f"a read of {nbytes >> 20} MiB again and again, {with_threads}"}
    best = {
        name: Known(
            float(f"{max(pair):.4g}"), "measured", how.get(name, f"multiplications in registers, {with_threads}")
        )
        for name, pair in reached.items()
    }
    (cpu,) = probe.device_profile(probe.machine()).processors
    peaks = {name.removesuffix("_tops"): value for name, value in best.items() if name.endswith("_tops")}
    cpu = replace(cpu, bandwidth_gb_s=best["bandwidth_gb_s"], peak_tops=peaks)
    return Roof(model, stored, cpu, profile)


def profile_of(name: str, threads: int) -> dict[str, Processor]:
    """The processors of the profile `name` by their kind; of this machine's own, which `lensc profile` writes, if that is
    empty and there is one. A CPU that was measured with another number of threads is left out. Raises UsageError.
    """
    try:
        device = planning.device_of(name or rates.HERE)
    except UsageError:
        if name:
            raise
        return {}
    if device.name == rates.HERE and device.title != probe.machine().cpu:
        return {}  # a home folder that moved
    found: dict[str, Processor] = {}
    for processor in device.processors:
        if processor.kind == "cpu" and processor.by_threads:
            at = next((of for of in processor.by_threads if of.threads == threads), None)
            if at is None or at is not processor.by_threads[-1]:
                continue
        found[processor.kind] = processor
    return found


# --- rows ---------------------------------------------------------------------------------------------------------


def row_of(subject: Subject, case: Case, roof: Roof) -> Row:
    """What was measured of a case, emulated parts left out."""
    runs = subject.runs.get(case, [])
    failed = subject.failed
    found = summed_up(runs) if runs and not failed else None
    row = Row(
        device=subject.device,
        plan=subject.plan,
        image=case.image,
        slices=len(case.patches),
        prompt_tokens=case.prompt_tokens,
        text_tokens=case.text_tokens,
        new_tokens=case.new_tokens,
        load_ms=subject.load_ms,
        figures={},
        failed=failed,
        skipped=subject.skipped,
        notes=() if found is None else found.notes,
    )
    if found is None:
        return row
    most, expected = roof.of(case, subject.plan)
    figures = {
        name: Figure(values.values, most.get(name), expected.get(name))
        for name, values in _figures(found, subject.peak_bytes(case), set(row.emulated)).items()
    }
    return replace(row, figures=figures)


def _figures(found: Measured, peak_bytes: int | None, emulated: set[str]) -> dict[str, Values]:
    """By name. A time that an emulation is part of is none of the device's."""
    named: dict[str, tuple[Values | None, set[str]]] = {
        "image_ms": (found.image_ms, {"vision"}),
        "prefill_tokens_s": (found.prefill_tokens_s, {"decoder"}),
        "decode_tokens_s": (found.decode_tokens_s, {"decoder"}),
        "ttft_ms": (found.ttft_ms, {"vision", "decoder"} if found.slices else {"decoder"}),
    }
    if peak_bytes is not None:
        named["peak_memory_bytes"] = (Values((float(peak_bytes),)), {"vision", "decoder"})
    return {name: values for name, (values, of) in named.items() if values is not None and not of & emulated}
