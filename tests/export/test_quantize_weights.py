"""Weight formats, rounding, and the bytes: against a plain implementation, ONNX's reference, ONNX Runtime."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from lensc.backends.errors import InputError, UsageError
from lensc.export.quantize import grid, weights
from lensc.export.quantize.linears import UINT2_IR, UINT2_OPSET
from lensc.export.quantize.weights import (
    QuantizedWeight,
    WeightFormat,
    dequantize,
    pack,
    pack_zero_points,
    packed_table,
    quantize_rtn,
    quantize_table,
    unpack,
)
from lensc.runtime.embedding import EmbeddingTable

FORMATS = ["w8", "w8-g32", "w8-g32-asym", "w4-g128", "w4-g32", "w4-g32-asym", "w4", "w3-g32", "w2-g16-asym", "w2-g32"]
MULTIPLES = ["w4-g128-s4", "w4-g32-s4", "w3-g32-s4", "w2-g64-s4"]
"""Formats whose scales are multiples; see test_quantize_multiples."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Root mean square error as a share of the root mean square."""
    return float((dequantize(quantized) - weight).norm() / weight.norm())


def plain_rtn(weight: Tensor, text: str) -> Tensor:
    """The textbook's rounding without a search, one group after the other in float64: the dequantized weight."""
    format = WeightFormat.parse(text)
    result = torch.empty(weight.shape, dtype=torch.float64)
    size = format.group_size or weight.shape[1]
    for r in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            x = weight[r, start : start + size].double()
            if format.symmetric:
                scale = float(x.abs().max()) / (2 ** (format.bits - 1) - 1)
                result[r, start : start + size] = (x / scale).round() * scale
            else:
                low, high = min(float(x.min()), 0), max(float(x.max()), 0)
                scale = (high - low) / (2**format.bits - 1)
                zero = round(-low / scale)
                q = ((x / scale).round() + zero).clamp(0, 2**format.bits - 1)
                result[r, start : start + size] = (q - zero) * scale
    return result


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS + MULTIPLES)
def test_a_format_has_one_spelling(text: str) -> None:
    assert str(WeightFormat.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected like w4-g128-s4, w4-g32-asym or w8"),
        ("w", "expected like"),
        ("w04", "expected like"),
        ("W4", "expected like"),
        ("w4-asym-g32", "expected like"),
        ("w4-g032", "expected like"),
        ("w4-g32 ", "expected like"),
        ("w4\n", "expected like"),
        ("w٤", "expected like"),
        ("w4-s4-g32", "expected like"),
        ("w4-g32-asym-s4", "expected like"),
        ("w4-g32-s04", "expected like"),
        ("w4-g32-s5", "scales of 5 bits, expected 4"),
        ("w8-g32-s4", "'w8-g32-s4': scales of 4 bits are for weights below 8 bits"),
        ("w4-g32-s4-asym", "'w4-g32-s4-asym': scales of 4 bits are for weights without a zero point"),
        ("w4-s4", "'w4-s4': scales of 4 bits are for weights in groups"),
        ("w5", "5 bits is not one of 2, 3, 4, 8"),
        ("w16-g8", "16 bits is not one of 2, 3, 4, 8; group size 8, expected at least 16"),
    ],
)
def test_nonsense_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match="weight format") as caught:
        WeightFormat.parse(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", FORMATS + MULTIPLES)
@pytest.mark.parametrize("shape", [(3, 256), (2, 300), (5, 77), (3, 20)])
def test_bytes_for_counts_what_pack_returns(text: str, shape: tuple[int, int]) -> None:
    quantized = quantize_rtn(normal(*shape), WeightFormat.parse(text), search=False)
    zeros = pack_zero_points(quantized)
    found = pack(quantized).nbytes + quantized.scales.numel() * 4 + (0 if zeros is None else zeros.nbytes)
    assert WeightFormat.parse(text).bytes_for(shape) == found


def test_bytes_of_a_layer_at_full_size() -> None:
    shape = (14336, 4096)
    assert WeightFormat.parse("w4-g128").bytes_for(shape) == 14336 * 4096 // 2 + 14336 * 32 * 4 + 14336 * 32 // 2
    assert WeightFormat.parse("w8").bytes_for(shape) == 14336 * 4096 + 14336 * 4


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("inputs", [128, 100, 33])
def test_rounding_is_the_textbooks(text: str, inputs: int) -> None:
    weight = normal(6, inputs) + 0.3
    quantized = quantize_rtn(weight, WeightFormat.parse(text), search=False)
    torch.testing.assert_close(dequantize(quantized).double(), plain_rtn(weight, text), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "plain", "exhaustive", "within"),
    [
        ("w4-g128", 0.1176, 0.0968, 0.005),
        ("w4-g32-asym", 0.0809, 0.0766, 0.015),
        ("w3-g32", 0.2266, 0.1620, 0.005),
        ("w2-g32", 0.6579, 0.3312, 0.005),
    ],
)
def test_the_search_is_worth_it(text: str, plain: float, exhaustive: float, within: float) -> None:
    """Normal numbers; `exhaustive` was found with 240 scales, or 60 scales and all zero points, each improved thrice."""
    weight, format = normal(256, 512), WeightFormat.parse(text)
    assert error(weight, quantize_rtn(weight, format, search=False)) == pytest.approx(plain, rel=0.01)
    assert error(weight, quantize_rtn(weight, format)) < exhaustive * (1 + within)


