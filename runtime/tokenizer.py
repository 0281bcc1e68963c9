"""Text to token ids and back, on the `tokenizers` library.

Two things are special about this model's tokenizer:

- `!` is id 0 and the padding token, so it is a special token although tokenizer.json does not list it among the added
  tokens: it splits the text before BPE and always becomes id 0 ("Wow!! Nice!\\n" has no merged "!\\n").
- No BOS is added: the only one comes from the chat template.

`encode` treats the spelling of a special token (`<image>`, `<|eot_id|>`) as plain text, so that what a user types can
never act as a placeholder. `encode_special` does what the official tokenizer does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from lensc.backends.errors import PromptError, TokenizerError

PAD = "!"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that the template, the placeholders and the end of an answer are made of."""

    bos: int
    eos: int
    unk: int
    """Stands for one query of a slice; its embedding is overwritten by the picture's."""
    start_header: int
    end_header: int
    eot: int
    image_start: int
    image_end: int
    slice_start: int
    slice_end: int
    pad: int


_SPELLING = {
    "bos": "<|begin_of_text|>",
    "eos": "<|end_of_text|>",
    "unk": "<unk>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
    "image_start": "<image>",
    "image_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "pad": PAD,
}
assert list(_SPELLING) == [f.name for f in fields(SpecialIds)]

