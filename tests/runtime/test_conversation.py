"""A conversation in a file: gone on with as if it had never been left, and nothing else is taken for one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lensc.backends.errors import InputError, StorageError
from lensc.runtime.conversation import FORMAT, Identity
from lensc.runtime.pipeline import VLM

QUESTION = "What is it that can be seen here, in the left part and in the right part of it?"
HERE = Identity("a" * 64, "decoder on here")


def make(tiny: Any, identity: Identity = HERE) -> VLM:
    parts = {"vision": tiny.FakeVision(), "decoder": tiny.FakeDecoder()}
    return VLM(tiny.SPEC, tiny.TOKENIZER, parts, tiny.TABLE, identity=identity)


def held(tiny: Any, vlm: VLM) -> list[dict[str, Any]]:
    """A conversation of one turn about a picture."""
    image = tiny.picture(56, 30)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]},
    ]
    return [*messages, {"role": "assistant", "content": vlm.chat(messages, max_new_tokens=4).text}]


def more(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*messages, {"role": "user", "content": "And?"}]


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    vlm = make(tiny)
    vlm.save(tmp_path / "talk", held(tiny, vlm))
    return tmp_path / "talk"


def test_a_conversation_goes_on_where_it_was_left(tiny: Any, tmp_path: Path) -> None:
    vlm = make(tiny)
    messages = held(tiny, vlm)
    tokens = vlm.save(tmp_path / "talk", messages)
    expected = vlm.chat(more(messages))
    other = make(tiny)
    restored = other.restore(tmp_path / "talk")
    assert restored.cached_tokens == tokens > 40 and restored.notes == ()
    assert [m["role"] for m in restored.messages] == ["system", "user", "assistant"]
    assert restored.messages[1]["content"][1] == messages[1]["content"][1]
    (part,) = [p for p in restored.messages[1]["content"] if p["type"] == "image"]
    np.testing.assert_array_equal(np.asarray(part["image"]), np.asarray(tiny.picture(56, 30)))
    answer = other.chat(more(restored.messages))
    assert answer.token_ids == expected.token_ids
    assert answer.metrics.reused_tokens == expected.metrics.reused_tokens == tokens
    assert not other._vision._session._session.runs  # type: ignore[attr-defined]
    assert vlm.save(tmp_path / "talk", messages) >= tokens, "a conversation is written over, and its cache kept"


def test_another_target_feeds_the_conversation_again(tiny: Any, saved: Path) -> None:
    other = make(tiny, Identity(HERE.model, "decoder on there"))
    restored = other.restore(saved)
    (note,) = restored.notes
    assert restored.cached_tokens == 0
    assert note.endswith("computed by decoder on here, here is decoder on there: the conversation is fed again")
    expected = make(tiny).chat(more(restored.messages)).token_ids
    assert other.chat(more(restored.messages)).token_ids == expected


def test_a_conversation_nothing_is_cached_of(tiny: Any, tmp_path: Path) -> None:
    vlm = make(tiny)
    messages = held(tiny, vlm)
    vlm.forget()
    assert vlm.save(tmp_path / "talk", messages) == 0
    restored = make(tiny).restore(tmp_path / "talk")
    assert (restored.cached_tokens, restored.notes) == (0, ()) and len(restored.messages) == 3


def rewritten(path: Path, change: Any) -> None:
    """The archive with what `change` makes of its summary and arrays."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    summary = json.loads(members["conversation.json"])
    change(summary, members)
    members["conversation.json"] = json.dumps(summary).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _format(summary: Any, members: Any) -> None:
    summary["format"] = FORMAT + 1


def _role(summary: Any, members: Any) -> None:
    summary["messages"][1]["role"] = "root"


def _no_picture(summary: Any, members: Any) -> None:
    del members["pictures/0.png"]


def _no_array(summary: Any, members: Any) -> None:
    summary["cache"]["arrays"].remove("past_key.0")


def _short_array(summary: Any, members: Any) -> None:
    members["cache/past_key.0.npy"] = members["cache/past_key.0.npy"][:-4]


def _huge_array(summary: Any, members: Any) -> None:
    members["cache/rows.npy"] = members["cache/rows.npy"].replace(b", 4), }   ", b", 4444), }")


def _no_header(summary: Any, members: Any) -> None:
    members["cache/rows.npy"] = members["cache/rows.npy"].replace(b", 4)", b", 4 ")


def _fewer_rows(summary: Any, members: Any) -> None:
    file = members["cache/rows.npy"]
    header = file[:128].replace(b"(", b"(1", 1)
    members["cache/rows.npy"] = header[:128] + file[128:]


def _other_model(summary: Any, members: Any) -> None:
    summary["model"] = {"name": "Other-V", "checkpoint_sha256": "b" * 64}


def _not_a_summary(summary: Any, members: Any) -> None:
    summary.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_format, rf"format {FORMAT + 1} is newer than this package reads \({FORMAT}\); upgrade"),
        (_role, "damaged: role 'root'"),
        (_no_picture, "damaged: .*pictures/0.png"),
        (_no_array, r"KV cache: these are not its tokens: no past_key\.0"),
        (_short_array, r"damaged: cache/past_key\.0\.npy: float32"),
        (_huge_array, r"damaged: cache/rows\.npy: uint64\[.*4444\] in"),
        (_no_header, r"damaged: cache/rows\.npy has no header"),
        (_fewer_rows, "damaged: "),
        (
            _other_model,
            "a conversation with Other-V .checkpoint bbbbbbbbbbbb., this model is tiny .checkpoint aaaaaaaa",
        ),
        (_not_a_summary, "damaged: conversation.json names no format"),
    ],
)
def test_a_file_of_something_else_is_one_clear_line(tiny: Any, saved: Path, change: Any, message: str) -> None:
    rewritten(saved, change)
    vlm = make(tiny)
    with pytest.raises(InputError, match=message) as caught:
        vlm.restore(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)
    assert not vlm._decoder.prefixes._held


def test_a_flipped_byte_anywhere_is_found(tiny: Any, saved: Path) -> None:
    """Of contents, or of what names them; what has no meaning, a date, may change."""
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        starts = {i.filename: i.header_offset + 30 + len(i.filename) + 20 for i in archive.infolist()}
        sizes = {i.filename: i.file_size for i in archive.infolist()}
    for name, start in starts.items():
        at = start + sizes[name] // 2
        saved.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(InputError, match="damaged"):
            make(tiny).restore(saved)
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:cut])
        with pytest.raises(InputError, match="damaged"):
            make(tiny).restore(saved)


def test_what_cannot_be_read_or_written(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = make(tiny)
    messages = held(tiny, vlm)
    with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
        vlm.restore(tmp_path / "nowhere")
    (tmp_path / "thesis").write_text("months of work")
    with pytest.raises(StorageError, match="thesis exists and is no conversation of lensc; choose another name"):
        vlm.save(tmp_path / "thesis", messages)
    assert (tmp_path / "thesis").read_text() == "months of work"
    with pytest.raises(StorageError, match="not written: No such file"):
        vlm.save(tmp_path / "no" / "talk", messages)
    vlm.save(tmp_path / "talk", messages)
    kept = (tmp_path / "talk").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array", full)
    with pytest.raises(StorageError, match="talk: not written: No space left on device"):
        vlm.save(tmp_path / "talk", messages)
    assert (tmp_path / "talk").read_bytes() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talk", "thesis"]
    assert vlm.chat(more(messages)).metrics.reused_tokens > 40, "the cache is still there"
