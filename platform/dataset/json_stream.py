"""JSON that is read piece by piece: the members of an object, and the items of one of its lists."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

PIECE_CHARACTERS, MOST_VALUE_CHARACTERS = 1 << 20, 1 << 27
SPACES = " \t\r\n"


class JsonStream:
    """A JSON text in a file, of which only a piece is in memory. Methods raise ValueError if it is damaged.

    Args:
        file: a file in UTF-8, 16 or 32.
    """

    def __init__(self, file: BinaryIO) -> None:
        head = file.read(4)
        decoder = codecs.getincrementaldecoder(json.detect_encoding(head))()
        self._file, self._decode = file, decoder.decode
        self._text, self._position, self._is_read = self._decode(head), 0, False
        self._json = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            while self._position < len(self._text):
                if self._text[self._position] not in SPACES:
                    return self._text[self._position]
                self._position += 1
            if not self._grow():
                return ""

    def skip(self, wanted: str) -> str:
        """Skip the next character, which must be one of some; returns it."""
        found = self.next_character()
        if not found or found not in wanted:
            raise ValueError(f"found {found!r} where {' or '.join(wanted)} is expected")
        self._position += 1
        return found

    def value(self) -> Any:
        """The next value, whole."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
                if end < len(self._text) or self._is_read:  # a number could go on in the next piece
                    self._position = end
                    return value
            except json.JSONDecodeError:
                if self._is_read:
                    raise
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            if len(self._text) - self._position > MOST_VALUE_CHARACTERS:
                raise ValueError(f"it has a value of more than {MOST_VALUE_CHARACTERS:,} characters")
            self._grow()

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next. After each one, the value must be taken."""
        self.skip("{")
        if self.next_character() == "}":
            self.skip("}")
            return
        while True:
            key = self.value()
            self.skip(":")
            yield key
            if self.skip(",}") == "}":
                return

    def items(self) -> Iterator[Any]:
        """The items of a list, or the pairs of an object, which comes next."""
        is_list = self.skip("[{") == "["
        close = "]" if is_list else "}"
        if self.next_character() == close:
            self._position += 1
            return
        while True:
            first = self.value()
            if is_list:
                yield first
            else:
                self.skip(":")
                yield first, self.value()
            if self.skip("," + close) == close:
                return

    def _grow(self) -> bool:
        """Read the next piece. Returns False at the end of the file."""
        if self._is_read:
            return False
        content = self._file.read(PIECE_CHARACTERS)
        self._is_read = not content
        self._text = self._text[self._position :] + self._decode(content, not content)
        self._position = 0
        return True
