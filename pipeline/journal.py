"""What a stage has worked out and not yet written: lines in a file, for the try after a crash to go on from.

    9f2c04d1a7b35e60 {"prompt_id": "a", ...}       hash of the rest of the line and of `under`, then JSON

Lines are only ever added. One that was cut off, damaged, or written `under` something else does not have its hash, and
is passed over. JSON writes a float so that it is read back exactly.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic_core import PydanticSerializationError, to_json

DIGITS = 16
"""Hex digits of a line's hash."""

NOWHERE = Path(os.devnull)
"""The path of a journal that keeps nothing."""


class Journal:
    """A file of JSON values that tries at the same computation share, one after the other.

    A line is handed to the operating system as it is added (microseconds), so a process that is killed loses none; a
    machine that goes down loses those of its last seconds.
    """

    def __init__(self, path: Path, under: Mapping[str, str] | None = None) -> None:
        self.path = path
        named = json.dumps(dict(under or {}), sort_keys=True).encode()
        self._key = hashlib.blake2b(named, digest_size=32).digest()
        self._file = path.open("ab")
        if not _ends_with_a_line(path):
            self._file.write(b"\n")  # or the next line would be lost with the one that was cut off

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def entries(self) -> Iterator[Any]:
        """What is there, in the order in which it was added."""
        with self.path.open("rb") as lines:
            for line in lines:
                hashed, _, text = line.rstrip(b"\n").partition(b" ")
                if hashed == self._hash(text):
                    yield json.loads(text)

    def add(self, entry: Any) -> None:
        """Keep a value that JSON can hold."""
        try:
            text = to_json(entry)  # eight times as fast on numbers
        except PydanticSerializationError:  # half a surrogate pair: no UTF-8, but JSON has a way to write it
            text = json.dumps(entry, separators=(",", ":")).encode()
        self._file.write(self._hash(text) + b" " + text + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Add nothing more; the file stays."""
        self._file.close()

    def _hash(self, text: bytes) -> bytes:
        return hashlib.blake2b(text, key=self._key, digest_size=DIGITS // 2).hexdigest().encode()


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 1))
        return stream.read() in (b"", b"\n")