@pytest.mark.parametrize("text", FORMATS)
def test_the_search_is_never_worse(text: str) -> None:
    """Group by group, on shapes of distribution that it was not made for."""
    format = WeightFormat.parse(text)
    cases = torch.cat((normal(8, 256) ** 3, normal(8, 256).abs(), normal(8, 256).sign(), 1 + 1e-3 * normal(8, 256)))
    plain, found = (dequantize(quantize_rtn(cases, format, search=s)) for s in (False, True))
    size = format.group_of(256)
    errors = [((q - cases).double() ** 2).unflatten(1, (-1, size)).sum(-1) for q in (plain, found)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5) + 1e-12).all())


def test_the_search_comes_near_an_exhaustive_one() -> None:
    """4 bits, symmetric: the best of 2000 scales of either sign for each of 20 groups."""
    groups = normal(20, 32).double()
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for scale in torch.linspace(0.3, 1.2, 1000).tolist():
        for sign in (1, -1):
            step = sign * scale * groups.abs().amax(1, keepdim=True) / 7.5
            rounded = (groups / step).round().clamp(-8, 7) * step
            best = torch.minimum(best, ((rounded - groups) ** 2).sum(1))
    found = dequantize(quantize_rtn(groups.float(), WeightFormat.parse("w4-g32"))).double()
    assert float(((found - groups) ** 2).sum() / best.sum()) < 1.06


def test_the_sign_of_a_scale_chooses_the_side_of_the_extra_level() -> None:
    row = torch.arange(-7.0, 9.0)[None]
    for weight in (row, -row):
        quantized = quantize_rtn(weight, WeightFormat.parse("w4-g16"))
        torch.testing.assert_close(dequantize(quantized), weight)
        assert float(quantized.scales[0, 0]) == pytest.approx(float(-weight[0, -1].sign()))


def test_int8_scales_are_positive() -> None:
    quantized = quantize_rtn(normal(64, 64), WeightFormat.parse("w8"))
    assert bool((quantized.scales > 0).all())
    assert quantized.values.dtype == torch.int8
    assert int(quantized.values.min()) >= -127


def test_importance_moves_the_error_where_it_does_not_matter() -> None:
    weight, format = normal(128, 256), WeightFormat.parse("w4-g64")
    importance = torch.logspace(-2, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    costs = []
    for chosen in (None, importance):
        difference = dequantize(quantize_rtn(weight, format, importance=chosen)) - weight
        costs.append(float((difference**2 * importance).sum()))
    assert costs[1] < 0.8 * costs[0]


def test_equal_importance_changes_nothing() -> None:
    weight, format = normal(16, 96), WeightFormat.parse("w4-g32")
    plain, weighed = quantize_rtn(weight, format), quantize_rtn(weight, format, importance=torch.full((96,), 7.0))
    assert torch.equal(plain.values, weighed.values)
    nowhere = quantize_rtn(weight, format, importance=torch.zeros(96))
    assert torch.equal(plain.scales, nowhere.scales)


@pytest.mark.parametrize("text", ["w4-g32", "w4-g32-asym", "w8", "w3-g128"])
def test_pieces_give_the_same_as_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = normal(37, 144), WeightFormat.parse(text)
    whole = quantize_rtn(weight, format)
    monkeypatch.setattr(weights, "CHUNK", 300)
    pieces = quantize_rtn(weight, format)
    rows = quantize_rtn(weight[5:9], format)
    assert torch.equal(whole.values, pieces.values) and torch.equal(whole.scales, pieces.scales)
    assert torch.equal(whole.values[5:9], rows.values) and torch.equal(whole.scales[5:9], rows.scales)


def test_half_precision_weights_are_taken_as_they_are() -> None:
    weight = normal(8, 64).half()
    format = WeightFormat.parse("w4-g32")
    assert torch.equal(quantize_rtn(weight, format).values, quantize_rtn(weight.float(), format).values)


# --- awkward numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS + MULTIPLES)
@pytest.mark.parametrize("search", [False, True])
def test_awkward_groups(text: str, search: bool) -> None:
    """Zeros, denormals, huge and constant numbers: scales stay normal numbers, and errors within half a step."""
    tiny = float(torch.finfo(torch.float32).tiny)
    rows = [
        torch.zeros(64),
        torch.full((64,), 1e-42),
        normal(64) * 1e-37,
        normal(64) * 1e-20,
        normal(64) * 1e30,
        torch.full((64,), 0.7),
        torch.full((64,), -0.7),
        torch.eye(64)[3],
        -torch.eye(64)[5] * 1e-4,
        torch.cat((torch.full((32,), 3e38), torch.full((32,), -3e38))) * 0.5,
    ]
    weight = torch.stack(rows)
    quantized = quantize_rtn(weight, WeightFormat.parse(text), search)
    found = dequantize(quantized)
    assert bool(torch.isfinite(quantized.scales).all()) and bool((quantized.scales.abs() >= tiny).all())
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[0], torch.zeros(64))
    size = weight.abs().amax(1)
    limit = size / (2 ** (quantized.format.bits - 1) - 0.5) + 1e-30
    assert bool(
        ((found - weight).abs().amax(1) <= limit * (2 if search or quantized.format.scale_bits else 1.001)).all()
    )
    # a constant row is exact: the largest number lies on a level
    torch.testing.assert_close(found[5:7], weight[5:7])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 128)
    weight = normal(9, 64)
    weight[7, 13] = value
    with pytest.raises(InputError, match=r"weight \[9, 64\]: .*(nan|inf) at \[7, 13\]"):
        quantize_rtn(weight, WeightFormat.parse("w4-g32"))


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 2, dtype=torch.int32)])
def test_what_is_no_matrix_of_floats_is_refused(weight: Tensor) -> None:
    with pytest.raises(InputError, match="expected a matrix of floats"):
        quantize_rtn(weight, WeightFormat.parse("w8"))


