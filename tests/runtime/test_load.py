"""`lensc.load`: from files to a working model, and every way it can refuse."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lensc
from lensc.backends import registry
from lensc.backends.base import Artifact, FileRecord, Probe, Session, Target
from lensc.backends.bundle import (
    DecoderSpec,
    GenerationSpec,
    GraphRecord,
    Manifest,
    ModelSpec,
    ParityRecord,
    PictureSpec,
    ProbeRecord,
    Provenance,
    load_manifest,
    sha256_file,
    write_manifest,
)
from lensc.backends.errors import (
    CompatibilityError,
    GraphError,
    ManifestError,
    MemoryLimitError,
    ParityError,
    TokenizerError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from lensc.backends.load_options import DEFAULTS, LoadOptions
from lensc.export.graph import DimRange, GraphSpec, StatePair, TensorSpec
from lensc.runtime.prompt import user_messages

TOKENIZER = Path(__file__).parents[1] / "golden" / "checkpoint" / "tokenizer.json"
D, VOCAB = 8, 1280
SPEC = ModelSpec(
    "tiny",
    PictureSpec(28, 14, 4, 3, "official", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 70),
    DecoderSpec(D, 1, 2, 4, VOCAB, 64),
    GenerationSpec(eos_token_ids=(1025,), max_new_tokens=3),
)
PER_PATCH = ("slices", "patches")
VISION = GraphSpec(
    "vision",
    (
        TensorSpec("patches", "float32", (*PER_PATCH, 588)),
        TensorSpec("position_ids", "int64", PER_PATCH),
        TensorSpec("attention_bias", "float32", PER_PATCH),
        TensorSpec("key_bias", "float32", PER_PATCH),
        TensorSpec("key_pos_embed", "float32", (*PER_PATCH, D)),
    ),
    (TensorSpec("image_embeds", "float32", ("slices", 3, D)),),
    (),
    {"slices": DimRange(1, 1, 9), "patches": DimRange(1, 4, 99)},
)
DECODER = GraphSpec(
    "decoder",
    (
        TensorSpec("inputs_embeds", "float32", ("batch", "tokens", D)),
        TensorSpec("position_ids", "int64", ("tokens",)),
        TensorSpec("logit_positions", "int64", ("rows",)),
        TensorSpec("past_key.0", "float32", ("past", "batch", 2, 4)),
        TensorSpec("past_value.0", "float32", ("past", "batch", 2, 4)),
    ),
    (
        TensorSpec("logits", "float32", ("batch", "rows", VOCAB)),
        TensorSpec("key.0", "float32", ("tokens", "batch", 2, 4)),
        TensorSpec("value.0", "float32", ("tokens", "batch", 2, 4)),
    ),
    (StatePair("past_key.0", "key.0"), StatePair("past_value.0", "value.0")),
    {d: DimRange(m, 1, 64) for d, m in (("batch", 1), ("tokens", 1), ("rows", 1), ("past", 0))},
)


class Engine:
    """A backend whose graphs return what their artifact's file says, added to zero."""

    def __init__(self, name: str, usable: bool = True, refuse: Callable[[Artifact], None] = lambda a: None) -> None:
        self.name = name
        self.usable = usable
        self.refuse = refuse
        self.open: list[Constant] = []
        self.threads: list[int | None] = []

    def probe(self) -> tuple[Probe, ...]:
        return (
            Probe(self.name, "cpu", self.usable, f"{self.name} 1.0" if self.usable else f"pip install {self.name}"),
        )

    def load(self, artifact: Artifact, spec: GraphSpec, bundle: Path, options: LoadOptions = DEFAULTS) -> Session:
        self.refuse(artifact)
        self.threads.append(options.threads)
        value = float((bundle / artifact.files[0].path).read_text())
        self.open.append(Constant(spec, value, self.open))
        return self.open[-1]


