"""From messages to token ids: roles, the chat template, and the placeholders that pictures take the place of.

The template, for each message: `<|start_header_id|>` role `<|end_header_id|>` "\\n\\n" content `<|eot_id|>`, with
`<|begin_of_text|>` before the first and an open assistant header after the last. The parts of a content are joined with
"\\n" and stripped at both ends. A picture is written as `<image>` 96 x `<unk>` `</image>` for its overview, and if it is
cut, `<slice>`, the same for each cell with "\\n" between rows, `</slice>`.

Special tokens are put in as ids and everything else is encoded as plain text, so no text can imitate one. As in the
official tokenizer, the text between two special tokens is encoded as one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from lensc.backends.errors import PromptError, UsageError

from .picture import PictureSource, SlicePlan
from .tokenizer import AnswerStream, SpecialIds, Tokenizer

__all__ = [
    "AnswerStream",
    "Message",
    "Picture",
    "Prompt",
    "SpecialIds",
    "Text",
    "Tokenizer",
    "build_prompt",
    "parse_messages",
    "pictures_of",
    "user_messages",
]

ROLES = ("system", "user", "assistant")
_IMAGE_KEYS = ("image", "url", "path")


@dataclass(frozen=True)
class Text:
    """A piece of text of a message."""

    text: str


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a message, not opened yet."""

    source: PictureSource


