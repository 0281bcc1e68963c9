"""The first layers of a MiniCPM-V checkpoint's decoder as a Llama of transformers, which rivals' tools read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

PREFIX = "llm."
"""Of the decoder's weights in a MiniCPM-V checkpoint."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_llama(checkpoint: Path, folder: Path, built_layers: int, files: tuple[str, ...] = TOKENIZER) -> int:
    """Write `built_layers` layers with embedding and head, and those of `files` that there are, into the new `folder`.

    Returns how many layers the checkpoint has.
    """
    from safetensors import safe_open
    from safetensors.numpy import save_file

    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    keys = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps",
        "rope_theta", "max_position_embeddings", "bos_token_id", "eos_token_id", "hidden_act",
    )  # fmt: skip
    llama = {key: config[key] for key in keys if key in config}
    llama |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": built_layers}
    llama |= {"torch_dtype": "float16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(llama))
    for name in files:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    kept: dict[str, Any] = {}
    for name, shard in index.items():
        parts = name.split(".")
        if name.startswith(PREFIX) and not (parts[2] == "layers" and int(parts[3]) >= built_layers):
            with safe_open(checkpoint / shard, framework="numpy") as file:
                kept[name.removeprefix(PREFIX)] = file.get_tensor(name)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return int(config["num_hidden_layers"])
