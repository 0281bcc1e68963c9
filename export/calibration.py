"""What a quantizer is shown: pictures with questions and answers, cut and tokenized as the runtime does it.

Three sources, in this order:

    a folder    the pictures of `--calibration FOLDER`, and the built-in texts
    the demo    pictures of the demo checkpoint's tasks, drawn anew; held-out strings are never among them
    built in    pages of text, figures and textures that are drawn here, the shipped pictures, and texts

A folder is one of `question_folder`. An answer is fed behind its prompt, so that the quantizer sees what the decoder sees while it
answers. Calibrate with what the model will be used for: the built-in pictures are no substitute for photographs.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lensc.backends.bundle import ModelSpec
from lensc.backends.errors import PictureError, UnavailableError, listed
from lensc.runtime.picture import slice_picture
from lensc.runtime.prompt import Tokenizer, build_prompt, user_messages

from . import demo
from .calibration_text import CONTINUE, SHIPPED, TEXTS
from .question_folder import DESCRIBE, Item, read_folder
from .questions import TEXT, questions_for

READ = "Read the text."

DEMO_SAMPLES = {"line": 16, "page": 16, "question": 24}
"""How many pictures of each task are drawn for the demo checkpoint."""

DEMO_HELD_OUT = {"line": 80, "page": 40, "question": 80}
"""The same for judging what a calibration came to, on pictures that it has not seen."""

PAGE_CELLS = (1.0, 2.5, 4.0, 6.0)
"""Areas of the drawn pages, in slices."""

COLOURS = (((20, 20, 20), (248, 246, 240)), ((240, 240, 230), (34, 44, 80)), ((120, 20, 30), (230, 220, 190)))
"""(text, ground) of the drawn pages."""

TEXTURES = 4


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and its answer, ready to be fed.

    slices: uint8[H, W, 3] each; ids: int64[tokens], the answer behind the prompt, without the token that ends it;
    image_bounds: int64[slices, 2] as in `runtime.prompt.Prompt`; prompt_tokens: how many of `ids` are the prompt.
    """

    slices: tuple[npt.NDArray[np.uint8], ...]
    ids: npt.NDArray[np.int64]
    image_bounds: npt.NDArray[np.int64]
    prompt_tokens: int


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """`source` says in words where the samples come from; `sha256` is that of all pixels and ids."""

    source: str
    samples: tuple[Sample, ...]
    pictures: int

    @property
    def slices(self) -> int:
        return sum(len(sample.slices) for sample in self.samples)

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            arrays: list[npt.NDArray[Any]] = [*sample.slices, sample.ids, sample.image_bounds]
            for array in arrays:
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
            digest.update(f"{sample.prompt_tokens}".encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"{self.source}: {self.pictures} pictures, {self.slices} slices, {self.tokens} tokens"


def calibration_set(
    spec: ModelSpec, tokenizer: Tokenizer, folder: Path | None = None, *, is_demo: bool = False
) -> CalibrationSet:
    """The samples of `folder`, or without one those of the demo checkpoint or the built-in ones.

    Raises InputError for a folder that cannot be used, PictureError that lists every picture that cannot be opened.
    """
    if folder is not None:
        items = [*read_folder(folder, "--calibration"), *_texts()]
        return prepare(f"folder {folder.name}", items, spec, tokenizer)
    if is_demo:
        try:
            return prepare("drawn for the demo model", list(_demo()), spec, tokenizer)
        except UnavailableError:
            source = "built in, as the demo fonts are not installed (pip install 'lensc[demo]')"
            return prepare(source, list(_built_in(spec)), spec, tokenizer)
    return prepare("built in", list(_built_in(spec)), spec, tokenizer)


def held_out_set(spec: ModelSpec, tokenizer: Tokenizer) -> CalibrationSet | None:
    """Pictures of the demo model's tasks that are in no calibration; None where they cannot be drawn."""
    try:
        return prepare("drawn anew for the demo model", list(_demo(DEMO_HELD_OUT, "judge")), spec, tokenizer)
    except UnavailableError:
        return None


def prepare(source: str, items: Sequence[Item], spec: ModelSpec, tokenizer: Tokenizer) -> CalibrationSet:
    """The samples of `items`: pictures cut, prompts made. `source` says where they come from. Raises PictureError that lists all pictures with a problem."""
    samples, problems = [], []
    for item in items:
        try:
            sliced = [slice_picture(picture, spec.picture) for picture in item.pictures]
        except PictureError as error:
            problems.append(str(error))
            continue
        messages = user_messages(item.question, item.pictures)
        prompt = build_prompt(messages, [cut.plan for cut in sliced], tokenizer, spec.picture.query_num)
        room = spec.decoder.context_length - len(prompt.ids)
        if room < 1:
            problems.append(
                f"{item.question[:60]!r} has a prompt of {len(prompt.ids)} tokens, "
                f"the model's context is {spec.decoder.context_length}"
            )
            continue
        answer = np.array(tokenizer.encode(item.answer)[:room], np.int64)
        slices = tuple(pixels for cut in sliced for pixels in cut.pixels)
        ids = np.concatenate([prompt.ids, answer])
        samples.append(Sample(slices, ids, prompt.image_bounds, len(prompt.ids)))
    if problems:
        raise PictureError(
            f"calibration, {source}: {len(problems)} of {len(items)} cannot be used: {listed(problems, '; ', len(problems))}"
        )
    return CalibrationSet(source, tuple(samples), sum(len(item.pictures) for item in items))


# --- the demo -----------------------------------------------------------------------------------------------------


def _demo(counts: Mapping[str, int] = DEMO_SAMPLES, seed: str = "calibration") -> Iterator[Item]:
    """Pictures of the tasks that the demo model was trained for, of a fixed seed. Raises UnavailableError."""
    from .demo.samples import Sample as Drawn
    from .demo.samples import line, page, question

    makers: dict[str, Callable[[Random, bool], Drawn]] = {"line": line, "page": page, "question": question}
    for task, count in counts.items():
        rng = Random(f"{seed} {task}")
        for _ in range(count):
            sample = makers[task](rng, False)
            yield Item(sample.question, sample.answer, (sample.image,))


# --- built in -----------------------------------------------------------------------------------------------------


def _built_in(spec: ModelSpec) -> Iterator[Item]:
    side = spec.picture.scale_resolution
    for asked in questions_for(spec):
        # the shipped pictures follow below, with their answers
        if not any(isinstance(picture, Path) for picture in asked.images):
            yield Item(asked.prompt, TEXT if asked.images else "", asked.images)
    for name, (question, answer) in SHIPPED.items():
        if (demo.PICTURES / name).is_file():
            yield Item(question, answer, (demo.PICTURES / name,))
    pages = [text for _, text in TEXTS if text.isascii()]
    for i, text in enumerate([*pages, *pages]):
        picture, shown = _page(text, side, PAGE_CELLS[i % len(PAGE_CELLS)], COLOURS[i % len(COLOURS)], tall=i % 2 == 0)
        yield Item(READ, shown, (picture,))
    for i in range(TEXTURES):
        yield Item(DESCRIBE, "", (_texture(side, i),))
    yield from _texts()


def _texts() -> Iterator[Item]:
    for question, text in TEXTS:
        yield Item(question or CONTINUE, text)


def _page(
    text: str, side: int, cells: float, colours: tuple[tuple[int, int, int], tuple[int, int, int]], tall: bool
) -> tuple[Image.Image, str]:
    """`text` on a page of about `cells` slices, and as it stands there: with its line breaks."""
    width = round(side * (cells * (0.7 if tall else 1.5)) ** 0.5)
    height = round(side * side * cells / width)
    columns = 26 if tall else 44
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, columns) or [""]]
    size = min(height / (1.4 * (len(lines) + 1)), width / (0.55 * columns))
    ink, ground = colours
    picture = Image.new("RGB", (width, height), ground)
    shown = "\n".join(lines)
    draw = ImageDraw.Draw(picture)
    draw.multiline_text(
        (size / 2, size / 2), shown, fill=ink, font=ImageFont.load_default(max(6.0, size)), spacing=size / 4
    )
    return picture, shown


def _texture(side: int, seed: int) -> Image.Image:
    """Soft clouds of colour with a sharp horizon and grain: nearer to a photograph than a page is."""
    rng = np.random.default_rng(seed)
    width, height = side * (1 + seed % 3), side * (1 + seed // 3)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in (3, 7, 19, 53):
        coarse = rng.uniform(0, 255, (octave, octave, 3)).astype(np.uint8)
        grown = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(grown, np.float32) / octave
    pixels *= 255 / pixels.max()
    pixels[round(height * rng.uniform(0.4, 0.7)) :] *= 0.5
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
