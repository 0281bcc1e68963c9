"""Rewrites of ONNX graphs that every engine can use. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from .functions import DOMAIN


def inline(model: ir.Model) -> ir.Model:
    """Put the definitions of the functions of `lensc` in the place of their calls, for an engine that has no operator
    of its own for them. What the calls compute alike (rotary angles, masks) is computed once.
    """
    common.InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
    weights = frozenset(name for name in model.graph.initializers if not name.startswith("const_"))
    simplify(model, weights)
    return model


def simplify(model: ir.Model, parameters: frozenset[str]) -> None:
    """Fold what is constant without the weights, merge what is computed twice, drop what is unused."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in parameters for v in node.inputs) else None

    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    _merge_constants(model, parameters)
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the graph: inputs, initializers, outputs of nodes."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _merge_constants(model: ir.Model, parameters: frozenset[str]) -> None:
    """Keep one of each constant and number them in the order of use."""
    first: dict[tuple[object, ...], ir.Value] = {}
    initializers = model.graph.initializers
    for name in [name for name in initializers if name not in parameters]:
        value = initializers[name]
        tensor = value.const_value
        assert tensor is not None
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del initializers[name]
    for i, value in enumerate(first.values()):
        value.name = f"const_{i}"
