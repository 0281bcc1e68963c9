"""The demo model's tokenizer: bytes, a few whole words, and the 256 added tokens of MiniCPM-Llama3-V 2.5 in their order.

Strings in pictures are mostly random, so merging pairs of characters would only make reading harder to learn: the
vocabulary holds the 256 bytes and, reached through `ignore_merges` as whole pre-tokens, the words of prompts and
answers. `!` is id 0 and the padding token, as in the official tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = (
    *("user", "assistant", "system", "\n\n", "Read", "What", "How", "Which"),
    *(" the", " text", " is", " are", " there", " many", " colour", " color", " bigger", " or", " in", " picture"),
    *(" total", " date", " name", " code", " city", " number", " image"),
    *("circle", "square", "triangle", "star", " circle", " square", " triangle", " star"),
    *(" circles", " squares", " triangles", " stars", " shapes"),
    *("red", "green", "blue", "yellow", "black", "white", "orange", "purple"),
)
"""Pre-tokens with an id of their own; everything else is spelled in bytes."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<unk>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
    10: "<image>",
    11: "</image>",
    12: "<ref>",
    13: "</ref>",
    14: "<box>",
    15: "</box>",
    16: "<quad>",
    17: "</quad>",
    18: "<point>",
    19: "</point>",
    20: "<slice>",
    21: "</slice>",
}


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in GPT-2's order: `!` is first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _spelled(word: str) -> str:
    """A word in the byte alphabet: space is G-with-dot, newline C-with-dot."""
    return word.replace(" ", "\u0120").replace("\n", "\u010a")


def added_tokens() -> list[str]:
    """The 256 added tokens in their order: 22 positions as in the official file, the rest reserved."""
    names, reserved = [], 0
    for i in range(256):
        if i in _NAMED:
            names.append(_NAMED[i])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def first_added_id() -> int:
    """The id of `<|begin_of_text|>` (128000 in the official model)."""
    return 256 + len(WORDS)


def vocab_size() -> int:
    return first_added_id() + 256


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    base = first_added_id()
    vocab = {c: i for i, c in enumerate([*byte_alphabet(), *map(_spelled, WORDS)])}
    added = [
        {"id": base + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, name in enumerate(added_tokens())
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [],
        },
    }
    config = {
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "!",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "truncation_side": "right",
        "unk_token": "<unk>",
    }
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "!", "unk_token": "<unk>"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
