"""A folder of pictures with questions: what a model is calibrated with, and asked to be compared with another.

It holds .png, .jpg and .jpeg files and, if there are questions and answers, `questions.json`:

    {"receipt.png": {"question": "What is the total?", "answer": "17.35"}}

Both keys may be left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lensc.backends.errors import InputError, PictureError, listed
from lensc.runtime.picture import PictureSource, open_picture

QUESTIONS = "questions.json"
SUFFIXES = (".png", ".jpg", ".jpeg")
QUESTIONS_BYTES = 1 << 20

DESCRIBE = "Describe the picture."


@dataclass(frozen=True, eq=False)
class Item:
    """Something to ask, not opened yet; an empty answer is none."""

    question: str
    answer: str = ""
    pictures: tuple[PictureSource, ...] = ()


def read_folder(folder: Path, flag: str) -> list[Item]:
    """The pictures of `folder` in the order of their names. `flag` begins every error: where the folder was named.

    Raises InputError for a folder that holds something else or nothing, PictureError that lists all that cannot be read.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "not found"
        raise InputError(f"{flag} {folder}: {found}, expected a folder of pictures")
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be read: {error.strerror or error}") from error
    pictures = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    others = [entry.name for entry in entries if entry not in pictures and entry.name != QUESTIONS]
    if others:
        raise InputError(
            f"{flag} {folder}: {listed(others, '; ', len(others))}: neither a picture ({', '.join(SUFFIXES)}) nor {QUESTIONS}; "
            "remove what is not meant"
        )
    if not pictures:
        raise InputError(f"{flag} {folder}: holds no picture ({', '.join(SUFFIXES)}); 20 to 60 are enough")
    asked = _questions(folder / QUESTIONS, {picture.name for picture in pictures})
    unreadable = []
    for picture in pictures:
        try:
            open_picture(picture)
        except PictureError as error:
            unreadable.append(str(error))
    if unreadable:
        raise PictureError(
            f"{flag} {folder}: {len(unreadable)} of {len(pictures)} pictures cannot be read: {listed(unreadable, '; ', len(unreadable))}"
        )
    items = []
    for picture in pictures:
        question, answer = asked.get(picture.name, (DESCRIBE, ""))
        items.append(Item(question, answer, (picture,)))
    return items


def _questions(path: Path, names: set[str]) -> dict[str, tuple[str, str]]:
    """(question, answer) by file name; {} without a file. Raises InputError that lists what is wrong in it."""
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > QUESTIONS_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {QUESTIONS_BYTES}")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {str(error)[:120]}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: {type(document).__name__}, expected an object of file name to question and answer")
    problems = [f"{ascii(name)[:80]} is no picture of the folder" for name in document if name not in names]
    found = {}
    for name, entry in document.items():
        if (
            not isinstance(entry, dict)
            or not entry.keys() <= {"question", "answer"}
            or not all(isinstance(value, str) for value in entry.values())
        ):
            problems.append(f"{ascii(name)[:80]} is {ascii(entry)[:60]}")
            continue
        found[name] = (entry.get("question", DESCRIBE), entry.get("answer", ""))
    if problems:
        raise InputError(
            f'{path}: {listed(problems, "; ", len(problems))}; expected {{"name.png": {{"question": …, "answer": …}}}}'
        )
    return found
