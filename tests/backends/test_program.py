"""Programs as files: written, read, and refused where they break a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensc.backends import _program as program_
from lensc.backends._program import Constant, Place, Port, Program, Value, WeightRecord
from lensc.backends._program_file import check, check_spec, read, write
from lensc.backends._program_reference import NumpySession
from lensc.backends.base import Array
from lensc.backends.errors import GraphError
from lensc.export.graph import DimRange, GraphSpec, StatePair, TensorSpec

WIDTH, HEADS, KV_HEADS, DIM, VOCAB, GROUP = 8, 2, 1, 4, 6, 4
DATA = "native-cpu.data"


def layout() -> dict[str, tuple[int, int]]:
    """Offset and size of what lies in the data file, by name: f32 matrices, and the head in uint4."""
    sizes = {
        "norm": 4 * WIDTH,
        "bias": 4 * WIDTH,
        "q": 4 * WIDTH * WIDTH,
        "k": 4 * DIM * WIDTH,
        "frequencies": 4 * DIM // 2,
        "head": VOCAB * WIDTH // 2,
        "scale": 4 * VOCAB * WIDTH // GROUP,
        "zero": VOCAB * WIDTH // GROUP // 2,
    }
    found, offset = {}, 0
    for name, size in sizes.items():
        found[name] = (offset, size)
        offset += -(-size // 64) * 64
    return found


LAYOUT = layout()
BYTES = sum(LAYOUT["zero"])


def constant(name: str, rows: int, width: int) -> Constant:
    return Constant(name, rows, width, Place(DATA, LAYOUT[name][0]))


def floats(name: str, outputs: int) -> WeightRecord:
    return WeightRecord(name, "f32", outputs, WIDTH, 0, Place(DATA, LAYOUT[name][0]), None, None, "float")


def program() -> Program:
    """A decoder of one layer, with every step but those of the vision tower."""
    places = [Place(DATA, LAYOUT[name][0]) for name in ("head", "scale", "zero")]
    head = WeightRecord("head", "uint4", VOCAB, WIDTH, GROUP, *places, "int8")
    norm = constant("norm", 1, WIDTH)
    tokens = "batch*tokens"
    steps: list[tuple[program_.Step, Value]] = [
        (program_.Normalize("rms", 0, norm, None, 1e-5, 1), Value(tokens, WIDTH)),
        (program_.Linear(1, floats("q", WIDTH), constant("bias", 1, WIDTH), None, 2), Value(tokens, WIDTH)),
        (program_.Linear(1, floats("k", DIM), None, None, 3), Value(tokens, DIM)),
        (program_.Linear(1, floats("k", DIM), None, None, 4), Value(tokens, DIM)),
        (
            program_.CausalAttention(2, 3, 4, 5, 0, HEADS, KV_HEADS, DIM, 0.5, constant("frequencies", 1, DIM // 2)),
            Value(tokens, WIDTH),
        ),
        (program_.Linear(5, floats("q", WIDTH), None, 0, 6), Value(tokens, WIDTH)),
        (program_.SiluMul(6, 1, 7), Value(tokens, WIDTH)),
        (program_.GeluTanh(7, 8), Value(tokens, WIDTH)),
        (program_.Add(8, constant("bias", 1, WIDTH), 9), Value(tokens, WIDTH)),
        (program_.Add(9, 6, 10), Value(tokens, WIDTH)),
        (program_.SelectRows(10, "logit_positions", 11), Value("batch*rows", WIDTH)),
        (program_.Linear(11, head, None, None, 12), Value("batch*rows", VOCAB)),
    ]
    values = (Value(tokens, WIDTH), *(value for _, value in steps))
    inputs, outputs = (Port("inputs_embeds", 0),), (Port("logits", 12),)
    return Program("decoder", (DATA,), values, inputs, tuple(step for step, _ in steps), outputs)


def spec() -> GraphSpec:
    rows = (KV_HEADS, DIM)
    names = ("key.0", "value.0")
    return GraphSpec(
        "decoder",
        (
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("position_ids", "int64", ("tokens",)),
            TensorSpec("logit_positions", "int64", ("rows",)),
            *(TensorSpec(f"past_{name}", "float32", ("past", "batch", *rows)) for name in names),
        ),
        (
            TensorSpec("logits", "float32", ("batch", "rows", VOCAB)),
            *(TensorSpec(name, "float32", ("tokens", "batch", *rows)) for name in names),
        ),
        tuple(StatePair(f"past_{name}", name) for name in names),
        {name: DimRange(0, 1, 9) for name in ("batch", "tokens", "rows", "past")},
    )


def vision() -> Program:
    """The steps that a decoder has not."""
    width = Value("slices*patches", WIDTH)
    steps: tuple[program_.Step, ...] = (
        program_.GatherRows(constant("q", WIDTH, WIDTH), "position_ids", 1),
        program_.Add(0, 1, 2),
        program_.Normalize("layer", 2, constant("norm", 1, WIDTH), constant("bias", 1, WIDTH), 1e-6, 3),
        program_.Attention(constant("k", DIM, WIDTH), 3, 2, "key_bias", 4, HEADS, 0.5),
    )
    values = (*[width] * 4, Value(f"slices*{DIM}", WIDTH))
    return Program("vision", (DATA,), values, (Port("patches", 0),), steps, (Port("image_embeds", 4),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the data file: floats of 0.01 everywhere else than in the head's values."""
    data = bytearray(np.full(-(-BYTES // 4), 0.01, "<f4").tobytes())
    start, size = LAYOUT["head"]
    data[start : start + size] = bytes(range(size))
    (tmp_path / DATA).write_bytes(data)
    return tmp_path


def written(folder: Path, change: Callable[[Any], None]) -> Path:
    """The program with its JSON changed."""
    path = folder / "native-cpu.json"
    write(program(), path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_what_is_written_is_read(folder: Path) -> None:
    for made in (program(), vision()):
        write(made, folder / "native-cpu.json")
        text = (folder / "native-cpu.json").read_bytes()
        assert read(folder / "native-cpu.json") == made
        write(made, folder / "native-cpu.json")
        assert (folder / "native-cpu.json").read_bytes() == text
    assert not list(folder.glob("*.partial"))


def test_what_is_read_runs(folder: Path) -> None:
    """Every step; the sums are those of the definition."""
    check_spec(program(), spec())
    session = NumpySession(spec(), program(), folder)
    feeds: dict[str, Array] = {
        "inputs_embeds": np.ones((1, 3, WIDTH), np.float32),
        "position_ids": np.arange(2, 5),
        "logit_positions": np.array([2, 2]),
        "past_key.0": np.ones((2, 1, KV_HEADS, DIM), np.float32),
        "past_value.0": np.ones((2, 1, KV_HEADS, DIM), np.float32),
    }
    got = session.run(feeds)
    assert got["logits"].shape == (1, 2, VOCAB) and np.isfinite(got["logits"]).all()
    np.testing.assert_array_equal(got["logits"][:, 0], got["logits"][:, 1])
    # the norm of ones is its weight, 0.01; a key sums eight of them times 0.01, a value too
    np.testing.assert_allclose(got["value.0"], 8e-4, rtol=1e-4)


def test_vision_runs(folder: Path) -> None:
    rows = ("slices", "patches")
    seen = GraphSpec(
        "vision",
        (
            TensorSpec("patches", "float32", (*rows, WIDTH)),
            TensorSpec("position_ids", "int64", rows),
            TensorSpec("key_bias", "float32", rows),
        ),
        (TensorSpec("image_embeds", "float32", ("slices", DIM, WIDTH)),),
        (),
        {name: DimRange(1, 1, 9) for name in rows},
    )
    check_spec(vision(), seen)
    patches = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)
    bias = np.zeros((2, 5), np.float32)
    bias[1, 1:] = -10000
    feeds = {"patches": patches, "position_ids": np.zeros((2, 5), np.int64), "key_bias": bias}
    got = NumpySession(seen, vision(), folder).run(feeds)["image_embeds"]
    # a slice of which one key is seen gives that key's value to every query
    np.testing.assert_allclose(got[1], np.tile(patches[1, 0] + np.float32(0.01), (DIM, 1)), rtol=1e-6)
    np.testing.assert_allclose(got[0], np.tile((patches[0] + np.float32(0.01)).mean(0), (DIM, 1)), atol=0.01)


def at(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """Sets what lies at `keys`."""

    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def without(*keys: str | int) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


def _with_multiples(group: int, offset: int = 0) -> Callable[[Any], None]:
    """The head with scales that are multiples of steps, which lie where the scales lay."""

    def change(document: Any) -> None:
        head = {"group": group, "zero_point": None, "multiples": {"file": DATA, "offset": offset}}
        document["steps"][11]["weight"] |= head

    return change


HOSTILE = {
    "format": (at("format", value=1), "format is 1, expected 2"),
    "format-bool": (at("format", value=True), "format is true, expected 2"),
    "unknown-key": (at("extra", value=1), "extra: unknown key"),
    "unknown-key-of-a-step": (at("steps", 0, "extra", value=1), r"steps\[0\]\.extra: unknown key"),
    "missing-key": (without("steps", 0, "x"), r"steps\[0\]\.x: missing"),
    "no-steps": (without("steps"), "expected an object with a list of steps"),
    "unknown-step": (at("steps", 0, "step", value="exec"), r'steps\[0\]: "exec" is no step'),
    "step-of-no-kind": (at("steps", 0, "step", value=[]), r"steps\[0\]: \[\] is no step"),
    "text-for-a-number": (at("steps", 0, "x", value="0"), r"steps\[0\]\.x: expected an integer"),
    "float-for-a-number": (at("steps", 0, "x", value=0.0), r"steps\[0\]\.x: expected an integer"),
    "kind": (at("steps", 0, "kind", value="batch"), r'steps\[0\]\.kind: "batch" is not one of rms, layer'),
    "itself": (at("steps", 0, "x", value=1), r"steps\[0\]: reads value 1, which is not made before it"),
    "later": (at("steps", 5, "residual", value=9), r"steps\[5\]: reads value 9"),
    "negative": (at("steps", 0, "x", value=-1), r"steps\[0\]: reads value -1"),
    "order": (at("steps", 0, "y", value=2), r"steps\[0\]: makes value 2, expected 1"),
    "output": (at("outputs", 0, "value", value=13), r'output "logits": there is no value 13'),
    "input": (at("inputs", 0, "value", value=1), "inputs: expected the first values, in order"),
    "too-few-values": (without("values", 3), "12 values, expected one for each of 1 inputs and 12 steps"),
    "width": (at("values", 0, "width", value=0), r"values\[0\]: width 0"),
    "width-of-a-value": (at("values", 1, "width", value=9), r"x is \[batch\*tokens, 8\], expected \[batch\*tokens, 9\]"),
    "rows": (at("values", 0, "rows", value="batch*-1"), r'values\[0\]: "batch\*-1" is no number of rows'),
    "rows-of-two-lines": (at("values", 0, "rows", value="\n"), r'x is \["\\n", 8\], expected \[batch\*tokens, 8\]'),
    "rows-of-a-value": (at("values", 1, "rows", value="batch"), r"steps\[0\] \(normalize\): x is"),
    "many-rows": (at("values", 0, "rows", value="*".join(["a"] * 9)), "is no number of rows"),
    "epsilon": (at("steps", 0, "epsilon", value="inf"), "epsilon inf"),
    "heads": (at("steps", 4, "num_heads", value=0), "0 heads, 1 key heads of 4"),
    "shared-heads": (at("steps", 4, "kv_num_heads", value=3), "2 heads do not share 3 key heads of 4"),
    "layer": (at("steps", 4, "layer", value=7), "layers of causal attention are not 0 to 0, each once"),
    "scale": (at("steps", 4, "scale", value="-inf"), "scale -inf"),
    "group": (at("steps", 11, "weight", "group", value=-4), r"weight \[6, 8\] in groups of -4"),
    "kind-of-a-weight": (at("steps", 11, "weight", "kind", value="uint3"), '"uint3" is not one of f32, int8'),
    "outputs-of-a-weight": (at("steps", 11, "weight", "outputs", value=1 << 40), r"weight \[1099511627776, 8\]"),
    "whole-bytes": (at("steps", 11, "weight", "inputs", value=7), r"rows of 7 values in uint4 do not end with whole"),
    "no-scale": (at("steps", 11, "weight", "scale", value=None), "a weight in uint4 has no scale"),
    "scaled-floats": (at("steps", 1, "weight", "activations", value="int8"), "a weight in float32 has no group, scale"),
    "multiples": (
        at("steps", 11, "weight", "multiples", value={"file": DATA, "offset": 0}),
        "multiples are for weights in uint4 or uint2 without a zero point",
    ),
    "multiples-of-few-inputs": (_with_multiples(GROUP), f"no kernel sums {WIDTH} inputs in groups of {GROUP} with mult"),
    "multiples-past-the-end": (_with_multiples(0, offset=BYTES), r'"head.multiples" is 6 bytes at'),
    "zero-point": (at("steps", 11, "weight", "kind", value="int8"), "a weight in int8 has a zero point"),
    "offset": (at("steps", 0, "weight", "place", "offset", value=-4), r'"norm" is 32 bytes at -4 of'),
    "offset-past-the-end": (at("steps", 0, "weight", "place", "offset", value=1 << 70), r'"norm" is 32 bytes at 11805'),
    "offset-at-the-end": (at("steps", 0, "weight", "place", "offset", value=BYTES), r'"norm" is 32 bytes at'),
    "alignment": (at("steps", 0, "weight", "place", "offset", value=2), '"norm" lies at 2, expected a multiple of 4'),
    "rows-of-a-constant": (at("steps", 8, "b", "rows", value=3), r"b is \[3, 8\], which does not repeat over"),
    "operand": (at("steps", 8, "b", value="bias"), r'steps\[8\]\.b: expected int or Constant, got "bias"'),
    "place": (at("steps", 0, "weight", "place", "file", value="other"), '"norm" lies in "other", which is not one of the'),
    "no-file": (at("files", 0, value="absent.data"), "files: absent.data is missing"),
    "file-elsewhere": (at("files", 0, value="../x.data"), r'files: "\.\./x\.data" is no plain file name'),
    "file-twice": (at("files", value=[DATA, DATA]), "files: a name appears twice"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_broken_rule_is_one_clear_line(change: Callable[[Any], None], message: str, folder: Path) -> None:
    path = written(folder, change)
    with pytest.raises(GraphError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "expected an object with a list of steps"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"format": 1, "format": 1}', "appears twice"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
    ids=("empty", "list", "no text", "deep", "twice", "nan", "long number"),
)
def test_what_is_no_program_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "native-cpu.json"
    path.write_bytes(text)
    with pytest.raises(GraphError, match=message):
        read(path)


def test_a_file_that_is_missing_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="cannot be read: No such file"):
        read(tmp_path / "native-cpu.json")
    with open(tmp_path / "native-cpu.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(GraphError, match="1073741824 bytes, a program has at most"):
        read(tmp_path / "native-cpu.json")


def test_a_data_file_that_is_cut_is_refused(folder: Path) -> None:
    write(program(), folder / "native-cpu.json")
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[: BYTES - 4])
    with pytest.raises(GraphError, match=rf'"head.zero_point" is 6 bytes at \d+ of {DATA}, which has {BYTES - 4}'):
        read(folder / "native-cpu.json")


def test_problems_are_listed_and_counted() -> None:
    with pytest.raises(GraphError, match=r"program decoder: (steps\[\d+\].*; ){4}and \d+ more$"):
        check(program(), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "vision"}, 'its graph is "vision"'),
        ({"inputs": (Port("embeds", 0),)}, 'no input "embeds" of float32'),
        ({"outputs": (Port("logits", 10),)}, r"expected output logits: float32\[batch, rows, 6\], found \[batch\*tokens, 8\]"),
        ({"outputs": ()}, "no output logits"),
        ({"values": (Value("words", WIDTH), *program().values[1:])}, "no dimension words"),
        ({"steps": ()}, "0 layers with a cache, expected 1"),
        ({"steps": (replace(program().steps[4], head_dim=2),)}, "no states of layer 0 with 1 heads of 2"),
        ({"steps": (replace(program().steps[10], positions="ids"),)}, r'no input "ids" int64\[rows\]'),
    ],
)  # fmt: skip
def test_the_program_of_another_graph_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check_spec(replace(program(), **change), spec())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_change_of_a_program_does_more_than_be_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Some value in the file is replaced by another: the result is refused, or it is a program that may run."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / DATA).write_bytes(bytes(BYTES))
    junk = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=8),
        st.sampled_from([[], {}]),
    )

    def change(document: Any) -> None:
        while True:
            keys = list(document) if isinstance(document, dict) else range(len(document))
            key = data.draw(st.sampled_from(list(keys)))
            if isinstance(document[key], dict | list) and document[key] and data.draw(st.integers(0, 9)):
                document = document[key]
                continue
            document[key] = data.draw(junk)
            return

    path = written(folder, change)
    try:
        found = read(path)
    except GraphError as error:
        assert "\n" not in str(error)
    else:
        check(found, {DATA: BYTES})
