"""Shelves of pieces: the signature of a function is its schema.

A piece is a plain function. Its positional parameters are columns, found by name; its keyword-only parameters are
settings, the only words that a recipe may write on its line; its docstring is its documentation. A piece whose
statistics are of all rows is marked (`gathered_by`), so that it can be computed over one lot of rows after the other.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pipeline.errors import RecipeError
from pipeline.settings import Settings, explain

T_co = TypeVar("T_co", covariant=True)
Function = TypeVar("Function", bound=Callable[..., Any])
GATHER = "gather"
"""Attribute of a marked function."""

OFFERED: Mapping[str, tuple[str, ...]] = {
    "label": (
        "verdicts", "answers", "group", "sample", "responses", "finished", "reward_scores", "sampler_logprobs", "mask"
    ),
    "filter": ("rewards", "verdicts", "group", "sample", "finished", "lottery"),
    "shape": ("rewards", "mask", "old_logprobs", "ref_logprobs", "finished"),
    "advantage": ("rewards", "values", "mask", "group", "greedy"),
    "normalize": ("advantages", "mask", "group"),
    "importance": ("old_logprobs", "sampler_logprobs", "mask"),
    "loss": (
        "logprobs", "old_logprobs", "ref_logprobs", "advantages", "entropies", "values", "old_values", "returns", "mask"
    ),
}  # fmt: skip
"""The columns that a piece of each shelf may ask for: what its stage hands over.

`rewards` is [B] for filters (what the labeler said) and [B T] for shape and advantage. `verdicts` [B] is 1.0 right,
0.0 wrong, NaN without a verdict: by the reference answer for labelers, by the labeler for filters. `answers` [B]
numbers the classes of equal answers within a group, -1 where there is none. `lottery` [B] is a random number in [0, 1),
a function of seed and key. `greedy` [B] is the reward of the greedy response to the same prompt.
"""

FROM_MODELS: Mapping[str, str] = {
    "reward_scores": "reward model",
    "old_logprobs": "policy",
    "ref_logprobs": "reference",
    "values": "critic",
}
"""The columns that only a forward pass over finished responses can fill, and the model that does."""


class Line(Settings):
    """A line of a recipe: which piece, and the settings that differ from its defaults."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, bool | int | float | str] = Field(init=False)

    kind: str
    """Name of the piece on its shelf."""

    @property
    def settings(self) -> dict[str, bool | int | float | str]:
        """The words on the line that belong to the piece."""
        return dict(self.__pydantic_extra__)


@dataclass(frozen=True)
class Card(Generic[T_co]):
    """What a shelf knows of a piece before its settings are chosen."""

    shelf: str
    name: str
    function: Callable[..., T_co]
    needs: tuple[str, ...]
    """Columns, in the order of the parameters."""
    schema: type[BaseModel]
    """The settings with their types, defaults and bounds."""
    gather: Callable[..., Any] | None = None
    """How statistics over all rows are gathered over lots of them; None where a piece has none."""

    @property
    def doc(self) -> str:
        """The function's docstring, dedented."""
        return inspect.getdoc(self.function) or ""


@dataclass(frozen=True)
class Piece(Generic[T_co]):
    """A piece with its settings: call it with columns."""

    card: Card[T_co]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name on the shelf."""
        return self.card.name

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns it reads."""
        return self.card.needs

    @property
    def doc(self) -> str:
        """Its docstring."""
        return self.card.doc

    def gather(self, columns: Mapping[str, Any]) -> Any:
        """What one lot of rows adds to the statistics over all; None where the piece has none."""
        if self.card.gather is None:
            return None
        chosen = {name: self.settings[name] for name in _words(self.card.gather)}
        return self.card.gather(*self._read(columns), **chosen)

    def __call__(self, columns: Mapping[str, Any], gathered: Any = None) -> T_co:
        """Apply it to the columns it needs; others are ignored. Raises `RecipeError` when one is not there.

        `gathered` is the sum of what `gather` said of all lots, where these columns are one of several.
        """
        added = () if gathered is None else (gathered,)
        return self.card.function(*self._read(columns), *added, **self.settings)

    def _read(self, columns: Mapping[str, Any]) -> list[Any]:
        missing = [name for name in self.needs if name not in columns]
        if missing:
            raise RecipeError(
                f"{self.card.shelf} {self.name!r} needs the column {', '.join(missing)}",
                where=f"columns present: {', '.join(columns)}",
                do="run `score` with this recipe, so that it writes what the recipe needs",
            )
        return [columns[name] for name in self.needs]


def gathered_by(gather: Callable[..., Any]) -> Callable[[Function], Function]:
    """Mark a piece whose statistics are those of all rows.

    `gather` has the piece's columns, and those of its settings that it names; what it returns of several lots can be
    added up. The piece takes the sum as one more positional parameter, `gathered`, and gathers for itself without.
    """

    def mark(function: Function) -> Function:
        setattr(function, GATHER, gather)
        return function

    return mark


class Shelf(Generic[T_co]):
    """The pieces of one kind, in the order of the documentation. All return the same type."""

    def __init__(self, name: str, functions: Sequence[Callable[..., T_co]]) -> None:
        self.name = name
        self._cards = {function.__name__: _card(name, function) for function in functions}

    @property
    def names(self) -> tuple[str, ...]:
        """What a line of this shelf may be called."""
        return tuple(self._cards)

    def __iter__(self) -> Iterator[Card[T_co]]:
        return iter(self._cards.values())

    def take(self, line: Line, where: str = "") -> Piece[T_co]:
        """Return the piece of a recipe line, its settings checked and completed with defaults.

        Raises `RecipeError`: no such piece (lists the shelf), a setting that the piece does not have, or a value that
        is not of the setting's type. `where` names the recipe in the message.
        """
        card = self._cards.get(line.kind)
        if card is None:
            close = get_close_matches(line.kind, self.names, n=1)
            raise RecipeError(
                f"no {self.name} is called {line.kind!r}; the shelf holds: {', '.join(self.names)}",
                where,
                f"did you mean {close[0]!r}?" if close else "",
            )
        try:
            settings = card.schema.model_validate(line.settings)
        except ValidationError as error:
            known = ", ".join(card.schema.model_fields) or "none"
            raise RecipeError(
                explain(error, f"{self.name} {card.name!r}: "), where, f"settings of {card.name!r}: {known}"
            ) from error
        return Piece(card, dict(settings))


def _card(shelf: str, function: Callable[..., T_co]) -> Card[T_co]:
    gather = getattr(function, GATHER, None)
    parameters = inspect.signature(function).parameters.values()
    columns = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    # Strict: a recipe that writes clip_low = true or "0.2" means something else than 0.2.
    schema = create_model(function.__name__, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    needs = columns if gather is None else columns[:-1]
    return Card(shelf, function.__name__, function, tuple(needs), schema, gather)


def _words(function: Callable[..., Any]) -> list[str]:
    """Names of the settings of a function."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