@pytest.mark.parametrize("importance", [torch.ones(5), -torch.ones(4), torch.full((4,), math.nan)])
def test_a_wrong_importance_is_refused(importance: Tensor) -> None:
    with pytest.raises(InputError, match="importance: expected 4 finite numbers"):
        quantize_rtn(normal(2, 4), WeightFormat.parse("w8"), importance=importance)


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_the_layout_of_half_bytes() -> None:
    values = torch.tensor([[1, 2, 3], [15, 0, 7]], dtype=torch.uint8)
    scales = torch.ones(2, 1)
    symmetric = QuantizedWeight(values, scales, None, WeightFormat(4))
    assert pack(symmetric).tolist() == [[0x21, 0x83], [0x0F, 0x87]]
    packed = pack_zero_points(symmetric)
    assert packed is not None and packed.tolist() == [0x88]
    asymmetric = QuantizedWeight(
        values, torch.ones(2, 1), torch.tensor([[5], [9]], dtype=torch.uint8), WeightFormat(4, None, False)
    )
    assert pack(asymmetric).tolist() == [[0x21, 0x53], [0x0F, 0x97]]
    packed = pack_zero_points(asymmetric)
    assert packed is not None and packed.tolist() == [0x95]


@pytest.mark.parametrize("text", FORMATS + MULTIPLES)
@pytest.mark.parametrize("inputs", [64, 33])
def test_unpack_inverts_pack(text: str, inputs: int) -> None:
    format = WeightFormat.parse(text)
    quantized = quantize_rtn(normal(5, inputs), format)
    again = unpack(pack(quantized), quantized.scales, quantized.zero_points, inputs, format)
    assert again.values.dtype == quantized.values.dtype
    assert torch.equal(again.values, quantized.values)


def onnx_type(format: WeightFormat) -> int:
    if format.container_bits < 8:
        return {2: TensorProto.UINT2, 4: TensorProto.UINT4}[format.container_bits]
    return TensorProto.INT8 if format.is_signed else TensorProto.UINT8


def model_of(
    nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto], inputs: int, outputs: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", outputs])],
        tensors,
    )
    few = any(tensor.data_type == TensorProto.UINT2 for tensor in tensors)
    opsets = [helper.make_opsetid("", UINT2_OPSET if few else 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=UINT2_IR if few else 10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def portable(quantized: QuantizedWeight) -> onnx.ModelProto:
    """x @ DequantizeLinear(values)^T, as the portable graph has it."""
    (outputs, inputs), format = quantized.shape, quantized.format
    groups, dtype = format.groups(inputs), onnx_type(format)
    scales, zeros = quantized.scales.numpy(), pack_zero_points(quantized)
    tensors = [
        helper.make_tensor("values", dtype, [outputs, inputs], pack(quantized).tobytes(), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [outputs, groups], scales.tobytes(), raw=True),
    ]
    if zeros is not None:
        tensors.append(helper.make_tensor("zeros", dtype, [outputs, groups], zeros.tobytes(), raw=True))
    block = format.group_of(inputs)
    names = [tensor.name for tensor in tensors]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], axis=1, block_size=block),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
    ]
    return model_of(nodes, tensors, inputs, outputs)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("inputs", [256, 304, 20])
