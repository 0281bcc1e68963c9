"""Tokens that are guessed before they are chosen: several go through the decoder at once, in the time of little more than one.

A guess is what followed the last two or three tokens where they stood before, in the prompt or in the answer: documents
repeat themselves (prompt lookup decoding). The decoder is fed the guesses behind the last token and gives the logits of every
position; tokens are then chosen one after another from these, just as they would be without guesses, with the same random
numbers, until one differs from the guess. What was fed behind it is taken back. So nothing but the speed depends on guesses.

Whether guessing pays is measured: what a step of several tokens takes beside one of one token, on this engine, and how
often guesses of a kind were right. Where it does not pay no guess is fed; a guess that fails costs time, and an answer may
lose LOSS of its time in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_DRAFTED = 7
SIZES = (2, 4, 8)
"""Tokens of a step with guesses. Few sizes, because engines prepare for each."""

LOSS, SHORT_LOSS, LIKELY_LOSS = 0.015, 0.005, 0.02
"""The share of an answer's decoding time that failed guesses may take: where steps are long, where they are short, which pay for
thoughts and cold caches besides, and until a likely guess is not fed any more."""
GAIN = 1.05
"""How many times faster a step must be expected to be."""
LEAST_CHANCE = 0.25
"""That a guess is right; below, it is not worth a thought, which takes its time, too."""
FORGET, RECONSIDER = 0.999, 16
"""What is left, after each thought, of the time that a size is believed to take which did not pay; and after how many tokens a
chance is thought about again at which none did: a thought takes as long as all else, which a step of 0.5 ms would notice."""
SHORT_S, PATIENCE, AT_ONCE = 0.01, 16, 4
"""Steps shorter than this notice thoughts. Once PATIENCE tokens have passed since a guess was right, tokens are thought about
AT_ONCE: that takes half the time of one by one, since each thought finds the processor's caches as a step has left them."""
LIKELY = 0.8
"""A guess as likely as this is always worth a thought, and more of a loss: what repeats itself should be seen at once."""
PLACEHOLDER = -1
"""In place of a token that nobody says: a row of a picture."""

ID_BITS = 24
"""More than the ids of any vocabulary have."""
TRIPLE = 1 << 3 * ID_BITS
"""Tells three tokens from two."""

FIRST_GUESS = {(2, 0): 0.3, (2, 1): 0.6, (2, 3): 0.8, (3, 0): 0.5, (3, 1): 0.7, (3, 3): 0.85}
"""How likely a guess is right before any was seen: by the tokens it follows, and how many in a row were right before it."""


@dataclass
class Pace:
    """What was learnt while a model answered: it holds for the next answers, too.

    Several threads may share it: what they overwrite of each other is one measurement of many.
    """

    plain_s: float = 0.0
    """Of a step with one token; 0 until it was measured."""
    ratios: dict[int, float] = field(default_factory=dict)
    """Time of a step of so many tokens beside `plain_s`."""
    right: dict[tuple[int, int], float] = field(default_factory=lambda: dict(FIRST_GUESS))
    """How often the guesses of a kind are right."""
    _begun: set[int] = field(default_factory=set)
    _hopeless: float = 0.0
    """At a chance as low as this no size pays, as far as is known."""
    _passed: int = 0
    """How often that was taken for granted."""

    def measured(self, tokens: int, seconds: float) -> None:
        """A step took so long. The first of a size does not count: engines prepare for it."""
        if tokens not in self._begun:
            self._begun.add(tokens)
        elif tokens == 1:
            # one that was interrupted by something else says nothing of the next
            seconds = min(seconds, 2 * self.plain_s) if self.plain_s else seconds
            self.plain_s += (seconds - self.plain_s) * (0.1 if self.plain_s else 1.0)
        elif self.plain_s:
            before = self.ratios.get(tokens)
            ratio = seconds / self.plain_s
            self._hopeless = 0.0
            self.ratios[tokens] = ratio if before is None else before + 0.2 * (min(ratio, 2 * before) - before)

    def ratio(self, tokens: int) -> float:
        """Of a step of so many tokens; a size that was not measured is taken to cost more than the next smaller one."""
        known = self.ratios.get(tokens)
        if known is not None:
            return known
        smaller = max((n for n in self.ratios if n < tokens), default=1)
        return self.ratios.get(smaller, 1.0) + (0.25 if smaller > 1 else 0.5) * (tokens - smaller)

    def best_size(self, chance: float, most: int, may_lose_s: float) -> int:
        """Tokens of the next step, guesses included: 1 if no guess pays. `chance`: that a guess is right.

        A step of n brings 1 + chance + … + chance^(n - 1) tokens.
        """
        if not self.plain_s:
            return 1
        forget = FORGET
        if chance <= self._hopeless:
            self._passed += 1
            if self._passed % RECONSIDER:
                return 1
            forget = FORGET**RECONSIDER
        best, size, pays = GAIN, 1, False
        for n in SIZES:
            if n > most:
                break
            ratio = self.ratio(n)
            brings = (1 - chance**n) / (1 - chance) if chance < 1 else n
            pays |= brings / ratio > GAIN
            if brings / ratio > best and (ratio - 1) * self.plain_s <= may_lose_s:
                best, size = brings / ratio, n
            elif n in self.ratios:
                self.ratios[n] = ratio * forget  # so that it is tried again some day
        if not pays and most >= SIZES[-1] and chance < LIKELY:
            self._hopeless = max(self._hopeless, chance)
        return size


