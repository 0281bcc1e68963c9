"""What each scheme costs: accuracy on the demo model's three tasks, size, and speed on this machine.

    python -m lensc.bench.schemes [--scheme int4 --scheme …] [--pictures 500] [--target onnxruntime:cpu] [--work FOLDER]

The demo model is built once for every scheme, `f32` first, and reads the same held-out pictures. Losses are in points of
exact match (of character errors for pages) against f32, on the same pictures. Beside them stands what separates schemes
long before an answer changes: the divergence (KL) of every token of the right answers from the reference model in
float32, fed the same pictures and answers, by the engine's own graphs.

With `--work` bundles and figures are kept there, and what is there is not measured again: schemes can be measured one
after the other. Speeds are measured last, all schemes in turn, `--rounds` times; they say how the schemes compare on a
model of 7 million parameters, not how fast a large one is. A scheme that the target cannot run is named and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import lensc
from lensc.backends.base import Array
from lensc.backends.errors import LensError, UnsupportedError
from lensc.backends.load_options import LoadOptions
from lensc.compare_text import wilson
from lensc.export.demo.evaluate import evaluate, score
from lensc.export.demo.samples import TASKS, Sample, held_out_samples

from . import record
from .demo_accuracy import GOALS, MAX_NEW_TOKENS

BASELINE = "f32"
FIGURES = "figures.json"
"""In a bundle's work folder: what was measured of it."""

SPEED_PICTURES = 10
"""Of each task, in each round."""


@dataclass(frozen=True)
class Figures:
    """One scheme on all pictures: by task, how many, how many exact, and percent of character errors."""

    scheme: str
    pictures: int
    exact: dict[str, int]
    errors: dict[str, float]
    kl: float
    """Nats per token."""
    bundle_bytes: int
    bundle: str
    """Of the manifest, as the figures are of no other."""

    def figure(self, task: str) -> float:
        """Percent of exact answers, or of character errors for the task that is judged by them."""
        return 100 * self.exact[task] / self.pictures if GOALS[task][0] == "exact match" else self.errors[task]

    def loss(self, task: str, baseline: Figures) -> float:
        """Points lost against `baseline`; negative if it is better."""
        difference = self.figure(task) - baseline.figure(task)
        return -difference if GOALS[task][0] == "exact match" else difference


@dataclass
class Speed:
    """Of one scheme, over all its pictures and rounds."""

    decode_tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    first_token_ms: list[float] = dataclasses.field(default_factory=list)


def build_bundle(scheme: str, target: str, work: Path) -> Path:
    """The demo model built by `scheme` in `work`, or what is there. Raises what `build` does."""
    from lensc.backends.base import Target
    from lensc.backends.bundle import sha256_file
    from lensc.export.build import build
    from lensc.export.quantize.recipe import resolve

    folder = work / f"{Target.parse(target).slug}-{resolve(scheme).name}"
    recipe = work / f"{folder.name}.recipe"
    wanted = resolve(scheme).to_toml()
    if not folder.is_dir() or not recipe.is_file() or recipe.read_text(encoding="utf-8") != wanted:
        build("demo", [Target.parse(target)], folder, scheme=scheme)
        recipe.write_text(wanted, encoding="utf-8")
        print(f"{folder}: built, manifest {sha256_file(folder / 'manifest.json')[:12]}", file=sys.stderr)
    return folder