_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""In this order, each over the whole text: what `clean_up_tokenization_spaces` does."""

_UNSETTLED = re.compile(r" [ 'nvr]*\Z")
"""An end of text that clean-up may still change. Every pattern of _CLEAN_UP begins with a space, and ` 'nvr` are all
the characters it can have before its last; so no match can span a point that is followed by the first space after any
other character. [ 'nvr]* is needed in full, as one replacement can complete another (" n ' t" becomes "n't")."""


class Tokenizer:
    """A tokenizer.json together with this model's rules. Immutable once made; may be shared between threads."""

    def __init__(self, tokenizer: FastTokenizer, name: str = "tokenizer.json") -> None:
        """Take over `tokenizer` (its padding, truncation and special-token settings are changed).

        Raises TokenizerError that lists everything the model needs and `tokenizer` lacks.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # in BPE's eyes a special token's spelling is text
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        pad = tokenizer.token_to_id(PAD)
        if pad is not None:
            special[PAD] = pad
        missing = [text for text in _SPELLING.values() if text not in special]
        problems = [f"no special token {', '.join(missing)}"] if missing else []
        stripping = [t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word]
        if stripping:
            problems.append(f"lstrip, rstrip and single_word are not supported: {', '.join(stripping)}")
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            problems.append(f"decoder {type(tokenizer.decoder).__name__}; expected ByteLevel")
        if problems:
            raise TokenizerError(f"{name}: {'; '.join(problems)}; take it from a MiniCPM-Llama3-V 2.5 checkpoint")
        self._tokenizer = tokenizer
        self._special = special
        # Longest first: of two that begin at the same place the longer one wins, as in the tokenizers library.
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._bytes: dict[int, bytes] = {}
        self.name = name
        self.special = SpecialIds(**{field: special[text] for field, text in _SPELLING.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises TokenizerError if it is missing, damaged or not this model's."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TokenizerError(f"{path}: cannot be read ({reason}); expected a tokenizer.json") from error
        try:
            tokenizer = FastTokenizer.from_str(text)
            tokenizer.encode("Wow, 2 pictures\n", add_special_tokens=False)  # some damage shows only here
        except BaseException as error:
            # The library raises bare Exception, and for some damage its Rust code panics, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TokenizerError(f"{path}: is not a tokenizer.json ({reason}); copy it again") from error
        return cls(tokenizer, str(path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: `!` becomes id 0, the spelling of any other special token is ordinary text."""
        segments = _encodable(text).split(PAD)
        ids = self._bpe(segments[0])
        for segment in segments[1:]:
            ids.append(self.special.pad)
            ids += self._bpe(segment)
        return ids

    def encode_special(self, text: str) -> list[int]:
        """Ids as the official tokenizer gives them: the spelling of a special token becomes that token."""
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(_encodable(text)):
            ids += self._bpe(text[end : match.start()])
            ids.append(self._special[match[0]])
            end = match.end()
        return ids + self._bpe(text[end:])

    def decode(self, ids: Iterable[int], clean_up: bool = True) -> str:
        """Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD.

        `clean_up` removes the space before punctuation and contractions, as the official tokenizer's configuration
        asks for. Raises TokenizerError for an id that the tokenizer does not have.
        """
        text = b"".join(map(self._token_bytes, ids)).decode("utf-8", errors="replace")
        return _clean_up(text) if clean_up else text

    def decode_answer(self, ids: Sequence[int], strip_pad: bool = True) -> str:
        """The answer in generated `ids`, as the official chat returns it.

        Drops all ids 0 (`strip_pad`; every lone `!` goes with them), a leading BOS and one trailing eos or eot, then
        decodes with clean-up and strips white space at both ends.
        """
        kept = [i for i in ids if i != self.special.pad] if strip_pad else list(ids)
        if kept and kept[0] == self.special.bos:
            kept = kept[1:]
        if kept and kept[-1] in (self.special.eos, self.special.eot):
            kept = kept[:-1]
        return self.decode(kept).strip()

    def decode_stream(self, strip_pad: bool = False) -> AnswerStream:
        """A decoder that takes ids one by one; by default it keeps `!`, as the official stream does."""
        return AnswerStream(self, strip_pad)

    def _bpe(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _token_bytes(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            text = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
            if text is None:
                raise TokenizerError(f"{self.name}: has no token {token}; use the tokenizer.json of this model")
            try:
                known = bytes(map(_BYTE_OF.__getitem__, text))
            except KeyError:  # an added token is spelled in plain text
                known = text.encode()
            self._bytes[token] = known
        return known


class AnswerStream:
    """Decodes an answer id by id.

    For any ids, all pieces of `push` and the one of `finish` joined equal `decode_answer(ids, strip_pad)`. So a piece
    never splits a character; it is held back while what follows may change it: the first bytes of a character, white
    space that may turn out to be the last, a space that clean-up may remove (until the word after it is clear), and a
    stop token.
    """

    def __init__(self, tokenizer: Tokenizer, strip_pad: bool) -> None:
        self._tokenizer = tokenizer
        self._strip_pad = strip_pad
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._raw = ""  # decoded, but clean-up may still change it
        self._space = ""  # clean white space, which is dropped if it is the last
        self._stop: int | None = None
        self._seen_id = self._seen_text = False

    def push(self, token: int) -> str:
        """Take the next id and return the text that is certain by now, often "" and sometimes several words."""
        special = self._tokenizer.special
        if self._strip_pad and token == special.pad:
            return ""
        held, self._stop = self._stop, None
        first, self._seen_id = not self._seen_id, True
        if first and token == special.bos:
            return ""
        data = b"" if held is None else self._tokenizer._token_bytes(held)
        if token in (special.eos, special.eot):
            self._stop = token
        else:
            data += self._tokenizer._token_bytes(token)
        self._raw += self._utf8.decode(data)
        unsettled = _UNSETTLED.search(self._raw)
        settled = unsettled.start() if unsettled else len(self._raw)
        text, self._raw = self._raw[:settled], self._raw[settled:]
        return self._emit(_clean_up(text))

    def finish(self) -> str:
        """Return what was held back. Call it once, after the last id."""
        text, self._raw = self._raw + self._utf8.decode(b"", final=True), ""
        return self._emit(_clean_up(text))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """All non-empty pieces of `ids`, to the end."""
        for token in ids:
            if piece := self.push(token):
                yield piece
        if piece := self.finish():
            yield piece

    def _emit(self, text: str) -> str:
        text = self._space + text
        if not self._seen_text:
            text = text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self._seen_text = self._seen_text or bool(piece)
        return piece


def _clean_up(text: str) -> str:
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"text: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), not a character; "
            "decode the text as UTF-8 first"
        ) from error
    return text


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes in order for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()
