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
        self._answer = answer
        self._pieces = self._run()
        self._cancelled = False
        self._result: Result | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """End the answer after the step in progress. Safe to call from another thread."""
        self._cancelled = True
        self._generation.cancel()

    @property
    def result(self) -> Result:
        """The whole answer, once the last piece was read or the stream was cancelled. Raises UsageError before."""
        if self._result is None and self._cancelled:
            for _ in self._pieces:
                pass
        if self._result is None:
            raise UsageError(
                "the stream has not ended: read it to its end, or cancel() it, before asking for its result"
            )
        return self._result

    def _run(self) -> Iterator[str]:
        text = ""
        for token in self._generation.tokens():
            piece = self._answer.push(token)
            if piece:
                text += piece
                yield piece
        piece = self._answer.finish()
        self._result = self._generation.result(text + piece)
        if piece:
            yield piece
