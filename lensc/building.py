"""The verbs `export`, `compile`, `build` and `quantize`: from a checkpoint to graphs, a bundle, a recipe."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lensc.backends.errors import UnavailableError, UsageError
from lensc.export.quantize.scheme import MARKS, NAMED

from . import console

if TYPE_CHECKING:
    from lensc.backends.base import Target
    from lensc.backends.bundle import Manifest
    from lensc.export.stages import StageEvent

EXPORT_PACKAGES = {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors"}
"""What the extra `export` installs."""


def add_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the four verbs; `verb(name, function, help, more)` makes the parser of one."""
    resumes = "An interrupted run leaves OUT.partial beside OUT; run the same command again to go on from there."
    export = verb("export", _export, "turn a checkpoint into verified portable graphs", resumes)
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or demo for the one that is shipped"
    )
    _scheme(export)
    _memory(export)
    _output(export, "graphs/")

    compile_ = verb("compile", _compile, "compile a folder of graphs for one or more targets", resumes)
    compile_.add_argument("graphs", metavar="GRAPHS", help="folder made by lensc export")
    _targets(compile_)
    text = "pictures for a target that fixes the ranges of activations (qnn); default: built-in ones"
    compile_.add_argument("--calibration", metavar="FOLDER", help=text)
    _on_npu(compile_)
    _memory(compile_)
    _output(compile_, "bundle/")

    build = verb("build", _build, "export and compile in one go", resumes)
    build.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or demo for the one that is shipped"
    )
    _scheme(build)
    _targets(build)
    _on_npu(build)
    _memory(build)
    _output(build, "bundle/")

    quantize = verb(
        "quantize",
        _quantize,
        "search the smallest recipe that keeps to a loss",
        "Measures what each group of weights costs in each format, and writes a recipe for lensc build --scheme. The loss "
        "of a recipe is measured with the answers of the calibration pictures: how many of 100 the float model gives "
        "right and the recipe does not; where the float model gives fewer than 20 right, how many of 100 tokens of the "
        "answers are chosen otherwise.",
    )
    quantize.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or demo for the one that is shipped"
    )
    quantize.add_argument("--search", action="store_true", help="search a recipe (this is all that quantize does)")
    text = "the most points of 100 that the recipe may lose (default: 1)"
    quantize.add_argument("--max-loss", metavar="POINTS", type=float, default=1.0, help=text)
    text = "how weights of 4 bits are chosen: gptq (the default), or rtn, which is much faster"
    quantize.add_argument("--method", metavar="METHOD", default="gptq", help=text)
    quantize.add_argument("--scheme", metavar="SCHEME", help="of lensc build; a search makes one")
    text = "folder of a LoRA adapter in PEFT's format, merged into the checkpoint while it is read"
    quantize.add_argument("--adapter", metavar="FOLDER", help=text)
    text = "pictures with questions.json; default: built-in ones"
    quantize.add_argument("--calibration", metavar="FOLDER", help=text)
    _targets(quantize)
    _memory(quantize)
    quantize.add_argument("-o", "--output", metavar="FILE", required=True, help="recipe to write, e.g. recipe.toml")


