"""`lensc doctor`: what works here, what is missing, and what would help.

Every engine that is usable runs the tiny model, every usable target of a bundle the bundle's golden probes, each in a
process of its own: one that crashes or hangs is a line of the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lensc.backends.errors import LensError, UsageError

from . import console, installation
from .installation import Line

if TYPE_CHECKING:
    from lensc.backends.base import Probe
    from lensc.runtime.checkup import Outcome

COMPILED_HERE = {
    "qnn": ("f32", "qnn:npu:sm8650", ("vision",)),
    "tensorrt": ("f32", "tensorrt:gpu", ("vision", "decoder")),
}
"""Engines whose artifacts hold on one machine: the tiny model's graphs are compiled first."""
COMPILING_S = 120.0
"""The longest that such an engine may take."""
ORACLE = "reference"
"""Not an engine to run a model on."""
NOT_HERE = ("UnavailableError", "UnsupportedError")
REFUSED = (*NOT_HERE, "CompatibilityError")
"""Errors of an engine that is in order."""
AT_ONCE = 2
"""Children that run side by side. What is looked for is whether they work, not how fast."""


def add_doctor(verb: argparse.ArgumentParser) -> None:
    """The arguments of `doctor`."""
    verb.add_argument("bundle", metavar="BUNDLE", nargs="?", help="check this bundle on this machine, too")
    text = "the longest that one check may take (default: 30, 120 where an engine compiles first, and more for large bundles)"
    verb.add_argument("--timeout", metavar="SECONDS", type=float, help=text)


def doctor(options: argparse.Namespace) -> int:
    """Print the report. Returns 1 if no engine runs the tiny model or, with a bundle, a graph of it has no target."""
    if options.timeout is not None and not 0 < options.timeout < float("inf"):
        raise UsageError(f"--timeout {options.timeout:g}: expected a number of seconds above 0")
    folder = None if options.bundle is None else Path(options.bundle)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected a bundle, or nothing to check the machine only")
    with console.Progress() as progress:
        progress.show("looking at this machine")
        lines = [*installation.machine(), *installation.packages(), *installation.folders()]
        try:
            tried, problem = _tried(folder, options.timeout, progress.show)
        except ImportError as error:  # a package that every engine needs, missing or broken
            said = " ".join(str(error).split())
            tried, problem = [Line("engines", "all", "wrong", f"not tried: {said}", "pip install lensc")], said
        lines += tried
    if options.json:
        document = {"usable": not problem, "problem": problem, "lines": [dataclasses.asdict(one) for one in lines]}
        console.print_json(document)
    else:
        print(text_of(lines))
        what = f"{folder} works here" if folder is not None else "lensc works here"
        print(f"\n{what}" if not problem else f"\n{problem}")
    return 1 if problem else 0


def _tried(folder: Path | None, timeout_s: float | None, report: Callable[[str], None]) -> tuple[list[Line], str]:
    """The lines of engines and of a bundle, and why the essential fails, if it does."""
    lines = engines(timeout_s, report)
    if folder is not None:
        of_bundle, problem = bundle(folder, timeout_s, report)
        return lines + of_bundle, problem
    works = any(one.state == "ok" for one in lines)
    return lines, "" if works else "no engine runs the tiny model"


def text_of(lines: Iterable[Line]) -> str:
    """The report: a section after the other, a fix below what it is for."""
    told = [(one, [one.state, one.name, one.found]) for one in lines]
    widths = [max((len(cells[i]) for _, cells in told), default=0) for i in range(2)]
    text: list[str] = []
    section = ""
    for one, (state, name, found) in told:
        if one.section != section:
            text += ["", one.section] if text else [one.section]
            section = one.section
        text.append(console.printable(f"  {state:{widths[0]}}  {name:{widths[1]}}  {found}"))
        if one.fix:
            text.append(console.printable(f"  {'':{widths[0]}}  {'':{widths[1]}}  fix: {one.fix}"))
    return "\n".join(text)


# --- engines ------------------------------------------------------------------------------------------------------


def engines(timeout_s: float | None, report: Callable[[str], None]) -> list[Line]:
    """A line for each processor of each engine."""
    from lensc.backends import registry
    from lensc.runtime import tiny

    with tempfile.TemporaryDirectory(prefix="lensc-") as place:
        bundles = tiny.unpack(Path(place))
        report("asking the engines")
        probes = [probe for name in registry.names() if name != ORACLE for probe in registry.get(name).probe()]
        report("running the tiny model on every engine")

        def line_of(probe: Probe) -> Line:
            return _engine(probe, bundles, timeout_s)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(line_of, probes))


