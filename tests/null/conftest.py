"""A small valid bundle, for tests that break it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lensc.backends.base import Artifact, FileRecord, Target
from lensc.backends.bundle import (
    FORMAT,
    DecoderSpec,
    GenerationSpec,
    GraphRecord,
    Manifest,
    MeasuredRecord,
    ModelSpec,
    ParityRecord,
    PictureSpec,
    ProbeRecord,
    Provenance,
    sha256_file,
    write_manifest,
)
from lensc.export.graph import DimRange, GraphSpec, StatePair, TensorSpec

FILES = {
    "tokenizer.json": b"{}",
    "embed_tokens.npy": b"table",
    "decoder.onnx": b"graph",
    "onnxruntime-cpu/decoder.onnx": b"compiled",
    "probes/decoder.npz": b"probe",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with a valid manifest and the files it lists, whose content means nothing."""
    folder = tmp_path / "bundle"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, _manifest(folder))
    return folder


def _manifest(folder: Path) -> Manifest:
    compiled = "onnxruntime-cpu/decoder.onnx"
    spec = GraphSpec(
        name="decoder",
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", 64)),
            TensorSpec("past_key.0", "float32", ("past", "batch", 2, 16)),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "tokens", 300)),
            TensorSpec("key.0", "float32", ("tokens", "batch", 2, 16)),
        ),
        states=(StatePair("past_key.0", "key.0"),),
        dims={"batch": DimRange(1, 1, 3), "tokens": DimRange(1, 1, 512), "past": DimRange(0, 128, 512)},
    )
    artifact = Artifact(
        graph="decoder",
        target=Target.parse("onnxruntime:cpu"),
        scheme="f32",
        files=(FileRecord(compiled, len(FILES[compiled]), sha256_file(folder / compiled)),),
        toolchain={"onnxruntime": "1.32.0"},
        options={"level": "extended"},
        compatibility={"onnxruntime": ">=1.32"},
        placement={"CPUExecutionProvider": 412},
        parity={"max_abs": 1e-6, "pictures": 3, "against": "reference"},
    )
    return Manifest(
        format=FORMAT,
        model=ModelSpec(
            name="demo",
            picture=PictureSpec(448, 14, 9, 96, "official", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 70),
            decoder=DecoderSpec(64, 1, 2, 16, 300, 512),
            generation=GenerationSpec(eos_token_ids=(257, 258)),
        ),
        graphs={"decoder": GraphRecord(spec, "f32", sha256_file(folder / "decoder.onnx"), "decoder.onnx")},
        artifacts=(artifact,),
        tables={"embed_tokens": "embed_tokens.npy"},
        tokenizer="tokenizer.json",
        files=(),
        provenance=Provenance("0.1.0", "lensc build demo", "0" * 64, {"torch": "2.13.0"}, "f32", "2026-11-23T10:00:00"),
        parity=(
            ParityRecord("decoder", "onnx", "reference", 0.0, math.inf, 1.0, 1.0, None, 3, True, "max_abs <= 1e-4"),
        ),
        measured=(
            MeasuredRecord(
                "decoder",
                "onnxruntime:cpu",
                "Phone 1 (Android 14)",
                2.5,
                (2.0, 3.0),
                100,
                1 << 20,
                {"npu": 3},
                "job j1",
            ),
        ),
        probes=(ProbeRecord("decoder", "probes/decoder.npz", 1e-3),),
        metadata={"note": "any text: µ"},
    )
