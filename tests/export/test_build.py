"""Checkpoint to bundle: what it holds, that it answers as the reference model does, and that a kill loses no stage."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lensc
from lensc.backends.base import Target
from lensc.backends.bundle import Manifest, load_manifest, write_manifest
from lensc.backends.errors import (
    CheckpointError,
    IntegrityError,
    ManifestError,
    ParityError,
    PictureError,
    StorageError,
    TokenizerError,
    UnsupportedError,
    UsageError,
)
from lensc.export import build as build_module
from lensc.export import compile_stages, engines, export_stages, stages, verify
from lensc.export.build import build, compile_graphs, export_checkpoint, resolve_checkpoint
from lensc.export.checkpoint import Checkpoint
from lensc.export.models.session import torch_sessions
from lensc.export.portable import PortableWeights
from lensc.export.quantize import calibrate
from lensc.export.quantize.calibrated import write_block
from lensc.export.quantize.weights import WeightFormat, dequantize, quantize_rtn
from lensc.export.source import Source
from lensc.export.stages import StageEvent
from lensc.runtime.pipeline import VLM
from lensc.runtime.prompt import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
ORT = Target("onnxruntime", "cpu")

EXPORT = ("golden probes", "embedding table", "tokenizer", "export vision", "export decoder", "verify graphs")
COMPILE = tuple(f"{what} onnxruntime:cpu" for what in ("compile vision for", "check vision on", "compile decoder for", "check decoder on"))  # fmt: skip
BUILD = (*EXPORT, *COMPILE, "verify onnxruntime:cpu")


def small_checkpoint(folder: Path) -> Path:
    """The golden checkpoint with one layer in each tower and slices of 112 pixels: quick to trace and to verify."""
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    config["slice_config"]["scale_resolution"] = 112
    config["_name_or_path"] = "small"
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "scale_resolution": 112}))
    weights = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in weights.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


def impossible_to_pass(*args: Any, **more: Any) -> Any:
    """`verify_model` with tolerances that float32 cannot keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "EPSILON", 1e-12)
        for name in verify.TOLERANCES:
            patch.setitem(verify.TOLERANCES, name, 1e-12)
        return verify.verify_model(*args, **more)


