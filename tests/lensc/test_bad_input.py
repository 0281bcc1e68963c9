"""Bad input of every kind, through the command line: one line that says what is wrong, and nothing written over."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lensc.backends.bundle import MANIFEST, Manifest, write_manifest
from lensc.backends.codec import decode

GOLDEN = Path(__file__).parents[1] / "golden"
Cli = Callable[..., Any]


def assert_refused(shown: Any, code: int, *parts: str) -> None:
    """Nothing on stdout, one line on stderr that holds `parts`, the exit code."""
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lensc: error: ") and "bug in lensc" not in lines[0], shown.err
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    assert len(lines[0]) < 1000 and shown.code == code


# --- checkpoints --------------------------------------------------------------------------------------------------


def truncate(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def overwrite(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def hostile_header(header: bytes, length: int | None = None) -> Callable[[Path], object]:
    return overwrite(struct.pack("<Q", len(header) if length is None else length) + header)


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "weights-missing": ("model.safetensors", Path.unlink, ("neither model.safetensors nor",)),
    "weights-truncated": ("model.safetensors", truncate, ("ends at byte", "copy it again")),
    "weights-are-text": ("model.safetensors", overwrite(b"not weights at all"), ("over the format's limit",)),
    "weights-header-beyond-file": ("model.safetensors", hostile_header(b"{}", 10**6), ("beyond the file",)),
    "weights-header-garbage": ("model.safetensors", hostile_header(b'{"a":'), ("the header is not JSON",)),
    "weights-of-another-model": ("model.safetensors", hostile_header(b"{}"), ("weights", "tensors")),
    "pickle-beside": ("pytorch_model.bin", overwrite(b"\x80\x04."), ("unpickling can run any code",)),
    "config-missing": ("config.json", Path.unlink, ("config.json: not found",)),
    "config-truncated": ("config.json", truncate, ("config.json: not JSON",)),
    "config-empty-object": ("config.json", overwrite(b"{}"), ("hidden_size is missing", "vocab_size is missing")),
    "config-of-another-model": ("config.json", overwrite(b'{"model_type": "llama"}'), ("model_type is 'llama'",)),
    "tokenizer-missing": ("tokenizer.json", Path.unlink, ("tokenizer.json: not found",)),
    "tokenizer-truncated": ("tokenizer.json", truncate, ("tokenizer.json: not JSON",)),
    "tokenizer-empty-object": ("tokenizer.json", overwrite(b"{}"), ("expected model.vocab and added_tokens",)),
    "preprocessor-garbage": (
        "preprocessor_config.json",
        overwrite(b"\x00\xff"),
        ("preprocessor_config.json: not JSON",),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoint(name: str, tmp_path: Path, cli: Cli) -> None:
    file, damage, parts = CHECKPOINTS[name]
    folder = Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "ckpt", copy_function=shutil.copyfile))
    damage(folder / file)
    for verb in ("export", "build"):
        assert_refused(cli(verb, folder, "-o", tmp_path / "out"), 1, str(folder), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_missing_checkpoint(tmp_path: Path, cli: Cli) -> None:
    assert_refused(cli("build", tmp_path / "absent", "-o", tmp_path / "out"), 1, "absent: not found, expected a folder")


# --- output folders and targets -----------------------------------------------------------------------------------


def test_nothing_is_written_over(made: Any, tmp_path: Path, cli: Cli) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    for argv in (["export", GOLDEN / "checkpoint"], ["build", GOLDEN / "checkpoint"], ["compile", made.graphs]):
        assert_refused(
            cli(*argv, "-o", precious), 2, "is not a bundle that can be replaced", "choose another output folder"
        )
        assert_refused(cli(*argv, "-o", precious / "chapter.txt"), 2, "exists and is not a folder")
    assert (precious / "chapter.txt").read_text() == "years of work"
    assert_refused(cli("compile", made.graphs, "-o", made.graphs), 2, "is the folder of graphs itself")


def test_place_that_cannot_be_written(made: Any, cli: Cli) -> None:
    assert_refused(cli("compile", made.graphs, "-o", "/proc/bundle"), 1, "/proc/bundle.partial: ")
    assert_refused(cli("build", GOLDEN / "checkpoint", "-o", "/proc/bundle"), 1, "/proc/bundle.partial: ")


@pytest.mark.parametrize(
    ("target", "code", "part"),
    [
        ("cpu", 2, "expected backend:processor or backend:processor:arch, e.g. onnxruntime:cpu"),
        ("", 2, "expected backend:processor"),
        ("onnxruntime:tpu", 2, "processor 'tpu' is not one of cpu, gpu, npu"),
        ("warp:cpu", 2, "backend 'warp' is not known; expected one of cuda, native, onnxruntime"),
        ("onnxruntime:gpu", 1, "vision for onnxruntime:gpu: "),
    ],
)
def test_bad_target(target: str, code: int, part: str, made: Any, tmp_path: Path, cli: Cli) -> None:
    for argv in (["compile", made.graphs], ["build", GOLDEN / "checkpoint"]):
        assert_refused(cli(*argv, "--target", target, "-o", tmp_path / "out"), code, part)
    assert list(tmp_path.iterdir()) == []


# --- bundles ------------------------------------------------------------------------------------------------------


def newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def flip(path: Path) -> None:
    """Change a byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def stray(path: Path) -> None:
    (path.parent / "stray.txt").write_text("x")


