"""Every backend that is usable here against the torch reference, on graphs of a tiny random model. Sizes are awkward on
purpose: 1, 63, 37, no multiple of a vector or a tile.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference model needs torch: pip install 'lensc[export]'")
import torch

from lensc.backends import registry
from lensc.backends.base import Array, Artifact, Backend, CachedSession, Session, StaticBackend, Target
from lensc.backends.bundle import DecoderSpec
from lensc.backends.errors import (
    CompatibilityError,
    ExecutionError,
    GraphError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from lensc.backends.load_options import LoadOptions
from lensc.export.graph import Graph, GraphSpec
from lensc.export.models.config import ModelConfig
from lensc.export.models.functions import MASK
from lensc.export.models.minicpmv import MiniCPMV
from lensc.export.models.session import graph_modules, torch_sessions
from lensc.export.onnx import example_inputs, export_graph
from lensc.runtime.decoder import HostCachedSession

GROUPS = (1, 2, 4)
DECODER_SIZES = (
    (1, 1, 0, 1),
    (1, 63, 0, 2),
    (1, 1, 1, 1),
    (1, 1, 37, 1),
    (3, 1, 37, 1),
    (3, 5, 1, 5),
    (1, 63, 37, 63),
    (2, 17, 100, 1),
)
VISION_SIZES = ((1, 1), (1, 63), (3, 7), (2, 100))

ATOL, RTOL = 2e-5, 64 * float(np.finfo(np.float32).eps)
"""Float32: sums of up to 256 products of values around 1 in another order."""


def config(groups: int) -> ModelConfig:
    return ModelConfig.from_json(
        {
            "model_type": "minicpmv",
            "hidden_size": 128,
            "intermediate_size": 200,
            # two layers where names and order of the cache matter, one where only the grouping of heads does
            "num_hidden_layers": 2 if groups == 2 else 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4 // groups,
            "vocab_size": 101,
            "query_num": 5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 512,
            "drop_vision_last_layer": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "slice_config": {"max_slice_nums": 4, "patch_size": 14, "scale_resolution": 56},
            "vision_config": {
                "hidden_size": 48,
                "intermediate_size": 100,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "image_size": 140,
                "patch_size": 14,
            },
        }
    )


def model(groups: int) -> MiniCPMV:
    torch.manual_seed(groups)
    made = MiniCPMV(config(groups)).requires_grad_(False).eval()
    for name, parameter in made.named_parameters():
        scale = 0.15 if parameter.ndim == 1 else 0.7 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1 and name.endswith("weight")))
    return made


@dataclasses.dataclass(frozen=True)
class Exported:
    graph: Graph
    reference: Session


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Exported]:
    """The graph `vision` or `decoder` of the model with that many heads per group, exported once."""
    made: dict[tuple[str, int], Exported] = {}

    def get(name: str, groups: int) -> Exported:
        if (name, groups) not in made:
            source = model(groups)
            module, spec = graph_modules(source)[name]
            path = tmp_path_factory.mktemp("graphs") / f"{name}.onnx"
            graph = export_graph(module, example_inputs(spec), spec, path)
            made[name, groups] = Exported(graph, torch_sessions(source)[name])
        return made[name, groups]

    return get


def targets() -> list[Any]:
    found = []
    for probe in registry.probes():
        if not isinstance(registry.get(probe.backend), StaticBackend):  # those have a file of their own, test_qnn.py
            marks = () if probe.usable else pytest.mark.skip(reason=probe.reason)
            found.append(pytest.param(Target(probe.backend, probe.processor), id=probe.backend, marks=marks))
    return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A graph in an engine, and the reference it has to equal."""

    session: Session
    reference: Session
    artifact: Artifact
    backend: Backend
    graph: Graph
    bundle: Path

    @property
    def spec(self) -> GraphSpec:
        return self.graph.spec


