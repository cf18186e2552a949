"""Named queries: what practitioners ask of a run, as SQL files in `named/`. A new one is a new file.

-- question: one line
-- needs: VIEW.COLUMN, ...         what a run has to have stored for an answer
-- set NAME = DEFAULT: meaning     a setting; $NAME in the statement
select ...
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources

import pyarrow as pa

from pipeline.errors import ExperimentError
from pipeline.inspecting.views import Views
from pipeline.settings import override

Value = int | float | str


@dataclass(frozen=True)
class Query:
    """One of them."""

    name: str
    question: str
    needs: tuple[tuple[str, str], ...]
    """(view, column) that must be stored."""
    settings: Mapping[str, tuple[Value, str]]
    """Name -> default and meaning."""
    sql: str

    def values(self, changes: Iterable[str]) -> dict[str, Value]:
        """The settings with `a=b` changes applied. Raises `ExperimentError` for one that the query does not have."""
        values: dict[str, Value] = {}
        for name, value in override({name: default for name, (default, _) in self.settings.items()}, changes).items():
            if name not in self.settings:
                there = ", ".join(self.settings) or "none"
                raise ExperimentError(f"query {self.name} has no setting {name!r}; it has: {there}", "--set")
            kind = type(self.settings[name][0])
            if not isinstance(value, kind):
                raise ExperimentError(f"{name} is {value!r}", "--set", f"a value like {self.settings[name][0]!r}")
            values[name] = value
        return values

    def run(self, views: Views, changes: Iterable[str] = ()) -> pa.Table:
        """The answer. Raises `ExperimentError` where these runs have not stored what it takes."""
        values = self.values(changes)
        missing = [f"{view}.{column}" for view, column in self.needs if not views.stored(view, column)]
        if missing:
            raise ExperimentError(
                f"query {self.name} needs {', '.join(missing)}, which these runs have not stored",
                do="`rlhf recipes` says which models a recipe asks; `rlhf sql` lists the other queries",
            )
        return views.run(self.sql, values)


@cache
def names() -> tuple[str, ...]:
    """All of them, sorted."""
    files = resources.files("pipeline.inspecting").joinpath("named").iterdir()
    return tuple(sorted(file.name.removesuffix(".sql") for file in files if file.name.endswith(".sql")))


def load(name: str) -> Query:
    """The query of that name. Raises `ExperimentError` that names the closest ones."""
    if name not in names():
        close = get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`rlhf sql` alone lists them"
        raise ExperimentError(f"no query is called {name!r}", "--query", hint)
    text = resources.files("pipeline.inspecting").joinpath("named", f"{name}.sql").read_text(encoding="utf-8")
    (question,) = re.findall(r"^-- question: (.*)$", text, re.MULTILINE)
    needs = [word for line in re.findall(r"^-- needs: (.*)$", text, re.MULTILINE) for word in line.split(", ")]
    settings = re.findall(r"^-- set (\w+) = ([^:]*): (.*)$", text, re.MULTILINE)
    return Query(
        name, question, tuple((view, column) for view, _, column in (word.partition(".") for word in needs)),
        {key: (_value(default), meaning) for key, default, meaning in settings}, text,
    )  # fmt: skip


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()