VISION = "vision/onnxruntime-cpu.onnx"

BUNDLES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "manifest-missing": (MANIFEST, Path.unlink, ("is not a bundle; make one with lensc build",)),
    "manifest-truncated": (MANIFEST, truncate, ("not JSON",)),
    "manifest-garbage": (MANIFEST, overwrite(b"\xff\xfe{"), ("not JSON",)),
    "manifest-list": (MANIFEST, overwrite(b"[1]"), ("expected a JSON object",)),
    "manifest-newer": (MANIFEST, newer, ("bundle format 99 is newer than this package reads (1); upgrade lensc",)),
    "graph-missing": (VISION, Path.unlink, (VISION, "listed in files, not in the folder")),
    "graph-truncated": (VISION, truncate, (VISION, "bytes, the manifest says")),
    "tokenizer-truncated": ("tokenizer.json", truncate, ("tokenizer.json: ", "bytes, the manifest says")),
    "table-truncated": ("embed_tokens.npy", truncate, ("embed_tokens.npy: ", "bytes, the manifest says")),
    "file-not-listed": (MANIFEST, stray, ("stray.txt: in the folder, not listed in files",)),
}


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.mark.parametrize("name", BUNDLES)
def test_bad_bundle(name: str, copy: Path, cli: Cli) -> None:
    file, damage, parts = BUNDLES[name]
    damage(copy / file)
    for argv in (["run", copy, "Hello"], ["chat", copy], ["inspect", copy]):
        assert_refused(cli(*argv), 1, str(copy), *parts)


def test_missing_bundle(tmp_path: Path, cli: Cli) -> None:
    assert_refused(cli("run", tmp_path / "absent", "Hello"), 1, "is not a bundle; make one with lensc build")
    (tmp_path / "file").write_text("")
    assert_refused(cli("run", tmp_path / "file", "Hello"), 1, "is not a bundle")
    compiled = cli("compile", tmp_path / "absent", "--target", "onnxruntime:cpu", "-o", tmp_path / "out")
    assert_refused(compiled, 1, "is not a folder of graphs; make one with lensc export")


@pytest.mark.parametrize("file", [VISION, f"{VISION}.data", "tokenizer.json", "embed_tokens.npy"])
def test_flipped_byte_is_found_by_inspect_verify(file: str, copy: Path, cli: Cli) -> None:
    flip(copy / file)
    assert_refused(cli("inspect", copy, "--verify"), 1, f"{file}: sha256", "copy or build the bundle again")


