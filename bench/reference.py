"""The rival and judge of the demo's benchmarks: the torch reference model, behind the same pipeline."""

from __future__ import annotations

from pathlib import Path

from lensc.backends.base import Array, Session
from lensc.runtime.pipeline import VLM


def reference_sessions(checkpoint: Path) -> tuple[dict[str, Session], Array]:
    """The graphs of the model in `checkpoint` run by torch, eager, in float32, and its embedding table."""
    from lensc.export.checkpoint import Checkpoint
    from lensc.export.models.session import torch_sessions

    model = Checkpoint(checkpoint).load_model()
    return torch_sessions(model), model.llm.model.embed_tokens.weight.detach().numpy()


def reference_vlm(checkpoint: Path) -> VLM:
    """The model in `checkpoint` run by torch, eager, in float32. Raises CheckpointError or TokenizerError."""
    from lensc.export.checkpoint import Checkpoint
    from lensc.runtime.prompt import Tokenizer

    opened = Checkpoint(checkpoint)
    sessions, table = reference_sessions(checkpoint)
    return VLM(opened.model_spec(), Tokenizer.from_file(opened.tokenizer), sessions, table)