def _output(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("-o", "--output", metavar="OUT", required=True, help=f"folder to make, e.g. {example}")


def _memory(verb: argparse.ArgumentParser) -> None:
    text = "the most memory a stage may take, e.g. 4GiB; one that takes more ends the build (default: no limit)"
    verb.add_argument("--max-memory", metavar="SIZE", help=text)


def _scheme(verb: argparse.ArgumentParser) -> None:
    text = "folder of a LoRA adapter in PEFT's format, merged into the checkpoint while it is read"
    verb.add_argument("--adapter", metavar="FOLDER", help=text)
    names = (name + (f" ({MARKS[name]})" if name in MARKS else "") for name in NAMED)
    text = f"how weights are stored: {', '.join(names)}, or a recipe file (.toml); default: f32"
    verb.add_argument("--scheme", metavar="SCHEME", default="f32", help=text)
    text = "pictures for a scheme that is calibrated (gptq), with questions.json if there are questions and answers; "
    verb.add_argument("--calibration", metavar="FOLDER", help=text + "default: built-in ones")


def _targets(verb: argparse.ArgumentParser) -> None:
    text = (
        "backend:processor[:arch], e.g. onnxruntime:cpu (the default), or for one graph, e.g. vision=qnn:npu:sm8650; "
    )
    text += "repeat for several; see lensc devices"
    verb.add_argument("--target", metavar="TARGET", action="append", default=[], help=text)


def _on_npu(verb: argparse.ArgumentParser) -> None:
    text = "a node that may run on the CPU where all others must be on the NPU (qnn); repeat for several"
    verb.add_argument("--allow-cpu", metavar="NODE", action="append", default=[], help=text)
    text = (
        "tokens of past that a decoder on an NPU is compiled for (qnn; default: 2048, or the model's if that is less)"
    )
    verb.add_argument("--context", metavar="N", type=int, help=text)


# --- verbs --------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    with _needs_export_packages():
        from lensc.export import build
    with console.Progress() as progress:
        manifest = build.export_checkpoint(
            options.checkpoint,
            options.output,
            scheme=options.scheme,
            adapter=options.adapter,
            calibration=options.calibration,
            max_memory=_bytes(options.max_memory),
            report=_reporter(progress),
            command=options.command,
        )
    return _made(options, manifest)


def _compile(options: argparse.Namespace) -> int:
    with _needs_export_packages():
        from lensc.export import build
    with console.Progress() as progress:
        manifest = build.compile_graphs(
            options.graphs,
            _parsed(options.target),
            options.output,
            calibration=options.calibration,
            cpu_nodes=options.allow_cpu,
            context=options.context,
            max_memory=_bytes(options.max_memory),
            report=_reporter(progress),
            command=options.command,
        )
    return _made(options, manifest)


def _build(options: argparse.Namespace) -> int:
    targets = _parsed(options.target)
    with _needs_export_packages():
        from lensc.export import build
    with console.Progress() as progress:
        manifest = build.build(
            options.checkpoint,
            targets,
            options.output,
            scheme=options.scheme,
            adapter=options.adapter,
            calibration=options.calibration,
            cpu_nodes=options.allow_cpu,
            context=options.context,
            max_memory=_bytes(options.max_memory),
            report=_reporter(progress),
            command=options.command,
        )
    return _made(options, manifest)


def _quantize(options: argparse.Namespace) -> int:
    if not options.search or options.scheme is not None:
        scheme = options.scheme or "int4-gptq"
        raise UsageError(
            "lensc quantize searches a recipe: give --search and no --scheme; to quantize by one that exists: "
            + shlex.join(["lensc", "build", options.checkpoint, "--scheme", scheme, "-o", "bundle/"])
        )
    with _needs_export_packages():
        from lensc.export import search
    with console.Progress() as progress:
        found = search.search_recipe(
            options.checkpoint,
            options.output,
            max_loss=options.max_loss,
            targets=_parsed(options.target),
            method=options.method,
            adapter=options.adapter,
            calibration=options.calibration,
            max_memory=_bytes(options.max_memory),
            report=_reporter(progress),
            command=options.command,
        )
    if options.json:
        console.print_json({"recipe": options.output, **search.as_json(found)})
    else:
        print(search.summary(found, options.output))
    return 0


# --- what verbs share ---------------------------------------------------------------------------------------------


@contextmanager
def _needs_export_packages() -> Iterator[None]:
    """Say which extra to install where a package of the compile host is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXPORT_PACKAGES:
            raise
        raise UnavailableError(f"{package} is not installed; pip install 'lensc[export]'") from error


def _bytes(text: str | None) -> int | None:
    """The bytes of `--max-memory`."""
    from lensc.export.memory import parse_bytes

    return None if text is None else parse_bytes(text)


def _parsed(targets: list[str]) -> list[Target | tuple[str, Target]]:
    """The targets without repetition, each for all graphs or with the graph before it; onnxruntime:cpu if there are none."""
    from lensc.backends.base import Target

    parts = [text.rpartition("=") for text in targets or ["onnxruntime:cpu"]]
    parsed = ((graph, Target.parse(text)) if equals else Target.parse(text) for graph, equals, text in parts)
    return list(dict.fromkeys(parsed))


def _reporter(progress: console.Progress) -> Callable[[StageEvent], None]:
    def report(event: StageEvent) -> None:
        if event.state in ("start", "part"):
            progress.show(event.stage, (event.index, event.total))
        else:
            progress.line(f"  {event.stage}: " + ("kept" if event.state == "kept" else f"{event.seconds:.1f} s"))

    return report


def _made(options: argparse.Namespace, manifest: Manifest) -> int:
    from pathlib import Path

    from . import describe

    folder = Path(options.output)
    if options.json:
        console.print_json({"bundle": str(folder), "manifest": describe.as_json(manifest)})
    else:
        print(describe.summary(manifest, folder))
    return 0
