"""The context: how many tokens prompt and answer may have together, and what becomes of a conversation that has more.

A prompt that does not fit is refused, and an answer that reaches the end is cut off there, with a note. A conversation may
ask for its oldest turns to be dropped (`when_full="drop_oldest"`): whole turns, with their pictures, never the system
message and never the last question, and with a note each time. How many go depends on the messages alone: as many tokens
as it takes, rounded up to a quarter of the room, so that the next turns drop the same ones and what is left is still in the
KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lensc.backends.bundle import DecoderSpec, ModelSpec
from lensc.backends.errors import PromptError, UsageError
from lensc.export.graph import GraphSpec

from .options import GenerationOptions
from .prompt import Message, Prompt, pictures_of

WHEN_FULL = ("error", "drop_oldest")

ANSWER_SHARE = 8
"""A conversation is cut so that max_new_tokens have room, or this part of the context, if that is less."""
STEP_SHARE = 4


@dataclass(frozen=True)
class Context:
    """`tokens` that prompt and answer may have: the model's context, or the smaller one that a decoder was compiled for."""

    tokens: int
    of_model: int

    @classmethod
    def of(cls, graph: GraphSpec, decoder: DecoderSpec) -> Context:
        """That of a decoder."""
        past = graph.dims.get("past")
        most = decoder.context_length if past is None else min(decoder.context_length, past.max)
        return cls(most, decoder.context_length)

    def __str__(self) -> str:
        owner = "the model" if self.tokens == self.of_model else "this decoder"
        return f"{owner}'s context is {self.tokens}"

    def check_fits(self, prompt: Prompt, spec: ModelSpec, messages: Sequence[Message] = ()) -> None:
        """Raise PromptError unless `prompt`, which `messages` became, and a token of answer fit."""
        tokens, slices = len(prompt.ids), len(prompt.image_bounds)
        if tokens < self.tokens:
            return
        ways = ["shorten the text"]
        ways += ["use fewer or smaller pictures"] if slices else []
        ways += ["leave out early turns"] if len(_turns(messages)) > 1 else []
        if self.tokens < self.of_model:
            ways.append(f"compile the decoder again with a larger --context (the model's is {self.of_model})")
        held = f" ({slices} slices of {spec.picture.query_num} among them)" if slices else ""
        raise PromptError(
            f"the prompt has {tokens} tokens{held}, {self.tokens - 1} fit: {self} and the answer needs at least 1; "
            f"{', '.join(ways[:-1])}{' or ' if ways[1:] else ''}{ways[-1]}"
        )

    def limit(self, options: GenerationOptions, prompt_tokens: int) -> tuple[int, str]:
        """The most tokens that an answer can have, and what is said of one that has as many and did not end by itself."""
        room = self.tokens - prompt_tokens
        if options.max_new_tokens <= room:
            cause = f"max_new_tokens is {options.max_new_tokens}"
        else:
            cause = f"{self}, {prompt_tokens} of that are the prompt's"
        most = min(options.max_new_tokens, room)
        return most, f"the answer was cut off after {most} {'token' if most == 1 else 'tokens'}: {cause}"

    def kept(
        self, messages: Sequence[Message], prompt: Prompt, start_header: int, max_new_tokens: int
    ) -> tuple[list[Message], str | None]:
        """`messages`, which became `prompt`, without the oldest turns where they are too many, and a note that says so."""
        answer = min(max_new_tokens, self.tokens // ANSWER_SHARE)
        room = self.tokens - answer
        turns = _turns(messages)
        starts = np.flatnonzero(prompt.ids == start_header)  # of every message: no text can imitate a special token
        gone = [int(starts[turn] - starts[turns[0]]) for turn in turns]
        excess = len(prompt.ids) - room
        if excess <= 0 or len(turns) < 2:
            return list(messages), None
        step = max(1, room // STEP_SHARE)
        least = -(-excess // step) * step
        enough = [i for wanted in (least, excess) for i, tokens in enumerate(gone) if tokens >= wanted]
        i = enough[0] if enough else len(turns) - 1
        dropped = messages[turns[0] : turns[i]]
        pictures = len(pictures_of(dropped))
        what = f"the oldest {i} turns of the conversation were" if i > 1 else "the oldest turn of the conversation was"
        held = f" with {pictures} {'picture' if pictures == 1 else 'pictures'}" if pictures else ""
        note = f"{what} left out, {gone[i]} tokens{held}: the whole has {len(prompt.ids)}, {self} and {answer} are kept for the answer"
        return [*messages[: turns[0]], *messages[turns[i] :]], note


def check_policy(when_full: str) -> None:
    """Raise UsageError for a policy that there is not."""
    if when_full not in WHEN_FULL:
        raise UsageError(f"when_full={when_full!r}: expected {' or '.join(WHEN_FULL)}")


def _turns(messages: Sequence[Message]) -> list[int]:
    """Where the turns begin: with what a user says after somebody else."""
    roles = [message.role for message in messages]
    return [i for i, role in enumerate(roles) if role == "user" and (i == 0 or roles[i - 1] != "user")]