@pytest.fixture(scope="module", params=targets())
def load(
    request: pytest.FixtureRequest,
    exported: Callable[[str, int], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str, int], Loaded]]:
    """Compile and load a graph, once."""
    target: Target = request.param
    backend = registry.get(target.backend)
    made: dict[tuple[str, int], Loaded] = {}

    def get(name: str, groups: int = 2) -> Loaded:
        if (name, groups) not in made:
            source = exported(name, groups)
            bundle = tmp_path_factory.mktemp("bundle")
            (bundle / target.slug).mkdir()
            artifact = backend.compile(source.graph, target, bundle / target.slug)
            session = backend.load(artifact, source.graph.spec, bundle, LoadOptions(threads=1))
            made[name, groups] = Loaded(session, source.reference, artifact, backend, source.graph, bundle)
        return made[name, groups]

    yield get
    for loaded in made.values():
        loaded.session.close()


def decoder_feeds(spec: GraphSpec, batch: int, tokens: int, past: int, rows: int) -> dict[str, Array]:
    generator = np.random.default_rng(batch * 1000 + tokens * 100 + past)
    sizes = {"batch": batch, "tokens": tokens, "past": past}
    feeds: dict[str, Array] = {
        t.name: generator.standard_normal([sizes[d] if isinstance(d, str) else d for d in t.shape], np.float32)
        for t in spec.inputs
        if t.dtype == "float32"
    }
    feeds["position_ids"] = np.arange(past, past + tokens)
    feeds["logit_positions"] = np.linspace(0, tokens - 1, rows).astype(np.int64) if rows > 1 else np.array([tokens - 1])
    return feeds


