"""No verdict: for prompts whose responses are rewarded by a model, or not at all."""

from typing import ClassVar


class NoGrader:
    """Finds no answer and reads no reference, so that every row stays without a verdict."""

    risky: ClassVar[bool] = False
    literal: ClassVar[bool] = True

    def extract(self, text: str) -> str | None:
        """Return None: nothing is looked for."""
        return None

    def readable(self, reference: str) -> bool:
        """Return False: nothing is compared."""
        return False

    def same(self, answer: str, reference: str) -> bool:
        """Return False: an unreadable reference equals nothing."""
        return False
