"""The benchmark of our own kernels at full size, on a bundle that is small, our own server in the rival's place."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lensc.backends import _program_file
from lensc.backends._program import Constant, GatherRows, Linear, Normalize, Place, Program, WeightRecord
from lensc.backends.base import Target
from lensc.backends.bundle import load_manifest
from lensc.backends.errors import UnsupportedError
from lensc.bench import cpu, full_size, serve, turns
from lensc.contender import Contender
from lensc.export.build import build

GOLDEN = Path(__file__).parents[1] / "golden"
REACH = {"bandwidth_gb_s": 20.0, "int8_gemm_gop_s": 1000.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> cpu.Bench:
    folder = tmp_path_factory.mktemp("bench")
    build(GOLDEN / "checkpoint", [Target.parse("native:cpu")], folder / "native")
    for name in ("ort-genai", "llama-cpp-decoder"):
        (folder / "rivals" / name).mkdir(parents=True)
    return cpu.Bench(full_size.Place(folder, 1, 2), folder / "native", 128)


@pytest.fixture
def asked(bench: cpu.Bench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Engine and script of the rivals that are started; our own decoder stands in for each."""
    found: list[tuple[str, str]] = []

    def rival(place: full_size.Place, engine: str, script: str) -> Contender:
        found.append((engine, script))
        return bench.ours("decoder")

    monkeypatch.setattr(full_size.Place, "rival", rival)
    return found


def test_the_decoder_beside_a_rival(bench: cpu.Bench, asked: list[tuple[str, str]]) -> None:
    rows = {row.what: row for row in cpu.decoder(bench, "onnxruntime")(REACH)}
    assert list(rows) == ["load until ready", "decode, context 32", "prefill 128", "peak memory, 128 tokens"]
    decode = rows["decode, context 32"]
    assert decode.unit == "tokens/s" and decode.lensc is not None and decode.lensc > 0
    assert decode.ratio is not None and 0.01 < decode.ratio < 100
    assert decode.limit == 20e9 / bench.bytes_per_token(32)
    assert rows["prefill 128"].limit == 1000e9 / full_size.FLOP_PER_TOKEN
    assert set(asked) == {("onnxruntime", "ort_genai")}


def test_llama_cpp_is_measured_with_both_of_its_files(bench: cpu.Bench, asked: list[tuple[str, str]]) -> None:
    rows = cpu.SECTIONS["llama"](bench)(REACH)
    decode = [(row.what, row.rival) for row in rows if row.what.startswith("decode")]
    assert decode == [("decode, context 32", "llama.cpp Q4_0"), ("decode, context 32", "llama.cpp Q3_K_M")]
    assert rows[-1].limit == 20e9 / bench.bytes_per_token(32) and rows[-1].ratio_spread is not None
    assert [row.what for row in rows] == ["load until ready", decode[0][0], "prefill 128", "peak memory, 128 tokens",
                                          decode[1][0]]  # fmt: skip
    assert set(asked) == set(cpu.scripts_of(["llama"]))


def test_small_weights_are_set_beside_both_rivals(bench: cpu.Bench, asked: list[tuple[str, str]]) -> None:
    shutil.copytree(bench.bundle, cpu.small_bundle(bench.place))
    rows = cpu.SECTIONS["small"](bench)(REACH)
    assert [(row.what, row.rival) for row in rows] == [
        ("decode, context 32, int2-mlp", "ONNX Runtime GenAI, int4 block 128"),
        ("decode, context 32, int2-mlp", "llama.cpp Q4_0"),
    ]
    assert all(row.ratio is not None and row.limit == 20e9 / bench.bytes_per_token(32) for row in rows)
    assert asked == cpu.scripts_of(["small"])


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
    decoders = [("onnxruntime", "ort_genai"), ("openvino", "openvino_decoder"), ("llama", "llama_cpp_decoder")]
    towers = [("onnxruntime", "ort_vision"), ("openvino", "openvino_vision")]
    assert cpu.scripts_of(["verify"]) == []
    assert cpu.scripts_of(["onnxruntime"]) == decoders[:1]
    assert cpu.scripts_of(["llama"]) == [decoders[2], ("llama", "llama_cpp_q3_k_m")]
    assert cpu.scripts_of(["vision"]) == towers
    assert cpu.scripts_of(["whole"]) == decoders + towers


def test_a_cache_of_8_bits_has_scales(bench: cpu.Bench) -> None:
    spec = load_manifest(bench.bundle).model.decoder
    rows = 2 * spec.num_layers * spec.num_kv_heads * 10
    assert cpu.cache_bytes(spec, 10, None) == rows * 2 * spec.head_dim
    assert cpu.cache_bytes(spec, 10, 8) == rows * (spec.head_dim + 4)


def test_a_token_reads_what_the_program_names_and_no_more_of_its_files(bench: cpu.Bench, tmp_path: Path) -> None:
    """All of the decoder's weights in float32, and the frequencies that its layers share."""
    weights = 4 * sum(math.prod(array.shape) for name, array in load_file(GOLDEN / "checkpoint/model.safetensors").items()
                      if name.startswith("llm.") and "embed_tokens" not in name)  # fmt: skip
    spec = load_manifest(bench.bundle).model.decoder
    assert bench.bytes_per_token(0) == weights + 4 * spec.head_dim // 2
    assert bench.bytes_per_token(10) - bench.bytes_per_token(0) == cpu.cache_bytes(spec, 10, None)
    program, *data = turns.files_of(bench.bundle, "decoder", "native:cpu")
    for path in (program, *data):
        shutil.copyfile(path, tmp_path / path.name)
    for path in data:
        with open(tmp_path / path.name, "ab") as file:
            file.write(bytes(1 << 20))
    larger = _program_file.read(tmp_path / program.name)
    assert cpu.constant_bytes(larger) == bench.bytes_per_token(0)


def test_a_constant_is_counted_once_and_a_table_by_the_row() -> None:
    places = [Place("data", offset) for offset in (0, 4000, 6000, 7000, 8000)]
    weight = WeightRecord("w", "uint4", 40, 64, 32, places[0], places[1], places[2], "int8")
    norm, table = Constant("n", 1, 64, places[3]), Constant("t", 1000, 64, places[4])
    steps = (
        GatherRows(table, "ids", 0),
        Normalize("rms", 0, norm, None, 1e-5, 1),
        Linear(1, weight, None, None, 2),
        Normalize("rms", 2, norm, None, 1e-5, 3),
        Linear(3, weight, norm, None, 4),
    )
    values, scales, zero_points = 40 * 64 // 2, 4 * 40 * 2, 40 * 2 // 2
    row = 4 * 64
    assert cpu.constant_bytes(Program("decoder", ("data",), (), (), steps, ())) == (
        values + scales + zero_points + row + row
    )
    # a table that is a weight, too, is read whole
    tied = (*steps, Normalize("rms", 4, table, None, 1e-5, 5))
    assert cpu.constant_bytes(Program("decoder", ("data",), (), (), tied, ())) == (
        values + scales + zero_points + row + 1000 * row
    )


def test_a_bundle_without_the_target_says_how_to_make_one(bench: cpu.Bench) -> None:
    with pytest.raises(UnsupportedError, match="no decoder for openvino:cpu; build it with --target openvino:cpu"):
        turns.files_of(bench.bundle, "decoder", "openvino:cpu")
