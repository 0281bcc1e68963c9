"""Slices of pictures in, image embeddings out; a slice seen before is not encoded again."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lensc.backends.base import Session
from lensc.backends.bundle import PictureSpec
from lensc.backends.errors import ExecutionError, GraphError
from lensc.export.graph import GraphSpec

from .costs import Curve
from .decoder import Cancelled
from .picture import vision_feeds
from .picture_cache import PictureCache
from .timeline import Timeline

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

CACHE_BYTES = 128 << 20
"""Image embeddings kept: 80 slices of 96 x 4096 floats, that is 8 pictures of the largest grid."""


@dataclass(frozen=True, eq=False)
class EncodedSlice:
    """`embeds: float32[Q, D]`, None if they are not needed, and the milliseconds that took (0.0 if from the cache)."""

    embeds: F32 | None
    ms: float
    from_cache: bool


@dataclass(frozen=True)
class Encoded:
    """`embeds: float32[slices, Q, D]`, with the milliseconds each slice took (0.0 if it came from the cache)."""

    embeds: F32
    ms: tuple[float, ...]
    from_cache: tuple[bool, ...]


class VisionEncoder:
    """Runs the vision graph slice by slice and remembers the results, least recently used first to go.

    One slice per run: slices do not see each other (the padding of "official" depends on the batch's longest slice
    only), and ten slices in one run would take ten times the attention memory for no gain on a busy processor.
    """

    def __init__(
        self,
        session: Session,
        spec: PictureSpec,
        hidden_size: int,
        disk: PictureCache | None = None,
        ready: Callable[[], None] | None = None,
        replan: Callable[[Session, ExecutionError], Session] | None = None,
    ) -> None:
        """`ready` is called before the graph is run, and is not counted in its time. `replan` gives the session to go on with
        when one has failed, or raises.
        """
        self._replan = replan
        self._last: tuple[bytes, F32] | None = None
        """The slice that was encoded last, and its features."""
        self.slice_ms = Curve()
        """What encoding took, by the patches of a slice with its padding."""
        self._disk = disk
        self._ready = ready
        self._session = session
        self._spec = spec
        self._hidden_size = hidden_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, F32] = OrderedDict()

    def keys(self, slices: Sequence[U8], longest: int = 0) -> list[bytes]:
        """A SHA-256 for each of the slices of a call: of all that its features depend on.

        `longest`: patches of the longest slice of the call, if that is not among them.
        """
        longest = max([longest, *map(self._patches, slices)])
        return [self._key(pixels, longest) for pixels in slices]

    def encode(self, slices: Sequence[U8]) -> Encoded:
        """Encode `slices`, each uint8[H, W, 3] of whole patches, as one call of the model would see them together."""
        embeds = np.empty((len(slices), self._spec.query_num, self._hidden_size), np.float32)
        made = list(self.each(slices, self.keys(slices)))
        for i, one in enumerate(made):
            embeds[i] = one.embeds
        return Encoded(embeds, tuple(one.ms for one in made), tuple(one.from_cache for one in made))

    def each(
        self,
        slices: Sequence[U8],
        keys: Sequence[bytes],
        known: int = 0,
        should_stop: Callable[[], bool] | None = None,
        timeline: Timeline | None = None,
    ) -> Iterator[EncodedSlice]:
        """The slices of a call one after another, each encoded when it is asked for; `keys` are theirs.

        The first `known` are not needed, and count as being from the cache. Raises Cancelled between two slices.
        """
        longest = self._longest(slices)
        for i, (pixels, key) in enumerate(zip(slices, keys, strict=True)):
            features = None if i < known else self._find(key)
            if i < known or features is not None:
                yield EncodedSlice(features, 0.0, True)
                continue
            if should_stop is not None and should_stop():
                raise Cancelled
            if self._ready is not None:
                self._ready()
            started = time.perf_counter()
            features = self._run(pixels, longest, key)
            self._remember(key, features)
            if self._disk is not None:
                self._disk.put(key, features)
            beside = self._padded_to(pixels, longest)
            patches = self._patches(pixels if beside is None else beside)
            if timeline is not None:
                timeline.add("vision", f"slice {i + 1}", started, patches=patches)
            ms = (time.perf_counter() - started) * 1e3
            self.slice_ms.add(patches, ms)
            yield EncodedSlice(features, ms, False)

    def notes(self) -> list[str]:
        """What the cache on disk has to say since this was last asked."""
        return [] if self._disk is None else list(self._disk.notes())

    def knows(self, keys: Sequence[bytes]) -> bool:
        """Whether the slices with these keys need not be encoded."""
        return all(self._find(key) is not None for key in keys)

    def forget(self) -> None:
        """Let go of what is remembered; what is kept on disk stays there."""
        with self._lock:
            self._cache.clear()

    def _find(self, key: bytes) -> F32 | None:
        """What is remembered of a slice, or kept on disk."""
        features = self._recall(key)
        if features is None and self._disk is not None:
            features = self._disk.get(key)
            if features is not None:
                self._remember(key, features)
        return features

    def _longest(self, slices: Sequence[U8]) -> U8:
        return max(slices, key=self._patches, default=np.empty((0, 0, 3), np.uint8))

    def _patches(self, pixels: U8) -> int:
        return int(pixels.shape[0] * pixels.shape[1]) // self._spec.patch_size**2

    def _padded_to(self, pixels: U8, longest: U8) -> U8 | None:
        """`longest` if `pixels` must be padded to it, which changes "official" features only; else None."""
        shorter = self._patches(pixels) < self._patches(longest)
        return longest if shorter and self._spec.vision_padding == "official" else None

    def _key(self, pixels: U8, longest: int) -> bytes:
        """A hash of all that a slice's features depend on."""
        padded = self._spec.vision_padding == "official" and self._patches(pixels) < longest
        patches = longest if padded else 0
        digest = hashlib.sha256(f"{pixels.shape} {patches}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.digest()

    def _run(self, pixels: U8, longest: U8, key: bytes) -> F32:
        beside = self._padded_to(pixels, longest)
        batch = vision_feeds([pixels] if beside is None else [pixels, beside], self._spec, self._hidden_size)[0]
        feeds = {name: array[:1] for name, array in batch.feeds.items()}
        while True:
            session = self._session
            try:
                # A copy: an engine may reuse the memory of its outputs.
                features = np.array(session.run(feeds)["image_embeds"][0], np.float32)
                self._check(features, key)
                return features
            except ExecutionError as error:
                if self._replan is None:
                    raise
                self._session = self._replan(session, error)
                self.slice_ms = Curve()

    def _check(self, features: F32, key: bytes) -> None:
        """Raise ExecutionError for features that no slice has: not finite, all equal, or those of the slice before."""
        if not np.isfinite(features).all():
            raise ExecutionError("vision: the features of a slice hold NaN or infinity, expected finite numbers")
        if features.min() == features.max():
            raise ExecutionError(f"vision: all features of a slice are {features[0, 0]}, expected numbers that differ")
        last, self._last = self._last, (key, features)
        if last is not None and last[0] != key and np.array_equal(last[1], features):
            raise ExecutionError("vision: the features of a slice are those of the slice before, expected its own")

    def _recall(self, key: bytes) -> F32 | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _remember(self, key: bytes, features: F32) -> None:
        with self._lock:
            self._cache[key] = features
            while len(self._cache) > 1 and len(self._cache) * features.nbytes > CACHE_BYTES:
                self._cache.popitem(last=False)


def check_graph(graph: GraphSpec, picture: PictureSpec, hidden_size: int) -> None:
    """Raise GraphError if `graph` is not the vision graph of this model, naming every difference."""
    strip = 3 * picture.patch_size**2
    wanted = {
        "patches": strip,
        "position_ids": None,
        "attention_bias": None,
        "key_bias": None,
        "key_pos_embed": hidden_size,
    }
    found = {t.name: t for t in graph.inputs}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not known" for name in found if name not in wanted]
    for name, width in wanted.items():
        if name in found and width is not None and found[name].shape[-1] != width:
            problems.append(f"{found[name]}: expected [slices, patches, {width}]")
    made = {t.name: t for t in graph.outputs}
    shape = (picture.query_num, hidden_size)
    if "image_embeds" not in made or made["image_embeds"].shape[1:] != shape:
        problems.append(f"expected output image_embeds [slices, {shape[0]}, {shape[1]}]")
    if problems:
        raise GraphError(f"graph {graph.name} does not fit the model: " + "; ".join(problems))
