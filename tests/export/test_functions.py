"""The functions of the domain `lensc`: their definition in standard operators is what torch computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")
onnx = pytest.importorskip("onnx", reason="pip install 'lensc[export]'")
ort = pytest.importorskip("onnxruntime", reason="pip install lensc")
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor

from lensc.export.functions import DOMAIN, functions
from lensc.export.models.functions import MASK, attention, causal_attention, inverse_frequencies, rms_norm

TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


def call(name: str, inputs: dict[str, Tensor], ranks: tuple[int, ...], **attributes: Any) -> list[Tensor]:
    """What ONNX Runtime makes of one call; no shape is known to it beforehand."""
    names = [f"out_{i}" for i in range(len(ranks))]
    node = helper.make_node(name, list(inputs), names, domain=DOMAIN, **attributes)
    infos = [helper.make_tensor_value_info(n, TYPES[t.dtype], [None] * t.ndim) for n, t in inputs.items()]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * r) for n, r in zip(names, ranks, strict=True)]
    model = helper.make_model(
        helper.make_graph([node], "call", infos, made),
        functions=[ir.to_proto(function) for function in functions([name])],
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(o) for o in session.run(None, {n: t.numpy() for n, t in inputs.items()})]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_rms_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 16, generator=generator) * 5, torch.randn(16, generator=generator)
    close(call("RMSNorm", {"x": x, "weight": weight}, (3,), epsilon=1e-2)[0], rms_norm(x, weight, 1e-2))


@pytest.mark.parametrize(("shared", "queries", "keys"), [(False, 5, 5), (True, 3, 7), (False, 1, 1)])
def test_attention(shared: bool, queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(1 if shared else 2, queries, 24, generator=generator)
    key, value = torch.randn(2, 2, keys, 24, generator=generator)
    bias = torch.where(torch.arange(keys) < torch.tensor([[keys], [max(1, keys - 2)]]), 0.0, MASK)
    inputs = {"query": query, "key": key, "value": value, "bias": bias}
    found = call("Attention", inputs, (3,), num_heads=3, scale=8**-0.5)[0]
    close(found, attention(query, key, value, bias, 3))


@pytest.mark.parametrize("past", (0, 1, 6))
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 5), (3, 2)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 1)])
def test_causal_attention(past: int, batch: int, tokens: int, heads: int, kv_heads: int) -> None:
    d = 8
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(batch, tokens, heads * d, generator=generator)
    key, value = torch.randn(2, batch, tokens, kv_heads * d, generator=generator)
    past_key, past_value = torch.randn(2, past, batch, kv_heads, d, generator=generator)
    positions = torch.arange(past, past + tokens)
    frequencies = inverse_frequencies(d, 10000.0, torch.device("cpu"))
    inputs = {"query": query, "key": key, "value": value, "position_ids": positions, "frequencies": frequencies}
    inputs |= {"past_key": past_key, "past_value": past_value}
    sizes = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": d, "groups": heads // kv_heads}
    found = call("CausalAttention", inputs, (3, 4, 4), scale=d**-0.5, **sizes)
    expected = causal_attention(*inputs.values(), heads, kv_heads)
    for got, wanted in zip(found, expected, strict=True):
        close(got, wanted)


def test_attention_is_what_torch_has_built_in() -> None:
    """A second implementation: scaled_dot_product_attention over the whole sequence, in one piece and in two."""
    heads, kv_heads, d, tokens = 4, 2, 8, 7
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, tokens, heads * d, generator=generator)
    key, value = torch.randn(2, 1, tokens, kv_heads * d, generator=generator)
    still = torch.zeros(d // 2)  # no rotation
    whole, keys, values = causal_attention(query, key, value, torch.arange(tokens), still, None, None, heads, kv_heads)
    split = [x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
    close(whole, expected.transpose(1, 2).flatten(2))
    first, rest = slice(0, 3), slice(3, None)
    later, _, _ = causal_attention(
        query[:, rest], key[:, rest], value[:, rest], torch.arange(3, tokens), still,
        keys[first], values[first], heads, kv_heads,
    )  # fmt: skip
    close(later, whole[:, rest])


def test_an_unused_function_is_not_shipped() -> None:
    assert [f.name for f in functions(["RMSNorm", "RMSNorm", "Other"])] == ["RMSNorm"]


def test_rotary_table_of_the_official_base() -> None:
    found = inverse_frequencies(128, 500000.0, torch.device("cpu")).numpy()
    expected = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(found, expected, rtol=2e-7)