class Constant:
    """Numbers that fall from `value` by less than the tolerance, a little more the more tokens there were."""

    def __init__(self, spec: GraphSpec, value: float, opened: list[Constant]) -> None:
        self.spec, self.value, self.opened = spec, value, opened

    def run(self, feeds: Any, out: Any = None) -> dict[str, Any]:
        sizes = {d: n for t in self.spec.inputs for d, n in zip(t.shape, feeds[t.name].shape, strict=True)}
        result = {}
        for tensor in self.spec.outputs:
            shape = [sizes.get(d, d) for d in tensor.shape]
            fall = np.linspace(0, 1e-4 + 1e-6 * sizes.get("past", 0), math.prod(shape)).reshape(shape)
            array = (self.value - fall).astype(np.float32)
            result[tensor.name] = array
            if out is not None and tensor.name in out:
                out[tensor.name][...] = array
        return result

    def close(self) -> None:
        self.opened.remove(self)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Engine]:
    made = {name: Engine(name) for name in ("alpha", "beta")}
    monkeypatch.setattr(registry, "names", lambda: tuple(made))
    monkeypatch.setattr(registry, "get", made.__getitem__)
    return made


def build(folder: Path, targets: tuple[str, ...] = ("alpha:cpu",), value: str = "0.5", **changes: Any) -> Path:
    """Write a bundle whose graphs return `value` and whose probe expects 0.5."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    np.save(folder / "embed_tokens.npy", np.zeros((VOCAB, D), np.float16))
    feeds = {
        f"in.{t.name}": np.zeros([{"slices": 1, "patches": 4}.get(d, d) for d in t.shape], t.dtype)
        for t in VISION.inputs
    }
    np.savez(folder / "probe.npz", **feeds, **{"out.image_embeds": np.full((1, 3, D), 0.5, np.float32)})
    artifacts = []
    for target in map(Target.parse, targets):
        for graph in ("vision", "decoder"):
            (folder / target.slug).mkdir(exist_ok=True)
            path = folder / target.slug / f"{graph}.txt"
            path.write_text(value)
            record = FileRecord(f"{target.slug}/{graph}.txt", len(value), sha256_file(path))
            artifacts.append(Artifact(graph, target, "f32", (record,), {}, {}, {}, {}))
    manifest = Manifest(
        1,
        SPEC,
        {g.name: GraphRecord(g, "f32", "0" * 64) for g in (VISION, DECODER)},
        tuple(artifacts),
        {"embed_tokens": "embed_tokens.npy"},
        "tokenizer.json",
        (),
        Provenance("0", "test", "0" * 64, {}, "f32", "2025-01-01"),
        probes=(ProbeRecord("vision", "probe.npz", 1e-3),),
    )
    write_manifest(folder, dataclasses.replace(manifest, **changes))
    return folder


def test_loads_answers_and_closes(tmp_path: Path, engines: dict[str, Engine]) -> None:
    with lensc.load(build(tmp_path / "b"), threads=2) as vlm:
        assert vlm.generate("Hello").token_ids == (0, 0, 0)
        assert vlm.plan is not None and str(vlm.plan["vision"].effective) == "alpha:cpu"
        assert engines["alpha"].threads == [2, 2]
        assert vlm.spec.picture.vision_padding == "official"
    assert not engines["alpha"].open


def test_the_table_is_mapped_not_read(tmp_path: Path, engines: dict[str, Engine]) -> None:
    vlm = lensc.load(str(build(tmp_path / "b")))
    values = vlm._table._values
    while isinstance(values, np.ndarray):
        values = values.base  # type: ignore[assignment]  # down to what holds the bytes
    assert values is vlm._table._mapped or memoryview(values).obj is vlm._table._mapped


def test_vision_padding_overrides_the_bundle_s(tmp_path: Path, engines: dict[str, Engine]) -> None:
    assert lensc.load(build(tmp_path / "b"), vision_padding="per_slice").spec.picture.vision_padding == "per_slice"


def test_a_failed_selftest_refuses_and_can_be_skipped(tmp_path: Path, engines: dict[str, Engine]) -> None:
    bundle = build(tmp_path / "b", value="0.75")
    with pytest.raises(ParityError, match=r"vision on alpha:cpu: image_embeds differs by 0.25, tolerance 0.001"):
        lensc.load(bundle)
    assert not engines["alpha"].open
    lensc.load(bundle, selftest=False).close()


def test_an_engine_that_refuses_its_artifact_is_planned_around(tmp_path: Path, engines: dict[str, Engine]) -> None:
    def refuse(artifact: Artifact) -> None:
        if artifact.graph == "decoder":
            raise CompatibilityError("needs alpha >=2.0, found 1.0")

    engines["alpha"].refuse = refuse
    vlm = lensc.load(build(tmp_path / "b", ("alpha:cpu", "beta:cpu")), placement="ranked")
    assert vlm.plan is not None
    assert [str(p.effective) for p in vlm.plan.placements] == ["alpha:cpu", "beta:cpu"]
    assert "needs alpha >=2.0, found 1.0" in vlm.plan["decoder"].reason
    assert (len(engines["alpha"].open), len(engines["beta"].open)) == (1, 1)
    with pytest.raises(CompatibilityError, match="needs alpha"):
        lensc.load(tmp_path / "b", target="alpha:cpu")
    assert (len(engines["alpha"].open), len(engines["beta"].open)) == (1, 1)


def test_the_target_chooses(tmp_path: Path, engines: dict[str, Engine]) -> None:
    bundle = build(tmp_path / "b", ("alpha:cpu", "beta:cpu"))
    lensc.load(bundle, target="beta:cpu")
    assert (len(engines["alpha"].open), len(engines["beta"].open)) == (0, 2)


@pytest.mark.parametrize(("most", "slices"), [(None, 5), (3, 3), (1, 1)])
def test_pictures_are_cut_as_finely_as_was_asked(
    tmp_path: Path, engines: dict[str, Engine], most: int | None, slices: int
) -> None:
    with lensc.load(build(tmp_path / "b"), max_slice_nums=most) as vlm:
        request = vlm.prepare(user_messages("?", [Image.new("RGB", (90, 90))]))
    assert len(request.slices) == slices


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "alpha"}, UsageError, "expected backend:processor"),
        ({"target": "delta:cpu"}, UsageError, "backend 'delta' is not one of alpha, beta"),
        ({"target": "beta:cpu"}, UnavailableError, "nothing runs for beta:cpu"),
        ({"threads": 0}, UsageError, "threads=0"),
        ({"vision_padding": "none"}, UsageError, "vision_padding='none': expected one of official, masked, per_slice"),
        ({"max_slice_nums": 0}, UsageError, "max_slice_nums=0: expected 1 to 4, which the model was made for"),
        ({"max_slice_nums": 5}, UsageError, "max_slice_nums=5: expected 1 to 4"),
        ({"max_slice_nums": True}, UsageError, "max_slice_nums=True: expected 1 to 4"),
    ],
)
def test_arguments_that_cannot_be_met(
    tmp_path: Path, engines: dict[str, Engine], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lensc.load(build(tmp_path / "b"), **arguments)
    assert not engines["alpha"].open


def test_an_engine_that_is_missing_says_how_to_get_it(tmp_path: Path, engines: dict[str, Engine]) -> None:
    engines["alpha"].usable = False
    with pytest.raises(UnavailableError, match="pip install alpha"):
        lensc.load(build(tmp_path / "b"))


def test_what_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not a bundle"):
        lensc.load(tmp_path)


def test_a_bundle_without_table(tmp_path: Path, engines: dict[str, Engine]) -> None:
    with pytest.raises(ManifestError, match="no embed_tokens"):
        lensc.load(build(tmp_path / "b", tables={}))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f2'", b"text"])
def test_a_damaged_table_is_named(tmp_path: Path, engines: dict[str, Engine], content: bytes) -> None:
    folder = build(tmp_path / "b")
    kept = load_manifest(folder)
    (folder / "embed_tokens.npy").write_bytes(content)
    write_manifest(folder, kept)
    with pytest.raises(ManifestError, match=r"embed_tokens\.npy: cannot be read as npy"):
        lensc.load(folder)


def test_a_table_of_another_model(tmp_path: Path, engines: dict[str, Engine]) -> None:
    folder = build(tmp_path / "b")
    kept = load_manifest(folder)
    np.save(folder / "embed_tokens.npy", np.zeros((VOCAB, D + 1), np.float16))
    write_manifest(folder, kept)
    with pytest.raises(GraphError, match=r"embed_tokens is float16\[1280, 9\]"):
        lensc.load(folder)
    assert not engines["alpha"].open


def test_a_damaged_tokenizer_is_named(tmp_path: Path, engines: dict[str, Engine]) -> None:
    folder = build(tmp_path / "b")
    kept = load_manifest(folder)
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, kept)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        lensc.load(folder)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lensc; heavy = 'numpy PIL tokenizers torch onnx onnxruntime transformers'.split(); "
        "print([m for m in heavy if m in sys.modules]); "
        "lensc.VLM, lensc.Result, lensc.LensError, lensc.__version__; "
        "print([m for m in heavy[3:] if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_exported_names_exist_and_unknown_ones_are_errors() -> None:
    assert all(getattr(lensc, name) is not None for name in lensc.__all__)
    assert set(lensc.__all__) <= set(dir(lensc))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lensc.nothing


def test_a_picture_cache_needs_a_graph_that_was_judged_and_checked(
    tmp_path: Path, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = build(tmp_path / "b")
    with pytest.raises(UnsupportedError, match="no passed parity of vision on alpha:cpu"):
        lensc.load(bundle, picture_cache_bytes=1 << 20)
    with pytest.raises(UsageError, match="selftest=False with a picture cache"):
        lensc.load(bundle, picture_cache_bytes=1 << 20, selftest=False)
    assert not engines["alpha"].open
    parity = ParityRecord("vision", "alpha:cpu", "torch", 0.0, 99.0, 1.0, None, None, 1, True, "none")
    write_manifest(bundle, dataclasses.replace(load_manifest(bundle), parity=(parity,)))
    with lensc.load(bundle, picture_cache_bytes=1 << 20) as vlm:
        vlm.generate("Hello", [np.zeros((28, 28, 3), np.uint8)])
    assert len(list((tmp_path / "cache" / "lensc" / "pictures").iterdir())) == 1


def test_max_memory_decides_whether_graphs_take_turns(
    tmp_path: Path, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lensc.runtime.sequential.WORK_BYTES", 1000)
    bundle = build(tmp_path / "b")
    cache = 2 * 1 * 2 * 4 * 4 * 64  # one layer, two heads of 4 float32, all 64 tokens of the context
    at_once, in_turn = 1000 + cache + 6, 1000 + cache + 3  # artifacts are files of three bytes
    with lensc.load(bundle, max_memory_bytes=at_once):
        assert len(engines["alpha"].open) == 2
    with lensc.load(bundle, max_memory_bytes=at_once - 1) as vlm:
        assert [s.spec.name for s in engines["alpha"].open] == ["vision"]
        result = vlm.generate("Hello")
        assert result.token_ids == (0, 0, 0)
        assert [s.spec.name for s in engines["alpha"].open] == ["decoder"]
        assert "peak memory was" in result.metrics.notes[-1], "this process is larger than some bytes"
    assert not engines["alpha"].open
    with pytest.raises(MemoryLimitError, match=r"all graphs at once take about 0 MB, one at a time 0 MB .*64 tokens"):
        lensc.load(bundle, max_memory_bytes=in_turn - 1)
    broken = build(tmp_path / "broken", value="0.75")
    with pytest.raises(ParityError, match="vision on alpha:cpu"):
        lensc.load(broken, max_memory_bytes=in_turn + 1)
    assert not engines["alpha"].open
