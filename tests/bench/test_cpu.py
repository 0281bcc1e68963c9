"""The benchmark of our own kernels at full size, on a bundle that is small, our own server in the rival's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import UnsupportedError
from lensc.bench import cpu, full_size, serve, turns
from lensc.bench.contender import Contender
from lensc.export.build import build

GOLDEN = Path(__file__).parents[1] / "golden"
REACH = {"bandwidth_gb_s": 20.0, "int8_gemm_gop_s": 1000.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> cpu.Bench:
    folder = tmp_path_factory.mktemp("bench")
    build(GOLDEN / "checkpoint", [Target.parse("native:cpu")], folder / "native")
    (folder / "rivals" / "ort-genai").mkdir(parents=True)
    return cpu.Bench(full_size.Place(folder, 1, 2), folder / "native", 128)


def test_the_decoder_beside_a_rival(bench: cpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def rival(place: full_size.Place, engine: str, script: str) -> Contender:
        assert (engine, script) == ("onnxruntime", "ort_genai")
        return bench.ours("decoder")

    monkeypatch.setattr(full_size.Place, "rival", rival)
    rows = {row.what: row for row in cpu.decoder(bench, "onnxruntime")(REACH)}
    assert list(rows) == ["load until ready", "decode, context 32", "prefill 128", "peak memory, 128 tokens"]
    decode = rows["decode, context 32"]
    assert decode.unit == "tokens/s" and decode.lensc is not None and decode.lensc > 0
    assert decode.ratio is not None and 0.01 < decode.ratio < 100
    assert decode.limit == 20e9 / bench.bytes_per_token(32)
    assert rows["prefill 128"].limit == 1000e9 / full_size.FLOP_PER_TOKEN


def test_steps_of_drafts_are_counted_in_steps_of_one(bench: cpu.Bench) -> None:
    rows = cpu.verify(bench)
    assert [(row.what, row.unit) for row in rows] == [(f"verify {count} tokens", "steps") for count in cpu.DRAFTS]
    assert all(row.lensc is not None and row.lensc > 0 for row in rows)
    assert [row.limit for row in rows] == [None, None, cpu.VERIFY_LIMIT]


def test_a_whole_request_says_what_it_was(bench: cpu.Bench) -> None:
    with bench.ours("whole") as ours:
        answer = ours.ask("request 112")
    assert answer["seconds"] > 0 and answer["slices"] >= 1 and answer["tokens"] > answer["slices"]


def test_slices_are_encoded_together(bench: cpu.Bench) -> None:
    with bench.ours("vision") as ours:
        assert ours.ask("vision 3")["what"] == "vision 3"


def test_every_context_follows_its_own_prompt() -> None:
    asked = cpu._asked(32, [128, 1024], [1024])
    order = ["prefill 32", "decode, context 32", "prefill 128", "prefill 1024", "decode, context 1024"]
    assert list(dict(asked)) == order
    assert asked.count(("decode, context 1024", "decode 8")) == cpu.TURNS
    assert max(cpu.TURNS, cpu.LAST_TURNS) * cpu.STEPS < serve.ROOM


def test_sections_need_their_rivals() -> None:
    both = [("onnxruntime", "ort_genai"), ("openvino", "openvino_decoder")]
    towers = [("onnxruntime", "ort_vision"), ("openvino", "openvino_vision")]
    assert cpu.scripts_of(["verify"]) == []
    assert cpu.scripts_of(["onnxruntime"]) == both[:1]
    assert cpu.scripts_of(["vision"]) == towers
    assert cpu.scripts_of(["whole"]) == both + towers


def test_a_cache_of_8_bits_has_scales(bench: cpu.Bench) -> None:
    spec = load_manifest(bench.bundle).model.decoder
    rows = 2 * spec.num_layers * spec.num_kv_heads * 10
    assert cpu.cache_bytes(spec, 10, None) == rows * 2 * spec.head_dim
    assert cpu.cache_bytes(spec, 10, 8) == rows * (spec.head_dim + 4)


def test_a_bundle_without_the_target_says_how_to_make_one(bench: cpu.Bench) -> None:
    with pytest.raises(UnsupportedError, match="no decoder for openvino:cpu; build it with --target openvino:cpu"):
        turns.files_of(bench.bundle, "decoder", "openvino:cpu")
