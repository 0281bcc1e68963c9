"""How close a hosted device comes: the golden probe and pictures, what is known of them, and the records of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lensc.backends.base import Array
from lensc.backends.bundle import Manifest, ParityRecord
from lensc.backends.errors import ExecutionError, ParityError, UnsupportedError
from lensc.runtime.picture import PictureSource, slice_picture, vision_feeds

from .engines import load_if_usable
from .graph import GraphSpec
from .questions import questions_for
from .verify import MIN_SQNR_DB, Metrics

GRAPH = "vision"
BACKEND = "qnn"

TOLERANCE = f"NPU: SQNR of every output at least {MIN_SQNR_DB:.0f} dB"


@dataclass(frozen=True, eq=False)
class Case:
    """Feeds of the portable graph, and what `against` makes of them. The probe counts as no picture."""

    against: str
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]
    pictures: int


def probe_cases(folder: Path, manifest: Manifest) -> Iterator[Case]:
    """The golden probes of the vision graph."""
    for probe in manifest.probes:
        if probe.graph == GRAPH:
            with np.load(folder / probe.file, allow_pickle=False) as arrays:
                feeds = {name[3:]: arrays[name] for name in arrays.files if name.startswith("in.")}
                expected = {name[4:]: arrays[name] for name in arrays.files if name.startswith("out.")}
            yield Case("golden probe of the reference model", feeds, expected, 0)


def picture_cases(folder: Path, manifest: Manifest, pictures: Sequence[PictureSource]) -> Iterator[Case]:
    """A case for each slice of `pictures`, or of the golden ones; none without an artifact that runs here."""
    spec, model = manifest.graphs[GRAPH].spec, manifest.model
    asked = list(pictures) or [picture for question in questions_for(model) for picture in question.images]
    for artifact in manifest.artifacts:
        if artifact.graph != GRAPH or artifact.target.backend == BACKEND:
            continue
        session = load_if_usable(artifact, spec, folder)
        if isinstance(session, str):
            continue
        try:
            for picture in asked:
                pixels = slice_picture(picture, model.picture).pixels
                for i, batch in enumerate(vision_feeds(pixels, model.picture, model.decoder.hidden_size)):
                    outputs = session.run(batch.feeds)
                    expected = {name: np.array(array) for name, array in outputs.items()}
                    yield Case(str(artifact.target), batch.feeds, expected, int(i == 0))
        finally:
            session.close()
        return
    if pictures:
        raise UnsupportedError(
            f"{folder}: no {GRAPH} artifact runs here, so nothing is known of the pictures; "
            "add one: --target onnxruntime:cpu"
        )


def checked_outputs(
    outputs: Mapping[str, list[Array]], spec: GraphSpec, slices: int, job: str
) -> dict[str, list[Array]]:
    """The outputs in float32. Raises ExecutionError unless there is each, of the right shape, for every slice."""
    for tensor in spec.outputs:
        arrays = outputs.get(tensor.name)
        if arrays is None or len(arrays) != slices:
            raise ExecutionError(
                f"AI Hub: job {job} gave {', '.join(f'{len(a)} of {n}' for n, a in outputs.items())}; "
                f"expected {slices} of {tensor.name}"
            )
        shape = tuple(1 if isinstance(d, str) else d for d in tensor.shape)
        for array in arrays:
            if array.shape != shape:
                raise ExecutionError(
                    f"AI Hub: job {job} gave {tensor.name} {list(array.shape)}, expected {list(shape)}"
                )
    return {t.name: [array.astype(np.float32) for array in outputs[t.name]] for t in spec.outputs}


def judge(
    cases: Sequence[Case], outputs: Mapping[str, list[Array]], target: str, where: str
) -> tuple[ParityRecord, ...]:
    """A record for each that the device was held against, whether it passed or not; `outputs` by slice, in order."""
    metrics: dict[str, Metrics] = {}
    pictures: dict[str, int] = {}
    taken = 0
    for case in cases:
        count = next(iter(case.feeds.values())).shape[0]
        got = {name: np.concatenate(arrays[taken : taken + count]) for name, arrays in outputs.items()}
        taken += count
        metrics.setdefault(case.against, Metrics(GRAPH, MIN_SQNR_DB)).add(case.expected, got)
        pictures[case.against] = pictures.get(case.against, 0) + case.pictures
    return tuple(
        ParityRecord(
            graph=GRAPH,
            target=target,
            against=against,
            max_abs=found.max_abs if found.finite else float("inf"),
            sqnr_db=found.sqnr_db if found.finite else -float("inf"),
            cosine=found.cosine if found.finite else 0.0,
            top1_agreement=None,
            first_divergent_token=None,
            pictures=pictures[against],
            passed=found.passed,
            tolerance=TOLERANCE,
            where=where,
        )
        for against, found in metrics.items()
    )


def check_parity(records: Sequence[ParityRecord]) -> None:
    """Raise ParityError that names every record which misses its tolerance."""
    failed = [
        f"against {r.against}: SQNR {r.sqnr_db:.1f} dB, max abs {r.max_abs:.3g}, cosine {r.cosine:.4f}"
        for r in records
        if not r.passed
    ]
    if failed:
        raise ParityError(f"{records[0].target}, {records[0].where}: {'; '.join(failed)} ({TOLERANCE})")