@dataclass(frozen=True, eq=False)
class Message:
    """What one role says: texts and pictures in order."""

    role: str
    content: tuple[Text | Picture, ...]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids of a conversation that is ready to be answered.

    `ids: int64[tokens]`; `image_bounds: int64[slices, 2]`, for each slice in order the positions of its first `<unk>` and
    of its `</image>`: `ids[start:end]` are the rows that the slice's image_embeds take.
    """

    ids: npt.NDArray[np.int64]
    image_bounds: npt.NDArray[np.int64]


def user_messages(text: str, images: Sequence[PictureSource] = (), system_prompt: str = "") -> list[Message]:
    """A conversation of one user turn: all pictures, then the text. An empty system prompt is left out."""
    _check_listed(images)
    messages = [Message("user", (*map(Picture, images), Text(text)))]
    if system_prompt:
        messages.insert(0, Message("system", (Text(system_prompt),)))
    return messages


def parse_messages(messages: Sequence[Mapping[str, Any]], images: Sequence[PictureSource] = ()) -> list[Message]:
    """Parse a message list as transformers takes it, or as the official MiniCPM-V chat does.

    Each message is `{"role": "system" | "user" | "assistant", "content": ...}`; content is a string or a list of

    - `{"type": "text", "text": str}` or a plain string;
    - `{"type": "image", "image": ...}` with anything `open_picture` takes, or `"path"` or `"url"` with a local file
      instead of `"image"`; without any of them it stands for the next of `images`;
    - a PIL image, a pathlib.Path, bytes or an array.

    Pictures are not opened. Raises UsageError that names the message and part and what was found, PromptError if
    `images` are more or fewer than the parts that stand for them.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages: {_found(messages)}; expected a list of messages with role and content")
    _check_listed(images)
    parsed = [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _check_roles(parsed)
    waiting = sum(part is None for _, parts in parsed for part in parts)
    if waiting != len(images):
        raise PromptError(
            f"messages have {waiting} image parts without a picture, {len(images)} images are given; give one for each"
        )
    following = iter(images)
    return [
        Message(role, tuple(Picture(next(following)) if part is None else part for part in parts))
        for role, parts in parsed
    ]


def pictures_of(messages: Sequence[Message]) -> list[Picture]:
    """All pictures of a conversation in order of appearance."""
    return [part for message in messages for part in message.content if isinstance(part, Picture)]


def build_prompt(
    messages: Sequence[Message], plans: Sequence[SlicePlan], tokenizer: Tokenizer, query_num: int
) -> Prompt:
    """Apply the chat template; `plans[i]` is how the i-th picture of `messages` is cut, `query_num` its rows per slice.

    Raises PromptError if pictures and plans differ in number, UsageError if the roles do not make a conversation.
    """
    _check_roles([(message.role, message.content) for message in messages])
    count = len(pictures_of(messages))
    if count != len(plans):
        raise PromptError(
            f"messages have {count} pictures, {len(plans)} are prepared; prepare each picture once, in order"
        )
    special, following = tokenizer.special, iter(plans)
    pieces: list[int | str] = [special.bos]
    for message in messages:
        pieces += [special.start_header, message.role, special.end_header, "\n\n"]
        for part in _joined(message.content):
            pieces += [part] if isinstance(part, str) else _placeholder(next(following), special, query_num)
        pieces.append(special.eot)
    pieces += [special.start_header, "assistant", special.end_header, "\n\n"]
    return _prompt(pieces, tokenizer)


def _check_listed(images: Sequence[PictureSource]) -> None:
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise UsageError(f"images: got {type(images).__name__}; expected a list, e.g. images=[picture]")


def _joined(content: Sequence[Text | Picture]) -> list[str | Picture]:
    """The parts joined with newlines and stripped at both ends; texts that meet are one string."""
    joined: list[str | Picture] = []
    for i, part in enumerate(content):
        for piece in ("\n" if i else "", part.text if isinstance(part, Text) else part):
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            else:
                joined.append(piece)
    if joined and isinstance(joined[0], str):
        joined[0] = joined[0].lstrip()
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    return joined


def _placeholder(plan: SlicePlan, special: SpecialIds, query_num: int) -> list[int | str]:
    slice_: list[int | str] = [special.image_start, *[special.unk] * query_num, special.image_end]
    if plan.grid is None:
        return slice_
    cols, rows = plan.grid
    row = slice_ * cols
    return [*slice_, special.slice_start, *row, *["\n", *row] * (rows - 1), special.slice_end]


def _prompt(pieces: Sequence[int | str], tokenizer: Tokenizer) -> Prompt:
    special = tokenizer.special
    ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        ids += tokenizer.encode(text)
        text = ""
        if piece == special.image_end:
            ends.append(len(ids))
        ids.append(piece)
        if piece == special.image_start:
            starts.append(len(ids))
    ids += tokenizer.encode(text)
    bounds = np.array([starts, ends], np.int64).T
    return Prompt(np.array(ids, np.int64), np.ascontiguousarray(bounds))


def _check_roles(messages: Sequence[tuple[str, Sequence[object]]]) -> None:
    """Raise UsageError unless there is an optional system message of text only, then a user, then users and assistants."""
    if not messages:
        raise UsageError("messages: the list is empty; expected at least one user message")
    for i, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise UsageError(f"messages[{i}]: role {role!r}; expected one of {', '.join(ROLES)}")
        if role == "system" and i:
            raise UsageError(f"messages[{i}]: role 'system'; a system message can only be the first")
        if role == "system" and not all(isinstance(part, Text) for part in content):
            raise UsageError(f"messages[{i}]: a picture in the system message; put it into a user message")
    first = 1 if messages[0][0] == "system" else 0
    if len(messages) == first or messages[first][0] != "user":
        found = "nothing" if len(messages) == first else f"role {messages[first][0]!r}"
        raise UsageError(f"messages[{first}]: {found}; a conversation begins with a user message")


def _parse_message(message: object, where: str) -> tuple[str, list[Text | Picture | None]]:
    """(role, parts); None is a picture that `images` must supply."""
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: {_found(message)}; expected a dict with role and content")
    _check_keys(message, where, required=("role", "content"))
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise UsageError(f"{where}: role is {_found(role)}; expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, [Text(content)]
    if not isinstance(content, list | tuple):
        raise UsageError(f"{where}: content is {_found(content)}; expected a string or a list of parts")
    if not content:
        raise UsageError(f"{where}: content is an empty list; expected at least one text or picture")
    return role, [_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _parse_part(part: object, where: str) -> Text | Picture | None:
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, Path | bytes | Image.Image | np.ndarray):
        return Picture(part)
    if not isinstance(part, Mapping):
        raise UsageError(f"{where}: {_found(part)}; expected a string, a picture or a dict with a type")
    kind = part.get("type")
    if kind == "text":
        _check_keys(part, where, required=("type", "text"))
        if not isinstance(part["text"], str):
            raise UsageError(f"{where}: text is {_found(part['text'])}; expected a string")
        return Text(part["text"])
    if kind == "image":
        _check_keys(part, where, required=("type",), optional=_IMAGE_KEYS)
        return _parse_image(part, where)
    found = f"type {kind!r}" if "type" in part else f"no type, but {', '.join(map(repr, part)) or 'an empty dict'}"
    raise UsageError(f"{where}: {found}; expected type 'text' or 'image'")


def _parse_image(part: Mapping[str, Any], where: str) -> Picture | None:
    given = [key for key in _IMAGE_KEYS if key in part]
    if len(given) > 1:
        raise UsageError(f"{where}: {' and '.join(given)} are given; expected only one of them")
    if not given:
        return None
    source = part[given[0]]
    accepted = (str, Path, bytes, Image.Image, np.ndarray) if given[0] == "image" else (str, Path)
    if not isinstance(source, accepted):
        expected = ", ".join(t.__name__ for t in accepted)
        raise UsageError(f"{where}: {given[0]} is {_found(source)}; expected one of {expected}")
    return Picture(_local(source, where) if isinstance(source, str) else source)


def _local(source: str, where: str) -> str:
    """The path that `source`, a path or file URL, names."""
    scheme = urlsplit(source).scheme.lower() if ":" in source else ""
    if scheme == "file":
        return unquote(urlsplit(source).path)
    if scheme in ("http", "https", "data"):
        shown = source if len(source) <= 60 else source[:57] + "..."
        raise UsageError(f"{where}: {shown}; expected a local file: nothing is fetched, pass the path or the bytes")
    return source


def _check_keys(
    given: Mapping[str, Any], where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    missing = [key for key in required if key not in given]
    unknown = [repr(key) for key in given if key not in required + optional]
    problems = [f"no {', '.join(missing)}"] if missing else []
    problems += [f"unknown key {', '.join(unknown)}"] if unknown else []
    if problems:
        raise UsageError(f"{where}: {'; '.join(problems)}; expected {', '.join(required + optional)}")


def _found(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, str | int | float) and len(repr(value)) <= 40:
        return repr(value)
    return type(value).__name__
