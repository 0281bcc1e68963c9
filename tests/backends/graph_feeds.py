"""Random feeds of the exported graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lensc.backends.base import Array
from lensc.export.graph import GraphSpec

Calls = Mapping[str, Sequence[tuple[int, ...]]]
"""By graph: (slices, patches) of each call of `vision`, (batch, tokens, past) of each of `decoder`."""


def feeds_of(spec: GraphSpec, calls: Calls) -> Iterator[dict[str, Array]]:
    """Slices of which some keys are hidden; prompts and tokens, with and without a past."""
    generator = np.random.default_rng(0)
    for call in calls[spec.name]:
        names = ("slices", "patches") if spec.name == "vision" else ("batch", "tokens", "past")
        sizes = {**dict(zip(names, call, strict=True)), "rows": 2}
        feeds: dict[str, Array] = {
            t.name: generator.standard_normal([d if isinstance(d, int) else sizes[d] for d in t.shape], np.float32)
            for t in spec.inputs
            if t.dtype == "float32"
        }
        if spec.name == "vision":
            for name in ("attention_bias", "key_bias"):
                feeds[name][:] = 0
                feeds[name][-1, 5:] = -10000
            feeds["position_ids"] = generator.integers(0, 4900, call)
        else:
            feeds["position_ids"] = np.arange(sizes["past"], sizes["past"] + sizes["tokens"])
            feeds["logit_positions"] = np.array([sizes["tokens"] - 1, 0])
        yield feeds
