"""`lensc bench`: how fast a bundle is on this machine, beside what the machine could do and what was predicted."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lensc.backends.errors import InputError, UsageError

from . import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lensc.backends.bundle import Manifest

    from .bench_record import Record, Row, Settings
    from .bench_run import Case, Report

PROMPT_TOKENS, NEW_TOKENS, REPETITIONS, WARMUP = "128", "32", 5, 1
FORMATS = ("md", "csv", "json", "jsonl")
MOST_TOKENS, MOST_RUNS, MOST_THREADS = 1 << 20, 10_000, 1024
ALL = "all"
OF_A_RECORD = (
    "prompt_tokens",
    "new_tokens",
    "repetitions",
    "warmup",
    "image",
    "device",
    "threads",
    "tuned",
    "prompt_lookup",
)
"""What `--verify` takes from the record."""
NAMED = {"tuned": "no_tuned", "prompt_lookup": "prompt_lookup_num_tokens"}
"""Flags by where argparse puts them, where that is not the same."""


def add_bench(verb: argparse.ArgumentParser) -> None:
    """The arguments of `lensc bench`."""
    verb.add_argument("bundle", metavar="BUNDLE", nargs="?", help="with --verify: default is that of the record")
    asked = verb.add_argument_group("what is asked", "Every combination of prompt, answer and picture is a row.")
    text = f"tokens of text, behind those of the picture; several: 128,1024 (default: {PROMPT_TOKENS})"
    asked.add_argument("-p", "--prompt-tokens", metavar="N", help=text)
    asked.add_argument("-n", "--new-tokens", metavar="N", help=f"tokens to decode (default: {NEW_TOKENS})")
    text = (
        "picture file, WIDTHxHEIGHT for noise of that size, or none; repeat for several (default: noise of one slice)"
    )
    asked.add_argument("--image", metavar="PICTURE", action="append", default=[], help=text)
    text = "most tokens guessed ahead, 0 to 7 (default: 0, as prompts are random)"
    asked.add_argument("--prompt-lookup-num-tokens", metavar="N", type=int, dest="prompt_lookup", help=text)
    where = verb.add_argument_group("where it runs")
    text = "as for lensc run; repeat for several, or all for every target of the bundle, in turn (default: the best usable one)"
    where.add_argument("--device", "--target", metavar="DEVICE", action="append", default=[], dest="device", help=text)
    add_tuning(where)
    how = verb.add_argument_group("how often, beside what")
    how.add_argument("-r", "--repetitions", metavar="N", type=int, help=f"runs that count (default: {REPETITIONS})")
    how.add_argument("--warmup", metavar="N", type=int, help=f"runs before that do not (default: {WARMUP})")
    text = "profile whose limits and predictions stand beside the figures (default: that of lensc profile, if there is one)"
    how.add_argument("--profile", metavar="NAME", default="", help=text)
    out = verb.add_argument_group("what is written", "stdout gets it at the end, all of it or nothing.")
    text = f"{', '.join(FORMATS)} (default: md; json is the record)"
    out.add_argument("-o", "--format", metavar="FORMAT", choices=FORMATS, help=text)
    text = "write the record there as well, as JSON, all of it or nothing"
    out.add_argument("--output", metavar="FILE", help=text)
    text = "measure again what a record says, and end with 1 if a figure has become worse by more than the noise"
    out.add_argument("--verify", metavar="RECORD", help=text)
    text = "percent that medians may move from one record to the next (default: 5)"
    out.add_argument("--tolerance", metavar="PERCENT", type=float, help=text)


def add_tuning(where: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """The arguments that say with which settings a bundle is measured."""
    text = "default: one per physical core, or as lensc tune has found best"
    where.add_argument("--threads", metavar="N", type=int, help=text)
    text = "do not use what lensc tune has kept for this machine"
    where.add_argument("--no-tuned", dest="tuned", action="store_false", help=text)


def bench(options: argparse.Namespace) -> int:
    """Measure, print the record or its comparison with another one. Returns 1 if a graph failed or a figure is worse."""
    if options.json and options.format not in (None, "json"):
        raise UsageError(f"--json with -o {options.format}: choose one")
    output = None if options.output is None else console.writable(options.output, "--output", "bench.json")
    if options.verify is not None:
        return _verify(options, output)
    if options.tolerance is not None:
        raise UsageError("--tolerance is for --verify")
    if options.bundle is None:
        raise UsageError("expected a BUNDLE, or a record with --verify; see lensc bench --help")
    from lensc.backends.bundle import load_manifest

    from . import bench_record, bench_run, bench_tables

    folder = Path(options.bundle)
    manifest = load_manifest(folder)
    side = manifest.model.picture.scale_resolution
    images = options.image or [f"{side}x{side}"]
    devices, lenient = devices_of(options.device, manifest, folder)
    settings = bench_record.Settings(
        images=tuple(map(bench_run.image_of, dict.fromkeys(images))),
        prompt_tokens=counts("-p", options.prompt_tokens or PROMPT_TOKENS),
        new_tokens=counts("-n", options.new_tokens or NEW_TOKENS),
        repetitions=count("-r", options.repetitions, REPETITIONS, 1, MOST_RUNS),
        warmup=count("--warmup", options.warmup, WARMUP, 0, MOST_RUNS),
        threads=threads_of(options.threads),
        tuned=options.tuned,
        prompt_lookup_num_tokens=count("--prompt-lookup-num-tokens", options.prompt_lookup, 0, 0, 7),
        devices=tuple(devices),
        profile=options.profile,
    )
    names = [image.name for image in settings.images]
    cases = bench_run.cases_of(manifest, folder, names, settings.prompt_tokens, settings.new_tokens)
    with console.Progress() as progress:
        record = measured(folder, manifest, settings, cases, options.command, progress.show, lenient)
    if options.json or options.format == "json":
        console.print_json(bench_record.as_json(record))
    else:
        print(bench_tables.FORMATS[options.format or "md"](record), flush=True)
    if output is not None:
        bench_record.write(output, record)
    return failed(record.rows)


def measured(
    folder: Path,
    manifest: Manifest,
    settings: Settings,
    cases: Sequence[Case],
    command: str,
    report: Report,
    lenient: bool,
) -> Record:
    """The record of a bundle. What cannot run here has rows without figures if that is allowed (`lenient`).

    Raises LensError for a device that was asked for by name and cannot run the bundle.
    """
    from lensc.profiles import probe

    from . import bench_record, bench_run
    from .contender import ending_with_us

    threads = settings.threads or probe.machine().cores
    profile = bench_run.profile_of(settings.profile, threads)
    subjects = [
        bench_run.Subject(folder, manifest, device, settings.threads, settings.tuned)
        for device in settings.devices or ("",)
    ]
    with ending_with_us():
        report("what the machine reaches", None)
        before = bench_run.probed(folder, threads)
        in_turn = bench_run.measure(
            subjects,
            cases,
            settings.repetitions,
            settings.warmup,
            settings.prompt_lookup_num_tokens,
            report,
            lenient,
        )
        report("what the machine reaches", None)
        after = bench_run.probed(folder, threads)
    reached = {name: (value, after[name]) for name, value in before.items()}
    roof = bench_run.roof_of(folder, threads, reached, profile)
    return bench_record.Record(
        lensc_bench=bench_record.FORMAT,
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=probe.machine(),
        versions=probe.versions(),
        bundle=bench_run.bundle_id(folder, manifest),
        settings=settings,
        in_turn=in_turn,
        limits=roof.known(),
        probed=reached,
        rows=tuple(bench_run.row_of(subject, case, roof) for case in cases for subject in subjects),
    )


def _verify(options: argparse.Namespace, output: Path | None) -> int:
    """Measure what an old record says, on the same placements, and say what moved."""
    from dataclasses import replace

    from lensc.backends.bundle import load_manifest

    from . import bench_record, bench_run, bench_tables

    given = [name for name in OF_A_RECORD if getattr(options, name) not in (None, [], True)]
    if given or options.format not in (None, "md", "json"):
        which = f"--{NAMED.get(given[0], given[0]).replace('_', '-')}" if given else f"-o {options.format}"
        raise UsageError(f"--verify {options.verify} with {which}: the settings are those of the record; leave it out")
    percent = 100 * bench_record.TOLERANCE if options.tolerance is None else options.tolerance
    if not 0 <= percent <= 1000:
        raise UsageError(f"--tolerance {percent:g}: expected 0 to 1000 percent")
    path = Path(options.verify)
    old = bench_record.read(path)
    folder = Path(options.bundle or old.bundle.folder)
    manifest = load_manifest(folder)
    if manifest.provenance.checkpoint_sha256 != old.bundle.checkpoint_sha256:
        raise InputError(
            f"{path}: measured a bundle of another checkpoint ({old.bundle.model}, {old.bundle.checkpoint_sha256[:12]}…), "
            f"{folder} is of {manifest.model.name}, {manifest.provenance.checkpoint_sha256[:12]}…"
        )
    devices = list(dict.fromkeys(row.where for row in old.rows if not row.failed))
    if not devices:
        raise InputError(f"{path}: holds no figure: everything in it had failed")
    for device in devices:
        bench_run.check_device(device, manifest, folder)
    names = [image.name for image in old.settings.images]
    settings = replace(
        old.settings, images=tuple(map(bench_run.image_of, names)), devices=tuple(devices), profile=options.profile
    )
    cases = bench_run.cases_of(manifest, folder, names, settings.prompt_tokens, settings.new_tokens)
    with console.Progress() as progress:
        new = measured(folder, manifest, settings, cases, options.command, progress.show, lenient=False)
    made = bench_tables.changes(old, new, percent / 100)
    different = bench_record.differences(old, new)
    worse = any(change.moved == "worse" for change in made)
    if options.json or options.format == "json":
        moved = [
            {
                "on": change.row.where,
                "picture": change.row.image,
                "prompt_tokens": change.row.prompt_tokens,
                "new_tokens": change.row.new_tokens,
                "figure": change.name,
                "before": change.old and change.old.median,
                "now": change.new and change.new.median,
                "moved": change.moved,
            }
            for change in made
        ]
        console.print_json(
            {"worse": worse, "changes": moved, "differences": different, "record": bench_record.as_json(new)}
        )
    else:
        print(bench_tables.compared(made, different, percent / 100), flush=True)
    if output is not None:
        bench_record.write(output, new)
    return int(worse or failed(new.rows))


def devices_of(asked: Sequence[str], manifest: Manifest, folder: Path) -> tuple[list[str], bool]:
    """What is measured: all targets of the bundle, those that cannot run here too, or those that were asked for, all of which
    must. Raises UsageError for one that the bundle was not built for.
    """
    from . import bench_run

    if ALL in asked:
        if len(asked) > 1:
            raise UsageError(f"--device {ALL} with --device {next(one for one in asked if one != ALL)}: choose one")
        return bench_run.devices_of(manifest), True
    for device in asked:
        bench_run.check_device(device, manifest, folder)
    return list(dict.fromkeys(asked)), False


def counts(flag: str, text: str) -> tuple[int, ...]:
    """The numbers of a list like 128,1024. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 9]
    if len(numbers) != len(parts) or not all(1 <= number <= MOST_TOKENS for number in numbers):
        raise UsageError(f"{flag} {text}: expected numbers of tokens from 1 on, e.g. 128 or 128,1024")
    return tuple(dict.fromkeys(numbers))


def count(flag: str, value: int | None, usual: int, least: int, most: int) -> int:
    """`value`, or what is usual where it was left out. Raises UsageError."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{flag} {value}: expected {least} to {most}")
    return usual if value is None else value


def threads_of(value: int | None) -> int | None:
    """`value`, if it is a number of threads. Raises UsageError."""
    return None if value is None else count("--threads", value, 1, 1, MOST_THREADS)


def failed(rows: Sequence[Row]) -> int:
    """1 if a row has no figures though it should, or none has any."""
    return int(any(row.failed and not row.skipped for row in rows) or all(row.failed for row in rows))
