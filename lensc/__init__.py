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
    from lensc.runtime.events import Event
    from lensc.runtime.pipeline import VLM, Metrics, Result, Stream

    __version__: str

__all__ = ["VLM", "Event", "LensError", "Metrics", "Result", "Stream", "__version__", "load"]

_LAZY = {
    "Event": "lensc.runtime.events",
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
    selftest: bool | str = True,
    vision_padding: str | None = None,
    picture_cache_bytes: int = 0,
    max_memory_bytes: int | None = None,
    on_failure: str = "replan",
    placement: str = "measured",
    overlap: bool | None = None,
    tuned: bool = True,
    max_slice_nums: int | None = None,
) -> VLM:
    """Open the bundle in folder `path`.

    `target` (`backend:processor[:arch]`, e.g. `onnxruntime:cpu`) must be one that the bundle was built for;
    `vision=qnn:npu:sm8650,decoder=native:cpu` names one for each graph, or for some, and is never replaced by another.
    Without it, `placement="measured"` times the candidates of a graph that has several when a bundle is first loaded on a
    machine, each in a process of its own, and remembers the figures; `"ranked"` takes npu before gpu before cpu. `vlm.plan`
    says which were taken and why. `threads` defaults to the physical cores allowed.
    Each graph answers a golden probe: a decoder the whole of it until that was right once on this machine, then its first tokens.
    `selftest`: what is done about a graph whose probe fails. `"replace"` (or True) takes another candidate where the
    choice was open and there is one, else raises ParityError; `"error"` raises it; `"warn"` goes on; `"off"` (or False) runs no
    probes. `on_failure`: what is done about a device that fails in the middle of an answer. `"replan"` goes on with the next
    candidate where the choice was open and there is one, with the same tokens; `"error"` raises ExecutionError. Everything
    that is replaced, refused or measured is one of `vlm.events`.
    `vision_padding` (official, masked or per_slice) overrides the bundle's: how slices of different sizes share a call.
    A picture is cut into at most `max_slice_nums` cells, beside the overview (1: nothing but that; default and most: the
    model's, officially 9): fewer are faster, and small print is lost.
    `picture_cache_bytes` of image embeddings are kept in the user's cache folder, for every process and engine that runs the
    same vision graph; 0 keeps none on disk.
    Where all graphs together take more than `max_memory_bytes`, by the sizes of their artifacts, one at a time is loaded, and
    loaded again when a new picture comes.
    Pictures are encoded while what stands before them in the prompt is fed, if the two graphs run on different processors;
    `overlap` says otherwise, and `vlm.overlap` what it came to, and why.

    What `lensc tune` has kept for a graph on this machine is used, and stands in `vlm.plan`; `tuned=False` leaves it out, and
    `threads`, and a number of tokens to guess that a call names, go before it.

    Raises ManifestError, UnavailableError, CompatibilityError, ParityError or UsageError, each with what to do.
    """
    from lensc.runtime.load import load as load_bundle

    return load_bundle(
        path,
        target,
        threads=threads,
        selftest=selftest,
        vision_padding=vision_padding,
        picture_cache_bytes=picture_cache_bytes,
        max_memory_bytes=max_memory_bytes,
        on_failure=on_failure,
        placement=placement,
        overlap=overlap,
        tuned=tuned,
        max_slice_nums=max_slice_nums,
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
