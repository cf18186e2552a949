"""String equality after the last final-answer mark."""

import re
from functools import lru_cache
from typing import ClassVar

MARK = re.compile(r";|####|\b[Aa]nswer:|\bANSWER:|\bA:")
"""What announces an answer: `37+85=122,122+6=128;128`, `#### 128`, `Answer: 128`, `A: 128`."""


class ExactGrader:
    """The answer is what follows the last mark, or the whole text where there is no mark; stripped of white space.

    The reference is read by the same rule. Nothing is normalized: `1/2` is not `0.5`, and `yes` is not `Yes`.
    """

    risky: ClassVar[bool] = False
    literal: ClassVar[bool] = True

    def extract(self, text: str) -> str | None:
        """Return the text after the last mark; None when nothing is there."""
        return _marked(text)

    def readable(self, reference: str) -> bool:
        """Return whether the reference holds any answer."""
        return _expected(reference) is not None

    def same(self, answer: str, reference: str) -> bool:
        """Return whether the two strings are equal character by character."""
        expected = _expected(reference)
        return expected is not None and answer.strip() == expected


def _marked(text: str) -> str | None:
    return MARK.split(text)[-1].strip() or None


_expected = lru_cache(maxsize=4096)(_marked)  # a reference is that of many responses
