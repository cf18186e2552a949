"""All shelves together: a recipe's pieces, what they need, and every check of how they fit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from pipeline.algorithms.advantages import ADVANTAGES, Credit
from pipeline.algorithms.filters import FILTERS, Kept
from pipeline.algorithms.labels import LABELS, Labels
from pipeline.algorithms.losses import LOSSES
from pipeline.algorithms.normalizers import NORMALIZERS
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shaping import SHAPES
from pipeline.algorithms.shelf import FROM_MODELS, Piece, Shelf
from pipeline.algorithms.weights import WEIGHTS
from pipeline.errors import RecipeError

SHELVES: Mapping[str, Shelf[Any]] = {
    shelf.name: shelf for shelf in (LABELS, FILTERS, SHAPES, ADVANTAGES, NORMALIZERS, LOSSES)
}
"""The six shelves by name, in the order in which a response passes them."""


@dataclass(frozen=True)
class LossTerm:
    """One summand of the loss."""

    piece: Piece[Float[Tensor, "B T"]]
    coef: float
    on: str
    """`all` rows, or the `correct` ones."""


@dataclass(frozen=True)
class Bound:
    """A recipe with its pieces in place."""

    recipe: Recipe
    labeler: Piece[Labels]
    filters: tuple[Piece[Kept], ...]
    shapers: tuple[Piece[Float[np.ndarray, "B T"]], ...]
    advantage: Piece[Credit]
    normalizer: Piece[Float[np.ndarray, "B T"]] | None
    losses: tuple[LossTerm, ...]
    weights: Callable[[Tensor], Tensor]
    """From the mask [B T] of an optimizer step to what each of its tokens counts."""

    @property
    def pieces(self) -> tuple[Piece[Any], ...]:
        """All pieces, in the order in which a response passes them."""
        normalizer = (self.normalizer,) if self.normalizer else ()
        terms = (term.piece for term in self.losses)
        return (self.labeler, *self.filters, *self.shapers, self.advantage, *normalizer, *terms)

    @property
    def needs(self) -> frozenset[str]:
        """The columns that forward passes over finished responses must provide: keys of `FROM_MODELS`."""
        return frozenset(name for piece in self.pieces for name in piece.needs if name in FROM_MODELS)


def bind(recipe: Recipe) -> Bound:
    """Take the recipe's pieces from their shelves.

    Raises `RecipeError`: a piece or setting that does not exist, or, with every reason at once, pieces that do not fit
    each other or the way the recipe samples.
    """
    where = f"recipe {recipe.name}"
    bound = Bound(
        recipe=recipe,
        labeler=LABELS.take(recipe.label, where),
        filters=tuple(FILTERS.take(line, where) for line in recipe.filter),
        shapers=tuple(SHAPES.take(line, where) for line in recipe.shape),
        advantage=ADVANTAGES.take(recipe.advantage, where),
        normalizer=NORMALIZERS.take(recipe.normalize, where) if recipe.normalize else None,
        losses=tuple(LossTerm(LOSSES.take(line, where), line.coef, line.on) for line in recipe.loss),
        weights=WEIGHTS[recipe.update.weights],
    )
    reasons = [reason for piece in bound.pieces for reason in _misfits(piece, recipe)]
    if recipe.rollout.greedy and not any("greedy" in piece.needs for piece in bound.pieces):
        reasons.append("rollout.greedy: no piece reads the greedy response, and it must not train like a sampled one")
    if reasons:
        raise RecipeError("\n".join(reasons), where, "change the recipe, or its [recipe_changes] in the experiment")
    return bound


def _misfits(piece: Piece[Any], recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    label = f"{piece.card.shelf} {piece.name!r}"
    if "group" in piece.needs and rollout.group_size < 2:
        yield f"{label} needs rollout.group_size >= 2: a group of one has nothing to be compared with"
    if "old_logprobs" in piece.needs and (rollout.top_p < 1 or rollout.top_k is not None):
        yield (
            f"{label} needs rollout.top_p = 1 and no top_k: cut sampling is another distribution than the one whose"
            " log-probabilities are recomputed"
        )
    if piece.name == "first" and piece.settings["n"] > rollout.group_size:
        yield f"{label}: n = {piece.settings['n']} is more than rollout.group_size = {rollout.group_size}"
    if piece.name == "overlong_penalty" and piece.settings["buffer"] > piece.settings["limit"]:
        yield f"{label}: buffer = {piece.settings['buffer']} is more than limit = {piece.settings['limit']}"