def relist(folder: Path) -> None:
    """Make the manifest agree with the files as they are: damage that no hash shows."""
    document = json.loads((folder / MANIFEST).read_text())
    manifest = decode(Manifest, document, [])
    assert manifest is not None
    sizes = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    import dataclasses

    from lensc.backends.base import file_record

    artifacts = tuple(
        dataclasses.replace(a, files=tuple(file_record(sizes[f.path], folder) for f in a.files))
        for a in manifest.artifacts
    )
    write_manifest(folder, dataclasses.replace(manifest, artifacts=artifacts))


@pytest.mark.parametrize(
    ("file", "damage", "part"),
    [
        (VISION, overwrite(b"not an ONNX file"), "onnxruntime failed"),
        (VISION, truncate, "onnxruntime failed"),
        (f"{VISION}.data", truncate, "vision"),
        (
            "decoder/onnxruntime-cpu.onnx.data",
            lambda p: p.write_bytes(bytes(p.stat().st_size)),
            "self-test failed",
        ),
        ("tokenizer.json", overwrite(b'{"version": "1.0"}'), "is not a tokenizer.json"),
        ("embed_tokens.npy", overwrite(b"\x93NUMPY garbage"), "cannot be read as npy"),
        ("probe/probe-vision.npz", overwrite(b"garbage"), "cannot be read as npz"),
    ],
    ids=["onnx-text", "onnx-truncated", "onnx-data-truncated", "weights-zero", "tokenizer", "table", "probe"],
)
def test_damage_under_a_valid_manifest(
    file: str, damage: Callable[[Path], object], part: str, copy: Path, cli: Cli
) -> None:
    damage(copy / file)
    relist(copy)
    assert_refused(cli("run", copy, "Hello", "--max-new-tokens", 2), 1, part)


def test_graphs_are_no_bundle_to_run_and_a_bundle_no_graphs_to_compile(made: Any, tmp_path: Path, cli: Cli) -> None:
    assert_refused(cli("run", made.graphs, "Hello"), 1, "no compiled artifacts")
    assert_refused(cli("compile", made.bundle, "-o", tmp_path / "x"), 1, "give the folder that lensc export made")


def test_target_that_the_bundle_was_not_built_for(bundle: Path, cli: Cli) -> None:
    assert_refused(cli("run", bundle, "Hello", "--target", "reference:cpu"), 1, "reference:cpu")
    assert_refused(cli("run", bundle, "Hello", "--target", "warp:cpu"), 2, "backend 'warp' is not one of")
    assert_refused(cli("chat", bundle, "--target", "nonsense"), 2, "expected backend:processor")


# --- pictures and prompts -----------------------------------------------------------------------------------------


