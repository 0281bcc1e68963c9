"""Bundles measured side by side, and asked the same questions: what `lensc compare` shows, as data.

Speed and memory are measured as `lensc bench` does. Answers are to questions about pictures: how many are exactly right, where
it is known what is right, and how many have the tokens of the first column in float32 (of the first, if none is).
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensc.backends.bundle import MANIFEST, Manifest, ParityRecord
from lensc.backends.errors import InputError, LensError, UnavailableError, UsageError
from lensc.profiles import probe
from lensc.profiles.probe import Machine
from lensc.profiles.profile import Figure as Known

from . import bench_run, benching
from .bench_record import BundleId, Row
from .contender import ending_with_us

if TYPE_CHECKING:
    from lensc.export.question_folder import Item

FORMAT = 1
WARMUP = 1
DEMO, DEMO_TASKS, DEMO_EACH = "demo", ("line", "page", "question"), 20
"""The model whose pictures come with lensc, the tasks that it was trained for, and how many held-out pictures of each."""
FLOAT = "f32"

Bundles = Sequence[tuple[Path, Manifest]]


@dataclass(frozen=True)
class Settings:
    """What was asked for; no devices are all."""

    devices: tuple[str, ...]
    threads: int | None
    tuned: bool
    repetitions: int
    prompt_tokens: int
    new_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class Asked:
    """A question about a picture: the right answer, empty if nobody says, and what each column answered (None: nothing)."""

    picture: str
    question: str
    expected: str
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class Column:
    """A bundle on a placement. `right` of `judged` answers are exactly right, `same` of `compared` have the same tokens as
    those of the baseline; `size_bytes` are the files that the placement opens.
    """

    name: str
    bundle: int
    row: Row
    size_bytes: int
    parity: tuple[ParityRecord, ...]
    right: int
    judged: int
    same: int
    compared: int


@dataclass(frozen=True)
class Comparison:
    """All of it, as `--output` writes it. `baseline` is the name of the column that others are held against."""

    lensc_compare: int
    command: str
    created: str
    machine: Machine
    versions: dict[str, str]
    bundles: tuple[BundleId, ...]
    pictures: str
    repetitions: int
    threads: int | None
    in_turn: bool
    limits: dict[str, Known]
    baseline: str
    columns: tuple[Column, ...]
    asked: tuple[Asked, ...]


def compared(
    bundles: Bundles, settings: Settings, source: str, items: Sequence[Item], command: str, report: bench_run.Report
) -> Comparison:
    """Measure the bundles on every placement, and ask each about all `items`, which are from `source`."""
    threads = settings.threads or probe.machine().cores
    subjects, lenient = _subjects(settings, bundles)
    first, manifest = bundles[0]
    largest = max(items, key=lambda item: _slices(item, manifest))
    (case,) = bench_run.cases_of(
        manifest, first, [str(largest.pictures[0])], [settings.prompt_tokens], [settings.new_tokens]
    )
    answers: dict[int, list[dict[str, Any] | None]] = {}

    def ask(subject: bench_run.Subject) -> None:
        of = answers.setdefault(id(subject), [])
        for number, item in enumerate(items, 1):
            report(f"{subject.device or subject.bundle.name}: questions", (number, len(items)))
            question = {
                "picture": str(item.pictures[0]),
                "question": item.question,
                "max_new_tokens": settings.max_new_tokens,
            }
            try:
                of.append(subject.ask(question))
            except LensError:
                return

    with ending_with_us():
        report("what the machine reaches", None)
        before = {folder: bench_run.probed(folder, threads) for folder, _ in bundles}
        profile = bench_run.profile_of("", threads)
        in_turn = bench_run.measure([*subjects], [case], settings.repetitions, WARMUP, 0, report, lenient, ask)
    roofs = {
        folder: bench_run.roof_of(folder, threads, {name: (v, v) for name, v in found.items()}, profile)
        for folder, found in before.items()
    }
    rows = [bench_run.row_of(subject, case, roofs[subject.bundle]) for subject in subjects]
    given = [
        [None] * len(items) if subject.failed else answers.get(id(subject), [None] * len(items)) for subject in subjects
    ]
    base = _baseline(rows)
    names = _names(subjects, rows)
    columns = tuple(
        _column(names[i], bundles, subject, rows[i], items, given[i], given[base]) for i, subject in enumerate(subjects)
    )
    return Comparison(
        lensc_compare=FORMAT,
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=probe.machine(),
        versions=probe.versions(),
        bundles=tuple(bench_run.bundle_id(folder, manifest) for folder, manifest in bundles),
        pictures=source,
        repetitions=settings.repetitions,
        threads=settings.threads,
        in_turn=in_turn,
        limits=roofs[first].known(),
        baseline=names[base],
        columns=columns,
        asked=tuple(
            Asked(
                Path(str(item.pictures[0])).name,
                item.question,
                item.answer,
                tuple(None if of[i] is None else str(_of(of[i], "text")) for of in given),
            )
            for i, item in enumerate(items)
        ),
    )


def _of(answer: dict[str, Any] | None, name: str) -> Any:
    return None if answer is None else answer[name]


def _slices(item: Item, manifest: Manifest) -> int:
    plan = bench_run.cut(str(item.pictures[0]), manifest)
    return 0 if plan is None else len(plan.sizes)


def _subjects(settings: Settings, bundles: Bundles) -> tuple[list[bench_run.Subject], bool]:
    asked, found = settings.devices, list[bench_run.Subject]()
    lenient = not asked or benching.ALL in asked
    for folder, manifest in bundles:
        devices, _ = benching.devices_of(asked or [benching.ALL], manifest, folder)
        found += [bench_run.Subject(folder, manifest, device, settings.threads, settings.tuned) for device in devices]
    if not found:
        raise UsageError(f"{bundles[0][0]}: holds no compiled graph, nothing to compare; see lensc compile")
    return found, lenient


def check_same_model(bundles: Bundles) -> None:
    """Raise InputError unless all are of one checkpoint."""
    first, reference = bundles[0]
    for folder, manifest in bundles[1:]:
        wanted, found = (m.provenance.checkpoint_sha256 for m in (reference, manifest))
        if wanted != found:
            raise InputError(
                f"{folder / MANIFEST}: of another checkpoint ({manifest.model.name}, {found[:12]}…) than {first} "
                f"({reference.model.name}, {wanted[:12]}…); compare bundles of one checkpoint"
            )


@contextmanager
def questions(images: str | None, manifest: Manifest, most: int) -> Iterator[tuple[str, list[Item]]]:
    """Where the pictures are from, and the first `most` of what is asked about them. Raises InputError, UsageError."""
    from lensc.export.question_folder import read_folder

    if images is not None:
        items = read_folder(Path(images), "--images")
        yield _counted(f"folder {Path(images).name}", items[:most])
    elif manifest.model.name != DEMO:
        raise UsageError(f"--images DIR: expected pictures to ask about; {manifest.model.name} has none of its own")
    else:
        with tempfile.TemporaryDirectory() as folder:
            source, items = _of_the_demo(Path(folder))
            yield _counted(source, items[:most])


def _counted(source: str, items: list[Item]) -> tuple[str, list[Item]]:
    return f"{len(items)} picture{'s' * (len(items) > 1)}, {source}", items


def _of_the_demo(folder: Path) -> tuple[str, list[Item]]:
    """Held-out pictures of the demo's tasks, drawn into `folder`; without its fonts, the pictures that come with it."""
    from lensc.export.calibration_text import SHIPPED
    from lensc.export.demo import PICTURES
    from lensc.export.demo.samples import held_out_samples
    from lensc.export.question_folder import Item

    with suppress(UnavailableError):
        items = []
        drawn = {task: held_out_samples(task, DEMO_EACH) for task in DEMO_TASKS}
        for number in range(DEMO_EACH):  # the first few are of all tasks
            for task, samples in drawn.items():
                path = folder / f"{task}-{number + 1:02}.png"
                samples[number].image.save(path)
                items.append(Item(samples[number].question, samples[number].answer, (path,)))
        return "held out from the demo's training", items
    shipped = {name: asked for name, asked in SHIPPED.items() if (PICTURES / name).is_file()}
    items = [Item(question, answer, (PICTURES / name,)) for name, (question, answer) in shipped.items()]
    return "shipped with the demo (more with pip install 'lensc[demo]')", items


