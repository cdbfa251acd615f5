"""A JSON document too large for memory, value by value."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator

_CHUNK = 1 << 20
# An error this close to the end of the text in memory may only mean that the rest is not read yet.
_CUT_MARGIN = 64
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
# The fields that hold the turns of one record, in a file of one record.
_TURNS = ("conversations", "messages")
_ROWS = re.compile(r"\[[ \t\n\r]*\{")


class JsonText:
    """Pulls one value after the other out of a JSON document, holding little more than the value at hand.

    Used in place of `ijson`, whose C backend turns a lone surrogate into "?" and stops at NaN and Infinity.
    Bytes that are no UTF-8 are carried through as surrogates, so that one bad record does not end the file.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._at, self._ended = "", 0, False

    def rows(self) -> Iterator[tuple[object, bool]]:
        """Each record with whether its bytes are UTF-8. Raises `ValueError` where the document is broken."""
        yield from self._array() if self._peek() == "[" else self._object()
        if self._peek():
            raise ValueError("more text follows the end of the document")

    def _array(self) -> Iterator[tuple[object, bool]]:
        self._take("[")
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._take(",")
                yield self._value()
        self._take("]")

    def _object(self) -> Iterator[tuple[object, bool]]:
        record: dict[str, object] = {}
        all_utf8, rows_key = True, None
        self._take("{")
        while self._peek() != "}":
            if record or rows_key is not None:
                self._take(",")
            key = self._key()
            if key not in _TURNS and self._starts_rows():
                if rows_key is not None:
                    raise ValueError(f"'{rows_key}' and '{key}' are both lists of objects, only one can hold the rows")
                rows_key = key
                yield from self._array()
            else:
                record[key], is_utf8 = self._value()
                all_utf8 = all_utf8 and is_utf8
        self._take("}")
        if rows_key is None:
            yield record, all_utf8

    def _key(self) -> str:
        key, _ = self._value()
        if not isinstance(key, str):
            raise ValueError(f"{key!r} stands where the name of a field is expected")
        self._take(":")
        return key

    def _starts_rows(self) -> bool:
        self._peek()
        while len(self._text) - self._at < _CUT_MARGIN and self._fill():
            pass
        return _ROWS.match(self._text, self._at) is not None

    def _value(self) -> tuple[object, bool]:
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CUT_MARGIN
                if cut and self._fill():
                    continue
                self._at = min(error.pos, len(self._text))
                raise ValueError(f"{error.msg} at {self._here()}") from None
            # A number that touches the end of the text in memory may go on in the file.
            if isinstance(value, int | float) and end > len(self._text) - _CUT_MARGIN and self._fill():
                continue
            is_utf8 = is_utf8_text(self._text[self._at : end])
            self._at = end
            return value, is_utf8

    def _take(self, char: str) -> None:
        if self._peek() != char:
            raise ValueError(f"expected '{char}' at {self._here()}")
        self._at += 1

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _fill(self) -> bool:
        """Read on; at least as much again as is held, so that a long record is not parsed many times."""
        if self._ended:
            return False
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not data
        self._text = self._text[self._at :] + self._decode(data, self._ended)
        self._at = 0
        return True

    def _here(self) -> str:
        return repr(self._text[self._at : self._at + 40]) if self._at < len(self._text) else "the end of the file"


def is_utf8_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
