"""The rival and judge of the demo's benchmarks: the torch reference model, behind the same pipeline."""

from __future__ import annotations

from pathlib import Path

from lensc.runtime.pipeline import VLM


def reference_vlm(checkpoint: Path) -> VLM:
    """The model in `checkpoint` run by torch, eager, in float32. Raises CheckpointError or TokenizerError."""
    from lensc.export.checkpoint import Checkpoint
    from lensc.export.models.session import torch_sessions
    from lensc.runtime.prompt import Tokenizer

    opened = Checkpoint(checkpoint)
    model = opened.load_model()
    table = model.llm.model.embed_tokens.weight.detach().numpy()
    return VLM(opened.model_spec(), Tokenizer.from_file(opened.tokenizer), torch_sessions(model), table)
