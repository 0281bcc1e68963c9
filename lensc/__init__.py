"""lensc: a compiler and runtime for vision-language models on edge devices.

    import lensc

    with lensc.load("bundle/") as vlm:
        answer = vlm.generate("What is the total?", images=["receipt.png"])
        print(answer.text)
        for piece in vlm.generate("Read the text.", images=["receipt.png"], stream=True):
            print(piece, end="", flush=True)

Importing the package costs milliseconds: numpy, Pillow, tokenizers and the engine are imported by `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lensc.backends.errors import LensError
    from lensc.runtime.pipeline import VLM, Metrics, Result, Stream

    __version__: str

__all__ = ["VLM", "LensError", "Metrics", "Result", "Stream", "__version__", "load"]

_LAZY = {
    "LensError": "lensc.backends.errors",
    "Metrics": "lensc.runtime.pipeline",
    "Result": "lensc.runtime.pipeline",
    "Stream": "lensc.runtime.pipeline",
    "VLM": "lensc.runtime.pipeline",
}


def load(
    path: str | Path,
    target: str | None = None,
    threads: int | None = None,
    selftest: bool = True,
    vision_padding: str | None = None,
    picture_cache_bytes: int = 0,
    max_memory_bytes: int | None = None,
    overlap: bool | None = None,
) -> VLM:
    """Open the bundle in folder `path`.

    `target` (`backend:processor[:arch]`, e.g. `onnxruntime:cpu`) must be one that the bundle was built for;
    `vision=qnn:npu:sm8650,decoder=native:cpu` names one for each graph, or for some; without it the best usable one is taken for each graph, and `vlm.plan` says which and why. `threads` defaults to the physical
    cores allowed. `selftest` runs the bundle's golden probes and refuses an engine that computes something else.
    `vision_padding` (official, masked or per_slice) overrides the bundle's: how slices of different sizes share a call.
    `picture_cache_bytes` of image embeddings are kept in the user's cache folder, for every process and engine that runs the
    same vision graph; 0 keeps none on disk.
    Where all graphs together take more than `max_memory_bytes`, by the sizes of their artifacts, one at a time is loaded, and
    loaded again when a new picture comes.
    Pictures are encoded while what stands before them in the prompt is fed, if the two graphs run on different processors;
    `overlap` says otherwise, and `vlm.overlap` what it came to, and why.

    Raises ManifestError, UnavailableError, CompatibilityError, ParityError or UsageError, each with what to do.
    """
    from lensc.runtime.load import load as load_bundle

    return load_bundle(
        path, target, threads, selftest, vision_padding, picture_cache_bytes, max_memory_bytes, overlap=overlap
    )


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lensc")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+source"
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "__version__"])
