"""The tiny model that comes with lensc, and what it answers: what an engine that is in order gives on every machine.

`tiny.tar.xz` holds a bundle for each of `SCHEMES`, which `python -m lensc.bench.tiny` makes. A model of the true architecture
with one layer in each half; its answer to `picture()` stands in the manifest's metadata under `ANSWER`.
"""

from __future__ import annotations

import lzma
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lensc.backends.bundle import Manifest
from lensc.backends.errors import ParityError, StorageError

from .load import load

ARCHIVE = Path(__file__).with_name("tiny.tar.xz")
FLOAT = "f32"
SCHEMES = (FLOAT, "int4-g32")
"""The bundle of `FLOAT` holds its portable graphs, too."""
ANSWER = "doctor_answer"
"""The metadata that hold the ids of the tokens, with spaces between them."""
QUESTION, NEW_TOKENS = "Read the text.", 4


def unpack(folder: Path) -> dict[str, Path]:
    """Unpack the bundles into `folder`; where each scheme's lies. Raises StorageError."""
    try:
        with tarfile.open(ARCHIVE) as packed:
            packed.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, lzma.LZMAError) as error:
        raise StorageError(f"{ARCHIVE}: not unpacked into {folder}: {error}; install lensc again") from error
    return {scheme: folder / scheme for scheme in SCHEMES}


def picture() -> Image.Image:
    """A picture that is cut into a thumbnail and two slices."""
    y, x = np.mgrid[:56, :112]
    return Image.fromarray(np.stack([2 * x, 4 * y, x + y], -1).astype(np.uint8), "RGB")


def answer(bundle: Path, target: str) -> tuple[int, ...]:
    """The tokens that the model chooses on `target`. Raises what `load` and `VLM.generate` do."""
    with load(bundle, target) as vlm:
        return vlm.generate(QUESTION, [picture()], max_new_tokens=NEW_TOKENS).token_ids


def check_answer(manifest: Manifest, bundle: Path, target: str) -> None:
    """Raise ParityError unless the model answers what is recorded; nothing if nothing is."""
    recorded = manifest.metadata.get(ANSWER)
    if recorded is None:
        return
    given = " ".join(map(str, answer(bundle, target)))
    if given != recorded:
        raise ParityError(f"{target}: the answer is {given}, expected {recorded}")