def _engine(probe: Probe, bundles: Mapping[str, Path], timeout_s: float | None) -> Line:
    """What came of the tiny model in each scheme."""
    from lensc.backends.base import Target
    from lensc.backends.bundle import load_manifest
    from lensc.runtime import checkup

    name = f"{probe.backend}:{probe.processor}"
    about, fix = _about(probe)
    if not probe.usable:
        return Line("engines", name, "missing", about, fix)
    jobs: dict[str, checkup.Job] = {}
    if probe.backend in COMPILED_HERE:
        scheme, target, graphs = COMPILED_HERE[probe.backend]
        jobs[f"{' and '.join(graphs)} in {scheme}"] = checkup.Job(bundles[scheme], Target.parse(target), graphs)
    for scheme, folder in bundles.items():
        made = tuple(a.graph for a in load_manifest(folder).artifacts if str(a.target) == name)
        if made:
            jobs[scheme] = checkup.Job(folder, Target.parse(name), made)
    limit_s = COMPILING_S if probe.backend in COMPILED_HERE else checkup.LIMIT_S
    outcomes = dict(zip(jobs, checkup.run([*jobs.values()], timeout_s or limit_s), strict=True))
    ran = [f"{what} in {one.seconds:.1f} s" for what, one in outcomes.items() if not one.problem]
    failed = [(what, one) for what, one in outcomes.items() if one.problem]
    found = f"{about}; tiny model right: {', '.join(ran)}" if ran else f"{about}; tiny model not run"
    return _judged(Line("engines", name, "ok" if ran else "missing", found, fix), failed)


def _about(probe: Probe) -> tuple[str, str]:
    """What the engine says of itself, and the command in it."""
    reason, fix = split_fix(probe.reason)
    return (reason if probe.state == "runs here" else f"{probe.state}; {reason}"), fix


def split_fix(reason: str) -> tuple[str, str]:
    """A reason, and the command or the advice that stands behind its last semicolon, if there is one."""
    said, semicolon, advice = reason.rpartition("; ")
    found = re.search(r"(?:pip install|lensc [a-z]+) .*", advice)
    return (said, found[0]) if semicolon and found else (reason, "")


def _judged(line: Line, failed: Sequence[tuple[str, Outcome]]) -> Line:
    """`line` with what failed. What the engine refuses for a reason is missing; what it computes wrong, or dies of, is wrong."""
    state, found, fix = line.state, line.found, line.fix
    for what, outcome in failed:
        problem, advice = split_fix(outcome.problem)
        found, fix = f"{found}; {what}: {problem}", advice or fix
        if outcome.kind not in REFUSED:
            state = "wrong"
    return dataclasses.replace(line, state=state, found=found, fix=fix)


# --- a bundle -----------------------------------------------------------------------------------------------------


def bundle(folder: Path, timeout_s: float | None, report: Callable[[str], None]) -> tuple[list[Line], str]:
    """A line for the files, and one for each artifact; and what keeps the bundle from working here, or nothing."""
    from lensc.backends import registry
    from lensc.backends.bundle import load_manifest
    from lensc.runtime import checkup

    section = f"bundle {folder}"
    report(f"hashing {folder}")
    try:
        manifest = load_manifest(folder, verify=True)
    except LensError as error:
        problem, fix = split_fix(str(error))
        return [Line(section, "files", "wrong", problem, fix or "build the bundle again: lensc build")], str(error)
    nbytes = sum(record.bytes for record in manifest.files)
    lines = [
        Line(section, "files", "ok", f"{len(manifest.files)}, {console.size(nbytes)}, sizes and SHA-256 are right")
    ]
    backends = {a.target.backend for a in manifest.artifacts} & set(registry.names())
    probes = {(p.backend, p.processor): p for name in sorted(backends) for p in registry.get(name).probe()}
    for artifact in manifest.artifacts:
        target, graph = artifact.target, artifact.graph
        name = f"{graph} on {target}"
        probe = probes.get((target.backend, target.processor))
        if probe is None:
            found = f"lensc knows no {target.processor} of a backend {target.backend!r}"
            lines.append(Line(section, name, "missing", found, "pip install --upgrade lensc"))
            continue
        about, fix = _about(probe)
        if not probe.usable:
            lines.append(Line(section, name, "missing", about, fix))
            continue
        report(f"running {name}")
        limit = timeout_s or checkup.limit_s(manifest, target, [graph])
        [outcome] = checkup.run([checkup.Job(folder, target, (graph,))], limit)
        if outcome.problem:
            problem, advice = split_fix(outcome.problem)
            lines.append(
                Line(section, name, "missing" if outcome.kind in NOT_HERE else "wrong", problem, advice or fix)
            )
        else:
            lines.append(Line(section, name, "ok", f"golden probe: {outcome.found}; {outcome.seconds:.1f} s"))
    working = {one.name.partition(" on ")[0] for one in lines[1:] if one.state == "ok"}
    without = [graph for graph in manifest.graphs if graph not in working]
    if not manifest.artifacts:
        lines.append(_uncompiled(section, folder))
    return lines, f"{folder}: no target works here for {' and '.join(without)}" if without else ""


def _uncompiled(section: str, folder: Path) -> Line:
    found = "none, only portable graphs"
    return Line(section, "artifacts", "missing", found, f"lensc compile {folder} --target native:cpu -o BUNDLE")