def bomb(path: Path) -> None:
    """A PNG of 30000 x 30000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def cut_png(path: Path) -> None:
    path.write_bytes((GOLDEN / "images" / "sq448.png").read_bytes()[:5000])


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "picture.png"),
    "folder": (Path.mkdir, "picture.png"),
    "empty": (overwrite(b""), "picture.png"),
    "text": (overwrite(b"<html>not a picture</html>"), "picture.png"),
    "cut": (cut_png, "picture.png"),
    "bomb": (bomb, "decompression bomb"),
    "thin": (lambda path: Image.new("RGB", (1, 30_000)).save(path), "too thin"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_bad_picture(name: str, bundle: Path, tmp_path: Path, cli: Cli) -> None:
    make, part = PICTURES[name]
    make(tmp_path / "picture.png")
    assert_refused(cli("run", bundle, "--image", tmp_path / "picture.png", "Read."), 1, part)


def test_prompt_longer_than_the_context(bundle: Path, cli: Cli) -> None:
    shown = cli("run", bundle, "word " * 9000)
    assert_refused(shown, 1, "the prompt has", "the model's context is 8192", "shorten the text")


@pytest.mark.parametrize("prompt", ["", "  \n"], ids=["empty", "blank"])
def test_empty_prompt(prompt: str, bundle: Path, cli: Cli) -> None:
    assert_refused(cli("run", bundle, prompt), 2, "the prompt is empty")


# --- flags --------------------------------------------------------------------------------------------------------

FLAGS = {
    "--threads 0": "--threads 0: expected 1 to 1024",
    "--threads 1000000": "--threads 1000000: expected 1 to 1024",
    "--threads many": "invalid int value: 'many'",
    "--max-new-tokens 0": "max_new_tokens=0: expected an integer of at least 1",
    "--max-new-tokens -5": "max_new_tokens=-5",
    "--num-beams 0": "num_beams=0",
    "--num-beams 1000": "num_beams=1000",
    "--num-beams 3 --do-sample": "beam search does not sample",
    "--do-sample --temperature 0": "temperature=0.0",
    "--do-sample --temperature nan": "temperature=nan",
    "--do-sample --temperature inf": "temperature=inf",
    "--do-sample --top-k -1": "top_k=-1",
    "--do-sample --top-p 1.5": "top_p=1.5",
    "--repetition-penalty 0": "repetition_penalty=0.0",
    "--do-sample --seed -1": "seed=-1",
    "--temperature 0.5": "has no effect without do_sample",
    "--vision-padding none": "expected one of official, masked, per_slice",
    "--image": "expected one argument",
    "--colour red": "unrecognized arguments: --colour red",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_absurd_flags(flags: str, bundle: Path, cli: Cli) -> None:
    assert_refused(cli("run", bundle, "Hello", *flags.split()), 2, FLAGS[flags])


def test_what_was_given_is_checked_before_anything_is_loaded(copy: Path, tmp_path: Path, cli: Cli) -> None:
    """Loading may take a minute; here it would fail."""
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_bytes(bytes(tokenizer.stat().st_size))
    assert_refused(cli("run", copy, "Hello"), 1, "tokenizer.json")
    assert_refused(cli("run", copy, "Hello", "--max-new-tokens", "0"), 2, "max_new_tokens=0")
    for verb in (["run", copy, "Hello"], ["chat", copy]):
        assert_refused(cli(*verb, "--image", tmp_path / "none.png"), 1, "none.png: no such file")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", ("give --search", "lensc build demo --scheme int4-gptq -o bundle/")),
        ("--scheme int8", ("give --search", "lensc build demo --scheme int8 -o bundle/")),
        ("--search --scheme int8", ("no --scheme", "lensc build demo --scheme int8")),
        ("--search --max-loss much", ("argument --max-loss: invalid float value: 'much'",)),
        ("--search --max-loss -3", ("--max-loss -3: expected 0 to 50 points of 100",)),
        ("--search --max-loss inf", ("--max-loss inf: expected 0 to 50",)),
        ("--search --method awq", ("--method 'awq': expected one of rtn, gptq",)),
        ("--search --max-memory lots", ("'lots' is no amount of memory",)),
        ("--search --target tpu", ("target 'tpu': expected backend:processor",)),
    ],
)
def test_a_search_that_cannot_be_meant(flags: str, parts: tuple[str, ...], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "r.toml"
    assert_refused(cli("quantize", "demo", *flags.split(), "-o", out), 2, *parts)
    assert_refused(cli("quantize", "demo", "--search", "-o", tmp_path / "r.json"), 2, "a recipe is a .toml file")
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_incomplete_commands(cli: Cli) -> None:
    assert_refused(cli("fly"), 2, "invalid choice: 'fly'", "see lensc --help")
    assert_refused(cli("run"), 2, "the following arguments are required: BUNDLE, PROMPT", "see lensc run --help")
    assert_refused(cli("build", "demo"), 2, "-o/--output", "see lensc build --help")


def test_errors_as_json(tmp_path: Path, cli: Cli) -> None:
    for argv, code, kind in (
        (("run", tmp_path, "Hello", "--json"), 1, "ManifestError"),
        (("run", "--json"), 2, "UsageError"),
        (("build", tmp_path / "absent", "-o", tmp_path / "x", "--json"), 1, "CheckpointError"),
    ):
        shown = cli(*argv)
        line, document = shown.err.splitlines()
        error = json.loads(document)["error"]
        assert (shown.code, shown.out, error["type"], error["exit_code"]) == (code, "", kind, code)
        assert line == f"lensc: error: {error['message']}"