def vision_feeds(spec: GraphSpec, slices: int, patches: int) -> dict[str, Array]:
    """Random patches; of every slice but the first the last third is padding."""
    generator = np.random.default_rng(slices * 1000 + patches)
    sizes = {"slices": slices, "patches": patches}
    feeds: dict[str, Array] = {
        t.name: generator.standard_normal([sizes[d] if isinstance(d, str) else d for d in t.shape]).astype(t.dtype)
        for t in spec.inputs
    }
    feeds["position_ids"] = np.tile(np.arange(patches) * 10 // patches, (slices, 1))
    padding = np.arange(patches) >= max(1, patches - patches // 3)
    for name in ("attention_bias", "key_bias"):
        feeds[name][:] = np.where(padding, MASK, 0.0)
        feeds[name][0] = 0.0
    return feeds


def assert_close(got: dict[str, Array], expected: dict[str, Array]) -> None:
    assert list(got) == list(expected)
    for name, reference in expected.items():
        assert got[name].shape == reference.shape, name
        assert got[name].dtype == reference.dtype, name
        np.testing.assert_allclose(got[name], reference, rtol=RTOL, atol=ATOL, err_msg=name)


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: f"G{g}")
@pytest.mark.parametrize("sizes", DECODER_SIZES, ids=lambda s: "B{}-T{}-P{}-R{}".format(*s))
def test_decoder(load: Callable[..., Loaded], groups: int, sizes: tuple[int, int, int, int]) -> None:
    loaded = load("decoder", groups)
    feeds = decoder_feeds(loaded.spec, *sizes)
    assert_close(loaded.session.run(feeds), loaded.reference.run(feeds))


@pytest.mark.parametrize("sizes", VISION_SIZES, ids=lambda s: "S{}-N{}".format(*s))
def test_vision(load: Callable[..., Loaded], sizes: tuple[int, int]) -> None:
    loaded = load("vision")
    feeds = vision_feeds(loaded.spec, *sizes)
    assert_close(loaded.session.run(feeds), loaded.reference.run(feeds))


def test_padding_of_a_slice_does_not_matter(load: Callable[..., Loaded]) -> None:
    loaded = load("vision")
    feeds = vision_feeds(loaded.spec, 2, 63)
    other = {name: array.copy() for name, array in feeds.items()}
    other["patches"][1, 42:] = 7.0
    other["key_pos_embed"][1, 42:] = -3.0
    assert_close(loaded.session.run(other), loaded.session.run(feeds))


@pytest.mark.parametrize("batch", (1, 3), ids=lambda b: f"B{b}")
def test_cache_is_filled_in_place(load: Callable[..., Loaded], batch: int) -> None:
    """Past and new rows are views of one array; nothing but the new rows changes, and they are not copied back."""
    loaded = load("decoder")
    spec, past, tokens, guard = loaded.spec, 37, 5, 3
    feeds = decoder_feeds(spec, batch, tokens, past, 1)
    expected = loaded.reference.run(feeds)
    caches, out = {}, {}
    for pair in spec.states:
        row = feeds[pair.input].shape[1:]
        caches[pair.input] = np.full((past + tokens + guard, *row), np.nan, np.float32)
        caches[pair.input][:past] = feeds[pair.input]
        out[pair.output] = caches[pair.input][past : past + tokens]
    before = {name: cache.copy() for name, cache in caches.items()}
    got = loaded.session.run({**feeds, **{name: cache[:past] for name, cache in caches.items()}}, out)
    assert_close(got, expected)
    for pair in spec.states:
        cache = caches[pair.input]
        assert got[pair.output] is out[pair.output]
        np.testing.assert_array_equal(cache[:past], before[pair.input][:past])
        np.testing.assert_array_equal(cache[past : past + tokens], got[pair.output])
        assert np.isnan(cache[past + tokens :]).all()


def test_first_rows_of_an_empty_cache(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    feeds = decoder_feeds(loaded.spec, 1, 1, 0, 1)
    caches = {p.input: np.full((4, *feeds[p.input].shape[1:]), np.nan, np.float32) for p in loaded.spec.states}
    out = {p.output: caches[p.input][:1] for p in loaded.spec.states}
    loaded.session.run({**feeds, **{name: cache[:0] for name, cache in caches.items()}}, out)
    expected = loaded.reference.run(feeds)
    for pair in loaded.spec.states:
        np.testing.assert_allclose(caches[pair.input][:1], expected[pair.output], rtol=RTOL, atol=ATOL)
        assert np.isnan(caches[pair.input][1:]).all()


def test_prompt_in_pieces_equals_prompt_at_once(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    whole = decoder_feeds(loaded.spec, 1, 20, 0, 20)
    expected = loaded.session.run(whole)
    rows: dict[str, list[Array]] = {p.input: [whole[p.input]] for p in loaded.spec.states}
    logits = []
    for start, end in ((0, 1), (1, 8), (8, 19), (19, 20)):
        feeds = {
            "inputs_embeds": whole["inputs_embeds"][:, start:end],
            "position_ids": np.arange(start, end),
            "logit_positions": np.arange(end - start),
            **{name: np.concatenate(parts) for name, parts in rows.items()},
        }
        got = loaded.session.run(feeds)
        logits.append(got["logits"])
        for pair in loaded.spec.states:
            rows[pair.input].append(got[pair.output])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected["logits"], rtol=RTOL, atol=ATOL)


def test_steps_after_a_cache_are_runs_after_a_past(load: Callable[..., Loaded]) -> None:
    """Prefill in two chunks, decode, trim, fork, reorder, growth: the engine's own cache against the reference's."""
    loaded = load("decoder")
    spec, generator = loaded.spec, np.random.default_rng(3)

    def pair(session: Session) -> CachedSession:
        return session if isinstance(session, CachedSession) else HostCachedSession(session, decoder_of(spec))

    both = [pair(loaded.session), pair(loaded.reference)]
    caches = [session.new_cache(6) for session in both]

    def step(batch: int, tokens: int) -> None:
        start = caches[1].length
        feeds = decoder_feeds(spec, batch, tokens, start, 1)
        feeds = {name: array for name, array in feeds.items() if not name.startswith("past_")}
        feeds["inputs_embeds"] = generator.standard_normal(feeds["inputs_embeds"].shape, np.float32)
        got, expected = (s.step(feeds, c)["logits"] for s, c in zip(both, caches, strict=True))
        np.testing.assert_allclose(got, expected, rtol=RTOL, atol=ATOL)
        assert caches[0].length == start + tokens and caches[0].used_bytes <= caches[0].nbytes

    step(1, 5)
    step(1, 3)  # past the capacity
    step(1, 1)
    for cache in caches:
        cache.trim(6)
    step(1, 2)
    caches = [cache.fork(3) for cache in caches]
    step(3, 1)
    for cache in caches:
        cache.reorder(np.array([2, 0, 0]), 8)
    step(3, 2)
    wrong: dict[str, Callable[[], object]] = {
        "trim": lambda: caches[0].trim(99),
        "fork": lambda: caches[0].fork(2),
        "reorder": lambda: caches[0].reorder(np.array([0, 1, 3]), 8),
    }
    for what, call in wrong.items():
        with pytest.raises(UsageError, match=what):
            call()
    if isinstance(loaded.session, CachedSession):  # its rows are appended: another order of positions has no place
        with pytest.raises(UsageError, match="position_ids"):
            loaded.session.run(decoder_feeds(spec, 1, 4, 5, 1) | {"position_ids": np.array([5, 7, 6, 8])})


def decoder_of(spec: GraphSpec) -> DecoderSpec:
    width, vocabulary = spec.input("inputs_embeds").shape[2], spec.output("logits").shape[2]
    sizes = (width, len(spec.states) // 2, *spec.input("past_key.0").shape[2:], vocabulary, spec.dims["past"].max)
    return DecoderSpec(*(int(size) for size in sizes))


def test_feeds_are_not_modified_and_need_not_be_contiguous(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    feeds = decoder_feeds(loaded.spec, 2, 5, 37, 1)
    strided = {name: np.asfortranarray(array) for name, array in feeds.items()}
    for array in strided.values():
        array.flags.writeable = False
    assert not strided["inputs_embeds"].flags.c_contiguous
    assert_close(loaded.session.run(strided), loaded.reference.run(feeds))
    for name, array in strided.items():
        np.testing.assert_array_equal(array, feeds[name])


def test_outputs_stay_valid_after_the_next_run(load: Callable[..., Loaded]) -> None:
    loaded = load("vision")
    feeds = vision_feeds(loaded.spec, 1, 63)
    first = loaded.session.run(feeds)["image_embeds"]
    kept = first.copy()
    loaded.session.run({**feeds, "patches": feeds["patches"] + 1})
    np.testing.assert_array_equal(first, kept)


def test_runs_are_repeatable(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    feeds = decoder_feeds(loaded.spec, 1, 5, 37, 1)
    first, second = loaded.session.run(feeds), loaded.session.run(feeds)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_every_wrong_feed_is_named(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    feeds = decoder_feeds(loaded.spec, 1, 5, 37, 1)
    del feeds["past_key.0"]
    feeds["position_ids"] = feeds["position_ids"].astype(np.int32)
    feeds["past_value.1"] = feeds["past_value.1"][:36]
    feeds["pixels"] = np.zeros(1, np.float32)
    with pytest.raises(UsageError, match="decoder") as caught:
        loaded.session.run(feeds)
    for name in ("missing past_key.0", "position_ids", "past_value.1", "unexpected pixels"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_wrong_out_is_named(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    feeds = decoder_feeds(loaded.spec, 1, 5, 37, 1)
    row = feeds["past_key.0"].shape[1:]
    frozen = np.zeros((5, *row), np.float32)
    frozen.flags.writeable = False
    out = {
        "key.0": np.zeros((4, *row), np.float32),
        "value.0": np.zeros((5, *row), np.float64),
        "key.1": np.zeros((10, *row), np.float32)[::2],
        "value.1": frozen,
        "keys": np.zeros(1, np.float32),
    }
    with pytest.raises(UsageError, match="decoder") as caught:
        loaded.session.run(feeds, out)
    for name in ("key.0", "value.0", "key.1", "value.1", "unexpected output keys"):
        assert name in str(caught.value)


def test_supports_names_what_it_runs_on(load: Callable[..., Loaded]) -> None:
    loaded = load("vision")
    target = loaded.artifact.target
    assert loaded.backend.supports(loaded.spec, "f32", target) is None
    other = Target(target.backend, "npu" if target.processor != "npu" else "gpu", "nothing")
    reason = loaded.backend.supports(loaded.spec, "f32", other)
    assert reason is not None and str(other) in reason
    with pytest.raises(UnsupportedError, match=str(other)):
        loaded.backend.compile(loaded.graph, other, loaded.bundle)


def test_artifact_describes_itself(load: Callable[..., Loaded]) -> None:
    loaded = load("decoder")
    artifact = loaded.artifact
    assert (artifact.graph, artifact.scheme) == ("decoder", "f32")
    assert artifact.toolchain and artifact.compatibility
    assert sum(artifact.placement.values()) > 20
    on_disk = {
        p.relative_to(loaded.bundle).as_posix(): p.stat().st_size for p in loaded.bundle.rglob("*") if p.is_file()
    }
    assert {f.path: f.bytes for f in artifact.files} == on_disk


def test_bundle_can_be_moved(load: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded = load("vision")
    shutil.copytree(loaded.bundle, tmp_path / "elsewhere")
    session = loaded.backend.load(loaded.artifact, loaded.spec, tmp_path / "elsewhere", LoadOptions(threads=1))
    feeds = vision_feeds(loaded.spec, 1, 7)
    assert_close(session.run(feeds), loaded.session.run(feeds))
    session.close()


def test_closed_session_refuses(load: Callable[..., Loaded]) -> None:
    loaded = load("vision")
    session = loaded.backend.load(loaded.artifact, loaded.spec, loaded.bundle)
    session.close()
    session.close()
    with pytest.raises(ExecutionError, match="closed"):
        session.run(vision_feeds(loaded.spec, 1, 7))


def test_other_requirements_are_refused_with_the_command(load: Callable[..., Loaded]) -> None:
    loaded = load("vision")
    newer = {
        name: ">=9999.1" if wanted.startswith(">=") else "other"
        for name, wanted in loaded.artifact.compatibility.items()
    }
    for requirements in (newer, {**loaded.artifact.compatibility, "firmware": "7"}):
        artifact = dataclasses.replace(loaded.artifact, compatibility=requirements)
        with pytest.raises(CompatibilityError, match=f"lensc compile .* --target {loaded.artifact.target}") as caught:
            loaded.backend.load(artifact, loaded.spec, loaded.bundle)
        assert any(f" {wanted}" in str(caught.value) for wanted in (">=9999.1", "other", "firmware"))


def test_another_graph_than_the_manifest_says_is_refused(load: Callable[..., Loaded]) -> None:
    loaded, other = load("vision"), load("decoder")
    with pytest.raises(
        GraphError, match=r"graph decoder holds another graph: no input inputs_embeds.*unexpected input"
    ):
        loaded.backend.load(loaded.artifact, other.spec, loaded.bundle)


@pytest.mark.parametrize("damage", ("truncated", "garbage", "missing"))
@pytest.mark.parametrize("which", (0, 1), ids=("model", "data"))
def test_damaged_artifacts_fail_in_one_line(
    load: Callable[..., Loaded], tmp_path: Path, damage: str, which: int
) -> None:
    loaded = load("vision")
    if which >= len(loaded.artifact.files):
        pytest.skip("this backend's artifacts are one file")
    bundle = tmp_path / "bundle"
    shutil.copytree(loaded.bundle, bundle)
    file = bundle / loaded.artifact.files[which].path
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif which == 1:
        pytest.skip("any bytes are weights; the manifest's sha256 tells")
    else:
        file.write_bytes(b"\xff" * 1000)
    with pytest.raises(ExecutionError) as caught:
        loaded.backend.load(loaded.artifact, loaded.spec, bundle)
    assert "\n" not in str(caught.value) and any(Path(r.path).stem in str(caught.value) for r in loaded.artifact.files)


def test_compiling_into_a_missing_folder_is_a_storage_error(load: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded = load("vision")
    with pytest.raises(StorageError, match="nowhere"):
        loaded.backend.compile(loaded.graph, loaded.artifact.target, tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ("truncated", "missing"))
def test_compiling_a_damaged_graph_fails_in_one_line(load: Callable[..., Loaded], tmp_path: Path, damage: str) -> None:
    loaded = load("vision")
    broken = dataclasses.replace(loaded.graph, path=tmp_path / "vision.onnx")
    if damage == "truncated":
        broken.path.write_bytes(loaded.graph.path.read_bytes()[:-1000])
    (tmp_path / "out").mkdir()
    with pytest.raises(ExecutionError) as caught:
        loaded.backend.compile(broken, loaded.artifact.target, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "out").iterdir())
