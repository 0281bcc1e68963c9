"""How finely pictures are cut so that the first token comes within a budget: fewer slices are one coarser cut, at the least
the overview alone.

The estimate is what the slices that are not remembered and the tokens that no cache holds take, from what the same graphs
took before in this load; see `costs`. Where pictures are encoded beside the prompt, or a graph must be loaded first, it does
the same. It knows nothing of what attention to a longer prompt costs, nor of what else the machine does.

Of several pictures the one with the most slices is cut more coarsely next. One whose slices are all remembered costs nothing
to see and is cut again only if the budget asks for less than its tokens take. A picture that was cut for a budget before
keeps that cut as long as its slices are remembered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lensc.backends.bundle import PictureSpec

from .decoder import pieces
from .overlap import MARKS
from .picture import PictureSlices, RGBPicture, SlicePlan, plan_slices, slice_picture
from .prefix_cache import rows_of
from .prompt import Message, Prompt, Tokenizer, build_prompt
from .sequential import Turns
from .sharing import LoadedDecoder
from .vision import U8, VisionEncoder

REMEMBERED = 256
"""Pictures whose cut is remembered."""


@dataclass(frozen=True)
class Graphs:
    """What an estimate is made of: where the time goes. `chunk`: most tokens that are fed at once, `piece`: where
    pictures are encoded beside them.
    """

    vision: VisionEncoder
    decoder: LoadedDecoder
    chunk: int
    piece: int
    overlap: bool
    turns: Turns | None = None

    @property
    def measured(self) -> bool:
        """Whether both graphs have worked since they were loaded."""
        return self.vision.slice_ms.at(1) is not None and self.decoder.prefill_ms.at(1) is not None

    @property
    def forgetful(self) -> bool:
        """Whether KV caches of earlier answers do not outlive the encoding of a slice."""
        return self.turns is not None and not self.turns.caches_outlive_decoder

    def first_token_ms(self, slices: Sequence[tuple[int, int]], tokens: int) -> float | None:
        """Of encoding `slices`, each with its first token among those that are fed and its patches, and of feeding `tokens`.

        None if nothing was measured that it could be made from.
        """
        ready, encoded_ms = [0.0], 0.0
        for _, patches in slices:
            ms = self.vision.slice_ms.at(patches)
            if ms is None:
                return None
            encoded_ms += ms
            ready.append(encoded_ms)
        beside = self.overlap and bool(slices)
        now_ms = 0.0 if beside else encoded_ms
        now_ms += self.turns.load_ms(bool(slices)) if self.turns else 0.0
        step_ms = self.decoder.pace.plain_s * 1e3  # a pass over the weights, which no piece undercuts
        for start, end in pieces(tokens, self.chunk, self.piece if beside else None):
            ms = self.decoder.prefill_ms.at(end - start)
            if ms is None:
                return None
            if beside:
                now_ms = max(now_ms, ready[sum(first < end for first, _ in slices)])
            now_ms += max(ms, step_ms)
        return now_ms


class Cuts:
    """How finely pictures were cut for a budget, by their pixels; the least recently used go first."""

    def __init__(self) -> None:
        self._chosen: OrderedDict[bytes, int] = OrderedDict()

    def get(self, digest: bytes, default: int) -> int:
        """`max_slice_nums` of the cut."""
        return self._chosen.get(digest, default)

    def put(self, digest: bytes, most: int) -> None:
        """A picture was cut so."""
        self._chosen[digest] = most
        self._chosen.move_to_end(digest)
        while len(self._chosen) > REMEMBERED:
            self._chosen.popitem(last=False)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Pictures as they are cut, what is estimated, and what was given up for it."""

    sliced: list[PictureSlices]
    estimate_ms: float | None
    slices_given_up: int
    notes: tuple[str, ...]


