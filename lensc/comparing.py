"""`lensc compare`: every backend and scheme of some bundles side by side, in speed, memory, parity and answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import benching, console

PROMPT_TOKENS, NEW_TOKENS, REPETITIONS, MAX_NEW_TOKENS = 32, 32, 3, 256
MOST_PICTURES = 100_000


def add_compare(verb: argparse.ArgumentParser) -> None:
    """The arguments of `lensc compare`."""
    verb.add_argument("bundle", metavar="BUNDLE", nargs="+", help="bundles of one checkpoint, e.g. in several schemes")
    text = "folder of pictures, with questions.json for questions and answers (default: pictures of the demo model, for that)"
    verb.add_argument("--images", metavar="DIR", help=text)
    text = "use the first N pictures (default: all)"
    verb.add_argument("--max-pictures", metavar="N", type=int, help=text)
    text = "most tokens of an answer (default: %(default)s)"
    verb.add_argument("--max-new-tokens", metavar="N", type=int, default=MAX_NEW_TOKENS, help=text)
    text = "as for lensc run; repeat for several (default: every target of each bundle)"
    verb.add_argument("--device", "--target", metavar="DEVICE", action="append", default=[], dest="device", help=text)
    benching.add_tuning(verb)
    speed = verb.add_argument_group("speed", "Of a request about the picture with the most slices.")
    text = f"tokens of text behind the picture (default: {PROMPT_TOKENS})"
    speed.add_argument("-p", "--prompt-tokens", metavar="N", type=int, help=text)
    speed.add_argument("-n", "--new-tokens", metavar="N", type=int, help=f"tokens to decode (default: {NEW_TOKENS})")
    speed.add_argument("-r", "--repetitions", metavar="N", type=int, help=f"runs that count (default: {REPETITIONS})")
    out = verb.add_argument_group("what is written")
    out.add_argument("--html", metavar="FILE", help="write a page with charts as well: one file that needs no other")
    out.add_argument("--output", metavar="FILE", help="write all of it as JSON as well")


def compare(options: argparse.Namespace) -> int:
    """Measure, ask, print. Returns 1 if a placement failed that should not."""
    from lensc.backends.bundle import load_manifest
    from lensc.backends.codec import encode
    from lensc.backends.files import write_text

    from . import compare_page, compare_run, compare_text

    page = None if options.html is None else console.writable(options.html, "--html", "compare.html")
    output = None if options.output is None else console.writable(options.output, "--output", "compare.json")
    most = benching.MOST_TOKENS
    settings = compare_run.Settings(
        devices=tuple(options.device),
        threads=benching.threads_of(options.threads),
        tuned=options.tuned,
        repetitions=benching.count("-r", options.repetitions, REPETITIONS, 1, benching.MOST_RUNS),
        prompt_tokens=benching.count("-p", options.prompt_tokens, PROMPT_TOKENS, 1, most),
        new_tokens=benching.count("-n", options.new_tokens, NEW_TOKENS, 1, most),
        max_new_tokens=benching.count("--max-new-tokens", options.max_new_tokens, MAX_NEW_TOKENS, 1, most),
    )
    most = benching.count("--max-pictures", options.max_pictures, MOST_PICTURES, 1, MOST_PICTURES)
    bundles = [(folder, load_manifest(folder)) for folder in map(Path, dict.fromkeys(options.bundle))]
    compare_run.check_same_model(bundles)
    with compare_run.questions(options.images, bundles[0][1], most) as (source, items), console.Progress() as progress:
        made = compare_run.compared(bundles, settings, source, items, options.command, progress.show)
    if options.json:
        console.print_json(encode(made))
    else:
        print(compare_text.table_of(made), flush=True)
    if output is not None:
        write_text(output, json.dumps(encode(made), indent=1, ensure_ascii=False) + "\n")
    if page is not None:
        write_text(page, compare_page.page(made))
    return benching.failed([column.row for column in made.columns])
