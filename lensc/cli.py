"""The command line: `lensc <verb>`, one function per verb; verbs with many arguments lie in modules of their own.

The result goes to stdout, everything else (progress, notes, metrics, errors) to stderr. Exit codes: 0 done, 1 failed,
2 wrong usage, 130 interrupted, 141 the reader of stdout went away. An error is one line, `lensc: error: …`; with
`--json` a second line on stderr holds it as `{"error": {"type", "message", "exit_code"}}`. Nothing heavier than
argparse is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from lensc.backends.errors import LensError, UsageError

from . import aihub, benching, building, comparing, console, doctor, planning, tune

INTERRUPTED, PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        options = parser().parse_args(arguments)
        if not hasattr(options, "verb"):
            parser().print_help(sys.stderr)
            return UsageError.exit_code
        options.command = shlex.join(["lensc", *arguments])
        verb: Callable[[argparse.Namespace], int] = options.verb
        code = verb(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout at exit and would complain; there is nobody left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("\nlensc: interrupted", file=sys.stderr)
        return INTERRUPTED
    except LensError as error:
        return _fail(error, error.exit_code, str(error), as_json, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(error, LensError.exit_code, f"{where}{error.strerror or error}", as_json, debug)
    except MemoryError as error:
        return _fail(error, LensError.exit_code, "out of memory; free some, or use a smaller model", as_json, debug)
    except Exception as error:  # noqa: BLE001  (a bug, told in one line; --debug shows all of it)
        text = f"unexpected {type(error).__name__}: {error}; this is a bug in lensc, please report it with the output"
        return _fail(error, LensError.exit_code, f"{text} of the same command under --debug", as_json, debug)


def _fail(error: BaseException, code: int, message: str, as_json: bool, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = console.printable(message)
    print(f"lensc: error: {message}", file=sys.stderr)
    if as_json:
        document = {"error": {"type": type(error).__name__, "message": message, "exit_code": code}}
        console.print_json(document, sys.stderr)
    return code


# --- arguments ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as UsageError, so that all errors look alike."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = Parser(prog="lensc", description="Compiler and runtime for vision-language models on edge devices.")
    top.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def verb(name: str, function: Callable[[argparse.Namespace], int], help: str, more: str = "") -> Parser:
        added = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}".strip())
        added.set_defaults(verb=function)
        _common(added)
        return added

    building.add_verbs(verb)

    inspect = verb("inspect", _inspect, "show what a bundle or a folder of graphs holds")
    inspect.add_argument("bundle", metavar="BUNDLE")
    inspect.add_argument("--verify", action="store_true", help="compute the SHA-256 of every file, too")

    explain = verb("explain", _explain, "show where every node of a bundle runs, and why not on its processor")
    explain.add_argument("bundle", metavar="BUNDLE")
    explain.add_argument("--target", metavar="TARGET", help="only the artifacts of this target")
    text = "fail if more than N nodes of an artifact for a GPU or NPU run on the CPU"
    explain.add_argument("--max-cpu-nodes", metavar="N", type=int, help=text)

    run = verb("run", _run, "answer one question about pictures; the answer is streamed")
    run.add_argument("bundle", metavar="BUNDLE")
    run.add_argument("prompt", metavar="PROMPT", help="the question; - reads it from stdin")
    run.add_argument("--image", metavar="PICTURE", action="append", default=[], help="picture file; repeat for several")
    run.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    run.add_argument("--metrics", action="store_true", help="print times and sizes to stderr afterwards")
    text = "write what the time went to as a Chrome trace, which ui.perfetto.dev and chrome://tracing show"
    run.add_argument("--timeline", metavar="FILE", help=text)
    _generation(run)

    chat = verb("chat", _chat, "hold a conversation about pictures; /help lists its commands")
    chat.add_argument("bundle", metavar="BUNDLE")
    chat.add_argument("--image", metavar="PICTURE", action="append", default=[], help="picture of the first message")
    chat.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    text = "a conversation has no room in the context: error (the default), or drop_oldest, which leaves out its oldest turns"
    chat.add_argument("--when-full", choices=("error", "drop_oldest"), default="error", help=text)
    _generation(chat)

    more = "Bandwidth, products by dtype and threads, a layer of each half of the model, what the engine costs: half a minute."
    planning.add_profile(verb("profile", planning.profile, "measure this machine and keep its profile", more))
    more = "From sizes and the device's profile, before anything is downloaded or compiled; each figure says what it rests on."
    planning.add_plan(verb("plan", planning.plan, "predict memory and times of a model on a device", more))

    more = "A request is a picture and a prompt of random tokens; decoding goes on behind stop ids, and nothing is guessed ahead."
    benching.add_bench(verb("bench", benching.bench, "measure how fast a bundle is here", more))
    more = "Threads, tokens fed at once, settings of the engine, guesses; what is kept, lensc run and all others begin with."
    tune.add_tune(verb("tune", tune.tune, "search the settings with which a bundle is fastest here", more))
    more = "Runs a tiny model on every engine, and with a bundle its golden probes. Ends with 1 if the essential fails."
    doctor.add_doctor(verb("doctor", doctor.doctor, "say what works here, what is missing and what would help", more))

    more = "Speed and memory as lensc bench measures them; answers to questions about pictures; a page with charts."
    comparing.add_compare(verb("compare", comparing.compare, "hold backends and schemes of a model side by side", more))

    text = "compile, time and check the vision graph on a phone that Qualcomm AI Hub hosts"
    hosted = verbs.add_parser(
        "aihub", help=text, description=f"{text[0].upper()}{text[1:]}. This is untested against the service."
    )
    aihub.add_verbs(hosted, _common)

    verb("devices", _devices, "list each engine and processor as usable or not, and why")
    return top


def _common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="machine-readable output")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")


class Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import lensc

        print(f"lensc {lensc.__version__}")
        parser.exit()


def _generation(verb: Parser) -> None:
    where = verb.add_argument_group("where it runs")
    text = "backend:processor[:arch] for all, or vision=TARGET,decoder=TARGET; default: the best usable one"
    where.add_argument("--device", "--target", metavar="DEVICE", dest="target", help=text)
    where.add_argument("--threads", metavar="N", type=int, help="default: one per physical core")
    where.add_argument("--vision-padding", metavar="MODE", help="official, masked or per_slice; default: the bundle's")
    text = "cells a picture is cut into at most; fewer are faster, and small print is lost (default, and most: the model's)"
    where.add_argument("--max-slice-nums", metavar="N", type=int, help=text)
    text = "where all graphs together would take more, e.g. 6GiB, load one at a time (default: no limit)"
    where.add_argument("--max-memory", metavar="SIZE", help=text)
    text = "keep image embeddings on disk, up to e.g. 512MiB, for the next time a picture is seen (default: do not)"
    where.add_argument("--picture-cache", metavar="SIZE", help=text)
    text = "encode pictures while the prompt before them is fed (default: if the graphs run on different processors)"
    where.add_argument("--overlap", action=argparse.BooleanOptionalAction, help=text)
    text = "measured (the default): what is fastest here, timed once a machine; ranked: npu before gpu before cpu"
    where.add_argument("--placement", metavar="HOW", default="measured", help=text)
    text = "a golden probe fails when loading: replace (the default), error, warn, or off, which runs none"
    where.add_argument("--selftest", metavar="POLICY", default="replace", help=text)
    where.add_argument("--no-selftest", dest="selftest", action="store_const", const="off", help="--selftest off")
    text = "a device fails while it answers: replan (the default), which goes on elsewhere, or error"
    where.add_argument("--on-failure", metavar="POLICY", default="replan", help=text)
    text = "do not use what lensc tune has kept for this bundle on this machine"
    where.add_argument("--no-tuned", dest="tuned", action="store_false", help=text)
    how = verb.add_argument_group("how it answers", "Greedy unless told otherwise; named as in transformers.")
    how.add_argument("--max-new-tokens", metavar="N", type=int)
    how.add_argument("--do-sample", action="store_true", default=None, help="draw with the model's defaults below")
    how.add_argument("--temperature", metavar="T", type=float)
    how.add_argument("--top-k", metavar="K", type=int)
    how.add_argument("--top-p", metavar="P", type=float)
    how.add_argument("--repetition-penalty", metavar="R", type=float)
    how.add_argument("--num-beams", metavar="N", type=int)
    text = "most tokens guessed ahead where that pays, 0 to 7 (the default); changes the speed only"
    how.add_argument("--prompt-lookup-num-tokens", metavar="N", type=int, help=text)
    text = (
        "cut pictures as coarsely as it takes for the first token to come in N milliseconds, by what was measured here"
    )
    how.add_argument("--max-ttft-ms", metavar="N", type=float, help=text)
    how.add_argument("--seed", metavar="N", type=int, help="makes draws repeatable")
    verb.add_argument("-q", "--quiet", action="store_true", help="no notes on stderr")


# --- verbs --------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    from pathlib import Path

    from lensc.backends.bundle import load_manifest

    from . import describe

    folder = Path(options.bundle)
    with console.Progress() as progress:
        if options.verify:
            progress.show(f"hashing {folder}")
        manifest = load_manifest(folder, verify=options.verify)
    if options.json:
        console.print_json({"bundle": str(folder), "verified": options.verify, "manifest": describe.as_json(manifest)})
    else:
        print(describe.details(manifest, folder, options.verify))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from . import explain

    return explain.explain(options)


def _run(options: argparse.Namespace) -> int:
    from . import answers

    return answers.run(options)


def _chat(options: argparse.Namespace) -> int:
    from . import answers

    return answers.chat(options)


def _devices(options: argparse.Namespace) -> int:
    from lensc.backends import registry
    from lensc.backends.codec import encode
    from lensc.profiles import probe

    from . import describe

    machine, probes = probe.machine(), registry.probes()
    if options.json:
        profile = encode(probe.device_profile(machine))
        console.print_json({"machine": str(machine), "profile": profile, "backends": [encode(p) for p in probes]})
    else:
        print(describe.devices(machine, probes))
    return 0
