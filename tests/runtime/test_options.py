"""Parameters of a generation: defaults of the three modes, and a message for everything that cannot be meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lensc.backends.bundle import GenerationSpec
from lensc.backends.errors import UsageError
from lensc.runtime.options import resolve

SPEC = GenerationSpec(eos_token_ids=(1, 2))


def test_nothing_given_is_greedy_without_penalty() -> None:
    options = resolve(SPEC)
    assert (options.do_sample, options.num_beams, options.repetition_penalty) == (False, 1, 1.0)
    assert options.max_new_tokens == 1024


def test_sampling_takes_the_official_values() -> None:
    options = resolve(SPEC, do_sample=True)
    values = (options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.num_beams)
    assert values == (0.7, 100, 0.8, 1.05, 1)


def test_beams_take_the_official_penalty_only() -> None:
    options = resolve(SPEC, num_beams=3)
    assert (options.do_sample, options.num_beams, options.repetition_penalty) == (False, 3, 1.2)


def test_given_values_win() -> None:
    options = resolve(
        SPEC,
        do_sample=True,
        temperature=1,
        top_k=np.int64(0),
        top_p=np.float32(1),
        repetition_penalty=1.3,
        max_new_tokens=5,
        seed=0,
    )
    assert (options.temperature, options.top_k, options.top_p, options.repetition_penalty) == (1.0, 0, 1.0, 1.3)
    assert (options.max_new_tokens, options.seed) == (5, 0)
    assert resolve(SPEC, num_beams=2, repetition_penalty=1.0).repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: expected a number above 0"),
        ({"temperature": 0}, "leave do_sample out"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0}, "top_p=0: expected a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1: expected an integer of at least 0"),
        ({"top_k": 3.5}, "top_k=3.5"),
        ({"num_beams": 0}, "num_beams=0: expected an integer from 1 to 64"),
        ({"num_beams": 65}, "num_beams=65"),
        ({"num_beams": True}, "num_beams=True"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: expected a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer of at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"do_sample": "yes"}, "do_sample='yes': expected True or False"),
        ({"do_sample": True, "num_beams": 2}, "choose one"),
        ({"stream": True, "num_beams": 2}, "stream=True with num_beams=2"),
        ({"temperature": 0.5}, "no effect without do_sample=True"),
        ({"top_k": 5, "do_sample": False}, "top_k=5 has no effect"),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_nonsense_is_refused_by_name_and_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(SPEC, **arguments)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"num_beams=0.*top_p=2.*max_new_tokens=-1"):
        resolve(SPEC, num_beams=0, top_p=2, max_new_tokens=-1)
