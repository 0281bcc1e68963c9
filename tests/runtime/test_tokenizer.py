"""The tokenizer against vectors of the official one, and the stream against the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from lensc.backends.errors import PromptError, TokenizerError
from lensc.runtime.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = GOLDEN / "checkpoint/tokenizer.json"
VECTORS = json.loads((GOLDEN / "extras/tokenizer_vectors.json").read_text())
TOKENIZER = Tokenizer.from_file(FILE)
LIBRARY = FastTokenizer.from_file(str(FILE))
SPECIAL = TOKENIZER.special
ADDED = sorted((t.content for t in LIBRARY.get_added_tokens_decoder().values()), key=len)
ids_lists = st.lists(
    st.one_of(
        st.integers(0, 1279),
        st.integers(0, 300),  # single bytes: broken characters
        st.sampled_from([0, SPECIAL.bos, SPECIAL.eos, SPECIAL.eot]),
        st.sampled_from(TOKENIZER.encode(" ' n't 'm 's 've 're . ? , n v r  don't we're")),  # what clean-up changes
    ),
    max_size=24,
)


@pytest.mark.parametrize("vector", VECTORS["tokenize"], ids=lambda v: repr(v["text"])[:30])
def test_ids_and_text_equal_the_official_ones(vector: dict[str, Any]) -> None:
    assert TOKENIZER.encode_special(vector["text"]) == vector["ids"]
    assert TOKENIZER.decode(vector["ids"]) == vector["decode"]
    if not any(text in vector["text"] for text in ADDED):
        assert TOKENIZER.encode(vector["text"]) == vector["ids"]


@pytest.mark.parametrize("vector", VECTORS["decode_answer"], ids=lambda v: repr(v["text"])[:30])
def test_answers_equal_the_official_ones(vector: dict[str, Any]) -> None:
    assert TOKENIZER.decode_answer(vector["ids"]) == vector["text"]


def test_special_ids_are_found_by_name() -> None:
    want = VECTORS["special_ids"]
    for ours, theirs in (("image_start", "im_start"), ("image_end", "im_end")):
        assert getattr(SPECIAL, ours) == want[theirs]
    for name in ("bos", "eos", "unk", "pad", "eot", "slice_start", "slice_end"):
        assert getattr(SPECIAL, name) == want[name]
    assert [SPECIAL.start_header, SPECIAL.end_header] == LIBRARY.encode("<|start_header_id|><|end_header_id|>").ids
    assert TOKENIZER.vocab_size == 1280


@pytest.mark.parametrize("text", ADDED[:60])
def test_the_spelling_of_a_special_token_is_text(text: str) -> None:
    ids = TOKENIZER.encode(f"a{text}b {text}{text}")
    assert max(ids) < 1024
    assert TOKENIZER.decode(ids, clean_up=False) == f"a{text}b {text}{text}"
    assert max(TOKENIZER.encode_special(text)) >= 1024


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_text_survives_the_round_trip(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, clean_up=False) == text
    assert ids.count(0) == text.count("!")


@given(
    st.lists(st.sampled_from([*ADDED[:12], "!", "Wow", " ", "\n", "n't", "<", "|>", "图片"]), max_size=12).map("".join)
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_special_tokens_split_as_in_the_library(text: str) -> None:
    official = FastTokenizer.from_str(LIBRARY.to_str())
    official.add_special_tokens(["!"])
    assert TOKENIZER.encode_special(text) == official.encode(text, add_special_tokens=False).ids


@given(ids_lists)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_bytes_decode_as_in_the_library(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids, clean_up=False) == LIBRARY.decode(ids, skip_special_tokens=False)


@given(ids_lists, st.booleans())
@settings(max_examples=1200, deadline=None, derandomize=True)
def test_a_stream_joins_to_the_answer(ids: list[int], strip_pad: bool) -> None:
    pieces = list(TOKENIZER.decode_stream(strip_pad).pieces(ids))
    assert "".join(pieces) == TOKENIZER.decode_answer(ids, strip_pad)
    assert all(pieces)


CLEAN = "it's n ' t fine , is n't it ? we 're ' n ' ve  ' s  . r v n'  ' !"


@given(st.lists(st.sampled_from(list(" 'nvrtmse.,?x")), max_size=14).map("".join))
@settings(max_examples=1200, deadline=None, derandomize=True)
def test_a_stream_cleans_up_as_the_whole_does(text: str) -> None:
    for sample in (text, CLEAN):
        ids = [i for character in sample for i in TOKENIZER.encode(character)]
        assert "".join(TOKENIZER.decode_stream().pieces(ids)) == TOKENIZER.decode_answer(ids, strip_pad=False)


def test_clean_up_applies_in_order() -> None:
    def cleaned(text: str) -> str:
        return TOKENIZER.decode(TOKENIZER.encode(text))

    assert cleaned("a . b ? c , d") == "a. b? c, d"
    assert cleaned("do n't I 'm it 's we 've they 're") == "don't I'm it's we've they're"
    assert cleaned("x n ' t y") == "xn't y"
    assert cleaned("a  . b") == "a . b"


def test_pieces_never_split_a_character() -> None:
    text = "图片 🙂👍🏽 größe"
    ids = TOKENIZER.encode(text)
    stream, shown = TOKENIZER.decode_stream(), ""
    for token in ids:
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown + stream.finish() == text
    assert len(ids) > len(text)


def test_a_broken_character_at_the_end_is_shown_when_the_stream_ends() -> None:
    ids = TOKENIZER.encode("ok 🙂")[:-1]
    stream = TOKENIZER.decode_stream()
    assert "".join(map(stream.push, ids)) == "ok"
    assert stream.finish() == " \ufffd"


def test_words_come_without_delay() -> None:
    stream = TOKENIZER.decode_stream()
    pieces = [stream.push(i) for i in TOKENIZER.encode("What is in the image?")]
    assert pieces == ["What", " is", " in", " the", " image", "?"]


def test_exclamation_marks_stay_in_streams_and_leave_answers() -> None:
    ids = [*TOKENIZER.encode("Wow!! Nice!"), SPECIAL.eot]
    assert "".join(TOKENIZER.decode_stream().pieces(ids)) == "Wow!! Nice!"
    assert TOKENIZER.decode_answer(ids) == "Wow Nice"
    assert TOKENIZER.decode_answer(ids, strip_pad=False) == "Wow!! Nice!"


@pytest.mark.parametrize("token", [1280, 2**31, 2**40, -1])
def test_an_unknown_id_is_refused(token: int) -> None:
    with pytest.raises(TokenizerError, match=f"has no token {token}; use the tokenizer.json of this model"):
        TOKENIZER.decode([64, token])
    with pytest.raises(TokenizerError, match=f"has no token {token}"):
        TOKENIZER.decode_stream().push(token)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(PromptError, match=r"character 2 is a lone surrogate \(U\+DC80\)"):
        TOKENIZER.encode("ab\udc80")
    with pytest.raises(PromptError, match="lone surrogate"):
        TOKENIZER.encode_special("\ud800")


# --- other and damaged files


def _edited(tmp_path: Path, **changes: Any) -> Path:
    content = json.loads(FILE.read_text()) | changes
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_settings_of_the_file_do_not_change_the_ids(tmp_path: Path) -> None:
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [1024], "tokens": ["<|begin_of_text|>"]}
        },
    }
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    listed = [*json.loads(FILE.read_text())["added_tokens"]]
    pad = dict(listed[0], id=0, content="!")
    changed = Tokenizer.from_file(
        _edited(tmp_path, post_processor=template, truncation=truncation, added_tokens=[pad, *listed])
    )
    for vector in VECTORS["tokenize"]:
        assert changed.encode_special(vector["text"]) == vector["ids"]
        assert changed.encode(vector["text"]) == TOKENIZER.encode(vector["text"])


def test_all_missing_special_tokens_are_named(tmp_path: Path) -> None:
    kept = [t for t in json.loads(FILE.read_text())["added_tokens"] if t["content"] not in ("<slice>", "<|eot_id|>")]
    with pytest.raises(TokenizerError, match=r"no special token <\|eot_id\|>, <slice>; take it from") as caught:
        Tokenizer.from_file(_edited(tmp_path, added_tokens=kept))
    assert "\n" not in str(caught.value)


def test_an_unsupported_tokenizer_says_everything_at_once(tmp_path: Path) -> None:
    listed = json.loads(FILE.read_text())["added_tokens"]
    listed[5]["lstrip"] = True
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(_edited(tmp_path, decoder=decoder, added_tokens=listed[1:]))
    message = str(caught.value)
    assert "<|begin_of_text|>" in message and "lstrip" in message and "WordPiece; expected ByteLevel" in message


def _damaged() -> dict[str, bytes]:
    good = FILE.read_bytes()
    content = json.loads(good)
    no_vocab = dict(content, model=dict(content["model"], vocab={}))
    bad_merge = dict(content, model=dict(content["model"], merges=[["zz", "qq"]]))
    bad_regex = dict(
        content, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    )
    panics = dict(content, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    return {
        "empty": b"",
        "truncated": good[:2000],
        "not-utf8": b"\xff\xfe" + good,
        "list": b"[]",
        "number": b"7",
        "other-json": b'{"model_type": "minicpmv"}',
        "deep": b"[" * 100_000,
        "no-vocabulary": json.dumps(no_vocab).encode(),
        "bad-merge": json.dumps(bad_merge).encode(),
        "panics": json.dumps(panics).encode(),
        "bad-regex": json.dumps(bad_regex).encode(),
    }


@pytest.mark.parametrize("kind", _damaged())
def test_a_damaged_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(_damaged()[kind])
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(path)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"none.json: cannot be read \(No such file or directory\)"):
        Tokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(TokenizerError, match=r"cannot be read \(Is a directory\)"):
        Tokenizer.from_file(tmp_path)
