"""`lensc aihub`: the vision graph of a bundle on a phone that Qualcomm AI Hub hosts. One function per verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console

if TYPE_CHECKING:
    from lensc.backends.bundle import Manifest
    from lensc.export.graph import Graph
    from lensc.export.stages import Report

UNTESTED = "untested against the service"

NOTE = f"lensc: note: lensc aihub is {UNTESTED}: written for qai-hub 0.56 and tested against a server of our own"


def add_verbs(parent: argparse.ArgumentParser, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add compile, profile and infer to the parser of `lensc aihub`; `common` adds what all verbs have."""
    verbs = parent.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(parent))

    def verb(name: str, function: Callable[[argparse.Namespace], int], help: str, more: str) -> Any:
        added = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}")
        added.set_defaults(verb=function)
        common(added)
        text = "a device of AI Hub by its name there; qai-hub list-devices lists them"
        added.add_argument("--device", metavar="NAME", required=True, help=text)
        text = "how long to wait for a job of the service (default: 3600); the job goes on, and so does the next run"
        added.add_argument("--timeout", metavar="SECONDS", type=float, default=3600.0, help=text)
        return added

    label = f"This is {UNTESTED}."
    resumes = "What was uploaded and asked for stands in a file beside the bundle: run the same command again to go on."
    compile_ = verb(
        "compile", _compile, "let AI Hub compile the vision graph for a device, into a bundle", f"{resumes} {label}"
    )
    compile_.add_argument("graphs", metavar="GRAPHS", help="folder made by lensc export")
    text = "what to compile here for both graphs, too; default: onnxruntime:cpu, which infer holds pictures against"
    compile_.add_argument("--target", metavar="TARGET", action="append", default=[], help=text)
    text = "further options of AI Hub's compiler, e.g. '--qairt_version 2.51'"
    compile_.add_argument("--options", metavar="TEXT", default="", help=text)
    compile_.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to make, e.g. bundle/")

    profile = verb(
        "profile",
        _profile,
        "time a bundle's vision graph on a device, and write that into the bundle",
        f"{resumes} {label}",
    )
    profile.add_argument("bundle", metavar="BUNDLE")

    infer = verb(
        "infer",
        _infer,
        "run golden inputs on a device, and write into the bundle how close it comes",
        f"Ends with 1 if it is not close enough. {resumes} {label}",
    )
    infer.add_argument("bundle", metavar="BUNDLE")
    text = "picture file; repeat for several (default: the golden pictures); needs a vision artifact that runs here"
    infer.add_argument("--image", metavar="PICTURE", action="append", default=[], help=text)


def _compile(options: argparse.Namespace) -> int:
    _check_ready()
    from lensc.backends.base import Target
    from lensc.export import aihub

    from . import describe

    with console.Progress() as progress:
        manifest = aihub.compile_on(
            options.device,
            options.graphs,
            options.output,
            write_fixed=_write_fixed,
            targets=[Target.parse(text) for text in options.target or ["onnxruntime:cpu"]],
            options=options.options,
            timeout_s=options.timeout,
            report=_reporter(progress),
            command=options.command,
        )
    return _show(options, options.output, manifest, lambda folder: describe.summary(manifest, folder))


def _write_fixed(graph: Graph, path: Path) -> int:
    """The vision graph as the backend qnn lowers it, for one slice."""
    from lensc.backends._qnn_compile import fix, save
    from lensc.backends._qnn_form import forms

    fixed = fix(graph, forms(graph.spec)[0], None)
    save(fixed.model, path)
    return fixed.multiply_adds


def _profile(options: argparse.Namespace) -> int:
    _check_ready()
    from lensc.export import aihub

    from . import describe

    with console.Progress() as progress:
        manifest, record = aihub.profile_on(
            options.device, options.bundle, timeout_s=options.timeout, report=_reporter(progress)
        )
    return _show(options, options.bundle, manifest, lambda folder: describe.measured([record]))


def _infer(options: argparse.Namespace) -> int:
    _check_ready()
    from lensc.export import aihub

    from . import describe

    with console.Progress() as progress:
        manifest, records = aihub.infer_on(
            options.device,
            options.bundle,
            pictures=options.image,
            timeout_s=options.timeout,
            report=_reporter(progress),
        )
    code = _show(options, options.bundle, manifest, lambda folder: describe.parity(records))
    aihub.check_parity(records)
    return code


def _check_ready() -> None:
    """Raise before anything heavy is imported or anybody asked, if there is no client or no token."""
    from lensc.export.aihub_service import check_ready

    check_ready()
    print(NOTE, file=sys.stderr)


def _show(options: argparse.Namespace, folder: str, manifest: Manifest, text: Callable[[Any], str]) -> int:
    from . import describe

    if options.json:
        console.print_json({"bundle": folder, "untested": UNTESTED, "manifest": describe.as_json(manifest)})
    else:
        print(text(Path(folder)))
        print(f"({UNTESTED})")
    return 0


def _reporter(progress: console.Progress) -> Report:
    def report(event: Any) -> None:
        if event.state in ("start", "part"):
            progress.show(event.stage, None if event.total == 1 else (event.index, event.total))
        else:
            progress.line(f"  {event.stage}: " + ("kept" if event.state == "kept" else f"{event.seconds:.1f} s"))

    return report
