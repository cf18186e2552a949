"""What stages measure, and what TRL and verl call it: names.toml as rows."""

import tomllib
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Literal

from pipeline.contracts import CONTRACTS
from pipeline.settings import Settings

Names = Literal["house", "trl", "verl"]
EVERY = "*"
"""Of kinds: all of them."""
SAME = {"judgements": "scores"}
"""Kinds that measure what others do, and never beside them. Candidates measure what rollouts do, in one iteration with
them: they have no aliases, and their tags begin with their kind."""


class Name(Settings):
    """A number that stages measure."""

    name: str
    """`area/what`; a star stands for what only a run knows: a reason, an annotator."""
    kinds: tuple[str, ...]
    """Kinds of artifact that have it."""
    unit: str
    """Its unit."""
    meaning: str
    """One line."""
    trl: str | None = None
    """TRL's name of the same number."""
    verl: str | None = None
    """verl's name of the same number."""
    differs: str | None = None
    """What they have that is almost the same."""

    def fits(self, name: str, kind: str) -> bool:
        """Whether this is the row of a metric."""
        return (SAME.get(kind, kind) in self.kinds or EVERY in self.kinds) and fnmatchcase(name, self.name)


@cache
def names() -> tuple[Name, ...]:
    """All rows."""
    table = tomllib.loads(resources.files(__package__).joinpath("names.toml").read_text("utf-8"))
    return tuple(Name.model_validate(row) for row in table["metric"])


@cache
def look_up(name: str, kind: str) -> Name | None:
    """The row of a metric of this kind of artifact."""
    return next((row for row in names() if row.fits(name, kind)), None)


@cache
def alias(name: str, kind: str, whose: Names) -> str | None:
    """Their name of the same number, where they have one."""
    row = look_up(name, kind)
    return None if row is None or whose == "house" else {"trl": row.trl, "verl": row.verl}[whose]


@cache
def tag(name: str, kind: str) -> str:
    """What to call a metric where those of all kinds stand side by side: with its kind where others have it, too."""
    kinds = [other for other in CONTRACTS if look_up(name, other) is not None]
    return name if kinds == [SAME.get(kind, kind)] else f"{kind}/{name}"
