"""The functions of the domain `lensc` in standard operators, as they travel with every portable graph.

They are what `lensc.export.models.functions` computes. An engine that has one operator for a call replaces it; every
other inlines the definition, which is standard ONNX of the graph's own opset.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import onnx.parser
import onnx_ir as ir

DOMAIN = "lensc"
VERSION = 1

_RMS_NORM = """
<domain: "lensc", opset_import: ["": 21]>
RMSNorm <epsilon> (x, weight) => (y) {
    two = Constant <value: tensor = float {2}> ()
    last = Constant <value: tensor = int64[1] {-1}> ()
    eps = Constant <value_float: float = @epsilon> ()
    square = Pow (x, two)
    mean = ReduceMean <keepdims: int = 1> (square, last)
    shifted = Add (mean, eps)
    rms = Sqrt (shifted)
    normal = Div (x, rms)
    y = Mul (normal, weight)
}
"""

_ATTENTION = """
<domain: "lensc", opset_import: ["": 21]>
Attention <num_heads, scale> (query, key, value, bias) => (mixed) {
    keep = Constant <value: tensor = int64[2] {0, 0}> ()
    rest = Constant <value: tensor = int64[1] {-1}> ()
    axes = Constant <value: tensor = int64[2] {1, 2}> ()
    first = Constant <value: tensor = int64[1] {0}> ()
    heads_0 = Constant <value_int: int = @num_heads> ()
    heads = Unsqueeze (heads_0, first)
    split = Concat <axis: int = 0> (keep, heads, rest)
    joined = Concat <axis: int = 0> (keep, rest)
    factor = Constant <value_float: float = @scale> ()
    query_4 = Reshape (query, split)
    key_4 = Reshape (key, split)
    value_4 = Reshape (value, split)
    query_h = Transpose <perm: ints = [0, 2, 1, 3]> (query_4)
    key_h = Transpose <perm: ints = [0, 2, 3, 1]> (key_4)
    value_h = Transpose <perm: ints = [0, 2, 1, 3]> (value_4)
    scaled = Mul (query_h, factor)
    scores = MatMul (scaled, key_h)
    bias_4 = Unsqueeze (bias, axes)
    masked = Add (scores, bias_4)
    weights = Softmax <axis: int = -1> (masked)
    mixed_h = MatMul (weights, value_h)
    mixed_4 = Transpose <perm: ints = [0, 2, 1, 3]> (mixed_h)
    mixed = Reshape (mixed_4, joined)
}
"""

_CAUSAL_ATTENTION = """
<domain: "lensc", opset_import: ["": 21]>
CausalAttention <num_heads, kv_num_heads, head_dim, groups, scale>
(query, key, value, position_ids, inverse_frequencies, past_key, past_value) => (mixed, new_key, new_value) {
    keep = Constant <value: tensor = int64[2] {0, 0}> ()
    rest = Constant <value: tensor = int64[1] {-1}> ()
    zero = Constant <value: tensor = int64[1] {0}> ()
    one = Constant <value: tensor = int64[1] {1}> ()
    end = Constant <value: tensor = int64[1] {9223372036854775807}> ()
    heads_0 = Constant <value_int: int = @num_heads> ()
    heads = Unsqueeze (heads_0, zero)
    kv_heads_0 = Constant <value_int: int = @kv_num_heads> ()
    kv_heads = Unsqueeze (kv_heads_0, zero)
    dim_0 = Constant <value_int: int = @head_dim> ()
    dim = Unsqueeze (dim_0, zero)
    groups_0 = Constant <value_int: int = @groups> ()
    group = Unsqueeze (groups_0, zero)
    factor = Constant <value_float: float = @scale> ()

    position = Cast <to: int = 1> (position_ids)
    position_2 = Unsqueeze (position, one)
    frequency_2 = Unsqueeze (inverse_frequencies, zero)
    half_angles = Mul (position_2, frequency_2)
    angles = Concat <axis: int = -1> (half_angles, half_angles)
    cos_2 = Cos (angles)
    sin_2 = Sin (angles)
    cos = Unsqueeze (cos_2, one)
    sin = Unsqueeze (sin_2, one)

    query_shape = Concat <axis: int = 0> (keep, heads, dim)
    query_4 = Reshape (query, query_shape)
    query_first, query_second = Split <axis: int = -1, num_outputs: int = 2> (query_4)
    query_minus = Neg (query_second)
    query_turned = Concat <axis: int = -1> (query_minus, query_first)
    query_cos = Mul (query_4, cos)
    query_sin = Mul (query_turned, sin)
    query_rotated = Add (query_cos, query_sin)
    query_scaled = Mul (query_rotated, factor)

    kv_shape = Concat <axis: int = 0> (keep, kv_heads, dim)
    key_4 = Reshape (key, kv_shape)
    key_first, key_second = Split <axis: int = -1, num_outputs: int = 2> (key_4)
    key_minus = Neg (key_second)
    key_turned = Concat <axis: int = -1> (key_minus, key_first)
    key_cos = Mul (key_4, cos)
    key_sin = Mul (key_turned, sin)
    key_rotated = Add (key_cos, key_sin)
    value_4 = Reshape (value, kv_shape)
    new_key = Transpose <perm: ints = [1, 0, 2, 3]> (key_rotated)
    new_value = Transpose <perm: ints = [1, 0, 2, 3]> (value_4)

    row = Unsqueeze (position_ids, one)
    column = Unsqueeze (position_ids, zero)
    visible = GreaterOrEqual (row, column)
    seen = Constant <value: tensor = float {0}> ()
    unseen = Constant <value: tensor = float {-10000}> ()
    causal = Where (visible, seen, unseen)
    repeats = Concat <axis: int = 0> (group, one)
    causal_rows = Tile (causal, repeats)

    grouped_shape = Concat <axis: int = 0> (keep, kv_heads, group, dim)
    grouped = Reshape (query_scaled, grouped_shape)
    grouped_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (grouped)
    rows_shape = Concat <axis: int = 0> (keep, rest, dim)
    rows = Reshape (grouped_heads, rows_shape)

    key_columns = Transpose <perm: ints = [0, 2, 3, 1]> (key_rotated)
    new_logits = MatMul (rows, key_columns)
    new_scores = Add (new_logits, causal_rows)
    past_columns = Transpose <perm: ints = [1, 2, 3, 0]> (past_key)
    past_scores = MatMul (rows, past_columns)
    scores = Concat <axis: int = -1> (past_scores, new_scores)
    weights = Softmax <axis: int = -1> (scores)

    past_length = Shape <start: int = 0, end: int = 1> (past_key)
    past_weights = Slice (weights, zero, past_length, rest)
    new_weights = Slice (weights, past_length, end, rest)
    past_rows = Transpose <perm: ints = [1, 2, 0, 3]> (past_value)
    new_rows = Transpose <perm: ints = [0, 2, 1, 3]> (value_4)
    past_mixed = MatMul (past_weights, past_rows)
    new_mixed = MatMul (new_weights, new_rows)
    mixed_rows = Add (past_mixed, new_mixed)
    mixed_shape = Concat <axis: int = 0> (keep, group, rest, dim)
    mixed_5 = Reshape (mixed_rows, mixed_shape)
    mixed_tokens = Transpose <perm: ints = [0, 3, 1, 2, 4]> (mixed_5)
    joined = Concat <axis: int = 0> (keep, rest)
    mixed = Reshape (mixed_tokens, joined)
}
"""


@cache
def _definitions() -> dict[str, onnx.FunctionProto]:
    parsed = [onnx.parser.parse_function(text) for text in (_RMS_NORM, _ATTENTION, _CAUSAL_ATTENTION)]
    return {function.name: function for function in parsed}


def functions(names: Iterable[str]) -> list[ir.Function]:
    """New objects of the functions called `names`, each once, in the order of definition."""
    wanted = set(names)
    return [ir.serde.deserialize_function(proto) for name, proto in _definitions().items() if name in wanted]
