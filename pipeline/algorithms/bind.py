"""All shelves together: a recipe's pieces, what they need, and every check of how they fit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from pipeline.algorithms.advantages import ADVANTAGES, Credit
from pipeline.algorithms.filters import FILTERS, Kept
from pipeline.algorithms.importance import IMPORTANCE
from pipeline.algorithms.labels import LABELS, Labels
from pipeline.algorithms.losses import LOSSES
from pipeline.algorithms.normalizers import NORMALIZERS
from pipeline.algorithms.recipe import DIVERGENCES, Recipe
from pipeline.algorithms.shaping import SHAPES
from pipeline.algorithms.shelf import FROM_MODELS, Piece, Shelf
from pipeline.algorithms.weights import WEIGHTS
from pipeline.errors import RecipeError

SHELVES: Mapping[str, Shelf[Any]] = {
    shelf.name: shelf for shelf in (LABELS, FILTERS, SHAPES, ADVANTAGES, NORMALIZERS, IMPORTANCE, LOSSES)
}
"""The seven shelves by name, in the order in which a response passes them."""

OF_CRITIC = frozenset({"values", "old_values", "returns"})
"""Columns of the loss shelf that teach a critic; a policy's loss has no business with them."""


@dataclass(frozen=True)
class LossTerm:
    """One summand of the loss."""

    piece: Piece[Float[Tensor, "B T"]]
    coef: float
    on: str
    """`all` rows, the `correct` or the `finished` ones."""


@dataclass(frozen=True)
class Bound:
    """A recipe with its pieces in place."""

    recipe: Recipe
    labeler: Piece[Labels]
    filters: tuple[Piece[Kept], ...]
    shapers: tuple[Piece[Float[np.ndarray, "B T"]], ...]
    advantage: Piece[Credit]
    normalizer: Piece[Float[np.ndarray, "B T"]] | None
    importance: Piece[Float[np.ndarray, "B T"]] | None
    losses: tuple[LossTerm, ...]
    critic_loss: Piece[Float[Tensor, "B T"]] | None
    """What the critic is taught with; None without a critic."""
    weights: Callable[[Tensor, Tensor], Tensor]
    """From mask [B T] and group [B] of an optimizer step to what each of its tokens counts."""

    @property
    def crediting(self) -> tuple[Piece[Any], ...]:
        """The pieces from the label to the credit of tokens, in the order in which a response passes them."""
        last = (piece for piece in (self.normalizer, self.importance) if piece)
        return (self.labeler, *self.filters, *self.shapers, self.advantage, *last)

    @property
    def pieces(self) -> tuple[Piece[Any], ...]:
        """All pieces: those of the credit, the terms of the loss, and what teaches the critic."""
        critic = (self.critic_loss,) if self.critic_loss else ()
        return (*self.crediting, *(term.piece for term in self.losses), *critic)

    @property
    def credit_needs(self) -> frozenset[str]:
        """The columns among `needs` without which tokens get no credit; the losses may ask for more."""
        return _of_models(self.crediting)

    @property
    def needs(self) -> frozenset[str]:
        """The columns that forward passes over finished responses must provide: keys of `FROM_MODELS`.

        A critic's values before the update are needed wherever there is one; the `values` that its loss reads are those
        of the critic in training, and not meant. Where an update is one optimizer step, its losses' old
        log-probabilities are those of its own forward pass, and no other is made for them.
        """
        critic = {"values"} if self.critic_loss else set()
        known = {"old_logprobs"} if self.recipe.update.steps == 1 else set()
        return self.credit_needs | (_of_models(term.piece for term in self.losses) - known) | critic


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
        importance=IMPORTANCE.take(recipe.importance, where) if recipe.importance else None,
        losses=tuple(LossTerm(LOSSES.take(line, where), line.coef, line.on) for line in recipe.loss),
        critic_loss=LOSSES.take(recipe.critic.loss, where) if recipe.critic else None,
        weights=WEIGHTS[recipe.update.weights],
    )
    reasons = [reason for piece in bound.pieces for reason in (*_unsampled(piece, recipe), *_oversized(piece, recipe))]
    reasons += [*_without_verdicts(bound), *_of_critic(bound), *_unread(bound)]
    if reasons:
        raise RecipeError("\n".join(reasons), where, "change the recipe, or its [recipe_changes] in the experiment")
    return bound