class Exports:
    """The folder of graphs, and how a first attempt under an impossible tolerance ended."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.folder = folder / "graphs"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ParityError) as caught:
            patch.setattr(export_stages, "verify_model", impossible_to_pass)
            export_checkpoint(checkpoint, self.folder)
        self.refusal = str(caught.value)
        self.shipped_before = self.folder.exists()
        self.events: list[StageEvent] = []
        self.manifest = export_checkpoint(checkpoint, self.folder, report=self.events.append, command="lensc export x")


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(checkpoint, tmp_path_factory.mktemp("exports"))


@pytest.fixture
def graphs(exports: Exports, tmp_path: Path) -> Path:
    """A copy of the folder of graphs that a test may damage."""
    return Path(shutil.copytree(exports.folder, tmp_path / "graphs"))


# --- export -------------------------------------------------------------------------------------------------------


def test_a_graph_that_fails_is_not_shipped_and_finished_stages_are_kept(exports: Exports) -> None:
    assert "does not compute what torch float32 computes" in exports.refusal
    assert not exports.shipped_before
    states = {e.stage: e.state for e in exports.events if e.state != "start" and e.stage in EXPORT}
    assert states == {**dict.fromkeys(EXPORT[:-1], "kept"), "verify graphs": "done"}


def test_progress_counts_each_stage_once(exports: Exports) -> None:
    """The last that is reported is the publication."""
    totals = {e.total for e in exports.events}
    assert sorted({e.index for e in exports.events}) == list(range(1, len(EXPORT) + 2)) and totals == {len(EXPORT) + 1}


def test_folder_of_graphs(exports: Exports, checkpoint: Path) -> None:
    manifest = load_manifest(exports.folder, verify=True)
    assert manifest == exports.manifest
    assert {f.path for f in manifest.files} == {
        "vision/model.onnx",
        "vision/model.onnx.data",
        "decoder/model.onnx",
        "decoder/model.onnx.data",
        "embed_tokens.npy",
        "tokenizer.json",
        "tokenizer_config.json",
        "probe/probe-vision.npz",
        "probe/probe-decoder.npz",
    }
    assert manifest.artifacts == () and manifest.model == Checkpoint(checkpoint).model_spec()
    assert [(r.graph, r.target, r.passed) for r in manifest.parity] == [
        ("vision", "onnx", True),
        ("decoder", "onnx", True),
    ]
    assert manifest.parity[1].top1_agreement == 1.0 and manifest.parity[0].pictures >= 2
    made = manifest.provenance
    assert (made.command, made.checkpoint_sha256) == ("lensc export x", Checkpoint(checkpoint).sha256)
    assert made.versions.keys() >= {"python", "torch", "onnx", "numpy"}
    table = np.load(exports.folder / "embed_tokens.npy", mmap_mode="r")
    stored = load_file(GOLDEN / "model.safetensors")["llm.model.embed_tokens.weight"]
    assert table.dtype == np.float16 and np.array_equal(table, stored.numpy())
    assert not exports.folder.with_name("graphs.partial").exists()


def test_weights_that_are_nan_are_found_before_the_long_part(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    weights["llm.lm_head.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    events: list[StageEvent] = []
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or Inf: llm\.lm_head\.weight"):
        export_checkpoint(folder, tmp_path / "out", report=events.append)
    assert [e.stage for e in events] == ["golden probes"]
    assert not (tmp_path / "out").exists()


def test_tokenizer_with_more_tokens_than_rows(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].update({f"more{i}": 2000 + i for i in range(50)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="has 1330 tokens, the embedding table has 1280 rows"):
        export_checkpoint(folder, tmp_path / "out")


def test_space_is_checked_before_the_work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    events: list[StageEvent] = []
    with pytest.raises(StorageError, match=r"about .* are needed, 1\.05 MB are free"):
        build(checkpoint, [ORT], tmp_path / "out", report=events.append)
    assert events == []


def test_calibrated_weights_are_those_of_the_graphs_and_survive_an_interruption(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, pictures, out = tmp_path / "mine.toml", tmp_path / "pictures", tmp_path / "graphs"
    recipe.write_text(
        'format = 1\nmethod = "gptq"\n[weights]\n"vpm.*" = "w8"\n"resampler.*" = "w4-g64"\n"llm.*_proj.weight" = "w3-g32-asym"\n'
        '"llm.lm_head.weight" = "w4-g128"'
    )
    pictures.mkdir()
    Image.linear_gradient("L").resize((90, 60)).save(pictures / "a.png")
    events: list[StageEvent] = []

    def made() -> Manifest:
        events.clear()
        return export_checkpoint(checkpoint, out, scheme=str(recipe), calibration=pictures, report=events.append)

    written: list[str] = []

    def write(path: Path, *rest: Any) -> None:
        if path.name.startswith("llm.lm_head") and not written.count("again"):
            raise KeyboardInterrupt
        written.append(path.name)
        write_block(path, *rest)

    monkeypatch.setattr(calibrate, "write_block", write)
    with pytest.raises(KeyboardInterrupt):
        made()
    assert "resampler.calibrated.safetensors" in written and "llm.model.layers.0.calibrated.safetensors" in written
    written[:] = ["again"]
    manifest = made()
    assert written == ["again", "llm.lm_head-0-1280.calibrated.safetensors"]
    assert [e.stage for e in events if e.state == "done"][:2] == ["calibrate", "golden probes"]
    against = {record.against for record in manifest.parity if not record.tolerance.startswith("none")}
    assert against == {"torch float32, quantized weights"} and all(record.passed for record in manifest.parity)
    assert manifest.metadata["calibration"].startswith("folder pictures: 1 pictures, 1 slices, ")
    portable = {name: out / str(record.file) for name, record in manifest.graphs.items()}
    weights = PortableWeights(portable, Checkpoint(checkpoint))
    name = "llm.model.layers.0.mlp.down_proj.weight"
    stored = Checkpoint(checkpoint).tensor(name).float()
    plain = dequantize(quantize_rtn(stored, WeightFormat(3, 32, symmetric=False)))
    assert not torch.equal(weights.tensor(name), plain) and float((weights.tensor(name) - stored).abs().max()) < 0.1
    # another picture, other values
    Image.radial_gradient("L").resize((90, 60)).save(pictures / "a.png")
    assert made().graphs["decoder"].sha256 != manifest.graphs["decoder"].sha256
    (pictures / "b.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"1 of 2 pictures cannot be read: .*b\.png"):
        build(checkpoint, [ORT], tmp_path / "x", scheme=str(recipe), calibration=pictures)
    assert not (tmp_path / "x.partial").exists()
    with pytest.raises(UsageError, match="the recipe int8 rounds to the nearest and looks at no pictures"):
        build(checkpoint, [ORT], tmp_path / "x", scheme="int8", calibration=pictures)


def test_demo_is_the_shipped_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module.demo, "CHECKPOINT", tmp_path)
    assert resolve_checkpoint("demo") == tmp_path
    assert resolve_checkpoint("./demo") == Path("demo") and resolve_checkpoint("x/demo") == Path("x/demo")
    monkeypatch.setattr(build_module.demo, "CHECKPOINT", tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not part of this installation"):
        resolve_checkpoint("demo")


# --- compile ------------------------------------------------------------------------------------------------------


def answers(vlm: VLM) -> list[tuple[int, ...]]:
    wide = Image.linear_gradient("L").resize((300, 90)).convert("RGB")
    small = Image.radial_gradient("L").resize((50, 60)).convert("RGB")
    asked: list[tuple[str, list[Any]]] = [("Read the text.", [wide]), ("Which?", [small, wide]), ("Hello!", [])]
    return [vlm.generate(prompt, images, max_new_tokens=12).token_ids for prompt, images in asked]


def test_bundle_answers_as_the_reference_model_does(exports: Exports, checkpoint: Path, tmp_path: Path) -> None:
    manifest = compile_graphs(exports.folder, [ORT], tmp_path / "bundle", command="lensc compile x")
    assert manifest == load_manifest(tmp_path / "bundle", verify=True)
    assert [(a.graph, str(a.target)) for a in manifest.artifacts] == [("vision", str(ORT)), ("decoder", str(ORT))]
    assert all(0 <= float(a.parity["probe_max_abs"]) < 1e-4 for a in manifest.artifacts)
    assert all(record.file is None for record in manifest.graphs.values())
    assert not any(Path(f.path).name.startswith("model.onnx") for f in manifest.files), "in float nothing is shared"
    assert manifest.provenance.command == "lensc compile x"
    assert manifest.metadata["export_command"] == "lensc export x"
    opened = Checkpoint(checkpoint)
    table = np.load(exports.folder / "embed_tokens.npy")
    reference = VLM(
        opened.model_spec(), Tokenizer.from_file(opened.tokenizer), torch_sessions(opened.load_model()), table
    )
    with lensc.load(tmp_path / "bundle") as vlm:
        assert answers(vlm) == answers(reference)


def test_two_targets_in_one_bundle(exports: Exports, tmp_path: Path) -> None:
    manifest = compile_graphs(exports.folder, [ORT, Target("reference", "cpu")], tmp_path / "bundle")
    assert [(a.graph, str(a.target)) for a in manifest.artifacts] == [
        ("vision", "onnxruntime:cpu"),
        ("decoder", "onnxruntime:cpu"),
        ("vision", "reference:cpu"),
        ("decoder", "reference:cpu"),
    ]


def test_artifacts_for_another_device_say_why_they_were_not_run(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "usable", lambda target: (False, "no such device here"))
    monkeypatch.setattr(compile_stages, "load_if_usable", engines.load_if_usable)
    manifest = compile_graphs(exports.folder, [ORT], tmp_path / "bundle")
    assert [a.parity for a in manifest.artifacts] == [{"not_run": "no such device here"}] * 2


def test_a_decoder_too_large_to_run_leaves_the_vision_graph_judged(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = engines.load_if_usable

    def no_room(artifact: Any, *more: Any) -> Any:
        return "no room" if artifact.graph == "decoder" else load(artifact, *more)

    monkeypatch.setattr(compile_stages, "load_if_usable", no_room)
    monkeypatch.setattr(Source, "is_streamed", True)
    made = build(checkpoint, [ORT], tmp_path / "bundle", scheme="int8")
    judged, cost = (record for record in made.parity if record.target == str(ORT))
    assert judged.graph == cost.graph == "vision" and judged.passed
    assert judged.sqnr_db > cost.sqnr_db > 20, "the weights' own error comes on top"
    assert made.artifacts[1].parity == {compile_stages.NOT_RUN: "no room"}


def test_wrong_probe_stops_the_bundle(graphs: Path, tmp_path: Path) -> None:
    path = graphs / "probe" / "probe-decoder.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["out.logits"] = changed["out.logits"] + np.float32(0.01)
    np.savez(path, **changed)
    write_manifest(graphs, load_manifest_lenient(graphs))
    with pytest.raises(ParityError, match=r"onnxruntime:cpu does not compute the golden probe probe/probe-decoder.npz"):
        compile_graphs(graphs, [ORT], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def load_manifest_lenient(folder: Path) -> Any:
    """The manifest of a folder whose files were changed."""
    document = json.loads((folder / "manifest.json").read_text())
    from lensc.backends.bundle import Manifest
    from lensc.backends.codec import decode

    manifest = decode(Manifest, document, [])
    assert manifest is not None
    return manifest


def test_damaged_graph_is_refused(graphs: Path, tmp_path: Path) -> None:
    path = graphs / "vision" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"vision/model\.onnx: sha256"):
        compile_graphs(graphs, [ORT], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "bundle.partial").exists()


def test_compiled_bundle_and_own_folder_are_refused(exports: Exports, graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the folder of graphs itself"):
        compile_graphs(graphs, [ORT], tmp_path / "x" / ".." / "graphs")
    compile_graphs(exports.folder, [ORT], tmp_path / "bundle")
    with pytest.raises(ManifestError, match="has no portable graph vision, decoder: a compiled bundle does not"):
        compile_graphs(tmp_path / "bundle", [ORT], tmp_path / "again")


def test_targets_are_checked_before_the_work(checkpoint: Path, exports: Exports, tmp_path: Path) -> None:
    events: list[StageEvent] = []
    with pytest.raises(UnsupportedError, match=r"vision for onnxruntime:gpu: .*; decoder for onnxruntime:gpu: "):
        build(checkpoint, [ORT, Target("onnxruntime", "gpu")], tmp_path / "out", report=events.append)
    with pytest.raises(UsageError, match="backend 'warp' is not known"):
        compile_graphs(exports.folder, [Target("warp", "cpu")], tmp_path / "out", report=events.append)
    with pytest.raises(UsageError, match="no target"):
        build(checkpoint, [], tmp_path / "out", report=events.append)
    assert events == [] and not (tmp_path / "out.partial").exists()


# --- killed -------------------------------------------------------------------------------------------------------

DRIVER = """
import json, os, signal, sys
from pathlib import Path
import lensc.export.build as module
from lensc.backends.base import Target
from lensc.export.checkpoint import Checkpoint
from lensc.export.engines import usable
from lensc.export.provenance import code_key

