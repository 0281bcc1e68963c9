"""A tokenizer of any size in the official layout: 256 bytes, words, merges of letters, the 256 added tokens.

The words are those of prompts, so that a prompt has as many tokens as with the official tokenizer; other text falls
into pieces of one to four letters. What is not in it: the official merges, which are no part of this package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path

from lensc.export.demo import tokenizer as demo

ADDED = len(demo.added_tokens())
LEAST = 256 + len(demo.WORDS) + ADDED

LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
"""By frequency in English."""
SPACE, NEWLINE = "\u0120", "\u010a"
"""How byte-level BPE spells them."""
PAIRS_OF_PAIRS = 320
"""How many of the most frequent pairs of letters are joined to four letters."""


def merges() -> Iterator[tuple[str, str]]:
    """Pairs to merge, the most frequent first within each kind; about 230,000, each made of bytes or earlier pairs."""
    by_frequency = sorted(product(range(26), repeat=2), key=lambda pair: (pair[0] + pair[1], pair))
    pairs = [LETTERS[a] + LETTERS[b] for a, b in by_frequency]
    digits = "0123456789"
    yield from ((NEWLINE, NEWLINE), (SPACE, SPACE), (SPACE * 2, SPACE * 2))
    yield from ((SPACE, letter) for letter in chain(LETTERS, LETTERS.upper()))
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from ((SPACE + pair[0], pair[1]) for pair in pairs)
    yield from product(digits, digits)
    yield from ((a + b, c) for a, b, c in product(digits, repeat=3))
    yield from ((pair[0].upper(), pair[1]) for pair in pairs)
    yield from ((SPACE + pair[0].upper(), pair[1]) for pair in pairs)
    yield from ((before + pair, letter) for before in ("", SPACE) for pair in pairs for letter in LETTERS)
    four = [(a, b) for a in pairs[:PAIRS_OF_PAIRS] for b in pairs[:PAIRS_OF_PAIRS]]
    yield from ((before + a, b) for before in (SPACE, "") for a, b in four)


def write_tokenizer(folder: Path, size: int) -> None:
    """Write tokenizer.json with `size` tokens, tokenizer_config.json and special_tokens_map.json into `folder`.

    The files are those of the demo tokenizer with another vocabulary. `size` is at least `LEAST`.
    """
    demo.write_tokenizer(folder)
    words = [word.replace(" ", SPACE).replace("\n", NEWLINE) for word in demo.WORDS]
    vocabulary = {token: i for i, token in enumerate(chain(demo.byte_alphabet(), words))}
    joined = []
    stream = merges()
    while len(vocabulary) < size - ADDED:
        left, right = next(stream)
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            joined.append(f"{left} {right}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"] |= {"vocab": vocabulary, "merges": joined}
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = size - ADDED + i
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = config["added_tokens_decoder"].values()
    config["added_tokens_decoder"] = {str(size - ADDED + i): token for i, token in enumerate(decoder)}
    for name, data in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