class Speculation:
    """The guesses of one answer. `prompt`: its ids, with PLACEHOLDER where a picture is."""

    def __init__(self, pace: Pace, prompt: Sequence[int], most_drafted: int) -> None:
        self._pace = pace
        self._most = 1 + most_drafted
        self._ids: list[int] = []
        self._ends: dict[int, int] = {}
        """Where the last occurrence of two or three tokens ends, by their ids in one number."""
        self._pair = PLACEHOLDER
        """The last two tokens, or PLACEHOLDER if one of them is."""
        self._match: int | None = None
        self._order = 0
        self._streak = 0
        self._guessed: tuple[int, float] | None = None
        """Tokens and time of the last step, if some of them were guesses."""
        self._spent_s = 0.0
        self._lost_s = 0.0
        self._pending: list[int] = []
        """Tokens that were chosen and not thought about."""
        self._passed = 0
        """Tokens since a guess was right."""
        for token in prompt:
            self._append(token)

    def push(self, token: int) -> None:
        """A token was chosen."""
        self._pending.append(token)

    def draft(self, most: int) -> list[int]:
        """The guesses to be fed behind the token that was pushed last: at most `most`, none if it does not pay."""
        if self._is_short() and self._passed >= PATIENCE and len(self._pending) < AT_ONCE:
            return []
        for token in self._pending:
            self._think(token)
        self._pending.clear()
        self._passed += 1
        return self._guess(most)

    def _think(self, token: int) -> None:
        """See whether it is the one that would have been guessed, and what followed it before."""
        if self._match is not None:
            right = self._ids[self._match] == token
            kind = self._kind()
            rates = self._pace.right
            rates[kind] += 0.1 * (right - rates[kind])
            self._streak = self._streak + 1 if right else 0
        self._append(token)

    def _guess(self, most: int) -> list[int]:
        if self._match is None:
            return []
        chance = self._pace.right[self._kind()]
        if chance < LEAST_CHANCE:
            return []
        loss = LIKELY_LOSS if chance >= LIKELY else SHORT_LOSS if self._is_short() else LOSS
        may_lose_s = loss * self._spent_s - self._lost_s
        size = self._pace.best_size(chance, min(self._most, 1 + most), may_lose_s)
        drafted: list[int] = []
        for i in range(self._match, self._match + size - 1):
            # a repetition that has just begun goes on
            token = self._ids[i] if i < len(self._ids) else drafted[i - len(self._ids)]
            if token == PLACEHOLDER:
                break
            drafted.append(token)
        return drafted

    def stepped(self, fed: int, brought: int, seconds: float) -> None:
        """A step of `fed` tokens brought `brought` and took so long, with taking back what was wrong.

        What a step with guesses costs the step behind it, whose engine may have to prepare for one token again, is its own.
        """
        pace = self._pace
        self._spent_s += seconds
        guessed, self._guessed = self._guessed, None
        if guessed is not None:
            late_s = max(0.0, seconds - pace.plain_s) if fed == 1 else 0.0
            self._lost_s += late_s
            pace.measured(guessed[0], guessed[1] + late_s)
        if brought > 1:
            self._passed = 0
        if fed > 1:
            self._lost_s += seconds - brought * pace.plain_s
            self._guessed = fed, seconds
        elif guessed is None:
            pace.measured(1, seconds)

    def _is_short(self) -> bool:
        return self._pace.plain_s < SHORT_S

    def _kind(self) -> tuple[int, int]:
        return self._order, 3 if self._streak >= 3 else min(self._streak, 1)

    def _append(self, token: int) -> None:
        """Look up where the last tokens stood before, and remember where they stand now."""
        ids, before, pair = self._ids, self._pair, PLACEHOLDER
        match = None
        if ids and token >= 0 and ids[-1] >= 0:
            ends, end = self._ends, len(ids) + 1
            pair = ids[-1] << ID_BITS | token
            match, ends[pair] = ends.get(pair), end
            if match is not None:
                self._order = 2
            if before >= 0:
                triple = TRIPLE | before << ID_BITS | token
                longer, ends[triple] = ends.get(triple), end
                if longer is not None:
                    match, self._order = longer, 3
        ids.append(token)
        self._pair, self._match = pair, match