def _baseline(rows: Sequence[Row]) -> int:
    """The first placement in float32 that answered; else the first that answered, or the first."""
    answered = [i for i, row in enumerate(rows) if not row.failed]
    in_float = [i for i in answered if {p.scheme for p in rows[i].plan} == {FLOAT} and not rows[i].emulated]
    return next(iter([*in_float, *answered, 0]))


def _names(subjects: Sequence[bench_run.Subject], rows: Sequence[Row]) -> list[str]:
    """A name for each column that no other has."""
    names = []
    for subject, row in zip(subjects, rows, strict=True):
        names.append(f"{subject.manifest.provenance.scheme} {row.where}")
    return [
        f"{name} ({subject.bundle.name})" if names.count(name) > 1 else name
        for name, subject in zip(names, subjects, strict=True)
    ]


def _column(
    name: str,
    bundles: Bundles,
    subject: bench_run.Subject,
    row: Row,
    items: Sequence[Item],
    answers: Sequence[dict[str, Any] | None],
    base: Sequence[dict[str, Any] | None],
) -> Column:
    manifest = subject.manifest
    placed = {p.graph: p.target for p in row.plan}
    files = {
        file.path: file.bytes
        for artifact in manifest.artifacts
        if placed.get(artifact.graph) == str(artifact.target)
        for file in artifact.files
    }
    judged = [(answer, item) for answer, item in zip(answers, items, strict=True) if answer is not None and item.answer]
    pairs = [(a, b) for a, b in zip(answers, base, strict=True) if a is not None and b is not None]
    return Column(
        name=name,
        bundle=[folder for folder, _ in bundles].index(subject.bundle),
        row=replace(row, image=Path(row.image).name),
        size_bytes=sum(files.values()),
        parity=tuple(p for p in manifest.parity if placed.get(p.graph) == p.target),
        right=sum(answer["text"] == item.answer for answer, item in judged),
        judged=len(judged),
        same=sum(a["token_ids"] == b["token_ids"] for a, b in pairs),
        compared=len(pairs),
    )
