"""An answer in pieces, as it is made."""

from __future__ import annotations

from collections.abc import Iterator

from lensc.backends.errors import UsageError

from .generation import Generation
from .prompt import AnswerStream
from .result import Result


class Stream(Iterator[str]):
    """Iterate to get the answer piece by piece; no piece splits a character, and joined they are `result.text`.

    Nothing is computed ahead: the pictures are encoded and the prompt is fed when the first piece is asked for.
    """

    def __init__(self, generation: Generation, answer: AnswerStream) -> None:
        self._generation = generation
        self._results: list[Result] = []
        # The pieces know nothing of the stream: one that is dropped halfway frees its KV cache at once, which a circle of
        # references would hold until the collector comes by.
        self._pieces = _pieces(generation, answer, self._results)
        self._cancelled = False

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """End the answer after the step in progress. Safe to call from another thread."""
        self._cancelled = True
        self._generation.cancel()

    @property
    def result(self) -> Result:
        """The whole answer, once the last piece was read or the stream was cancelled. Raises UsageError before."""
        if not self._results and self._cancelled:
            for _ in self._pieces:
                pass
        if not self._results:
            raise UsageError(
                "the stream has not ended: read it to its end, or cancel() it, before asking for its result"
            )
        return self._results[0]


def _pieces(generation: Generation, answer: AnswerStream, results: list[Result]) -> Iterator[str]:
    """The answer piece by piece; its result goes into `results`, before the last piece."""
    text = ""
    for token in generation.tokens():
        piece = answer.push(token)
        if piece:
            text += piece
            yield piece
    piece = answer.finish()
    results.append(generation.result(text + piece))
    if piece:
        yield piece