# What is imported or computed on first use is done here, once for all children.
code_key(), usable(Target("onnxruntime", "cpu")), Checkpoint(sys.argv[1])

for line in sys.stdin:
    checkpoint, out, fatal = json.loads(line)
    events = []
    def report(event):
        events.append([event.state, event.stage, event.index, event.total])
        if f"{event.state} {event.stage}" == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        try:
            module.build(checkpoint, [Target("onnxruntime", "cpu")], out, report=report)
            Path(out).with_name("events.json").write_text(json.dumps(events))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


class Builder:
    """A process that has imported all it needs and forks one build after the other: importing torch takes seconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", DRIVER, str(GOLDEN)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def build(self, checkpoint: Path, out: Path, fatal: str = "") -> int:
        """Build in a child that is killed when the event `fatal` is reported; returns its exit code, -9 if killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(checkpoint), str(out), fatal]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def builder() -> Iterator[Builder]:
    driver = Builder()
    yield driver
    driver.close()


def test_killed_after_every_stage_the_build_goes_on(builder: Builder, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    former = write_former_bundle(out)
    for i, stage in enumerate(BUILD):
        assert builder.build(checkpoint, out, f"done {stage}") == -signal.SIGKILL
        assert load_manifest(out, verify=True) == former
        lines = (tmp_path / "bundle.partial" / "journal.jsonl").read_text().splitlines()
        assert [json.loads(line)["stage"] for line in lines] == list(BUILD[: i + 1])
    for event in ("start publish bundle", "done move the old folder aside"):
        assert builder.build(checkpoint, out, event) == -signal.SIGKILL
    assert not out.exists()
    assert builder.build(checkpoint, out) == 0
    events = json.loads((tmp_path / "events.json").read_text())
    assert [(state, stage) for state, stage, *_ in events if stage in BUILD] == [("kept", stage) for stage in BUILD]
    assert sorted({index for *_, index, _ in events}) == list(range(1, events[0][-1] + 1))
    manifest = load_manifest(out, verify=True)
    assert [(r.graph, r.target) for r in manifest.parity] == [
        ("vision", "onnx"),
        ("decoder", "onnx"),
        ("vision", "onnxruntime:cpu"),
        ("decoder", "onnxruntime:cpu"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "events.json"]
    with lensc.load(out) as vlm:
        assert len(vlm.generate("Hello!", max_new_tokens=3).token_ids) <= 3


def write_former_bundle(folder: Path) -> Any:
    """A bundle with nothing to run, to be replaced."""
    from lensc.backends.bundle import FORMAT, Manifest, Provenance

    folder.mkdir()
    shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer.json")
    made = Provenance("0", "former", "0" * 64, {}, "f32", "2026-01-01")
    model = dataclasses.replace(Checkpoint(GOLDEN).model_spec(), name="former")
    return write_manifest(folder, Manifest(FORMAT, model, {}, (), {}, "tokenizer.json", (), made))
