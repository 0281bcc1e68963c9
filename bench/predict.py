"""How far `lensc plan` is off on this machine: its prediction beside what `lensc bench` measures, figure by figure.

    python -m lensc.bench.predict --folder build/predict [--size mid …] [--target native:cpu …] [--results FOLDER]

The profile is measured first, as by `lensc profile`, in the same run. Bundles are those of `lensc.bench.checkpoint` in 4 bits: for
each size, `<folder>/<size>` is taken if it is there and built if not, the checkpoint with it; the full size is measured where
`<folder>/native`, a bundle of it, is there. A request has a picture of one slice, 128 or 1024 tokens of text behind it, and 32
tokens of answer. The golden probes of a bundle pass before anything of it is measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from lensc import bench_run, benching, console
from lensc.backends.bundle import MANIFEST, load_manifest
from lensc.backends.errors import ExecutionError, LensError
from lensc.backends.files import write_text
from lensc.bench_record import Row, Settings
from lensc.profiles import measure, probe
from lensc.profiles.profile import DeviceProfile, to_toml

from . import record

FULL, FULL_BUNDLE = "full", "native"
SIZES = ("small", "mid", "wide", FULL)
PROMPTS, NEW, IMAGE = (128, 1024), 32, "448x448"
PROMISED = 0.25
"""The largest error at full size."""
UNITS = {"image_ms": "ms", "prefill_tokens_s": "tokens/s", "decode_tokens_s": "tokens/s", "ttft_ms": "ms"}
NAMES = {"image_ms": "image", "prefill_tokens_s": "prefill", "decode_tokens_s": "decode", "ttft_ms": "first token"}


def bundle_of(size: str, folder: Path, targets: Sequence[str], report: Callable[[str], None]) -> Path:
    """The bundle of a size, built if it is not there. Raises ExecutionError if that fails."""
    bundle = folder / (FULL_BUNDLE if size == FULL else size)
    if (bundle / MANIFEST).is_file() or size == FULL:
        return bundle
    checkpoint = folder / f"{size}.checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    if not checkpoint.is_dir():
        report(f"{size}: drawing a checkpoint")
        _done("lensc.bench.checkpoint", "-o", str(checkpoint), "--size", size)
    report(f"{size}: building")
    chosen = [part for target in targets for part in ("--target", target)]
    _done("lensc", "build", str(checkpoint), "--scheme", "int4", *chosen, "-o", str(bundle))
    shutil.rmtree(checkpoint)
    return bundle


def _done(module: str, *arguments: str) -> None:
    """Run a command of ours in a process of its own."""
    made = subprocess.run([sys.executable, "-P", "-m", module, *arguments], check=False, capture_output=True, text=True)
    if made.returncode:
        raise ExecutionError(
            f"{module} {' '.join(arguments)} ended with {made.returncode}: {made.stderr.strip()[-500:]}"
        )


def rows_of(size: str, rows: Sequence[Row], of: str) -> list[dict[str, Any]]:
    """A row of the record for each figure that was predicted. `of` is the target."""
    found = []
    for row in rows:
        for name, unit in UNITS.items():
            figure = row.figures.get(name)
            # a picture's slices do not depend on the text behind it
            if figure is None or figure.predicted is None or (name == "image_ms" and row.text_tokens != PROMPTS[0]):
                continue
            behind = "" if name == "image_ms" else f" {row.prompt_tokens}" if name != "decode_tokens_s" else ""
            behind += f", context {row.prompt_tokens}" if name == "decode_tokens_s" else ""
            found.append(
                {
                    "what": f"{size}, {of}: {NAMES[name]}{behind}",
                    "unit": unit,
                    "lensc": _rounded(figure.median),
                    "spread": [_rounded(min(figure.values)), _rounded(max(figure.values))],
                    "predicted": _rounded(figure.predicted),
                    "error": round(error_of(unit, figure.predicted, figure.median), 4),
                    "parity": "pass",
                }
            )
    return found


def error_of(unit: str, predicted: float, measured: float) -> float:
    """By how much of the measured time the predicted time is off, so that speeds and times are off alike."""
    return (measured / predicted if unit == "tokens/s" else predicted / measured) - 1


def measured(
    bundle: Path, size: str, target: str, profile: Path, runs: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of a bundle on a target. Raises LensError, ExecutionError if a graph failed."""
    manifest = load_manifest(bundle)
    bench_run.check_device(target, manifest, bundle)
    settings = Settings(
        images=(bench_run.image_of(IMAGE),),
        prompt_tokens=PROMPTS,
        new_tokens=(NEW,),
        repetitions=runs,
        warmup=1,
        threads=None,
        tuned=False,
        prompt_lookup_num_tokens=0,
        devices=(target,),
        profile=str(profile),
    )
    cases = bench_run.cases_of(manifest, bundle, [IMAGE], PROMPTS, [NEW])
    made = benching.measured(
        bundle, manifest, settings, cases, "", lambda what, _: report(f"{size}: {what}"), lenient=False
    )
    for row in made.rows:
        if row.failed:
            raise ExecutionError(f"{bundle} on {target}: {row.failed}")
    return rows_of(size, made.rows, target)


