"""The command line on a real bundle: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lensc
from lensc import answers, console
from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest
from lensc.backends.codec import encode
from lensc.backends.errors import ManifestError
from lensc.runtime.pipeline import VLM

Cli = Callable[..., Any]
BUG = "this is a bug in lensc, please report it with the output of the same command under --debug"
SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def vlm(made: Any) -> Iterator[VLM]:
    with lensc.load(made.bundle) as opened:
        yield opened


# --- export, compile, build, inspect, devices ---------------------------------------------------------------------


def test_export_and_compile(made: Any) -> None:
    assert made.exported["manifest"] == encode(load_manifest(made.graphs))
    assert made.exported["manifest"]["provenance"]["command"].startswith("lensc export /")
    manifest = load_manifest(made.bundle, verify=True)
    assert manifest.provenance.command.startswith("lensc compile /")
    lines = made.compiled.splitlines()
    assert lines[0].startswith(f"bundle {made.bundle}: MiniCPM-Llama3-V-2_5, f32, ")
    assert [line.split()[:2] for line in lines[1:3]] == [["vision", "onnxruntime:cpu"], ["decoder", "onnxruntime:cpu"]]
    assert "passed" in lines[-1] and "onnx" in lines[-1]


def test_build_passes_on_what_was_asked(made: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    build = importlib.import_module("lensc.export.build")
    asked = []

    def stub(checkpoint: str, targets: list[Target], out: str, **more: Any) -> Any:
        asked.append((checkpoint, [str(t) for t in targets], out, more["command"]))
        return load_manifest(made.bundle)

    monkeypatch.setattr(build, "build", stub)
    assert cli("build", "demo", "-o", "my bundle").code == 0
    two = cli("build", "ckpt", "--target", "a:cpu", "--target", "b:npu:v75", "--target", "a:cpu", "-o", "x", "--json")
    assert asked == [
        ("demo", ["onnxruntime:cpu"], "my bundle", "lensc build demo -o 'my bundle'"),
        ("ckpt", ["a:cpu", "b:npu:v75"], "x", "lensc build ckpt --target a:cpu --target b:npu:v75 --target a:cpu -o x --json"),
    ]  # fmt: skip
    assert json.loads(two.out)["bundle"] == "x"


def test_inspect(made: Any, cli: Cli) -> None:
    shown = cli("inspect", made.bundle, "--verify")
    assert (shown.code, shown.err) == (0, "")
    for part in (
        f"{made.bundle}: bundle format 1",
        "sizes and SHA-256 of all files are right",
        "MiniCPM-Llama3-V-2_5",
        "448 pixels, at most 9 cells, 96 embeddings a slice, vision_padding official",
        "2 layers, width 256, 1280 tokens",
        "patches: float32[slices, patches, 588]",
        "4 pairs like past_key.0: float32[past, batch, 2, 64]",
        "onnxruntime:cpu",
        "nodes on CPUExecutionProvider",
        "torch float32",
        "probe/probe-decoder.npz",
        "golden probe within ",
    ):
        assert part in shown.out
    plain = cli("inspect", made.bundle)
    assert "sizes of all files are right" in plain.out
    document = json.loads(cli("inspect", made.bundle, "--json").out)
    assert document == {"bundle": str(made.bundle), "verified": False, "manifest": encode(load_manifest(made.bundle))}


def test_inspect_graphs_without_artifacts(made: Any, cli: Cli) -> None:
    shown = cli("inspect", made.graphs)
    assert (
        shown.code == 0 and "none; make a bundle with lensc compile" in shown.out and "vision/model.onnx" in shown.out
    )


def test_devices(cli: Cli) -> None:
    shown = cli("devices")
    rows = [line.split() for line in shown.out.splitlines()]
    assert ["onnxruntime", "cpu", "yes", "runs", "here"] in [row[:5] for row in rows]
    document = json.loads(cli("devices", "--json").out)
    assert document["profile"]["processors"][0]["kind"] == "cpu"
    assert {"backend", "processor", "usable", "reason", "state"} <= document["backends"][0].keys()


# --- run ----------------------------------------------------------------------------------------------------------


def test_run_streams_the_answer_to_stdout_alone(bundle: Path, picture: Path, cli: Cli, vlm: VLM) -> None:
    shown = cli("run", bundle, "--image", picture, "Read the text.", "--metrics", *SHORT)
    stream = vlm.generate("Read the text.", [picture], max_new_tokens=8, stream=True)
    assert (shown.code, shown.out) == (0, "".join(stream) + "\n")
    lines = [line for line in shown.err.splitlines() if "the answer was cut off after 8 tokens" not in line]
    assert lines[0] == "note: picture 1: 64x64 resized to 448x448"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "first token", "prepare", "pictures", "overlap", "prefill", "decode", "guessed", "KV cache", "peak memory",
        "vision", "decoder",
    ]  # fmt: skip
    assert cli("run", bundle, "--image", picture, "Read the text.", "-q", *SHORT).err == ""


def test_run_within_a_time_shows_what_it_gave_up_and_where_the_time_went(
    bundle: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (900, 500), (90, 200, 30)).save(tmp_path / "large.png")
    argv = ("run", bundle, "--image", tmp_path / "large.png", "What?", "--max-new-tokens", 2)
    shown = cli(*argv, "--max-ttft-ms", 1, "--metrics", "--timeline", tmp_path / "trace.json")
    assert shown.code == 0 and "ms estimated" in shown.err
    assert "note: picture 1: 1 slice instead of 3, for max_ttft_ms: about " in shown.err
    assert "note: max_ttft_ms=1 cannot be kept: the least is about " in shown.err
    spans = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [s["name"] for s in spans if s["ph"] == "X" and s["cat"] == "vision"] == ["slice 1"]
    metrics = json.loads(cli(*argv, "--max-ttft-ms", 1e6, "--json").out)["metrics"]
    assert (len(metrics["image_ms"]), metrics["slices_given_up"]) == (3, 0)
    assert 0 < metrics["ttft_estimate_ms"] < 1e6
    wrong = cli(*argv, "--max-ttft-ms", 0)
    assert (wrong.code, wrong.out) == (2, "") and "max_ttft_ms=0.0: expected a number above 0" in wrong.err
    lost = cli(*argv, "--timeline", tmp_path / "none" / "trace.json")
    assert lost.code == 1 and "trace.json: not written" in lost.err and lost.out
    say(monkeypatch, "What?")
    told = cli("chat", bundle, "--image", tmp_path / "large.png", "--max-ttft-ms", 1, "--max-new-tokens", 2)
    assert "note: picture 1: 1 slice instead of 3, for max_ttft_ms: about " in told.err


def test_run_with_several_pictures_a_system_prompt_and_a_draw(bundle: Path, picture: Path, cli: Cli, vlm: VLM) -> None:
    flags = (
        "--do-sample",
        "--temperature",
        0.9,
        "--top-k",
        20,
        "--top-p",
        0.95,
        "--repetition-penalty",
        1.1,
        "--seed",
        7,
    )
    more = (
        "--image",
        picture,
        "--image",
        picture,
        "--system",
        "Be brief.",
        "--vision-padding",
        "per_slice",
        "--threads",
        1,
    )
    shown = cli("run", bundle, "Which?", *more, *flags, *SHORT, "--json", "-q")
    expected = vlm.generate(
        "Which?",
        [picture, picture],
        system_prompt="Be brief.",
        do_sample=True,
        temperature=0.9,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.1,
        seed=7,
        max_new_tokens=8,
    )
    document = json.loads(shown.out)
    assert (shown.code, shown.err) == (0, "")
    assert (document["text"], tuple(document["token_ids"])) == (expected.text, expected.token_ids)
    assert document["finish_reason"] == expected.finish_reason
    assert document["metrics"]["new_tokens"] == len(expected.token_ids)
    assert document["metrics"]["prompt_tokens"] == expected.metrics.prompt_tokens
    assert [p["target"] for p in document["plan"]] == ["onnxruntime:cpu", "onnxruntime:cpu"]


def test_run_with_beams(bundle: Path, cli: Cli, vlm: VLM) -> None:
    shown = cli("run", bundle, "Hello!", "--num-beams", 3, *SHORT)
    assert shown.out == vlm.generate("Hello!", num_beams=3, max_new_tokens=8).text + "\n"


def test_run_reads_the_prompt_from_stdin(bundle: Path, cli: Cli, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nworld\n"))
    expected = "".join(vlm.generate("Hello\nworld", max_new_tokens=8, stream=True))
    assert cli("run", bundle, "-", *SHORT).out == expected + "\n"


def test_a_prompt_that_spells_a_placeholder_is_text(bundle: Path, cli: Cli) -> None:
    assert cli("run", bundle, "What is <image></image> <|eot_id|>?", *SHORT).code == 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C means something, as in a terminal: a shell starts what runs in its background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, once, when the first piece of an answer is about to be printed."""
    clear, sent = console.Progress.clear, []

    def clear_and_interrupt(self: console.Progress) -> None:
        clear(self)
        if not sent and sys._getframe(1).f_code.co_name == "_print_pieces":
            sent.append(True)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(console.Progress, "clear", clear_and_interrupt)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_run_keeps_what_was_said(bundle: Path, cli: Cli, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after_first_piece(monkeypatch)
    shown = cli("run", bundle, "Hello!", "--max-new-tokens", 500)
    whole = "".join(vlm.generate("Hello!", max_new_tokens=500, stream=True))
    said = shown.out.removesuffix("\n")
    assert shown.code == 130 and said and whole.startswith(said) and len(said) < len(whole)
    assert shown.err.splitlines()[-1] == "lensc: interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- chat ---------------------------------------------------------------------------------------------------------


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_remembers_turns_and_pictures(
    bundle: Path, picture: Path, cli: Cli, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "Hello!", "", f"/image '{picture}'", "What is it?", "/clear", "Hello!", "/quit", "never said")
    shown = cli("chat", bundle, *SHORT)
    first = vlm.chat([{"role": "user", "content": "Hello!"}], max_new_tokens=8, strip_pad=False).text
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]},
    ]
    second = "".join(vlm.chat(turns, max_new_tokens=8, stream=True))
    assert (shown.code, shown.out) == (0, f"{first}\n{second}\n{first}\n")
    assert f"note: {picture}: 64x64" in shown.err and "(forgotten)" in shown.err


