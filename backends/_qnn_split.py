"""A fixed graph in parts that an NPU can hold: one after the other, each with some of the layers.

A context binary lives in 32-bit addresses, and compiling one takes several times its size in memory. Parts meet where one
value goes on, which is between layers; in a graph of integers that is what QuantizeLinear gives, so nothing is rounded twice.
What depends on no weight (the bias, cosines) is read by every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PART_BYTES = 1 << 30
"""Most bytes of weights in a part. Qualcomm cuts its own 8B models into parts of about this size."""


def split(model: Any, entry: str, limit_bytes: int) -> list[Any]:
    """`model`, an `onnx_ir.Model`, in parts of at most `limit_bytes` of weights each, as far as layers allow. `entry` names
    the input that all layers follow from.
    """
    import onnx_ir as ir

    graph = model.graph
    ends = list(_ends(graph, entry, limit_bytes))
    if not ends:
        return [model]
    order = {node: i for i, node in enumerate(graph)}
    parts, first, begins = [], 0, next(value for value in graph.inputs if value.name == entry)
    for end in [*ends, None]:
        last = len(order) - 1 if end is None else order[end.producer()]
        outputs = [value for value in graph.outputs if first <= order[value.producer()] <= last]
        outputs += [] if end is None else [end]
        inputs = [*_inputs_of(outputs, begins), begins]
        extracted = ir.convenience.extract(graph, inputs, outputs)
        parts.append(ir.Model(extracted, ir_version=model.ir_version))
        first, begins = last + 1, end
    return parts


def _ends(graph: Any, entry: str, limit_bytes: int) -> Iterator[Any]:
    """The values after which a part ends."""
    follows = {value for value in graph.inputs if value.name == entry}
    integers = any(node.op_type == "QuantizeLinear" for node in graph)
    live: set[Any] = set()
    held, counted, candidate = 0, set[Any](), None
    at_candidate = 0
    left = {value: len(value.uses()) for node in graph for value in (*node.inputs, *node.outputs) if value is not None}
    for node in graph:
        if not any(value in follows for value in node.inputs):
            continue
        size = sum(_bytes_of(value, follows, counted) for value in node.inputs if value is not None)
        if held + size > limit_bytes and candidate is not None:
            yield candidate
            held, candidate = held - at_candidate, None
        held += size
        for value in node.inputs:
            if value in follows:
                left[value] -= 1
                if not left[value]:
                    live.discard(value)
        follows.update(node.outputs)
        live.update(value for value in node.outputs if value.uses())
        if len(live) == 1 and (not integers or node.op_type == "QuantizeLinear"):
            [value] = live
            if not value.is_graph_output():
                candidate, at_candidate = value, held


def _bytes_of(value: Any, follows: set[Any], counted: set[Any]) -> int:
    """Bytes of weights that `value` is made of, each counted once."""
    if value in follows or value in counted:
        return 0
    counted.add(value)
    if value.is_initializer():
        return int(value.const_value.nbytes)
    producer = value.producer()
    if producer is None:
        return 0
    return sum(_bytes_of(v, follows, counted) for v in producer.inputs if v is not None)


def _inputs_of(outputs: list[Any], begins: Any) -> list[Any]:
    """The graph's inputs, besides `begins`, that `outputs` are made of, in the graph's order of discovery."""
    found: dict[Any, None] = {}
    seen, waiting = {begins}, list(outputs)
    while waiting:
        value = waiting.pop()
        if value is None or value in seen or value.is_initializer():
            continue
        seen.add(value)
        producer = value.producer()
        if producer is None:
            found[value] = None
        else:
            waiting.extend(producer.inputs)
    return list(found)
