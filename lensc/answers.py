"""`lensc run` and `lensc chat`: answers on stdout as they are made, everything else on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lensc
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import LensError, PromptError, UsageError
from lensc.export.memory import parse_bytes
from lensc.runtime.options import resolve
from lensc.runtime.pipeline import VLM, Metrics, Result, Stream
from lensc.runtime.plan import Placement

from . import console

MAX_THREADS = 1024
"""More than any machine has cores; an engine asked for a million threads takes the machine down."""

HELP = """\
/image PATH   show a picture with the next message; repeat for several
/save FILE    write the conversation to a file; /load FILE goes on with one
/drop         forget the oldest turn
/clear        forget the conversation
/metrics      times and sizes of the last answer, and what runs where
/help         this list
/quit         leave (or Ctrl-D)
Ctrl-C ends an answer. A message that begins with / is written with a space before it."""


def run(options: argparse.Namespace) -> int:
    """Answer one question."""
    prompt = sys.stdin.read().strip() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise UsageError('the prompt is empty; give the question, e.g. "Read the text."')
    arguments = _arguments(options)
    pictures = [os.path.expanduser(path) for path in options.image]
    with _load(options, arguments) as vlm, console.Progress() as progress:
        progress.show("thinking")
        beams = (options.num_beams or 1) > 1
        interrupted = False
        if options.json or beams:
            result = vlm.generate(prompt, pictures, system_prompt=options.system, **arguments)
            progress.clear()
            if not options.json:
                print(result.text, flush=True)
        else:
            stream = vlm.generate(prompt, pictures, system_prompt=options.system, stream=True, **arguments)
            with _interrupt_cancels(stream):
                result = _print_pieces(stream, progress)
            interrupted = result.finish_reason == "cancelled"
    if options.json:
        console.print_json(_as_json(result, vlm))
    if not options.quiet:
        _print_notes(result.metrics.notes)
    if options.metrics:
        print(metrics_text(result.metrics, vlm), file=sys.stderr)
    if options.timeline is not None:
        result.timeline.write(options.timeline)
    if interrupted:
        raise KeyboardInterrupt
    return 0


def chat(options: argparse.Namespace) -> int:
    """Hold a conversation over stdin and stdout. Returns 1 if stdin is no terminal and a message failed."""
    arguments = _arguments(options)
    with _load(options, arguments) as vlm:
        conversation = Conversation(vlm, options, arguments)
        for picture in options.image:
            conversation.add_picture(picture)
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{vlm.spec.name}. /help lists the commands, /quit leaves.", file=sys.stderr)
        for line in _lines(interactive):
            try:
                if not conversation.take(line):
                    break
            except LensError as error:
                conversation.failed = True
                print(f"lensc: error: {console.printable(str(error))}", file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(cancelled)", file=sys.stderr)
    return 1 if conversation.failed and not interactive else 0


@dataclass
class Conversation:
    """What was said so far, and the pictures that wait for the next message."""

    vlm: VLM
    options: argparse.Namespace
    arguments: dict[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    last: Result | None = None
    failed: bool = False

    def take(self, line: str) -> bool:
        """Obey a command or answer a message. Returns False to leave."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.strip():
            return True
        if command == "/quit":
            return False
        if command == "/image":
            self.add_picture(rest)
        elif command == "/save":
            if not rest or not self.messages:
                raise UsageError("/save: " + ("nothing was said yet" if rest else "expected the file to write"))
            tokens = self.vlm.save(os.path.expanduser(rest), self.messages)
            print(f"({rest}: {len(self.messages)} messages, {tokens} tokens of KV cache)", file=sys.stderr)
        elif command == "/load":
            if not rest:
                raise UsageError("/load: expected the file that /save wrote")
            restored = self.vlm.restore(os.path.expanduser(rest))
            self.messages, self.pictures = restored.messages, []
            _print_notes(restored.notes)
            print(
                f"({rest}: {len(self.messages)} messages, {restored.cached_tokens} tokens of KV cache)", file=sys.stderr
            )
        elif command == "/drop":
            self.drop()
        elif command == "/clear":
            self.messages, self.pictures = [], []
            self.vlm.forget()
            print("(forgotten)", file=sys.stderr)
        elif command == "/metrics":
            shown = metrics_text(self.last.metrics, self.vlm) if self.last else "no answer yet"
            print(shown, file=sys.stderr)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/"):
            raise UsageError(f"{command}: no such command; /help lists them")
        else:
            self.answer(line.strip())
        return True

    def add_picture(self, path: str) -> None:
        """Open a picture for the next message. It is kept, so that the file may change or go."""
        from lensc.runtime.picture import open_picture

        if not path:
            raise UsageError("/image: expected the path of a picture")
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        opened = open_picture(os.path.expanduser(path))
        self.pictures.append(opened.image)
        if not self.options.quiet:
            _print_notes([f"{path}: {note}" for note in opened.notes] or [f"{path}: {opened.width}x{opened.height}"])

    def answer(self, text: str) -> None:
        """Answer `text` and remember both. If it fails, the conversation and the waiting pictures stay as they were."""
        content = [*({"type": "image", "image": p} for p in self.pictures), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        if not self.messages and self.options.system:
            messages.insert(0, {"role": "system", "content": self.options.system})
        try:
            result = self._generate(messages)
        except PromptError as error:
            if not self.messages or self.options.when_full == "drop_oldest":
                raise
            ways = "/drop forgets the oldest turn, /clear all; lensc chat --when-full drop_oldest leaves out what is too much"
            raise PromptError(f"{error}. {ways}") from error
        self.last = result
        if not self.options.quiet:  # what was noted of pictures was told when they were opened
            notes = result.metrics.notes
            _print_notes([n for n in notes if "max_ttft_ms" in n or not n.startswith("picture ")])
        if self.options.json:
            console.print_json(_as_json(result, self.vlm))
        if result.text or result.finish_reason != "cancelled":
            self.messages, self.pictures = [*messages, {"role": "assistant", "content": result.text}], []

    def drop(self) -> None:
        """Forget the oldest turn: what was asked first, and the answer."""
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        if len(self.messages) == first:
            raise UsageError("/drop: nothing was said yet")
        following = [i for i, m in enumerate(self.messages) if i > first and m["role"] == "user"]
        self.messages = [*self.messages[:first], *self.messages[following[0] :]] if following else []
        turns = len(following)
        print(f"(forgotten; {turns or 'no'} {'turn is' if turns == 1 else 'turns are'} left)", file=sys.stderr)

    def _generate(self, messages: list[dict[str, Any]]) -> Result:
        arguments = self.arguments | {"when_full": self.options.when_full}
        with console.Progress() as progress:
            progress.show("thinking")
            if self.options.json or (self.options.num_beams or 1) > 1:
                result: Result = self.vlm.chat(messages, **arguments)
                progress.clear()
                if not self.options.json:
                    print(result.text, flush=True)
                return result
            stream = self.vlm.chat(messages, stream=True, **arguments)
            with _interrupt_cancels(stream):
                return _print_pieces(stream, progress)


def metrics_text(metrics: Metrics, vlm: VLM) -> str:
    """The metrics as a table, with where each graph runs and why."""
    speed = metrics.decode_tokens_per_s
    encoded = [ms for ms in metrics.image_ms if ms > 0]
    each = f", {sum(encoded) / len(encoded):.0f} ms a slice" if encoded else ""
    reused = f", {metrics.reused_tokens} more were in the KV cache" if metrics.reused_tokens else ""
    estimate_ms = metrics.ttft_estimate_ms
    estimated = "" if estimate_ms is None else f", {estimate_ms:.0f} ms estimated"
    rows = [
        ("first token", f"{metrics.ttft_ms:.0f} ms{estimated}"),
        ("prepare", f"{metrics.prepare_ms:.0f} ms"),
        *([("loading", f"{metrics.load_ms:.0f} ms, to save memory")] if metrics.load_ms else []),
        ("pictures", f"{len(metrics.image_ms)} slices, {metrics.slices_from_cache} from the cache{each}"),
        ("overlap", f"{metrics.overlap_ms:.0f} ms" if vlm.overlap.on else f"off: {vlm.overlap.reason}"),
        ("prefill", f"{metrics.prefill_ms:.0f} ms for {metrics.prompt_tokens - metrics.reused_tokens} tokens{reused}"),
        ("decode", f"{metrics.new_tokens} tokens" + (f", {speed:.1f} tokens/s" if speed else "")),
        ("guessed", f"{metrics.drafted_tokens} tokens, {metrics.accepted_tokens} of them right"),
        ("KV cache", console.size(metrics.kv_cache_bytes)),
    ]
    if metrics.peak_memory_bytes is not None:
        rows.append(("peak memory", console.size(metrics.peak_memory_bytes)))
    for placed in () if vlm.plan is None else vlm.plan.placements:
        rows.append((placed.graph, f"{placed.effective}: {console.printable(placed.reason)}"))
    return console.table(rows)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The generation parameters that were given."""
    names = (
        "do_sample",
        "num_beams",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "max_new_tokens",
        "seed",
        "prompt_lookup_num_tokens",
        "max_ttft_ms",
    )
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _load(options: argparse.Namespace, arguments: Mapping[str, Any]) -> VLM:
    """The bundle, once all that was given beside it is known to be good: loading may take a minute."""
    from lensc.runtime.picture_source import check_picture

    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(f"--threads {options.threads}: expected 1 to {MAX_THREADS}")
    resolve(load_manifest(Path(options.bundle)).model.generation, **arguments)
    for picture in options.image:
        check_picture(os.path.expanduser(picture))
    with console.Progress() as progress:
        progress.show(f"loading {options.bundle}")
        vlm = lensc.load(
            options.bundle,
            target=options.target,
            threads=options.threads,
            selftest=options.selftest,
            vision_padding=options.vision_padding,
            picture_cache_bytes=0 if options.picture_cache is None else parse_bytes(options.picture_cache),
            max_memory_bytes=None if options.max_memory is None else parse_bytes(options.max_memory),
            overlap=options.overlap,
            on_failure=options.on_failure,
            placement=options.placement,
            tuned=options.tuned,
            max_slice_nums=options.max_slice_nums,
        )
    if not options.quiet:
        _print_notes([event.text for event in vlm.events])
    return vlm


def _print_pieces(stream: Stream, progress: console.Progress) -> Result:
    for piece in stream:
        progress.clear()
        print(piece, end="", flush=True)
    progress.clear()
    print(flush=True)
    return stream.result


@contextmanager
def _interrupt_cancels(stream: Stream) -> Iterator[None]:
    """While inside, the first Ctrl-C ends the answer after the step in progress; the second interrupts as always."""

    def cancel(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stream.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of stdin until it ends; Ctrl-C at the prompt drops the line."""
    if not interactive:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # not part of every Python; it gives input() history and editing
        import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {console.printable(note)}", file=sys.stderr)


def _as_json(result: Result, vlm: VLM) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "metrics": dataclasses.asdict(result.metrics),
        "overlap": dataclasses.asdict(vlm.overlap),
        "plan": [_placed(p) for p in vlm.plan.placements] if vlm.plan else [],
        "events": [dataclasses.asdict(event) for event in vlm.events],
    }


def _placed(placement: Placement) -> dict[str, Any]:
    """`target` is where the graph runs, `requested` what was asked for, null if the choice was open."""
    return {
        "graph": placement.graph,
        "target": str(placement.effective),
        "requested": None if placement.requested is None else str(placement.requested),
        "state": placement.state,
        "measured_ms": None if placement.measured is None else placement.measured.ms,
        "reason": placement.reason,
    }