def measure(scheme: str, bundle: Path, samples: dict[str, list[Sample]], forced: Forced) -> Figures:
    """Ask `bundle` all questions, or read what an earlier run found."""
    from lensc.backends.bundle import load_manifest, sha256_file
    from lensc.export.quantize.recipe import resolve

    name, sha256 = resolve(scheme).name, sha256_file(bundle / "manifest.json")
    pictures = len(samples[TASKS[0]])
    kept = bundle.parent / f"{bundle.name}.{FIGURES}"
    if kept.is_file():
        found = Figures(**json.loads(kept.read_text(encoding="utf-8")))
        if (found.bundle, found.pictures) == (sha256, pictures):
            return found
    with lensc.load(bundle, threads=1) as vlm:

        def answer(image: Image.Image, question: str) -> str:
            return vlm.generate(question, [image], max_new_tokens=MAX_NEW_TOKENS).text

        outcomes = {task: evaluate(samples[task], answer) for task in TASKS}
    figures = Figures(
        name,
        pictures,
        {task: sum(o.exact for o in outcomes[task]) for task in TASKS},
        {task: 100 * score(outcomes[task]).cer for task in TASKS},
        forced.kl(bundle),
        sum(file.bytes for file in load_manifest(bundle).files),
        sha256,
    )
    kept.write_text(json.dumps(dataclasses.asdict(figures)), encoding="utf-8")
    return figures


class Forced:
    """The right answers of all pictures, and the reference model's logits of them, made when they are needed."""

    def __init__(self, samples: dict[str, list[Sample]]) -> None:
        self._samples = samples
        self._reference: list[Array] | None = None

    def kl(self, bundle: Path) -> float:
        """The mean over all tokens of `bundle`'s divergence, in nats."""
        from lensc.backends import registry
        from lensc.backends.bundle import load_manifest
        from lensc.export.calibration import prepare
        from lensc.export.demo import CHECKPOINT
        from lensc.export.engines import close
        from lensc.export.quantize.loss import compare_logits, forced_logits
        from lensc.export.question_folder import Item
        from lensc.runtime.embedding import EmbeddingTable, open_table
        from lensc.runtime.prompt import Tokenizer

        from .reference import reference_sessions

        manifest = load_manifest(bundle)
        spec, tokenizer = manifest.model, Tokenizer.from_file(bundle / manifest.tokenizer)
        items = [Item(s.question, s.answer, (s.image,)) for task in TASKS for s in self._samples[task]]
        data = prepare("held out", items, spec, tokenizer).samples
        if self._reference is None:
            sessions, table = reference_sessions(CHECKPOINT)
            self._reference = forced_logits(sessions, EmbeddingTable.of(table), spec, data)
        sessions = {
            artifact.graph: registry.get(artifact.target.backend).load(
                artifact, manifest.graphs[artifact.graph].spec, bundle, LoadOptions(threads=1)
            )
            for artifact in manifest.artifacts
        }
        try:
            found = forced_logits(sessions, open_table(bundle, manifest.tables), spec, data)
        finally:
            close(sessions)
        return compare_logits(self._reference, found, data, spec.generation.eos_token_ids).mean_kl


def measure_speeds(bundles: dict[str, Path], samples: dict[str, list[Sample]], rounds: int) -> dict[str, Speed]:
    """Ask every bundle the first pictures of each task, one bundle after the other, `rounds` times."""
    speeds = {scheme: Speed() for scheme in bundles}
    asked = [sample for task in TASKS for sample in samples[task][:SPEED_PICTURES]]
    for _ in range(rounds):
        for scheme, bundle in bundles.items():
            with lensc.load(bundle) as vlm:
                vlm.generate(asked[0].question, [asked[0].image], max_new_tokens=2)
                for sample in asked:
                    metrics = vlm.generate(
                        sample.question, [sample.image], max_new_tokens=MAX_NEW_TOKENS, prompt_lookup_num_tokens=0
                    ).metrics
                    speeds[scheme].first_token_ms.append(metrics.ttft_ms)
                    if metrics.decode_tokens_per_s:
                        speeds[scheme].decode_tokens_per_s.append(metrics.decode_tokens_per_s)
    return speeds


