"""A portable graph as it lies in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ExecutionError


def model_of(path: Path) -> Any:
    """The `onnx_ir.Model` of a file; weights are read when they are asked for. Raises ExecutionError if it is none."""
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as error:  # protobuf's own, and whatever a damaged file makes of the reader
        reason = " ".join(str(error).split())[:200]
        raise ExecutionError(f"{path}: cannot be read as ONNX: {reason}; export it again") from error