def errors(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The median and the largest error, without its sign."""
    found = [abs(row["error"]) for row in rows]
    return median(found), max(found)


def _profile(folder: Path, report: Callable[[str], None]) -> tuple[Path, DeviceProfile, float]:
    """Of this machine, in a file of `folder`, and the seconds it took."""
    started = time.perf_counter()
    found = measure.measure(probe.machine(), report=report)
    seconds = time.perf_counter() - started
    path = folder / f"{measure.HERE}.toml"
    write_text(path, to_toml(replace(found, name=path.stem)))
    return path, found, seconds


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every figure, write the record; 1 if a figure of the full size is off by more than was promised."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.predict", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where bundles are, and are built")
    parser.add_argument("--size", action="append", choices=SIZES, default=[], help="default: all, full if it is there")
    parser.add_argument("--target", action="append", default=[], help="default: native:cpu")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of every request (default 3)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the record here (default: do not)")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    targets = options.target or ["native:cpu"]
    there = (options.folder / FULL_BUNDLE / MANIFEST).is_file()
    sizes = options.size or [size for size in SIZES if size != FULL or there]
    rows: list[dict[str, Any]] = []
    try:
        with console.Progress() as progress, tempfile.TemporaryDirectory() as kept:
            bundles = {size: bundle_of(size, options.folder, targets, progress.show) for size in sizes}
            path, found, seconds = _profile(Path(kept), progress.show)
            for size, bundle in bundles.items():
                for target in targets:
                    rows += measured(bundle, size, target, path, options.runs, progress.show)
        for row in rows:
            low, high = row["spread"]
            shown = f"{row['lensc']:10.4g} ({low:.4g} to {high:.4g}) predicted {row['predicted']:10.4g} {row['unit']:8}"
            print(f"{row['what']:48} {shown} {100 * row['error']:+.0f} %")
        for size in sizes:
            middle, worst = errors([row for row in rows if row["what"].startswith(f"{size}, ")])
            print(f"{size}: off by {100 * middle:.0f} % in the median, {100 * worst:.0f} % at worst")
        print(f"the profile took {seconds:.1f} s")
        if options.results:
            limits = {"profile_s": round(seconds, 1), "profile": _reached(found)}
            command = f"python -m lensc.bench.predict --folder {record.shown(options.folder)}"
            made = record.entry("runtime", command, rows, limits)
            record.put(options.results / "runtime.json", made)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    full = [row for row in rows if row["what"].startswith(f"{FULL}, native:cpu")]
    return int(bool(full) and errors(full)[1] > PROMISED)


def _reached(found: DeviceProfile) -> dict[str, float]:
    """What predictions start from."""
    (cpu,) = found.processors
    figures = {f"achieved_tops.{name}": figure for name, figure in cpu.achieved_tops.items()}
    figures |= {f"overheads_us.{name}": figure for name, figure in cpu.overheads_us.items()}
    figures |= {"achieved_gb_s": cpu.achieved_gb_s} if cpu.achieved_gb_s else {}
    return {name: figure.value for name, figure in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