def _of_models(pieces: Iterable[Piece[Any]]) -> frozenset[str]:
    return frozenset(name for piece in pieces for name in piece.needs if name in FROM_MODELS)


def _called(piece: Piece[Any]) -> str:
    return f"{piece.card.shelf} {piece.name!r}"


def _unsampled(piece: Piece[Any], recipe: Recipe) -> Iterator[str]:
    """What the piece reads and the way of sampling does not give."""
    rollout = recipe.rollout
    if "group" in piece.needs and rollout.group_size < 2:
        yield f"{_called(piece)} needs rollout.group_size >= 2: a group of one has nothing to be compared with"
    if "greedy" in piece.needs and not rollout.greedy:
        yield f"{_called(piece)} needs rollout.greedy = true: the greedy response is what it compares with"
    cut = rollout.top_p < 1 or rollout.top_k is not None
    if "old_logprobs" in piece.needs and cut and recipe.importance is None:
        yield (
            f"{_called(piece)} needs rollout.top_p = 1 and no top_k: cut sampling is another distribution than the one"
            " whose log-probabilities are recomputed; an `importance` line corrects for it"
        )


def _oversized(piece: Piece[Any], recipe: Recipe) -> Iterator[str]:
    """Settings of the piece that are more than there is."""
    settings, size = piece.settings, recipe.rollout.group_size
    if piece.card.shelf == "filter" and settings.get("n", 0) > size:
        yield f"{_called(piece)}: n = {settings['n']} is more than rollout.group_size = {size}"
    if {"limit", "buffer"} <= settings.keys() and settings["buffer"] > settings["limit"]:
        yield f"{_called(piece)}: buffer = {settings['buffer']} is more than limit = {settings['limit']}"


def _without_verdicts(bound: Bound) -> Iterator[str]:
    """What asks for right and wrong where the labeler knows neither."""
    if {"verdicts", "answers"} & set(bound.labeler.needs):
        return
    lacking = f"a label that says right or wrong; {_called(bound.labeler)} does not"
    for piece in bound.filters:
        if "verdicts" in piece.needs:
            yield f"{_called(piece)} needs {lacking}"
    for term in bound.losses:
        if term.on == "correct":
            yield f"{_called(term.piece)} with on = 'correct' needs {lacking}"


def _of_critic(bound: Bound) -> Iterator[str]:
    """Values without a critic, a critic without targets, and losses on the wrong side."""
    for term in bound.losses:
        if OF_CRITIC & set(term.piece.needs):
            yield f"{_called(term.piece)} teaches a critic: write it as critic.loss, not on a line of loss"
    if bound.critic_loss is None:
        for piece in bound.crediting:
            if "values" in piece.needs:
                yield f"{_called(piece)} needs a critic: nothing else fills `values`"
        return
    if "returns" not in bound.critic_loss.needs:
        yield f"critic.loss {bound.critic_loss.name!r} does not read `returns`: it teaches no critic"
    if not _gives_returns(bound.advantage):
        yield f"critic: {_called(bound.advantage)} gives no returns that it could learn"


def _gives_returns(advantage: Piece[Credit]) -> bool:
    """Whether the piece has targets for a critic: it is asked on one response of one token."""
    token, row, mask = np.zeros((1, 1)), np.zeros(1), np.ones((1, 1), dtype=bool)
    columns = {"rewards": token, "values": token, "mask": mask, "group": row.astype(np.int64), "greedy": row}
    return advantage(columns).returns is not None


def _unread(bound: Bound) -> Iterator[str]:
    """Parts of the recipe that nothing makes use of."""
    recipe = bound.recipe
    if recipe.rollout.greedy and not any("greedy" in piece.needs for piece in bound.pieces):
        yield "rollout.greedy: no piece reads the greedy response, and it must not train like a sampled one"
    if recipe.kl_controller and not any(piece.name in DIVERGENCES for piece in bound.pieces):
        yield f"kl_controller: no line of the recipe has a divergence to steer ({' or '.join(DIVERGENCES)})"