def rows_of(measured: Sequence[Figures], speeds: dict[str, Speed]) -> list[record.Row]:
    """Seven rows per scheme; the first scheme is the one that the others are compared with."""
    rows = []
    for one in measured:
        baseline = None if one is measured[0] else measured[0]
        for task in TASKS:
            exact = GOALS[task][0] == "exact match"
            rows.append(
                record.Row(
                    f"{one.scheme}: {task}",
                    "%" if exact else "% errors",
                    one.figure(task),
                    wilson(one.exact[task], one.pictures) if exact else None,
                    rival=baseline.scheme if baseline else None,
                    rival_value=baseline.figure(task) if baseline else None,
                )
            )
        page = wilson(one.exact["page"], one.pictures)
        rows.append(
            record.Row(
                f"{one.scheme}: page exact",
                "%",
                100 * one.exact["page"] / one.pictures,
                page,
                rival=baseline.scheme if baseline else None,
                rival_value=100 * baseline.exact["page"] / baseline.pictures if baseline else None,
            )
        )
        rows.append(record.Row(f"{one.scheme}: divergence", "millinats", 1000 * one.kl))
        rows.append(record.Row(f"{one.scheme}: size", "MB", one.bundle_bytes / 1e6))
        speed = speeds[one.scheme]
        rows.append(record.Row(f"{one.scheme}: decode", "tokens/s", statistics.median(speed.decode_tokens_per_s)))
        rows.append(record.Row(f"{one.scheme}: first token", "ms", statistics.median(speed.first_token_ms)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    from lensc.export.quantize.recipe import PRESETS, resolve

    parser = argparse.ArgumentParser(prog="python -m lensc.bench.schemes", description=str(__doc__).split("\n")[0])
    parser.add_argument("--scheme", action="append", default=[], help="default: every scheme with a name")
    parser.add_argument("--target", default="onnxruntime:cpu", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=500, help="held-out pictures per task (default 500)")
    parser.add_argument("--rounds", type=int, default=3, help="of speed (default 3); 0 measures accuracy alone")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles and figures here")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.pictures < 1 or options.rounds < 0:
        parser.error(f"--pictures {options.pictures}, --rounds {options.rounds}: expected at least 1, and at least 0")
    if options.results and not options.rounds:
        parser.error("--results: a record needs speeds, give --rounds of at least 1")
    names = dict.fromkeys([BASELINE, *(options.scheme or PRESETS)])
    measured: list[Figures] = []
    bundles: dict[str, Path] = {}
    samples = {task: held_out_samples(task, options.pictures) for task in TASKS}
    forced = Forced(samples)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            for name in names:
                try:
                    bundle = build_bundle(name, options.target, work)
                except UnsupportedError as error:
                    print(f"{name}: left out: {error}", file=sys.stderr)
                    continue
                bundles[resolve(name).name] = bundle
                measured.append(measure(name, bundle, samples, forced))
                _print(measured[-1], measured[0])
            speeds = measure_speeds(bundles, samples, options.rounds)
        for scheme, speed in speeds.items() if options.rounds else ():
            decode, first = (statistics.median(v) for v in (speed.decode_tokens_per_s, speed.first_token_ms))
            print(f"{scheme:14} {decode:6.0f} tok/s {first:9.1f} ms")
        if options.results:
            command = f"python -m lensc.bench.schemes --target {options.target}"
            path = record.write("demo_accuracy", command, rows_of(measured, speeds), options.results)
            print(f"written to {path}", file=sys.stderr)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(one: Figures, baseline: Figures) -> None:
    if one is baseline:
        print(f"{'scheme':14} " + " ".join(f"{task + ' ' + GOALS[task][0]:>34}" for task in TASKS), end="")
        print(f" {'pages exact':>12} {'KL, millinats':>14} {'size':>9}")
    cells = []
    for task in TASKS:
        loss = "" if one is baseline else f" (loses {one.loss(task, baseline):+.1f})"
        cells.append(f"{one.figure(task):.1f} %{loss}")
    print(f"{one.scheme:14} " + " ".join(f"{cell:>34}" for cell in cells), end="")
    exact = 100 * one.exact["page"] / one.pictures
    print(f" {exact:10.1f} % {1000 * one.kl:14.3f} {one.bundle_bytes / 1e6:6.2f} MB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