def test_onnx_reads_the_bytes(text: str, inputs: int) -> None:
    """304 = 2 * 128 + 48: a short last group; 20: fewer inputs than a group has."""
    quantized = quantize_rtn(normal(5, inputs), WeightFormat.parse(text))
    x = np.eye(inputs, dtype=np.float32)
    model = portable(quantized)
    onnx.checker.check_model(model, full_check=True)
    for result in (ReferenceEvaluator(model).run(None, {"x": x})[0], run(model, x)):
        np.testing.assert_allclose(result.T, dequantize(quantized).numpy(), rtol=1e-6)


def matmul_nbits(quantized: QuantizedWeight, block: int, accuracy_level: int) -> onnx.ModelProto:
    """The operator of ONNX Runtime on the bytes of `pack`; short groups padded, int8 made unsigned."""
    (outputs, inputs), format = quantized.shape, quantized.format
    bits, groups = format.container_bits, format.groups(inputs)
    values = pack(quantized) ^ np.uint8(128 if format.is_signed else 0)
    missing = groups * block * bits // 8 - values.shape[1]
    values = np.pad(values, ((0, 0), (0, missing))).reshape(outputs, groups, block * bits // 8)
    tensors = [
        helper.make_tensor("values", TensorProto.UINT8, values.shape, values.tobytes(), raw=True),
        helper.make_tensor(
            "scales", TensorProto.FLOAT, [outputs, groups], quantized.scales.numpy().tobytes(), raw=True
        ),
    ]
    zeros = pack_zero_points(quantized)
    if zeros is not None and groups * bits % 8 == 0:
        # rows end on whole bytes, as the operator wants
        zeros = zeros.reshape(outputs, -1)
        tensors.append(helper.make_tensor("zeros", TensorProto.UINT8, zeros.shape, zeros.tobytes(), raw=True))
    names = ["x", *(tensor.name for tensor in tensors)]
    node = helper.make_node(
        "MatMulNBits",
        names,
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=accuracy_level,
    )
    return model_of([node], tensors, inputs, outputs)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("w4-g128", 512),
        ("w4-g128", 304),
        ("w4-g32", 256),
        ("w4-g32-asym", 256),
        ("w4-g16", 64),
        ("w3-g32", 256),
        ("w2-g64-asym", 256),
        ("w8-g128", 512),
        ("w8-g32-asym", 96),
    ],
)
def test_matmul_nbits_reads_the_same_bytes(text: str, inputs: int, accuracy_level: int) -> None:
    format = WeightFormat.parse(text)
    quantized = quantize_rtn(normal(24, inputs), format)
    assert format.group_size is not None
    if inputs % format.group_size and format.bits < 8:
        assert format.symmetric and format.bits == 4  # the operator's own zero point is 8
    x = normal(7, inputs, seed=1)
    expected = x @ dequantize(quantized).mT
    found = torch.from_numpy(run(matmul_nbits(quantized, format.group_size, accuracy_level), x.numpy()))
    # level 4 rounds each block of x to 8 bits
    limit = 1e-5 if accuracy_level == 0 else 0.01
    assert float((found - expected).norm() / expected.norm()) < limit
    if accuracy_level == 4:
        assert float((found - expected).norm() / expected.norm()) > 1e-4


# --- tables ---------------------------------------------------------------------------------------------------------


def test_rows_of_a_table() -> None:
    table = normal(50, 24).half() * torch.logspace(-3, 1, 50)[:, None].half()
    table[7] = 0
    values, scales = packed_table(quantize_table(table, WeightFormat(8)))
    assert values.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (50,)
    found = torch.from_numpy(values * scales[:, None])
    size = table.float().abs().amax(1)
    assert bool(((found - table.float()).abs().amax(1) <= size / 254 * 1.001).all())
    assert bool((np.abs(values[size > 0]).max(1) == 127).all())


@pytest.mark.parametrize("text", ("w4-g24", "w4", "w3-g16", "w2-g16"))
def test_the_runtime_reads_a_table_of_few_bits_as_it_was_meant(text: str) -> None:
    table, format = normal(50, 48), WeightFormat.parse(text)
    quantized = quantize_table(table, format)
    rows = EmbeddingTable(*packed_table(quantized)).gather(np.arange(50))
    np.testing.assert_allclose(rows, dequantize(quantized).numpy(), rtol=1e-6)


def test_groups_must_divide_the_rows_of_a_table() -> None:
    with pytest.raises(InputError, match=r"w4-g32 needs an even width that its groups divide"):
        quantize_table(normal(4, 48), WeightFormat(4, 32))


def test_every_width_has_ranges() -> None:
    assert set(grid.SHRINK) == set(weights.BITS)
