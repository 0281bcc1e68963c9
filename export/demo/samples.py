"""A seeded stream of (picture, question, answer): the same seed gives the same pictures on every machine.

Tasks: `line` (one line of text), `page` (several lines, several slices), `question` (colour, count, which is bigger,
fields of receipts and forms).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from .content import COLOURS, SHAPES, Page, form, line_text, note, receipt
from .draw import Drawing, draw_page, draw_scene

SCALE_RESOLUTION = 112
SLICE_AREA = SCALE_RESOLUTION**2
TASKS = ("line", "page", "question")
PAGE_CELLS = {2: 30, 3: 20, 4: 30, 6: 14, 9: 6}
"""How many cells a page is drawn for, and how often."""


@dataclass(frozen=True)
class Sample:
    """`kind` names the sort of content within the task."""

    task: str
    kind: str
    drawing: Drawing
    question: str
    answer: str

    @property
    def image(self) -> Image.Image:
        return self.drawing.image


READ = "Read the text."


def line(rng: Random, evaluation: bool, low: int = 4, high: int = 16, slices: int = 1) -> Sample:
    """One line, in a picture of one slice unless `slices` asks for a larger one."""
    text = line_text(rng, evaluation, low, high)
    area = SLICE_AREA * (rng.uniform(0.5, 0.94) if slices == 1 else rng.uniform(slices - 1 + 0.05, slices))
    drawing = draw_page(rng, Page(((text,),)), area)
    return Sample("line", "line", drawing, READ, text)


def _page(rng: Random, evaluation: bool, cells: int, kinds: tuple[str, ...]) -> tuple[str, Page]:
    """Content that fills about `cells` cells with characters at least a patch wide (22 to a cell)."""
    kind = rng.choice(kinds)
    room = 22 * cells
    if kind == "receipt":
        count = min(max(3, room // 15), 10)
        return kind, receipt(rng, evaluation, rng.randint(3, count))
    if kind == "form":
        return kind, form(rng, evaluation, rng.randint(2, min(5, max(2, room // 15))))
    longest = rng.randint(8, min(16, room // 2))
    count = min(10, max(2, room // (longest + 1)))
    return kind, note(rng, evaluation, rng.randint(max(2, count - 2), count), longest)


def page(rng: Random, evaluation: bool, cells: int | None = None) -> Sample:
    """Several lines in a picture that the slicing cuts into about `cells` cells."""
    cells = cells or rng.choices(list(PAGE_CELLS), list(PAGE_CELLS.values()))[0]
    kind, content = _page(rng, evaluation, cells, ("note", "note", "receipt", "form"))
    drawing = draw_page(rng, content, SLICE_AREA * (cells - rng.uniform(0.05, 0.6)))
    return Sample("page", kind, drawing, READ, content.text)


def _colour(rng: Random) -> tuple[str, str, Drawing | None]:
    kinds = rng.sample(SHAPES, rng.randint(1, 3))
    colours = rng.sample(list(COLOURS), len(kinds))
    drawing = draw_scene(
        rng, [(k, c, rng.uniform(0.14, 0.26)) for k, c in zip(kinds, colours, strict=True)], _scene_area(rng)
    )
    spelling = "colour" if rng.random() < 0.7 else "color"
    return f"What {spelling} is the {kinds[0]}?", colours[0], drawing


def _count(rng: Random) -> tuple[str, str, Drawing | None]:
    kind = rng.choice(SHAPES)
    number, others = rng.randint(1, 6), rng.choice((0, 0, 1, 2))
    colours = list(COLOURS)
    shapes = [(kind, rng.choice(colours), rng.uniform(0.09, 0.14)) for _ in range(number)]
    rest = [k for k in SHAPES if k != kind]
    shapes += [(rng.choice(rest), rng.choice(colours), rng.uniform(0.09, 0.14)) for _ in range(others)]
    rng.shuffle(shapes)
    drawing = draw_scene(rng, shapes, _scene_area(rng))
    if rng.random() < 0.25:
        return "How many shapes are there?", str(number + others), drawing
    return f"How many {kind}s are there?", str(number), drawing


def _bigger(rng: Random) -> tuple[str, str, Drawing | None]:
    first, second = rng.sample(SHAPES, 2)
    small = rng.uniform(0.08, 0.16)
    large = small * rng.uniform(1.45, 1.9)
    sizes = {first: large, second: small} if rng.random() < 0.5 else {first: small, second: large}
    colours = rng.sample(list(COLOURS), 2)
    drawing = draw_scene(
        rng, [(first, colours[0], sizes[first]), (second, colours[1], sizes[second])], _scene_area(rng)
    )
    return f"Which is bigger, the {first} or the {second}?", max(sizes, key=lambda k: sizes[k]), drawing


def _scene_area(rng: Random) -> float:
    return SLICE_AREA * rng.uniform(0.6, 0.97)


def question(rng: Random, evaluation: bool, kind: str | None = None) -> Sample:
    """A question about shapes, or about a field of a receipt or a form."""
    makers: dict[str, Callable[[Random], tuple[str, str, Drawing | None]]] = {
        "colour": _colour,
        "count": _count,
        "bigger": _bigger,
    }
    kind = kind or rng.choice((*makers, "field"))
    if kind == "field":
        cells = rng.choice((2, 3, 4))
        _, content = _page(rng, evaluation, cells, ("receipt", "form"))
        drawing = draw_page(rng, content, SLICE_AREA * (cells - rng.uniform(0.05, 0.6)))
        label = rng.choice(list(content.facts))
        return Sample("question", "field", drawing, f"What is the {label}?", content.facts[label])
    while True:
        text, answer, scene = makers[kind](rng)
        if scene is not None:
            return Sample("question", kind, scene, text, answer)


def held_out_samples(task: str, count: int, seed: int = 2026) -> list[Sample]:
    """The evaluation set of a task: held-out strings only, the same pictures on every machine."""
    makers: dict[str, Callable[[Random, bool], Sample]] = {"line": line, "page": page, "question": question}
    rng = Random(f"{task} {seed}")
    return [makers[task](rng, True) for _ in range(count)]


def main() -> None:
    """Write held-out pictures with their questions and answers: `python -m lensc.export.demo.samples -o FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m lensc.export.demo.samples", description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8, help="pictures per task (default 8)")
    parser.add_argument("--seed", type=int, default=2026, help="2026 is the evaluation set (default)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    answers = {}
    for task in TASKS:
        for i, sample in enumerate(held_out_samples(task, args.count, args.seed)):
            sample.image.save(args.output / f"{task}{i}.png")
            answers[f"{task}{i}.png"] = {"question": sample.question, "answer": sample.answer}
    (args.output / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