def test_chat_with_first_picture_and_system_prompt_as_json(
    bundle: Path, picture: Path, cli: Cli, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "What is it?", "And now?")
    shown = cli("chat", bundle, "--image", picture, "--system", "Be brief.", "--json", *SHORT)
    documents = [json.loads(line) for line in shown.out.splitlines()]
    first = vlm.generate("What is it?", [picture], system_prompt="Be brief.", max_new_tokens=8)
    assert documents[0]["token_ids"] == list(first.token_ids)
    assert documents[1]["metrics"]["slices_from_cache"] == 1, "the picture is remembered, and not encoded again"
    assert documents[1]["metrics"]["prompt_tokens"] > documents[0]["metrics"]["prompt_tokens"]


def test_chat_goes_on_with_what_was_saved(
    bundle: Path, picture: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    say(monkeypatch, f"/image {picture}", "What is it?", f"/save {tmp_path / 'talk'}", "And now?")
    held = cli("chat", bundle, *SHORT)
    say(monkeypatch, f"/load {tmp_path / 'talk'}", "And now?", "/metrics", f"/load {bundle / 'manifest.json'}", "/save")
    shown = cli("chat", bundle, *SHORT)
    assert shown.out.splitlines() == held.out.splitlines()[1:]
    assert "talk: 2 messages, " in shown.err and "more were in the KV cache" in shown.err
    errors = [line for line in shown.err.splitlines() if "error" in line]
    assert (
        "manifest.json: no conversation of lensc, or damaged" in errors[0] and "expected the file to write" in errors[1]
    )
    assert shown.code == 1


def test_chat_commands(bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "/metrics", "/help", "Hello!", "/metrics")
    shown = cli("chat", bundle, *SHORT)
    lines = shown.err.splitlines()
    assert lines[0] == "no answer yet" and answers.HELP in shown.err
    runs = f"decoder      onnxruntime:cpu: best usable: runs here, onnxruntime {version('onnxruntime')}"
    assert lines[-1].startswith(runs)
    assert len(shown.out.splitlines()) == 1


def test_chat_goes_on_after_an_error(bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "/image /nowhere.png", "/image", "/imagine", "word " * 9000, "Hello!")
    shown = cli("chat", bundle, *SHORT)
    errors = [line for line in shown.err.splitlines() if line.startswith("lensc: error: ")]
    assert shown.code == 1 and len(shown.out.splitlines()) == 1
    assert [
        "/nowhere.png" in errors[0],
        "/image: expected the path" in errors[1],
        "/imagine: no such" in errors[2],
    ] == [True] * 3
    assert "the model's context is 8192" in errors[3] and len(errors) == 4


def test_chat_drops_the_oldest_turn(bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "/drop", "Hello!", "Again!", "word " * 9000, "/drop", "/drop")
    lines = cli("chat", bundle, *SHORT, "--system", "Be brief.").err.splitlines()
    assert lines[0] == "lensc: error: /drop: nothing was said yet"
    refused = next(line for line in lines if "the prompt has" in line)
    assert "8191 fit" in refused and "/drop forgets the oldest turn, /clear all; lensc chat --when-full" in refused
    assert lines[-2:] == ["(forgotten; 1 turn is left)", "(forgotten; no turns are left)"]


def test_interrupt_ends_the_answer_and_not_the_chat(bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after_first_piece(monkeypatch)
    say(monkeypatch, "Hello!", "Hello again!")
    shown = cli("chat", bundle, "--max-new-tokens", 200)
    assert shown.code == 0
    first, second = shown.out.splitlines()[0], shown.out.splitlines()[-1]
    assert first and second and len(first) < 100


# --- the frame ----------------------------------------------------------------------------------------------------


def test_version(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli("--version")
    assert ended.value.code == 0 and capsys.readouterr().out == f"lensc {lensc.__version__}\n"


def test_no_verb_shows_the_help(cli: Cli) -> None:
    shown = cli()
    assert (shown.code, shown.out) == (2, "") and "usage: lensc" in shown.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ManifestError("x: two\nlines \x1b[31m"), 1, "x: two\\nlines \\x1b[31m"),
        (PermissionError(13, "Permission denied", "a.png"), 1, "a.png: Permission denied"),
        (MemoryError(), 1, "out of memory; free some, or use a smaller model"),
        (
            KeyError("x"),
            1,
            f"unexpected KeyError: 'x'; {BUG}",
        ),
    ],
    ids=["lensc", "system", "memory", "bug"],
)
def test_errors_are_one_line(error: Exception, code: int, text: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr("lensc.cli._devices", fail)
    shown = cli("devices")
    assert (shown.code, shown.out, shown.err) == (code, "", f"lensc: error: {text}\n")
    line, document = cli("devices", "--json").err.splitlines()
    assert line == f"lensc: error: {text}"
    assert json.loads(document) == {"error": {"type": type(error).__name__, "message": text, "exit_code": code}}
    assert "Traceback" in cli("devices", "--debug").err


@pytest.mark.usefixtures("interruptible")
def test_interrupt_at_any_time(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lensc.cli._devices", lambda options: signal.raise_signal(signal.SIGINT))
    shown = cli("devices")
    assert shown.code == 130 and shown.err.strip() == "lensc: interrupted"


def test_reader_that_goes_away(bundle: Path) -> None:
    program = [sys.executable, "-P", "-m", "lensc", "inspect", str(bundle)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_missing_torch_is_named_with_its_extra(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; import lensc.cli; sys.exit(lensc.cli.main())"
    argv = [sys.executable, "-P", "-c", program, "build", "demo", "-o", str(tmp_path / "x")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lensc: error: torch is not installed; pip install 'lensc[export]'\n"


# --- console ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only() -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        with console.Progress(stream) as progress:
            progress.show("export vision", (2, 4))
            progress.line("done with it")
        assert ("[#####---------------] 2/4 export vision" in stream.getvalue()) == shown
        assert ("done with it\n" in stream.getvalue()) == shown
        assert stream.getvalue().endswith("\r\x1b[K") == shown


def test_table_sizes_and_escapes() -> None:
    assert console.table([("a", "bb", "c"), ("aaa", "b", "cc")], " ") == " a    bb  c\n aaa  b   cc"
    assert [console.size(n) for n in (0, 999, 1000, 5_352_488, 17_074_270_976)] == [
        "0 B", "999 B", "1 kB", "5.35 MB", "17.1 GB",
    ]  # fmt: skip
    assert console.printable("a\nb\x1b[0m\u202e") == "a\\nb\\x1b[0m\\u202e"


# --- memory -------------------------------------------------------------------------------------------------------


def test_graphs_take_turns_where_memory_is_short(
    bundle: Path, picture: Path, cli: Cli, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real engine: the same answer, with vision released before the decoder is loaded."""
    impossible = cli("run", bundle, "Hello!", "--max-memory", "1MiB")
    assert impossible.code == 1 and "all graphs at once take about" in impossible.err
    assert "one at a time" in impossible.err and len(impossible.err.splitlines()) == 1
    files = {a.graph: sum(f.bytes for f in a.files) for a in load_manifest(bundle).artifacts}
    decoder = vlm.spec.decoder
    tokens = min(2048, decoder.context_length)
    files["decoder"] += 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 4 * tokens
    monkeypatch.setattr("lensc.runtime.sequential.WORK_BYTES", 0)
    say(monkeypatch, f"/image {picture}", "What is it?", "And now?", "/metrics")
    shown = cli("chat", bundle, "--json", "--max-memory", max(files.values()), *SHORT)
    documents = [json.loads(line) for line in shown.out.splitlines()]
    assert documents[0]["metrics"]["load_ms"] > 0 and documents[1]["metrics"]["load_ms"] == 0
    assert any("decoder was loaded in" in note for note in documents[0]["metrics"]["notes"])
    expected = vlm.generate("What is it?", [picture], max_new_tokens=8)
    assert documents[0]["token_ids"] == list(expected.token_ids)