class Fitting:
    """The pictures of one prompt, on their way to a cut that keeps to a budget."""

    def __init__(
        self,
        spec: PictureSpec,
        tokenizer: Tokenizer,
        graphs: Graphs,
        cuts: Cuts,
        messages: Sequence[Message],
        pictures: Sequence[RGBPicture],
        started_s: float,
    ) -> None:
        """Cut `pictures` as finely as the model does, or as they were cut before if that is remembered."""
        self._spec, self._graphs, self._cuts = spec, graphs, cuts
        self._vision = vision = graphs.vision
        self._pictures = pictures
        self._started_s = started_s
        self._digests = [hashlib.sha256(repr(p.size).encode() + p.image.tobytes()).digest() for p in pictures]
        self._cut_ms = [0.0] * len(pictures)
        self._all = [self._cut_plans(picture) for picture in pictures]
        most = [cuts.get(digest, spec.max_slice_nums) for digest in self._digests]
        sliced = [self._cut(i, n) for i, n in enumerate(most)]
        keys = iter(vision.keys([pixels for s in sliced for pixels in s.pixels]))
        for i, s in enumerate(sliced):
            if not vision.knows([next(keys) for _ in s.pixels]) and most[i] < spec.max_slice_nums:
                sliced[i] = self._cut(i, spec.max_slice_nums)
        self._sliced = sliced
        self.slices: list[U8] = [pixels for s in sliced for pixels in s.pixels]
        self.prompt: Prompt = build_prompt(messages, [s.plan for s in sliced], tokenizer, spec.query_num)
        self._keys = vision.keys(self.slices)
        self._rows = rows_of(self.prompt, self._keys)

    @property
    def undecided(self) -> bool:
        """Whether there is something to decide, and nothing was measured to decide it by; never where graphs take turns,
        which a measurement would have loaded twice.
        """
        choice = any(len(plans) > 1 for plans in self._all) and not self._vision.knows(self._keys)
        return choice and not self._graphs.measured and self._graphs.turns is None

    def fit(self, budget_ms: float) -> Fitted:
        """Cut as finely as the budget allows; where none does, as what takes the least."""
        kept = [s.plan for s in self._sliced]
        chosen, estimate_ms = list(kept), self._estimate_ms(kept)
        before_ms = estimate_ms
        notes: list[str] = []
        if estimate_ms is None:
            notes.append(f"max_ttft_ms={budget_ms:g}: nothing was measured yet to estimate by, so all slices are kept")
        elif estimate_ms > budget_ms:
            chosen, estimate_ms = self._coarser(chosen, estimate_ms, budget_ms)
        sliced, given_up = list(self._sliced), 0
        for i, (plan, full) in enumerate(zip(chosen, (plans[-1][1] for plans in self._all), strict=True)):
            most = next(n for n, other in self._all[i] if other == plan)
            self._cuts.put(self._digests[i], most)
            if plan != kept[i]:
                sliced[i] = self._cut(i, most)
            count, of = len(plan.sizes), len(full.sizes)
            given_up += of - count
            if plan != full:
                why = "as before, they are remembered"
                if plan != kept[i]:
                    why = f"for max_ttft_ms: about {estimate_ms:.0f} ms of {budget_ms:g}, {before_ms:.0f} otherwise"
                notes.append(f"picture {i + 1}: {count} {_slices(count)} instead of {of}, {why}")
        if estimate_ms is not None and estimate_ms > budget_ms:
            notes.append(f"max_ttft_ms={budget_ms:g} cannot be kept: the least is about {estimate_ms:.0f} ms")
        return Fitted(sliced, estimate_ms, given_up, tuple(notes))

    def _coarser(self, plans: list[SlicePlan], best_ms: float, budget_ms: float) -> tuple[list[SlicePlan], float]:
        """The finest cuts within the budget, else those that take the least, with what they take."""
        best = list(plans)
        starts = self._first_slices()
        costs = [not self._vision.knows(self._keys[a:b]) for a, b in itertools.pairwise(starts)]
        while best_ms > budget_ms:
            open_ = [i for i, new in enumerate(costs) if new and self._next(i, best[i]) is not None]
            if not open_:
                break
            i = max(open_, key=lambda i: len(best[i].sizes))
            best[i] = self._next(i, best[i]) or best[i]
            best_ms = self._estimate_ms(best) or best_ms
        for i in (i for i, new in enumerate(costs) if not new):
            other = self._next(i, best[i])
            while best_ms > budget_ms and other is not None:
                tried = [*best[:i], other, *best[i + 1 :]]
                ms = self._estimate_ms(tried) or best_ms
                if ms <= budget_ms or (ms < best_ms and self._next(i, other) is None):
                    best, best_ms = tried, ms
                other = self._next(i, other)
        return best, best_ms

    def _estimate_ms(self, plans: Sequence[SlicePlan]) -> float | None:
        """From the call to the first token, with pictures cut so."""
        spec, vision = self._spec, self._vision
        per_slice = spec.query_num + MARKS
        longest = max((_patches(size, spec) for plan in plans for size in plan.sizes), default=0)
        keys = vision.keys(self.slices, longest) if self.slices else []
        starts, bounds = self._first_slices(), self.prompt.image_bounds[:, 0].tolist()
        reused = self._graphs.decoder.prefixes.longest(self._rows)
        shift, again_ms = 0, 0.0
        unknown: list[tuple[int, int]] = []
        for i, plan in enumerate(plans):
            first, cut = starts[i], self._sliced[i].plan
            if plan == cut:
                for j in range(first, starts[i + 1]):
                    if keys[j] != self._keys[j]:
                        reused = min(reused, bounds[j])
                    if not vision.knows([keys[j]]):
                        unknown.append((bounds[j] + shift, _patches(plan.sizes[j - first], spec)))
                continue
            reused = min(reused, bounds[first])
            again_ms += self._cut_ms[i]
            unknown += [(bounds[first] + shift + j * per_slice, _patches(s, spec)) for j, s in enumerate(plan.sizes)]
            shift += _tokens(plan, per_slice) - _tokens(cut, per_slice)
        padded = spec.vision_padding == "official"

        def not_fed(reused: int) -> list[tuple[int, int]]:
            return [(at - reused, longest if padded else n) for at, n in unknown if at + spec.query_num > reused]

        if self._graphs.forgetful and not_fed(reused):
            reused = 0
        new = not_fed(reused)
        ms = self._graphs.first_token_ms(new, len(self.prompt.ids) + shift - reused)
        return None if ms is None else ms + again_ms + (time.perf_counter() - self._started_s) * 1e3

    def _first_slices(self) -> list[int]:
        """Where the slices of each picture begin among all, and where the last ends."""
        starts = [0]
        for s in self._sliced:
            starts.append(starts[-1] + len(s.pixels))
        return starts

    def _next(self, i: int, plan: SlicePlan) -> SlicePlan | None:
        """The next coarser cut of picture i, if there is one."""
        coarser = [other for _, other in self._all[i] if len(other.sizes) < len(plan.sizes)]
        return coarser[-1] if coarser else None

    def _cut_plans(self, picture: RGBPicture) -> list[tuple[int, SlicePlan]]:
        """`max_slice_nums` and plan of each cut, the coarsest first: each has more slices than the one before."""
        found: list[tuple[int, SlicePlan]] = []
        for most in range(1, self._spec.max_slice_nums + 1):
            spec = dataclasses.replace(self._spec, max_slice_nums=most)
            plan = plan_slices(*picture.size, spec, picture.name)
            if not found or len(plan.sizes) > len(found[-1][1].sizes):
                found.append((most, plan))
        full = plan_slices(*picture.size, self._spec, picture.name)
        return [(most, plan) for most, plan in found if len(plan.sizes) < len(full.sizes)] + [
            (self._spec.max_slice_nums, full)
        ]

    def _cut(self, i: int, most: int) -> PictureSlices:
        started_s = time.perf_counter()
        sliced = slice_picture(self._pictures[i], dataclasses.replace(self._spec, max_slice_nums=most))
        self._cut_ms[i] = (time.perf_counter() - started_s) * 1e3
        return sliced


def _patches(size: tuple[int, int], spec: PictureSpec) -> int:
    return (size[0] // spec.patch_size) * (size[1] // spec.patch_size)


def _tokens(plan: SlicePlan, per_slice: int) -> int:
    """Of a picture in the prompt: its slices, and where it is cut, two marks and the ends of all rows but one."""
    return len(plan.sizes) * per_slice + (0 if plan.grid is None else MARKS + plan.grid[1] - 1)


def _slices(count: int) -> str:
    return "slice" if count == 1 else "slices"
