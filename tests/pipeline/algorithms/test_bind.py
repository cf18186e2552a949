"""A recipe's pieces fit each other and the way it samples, or the recipe is refused with every reason."""

import inspect

import pytest

from pipeline.algorithms.bind import SHELVES, bind
from pipeline.algorithms.recipe import LossLine, Recipe
from pipeline.algorithms.shelf import FROM_MODELS, OFFERED
from pipeline.algorithms.weights import WEIGHTS
from pipeline.errors import RecipeError

CARDS = [card for shelf in SHELVES.values() for card in shelf]


def _changed(**tables):
    return Recipe.load("grpo").changed(tables)


def _reasons(**tables):
    with pytest.raises(RecipeError) as error:
        bind(_changed(**tables))
    assert error.value.where == "recipe grpo"
    return error.value.what


def test_the_shelves_are_those_that_stages_serve():
    assert tuple(SHELVES) == tuple(OFFERED)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.shelf}-{card.name}")
def test_every_parameter_is_an_offered_column_or_a_setting(card):
    parameters = inspect.signature(card.function).parameters.values()
    assert {p.kind for p in parameters} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert set(card.needs) <= set(OFFERED[card.shelf])
    assert all(p.default is p.empty for p in parameters if p.name in card.needs)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.shelf}-{card.name}")
def test_every_piece_is_documented(card):
    assert card.doc


@pytest.mark.parametrize("card", list(SHELVES["loss"]), ids=lambda card: card.name)
def test_a_loss_leaves_the_words_of_its_line_alone(card):
    assert not set(card.schema.model_fields) & set(LossLine.model_fields)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weighting_can_be_asked_for(name):
    assert bind(_changed(update={"weights": name})).weights is WEIGHTS[name]


def test_all_parts_are_bound_in_order():
    bound = bind(
        _changed(
            filter=[{"kind": "mixed_outcomes"}, {"kind": "first", "n": 32}],
            shape=[{"kind": "kl_penalty", "coef": 0.1}],
            loss=[{"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 0.3, "on": "correct", "coef": 2}],
        )
    )
    assert [piece.name for piece in bound.pieces] == [
        "verifier", "mixed_outcomes", "first", "kl_penalty", "group_mean", "group_std", "clipped_surrogate"
    ]  # fmt: skip
    (term,) = bound.losses
    assert (term.coef, term.on) == (2.0, "correct")
    assert term.piece.settings == {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}


def test_needs_follow_the_pieces():
    plain = {"normalize": False, "loss": [{"kind": "policy_gradient"}]}
    assert bind(_changed(**plain)).needs == frozenset()
    assert bind(_changed(**plain)).normalizer is None
    assert bind(_changed(**plain, shape=[{"kind": "kl_penalty", "coef": 0.1}])).needs == {
        "old_logprobs",
        "ref_logprobs",
    }
    assert bind(_changed()).needs <= set(FROM_MODELS)


def test_a_bad_piece_says_which_recipe():
    assert _reasons(advantage={"kind": "gruop_mean"}).startswith("no advantage is called 'gruop_mean'")
    assert _reasons(normalize={"kind": "group_std", "ddof": 2}) == (
        "normalize 'group_std': ddof: Input should be 0 or 1 [input_value=2]"
    )


def test_a_group_of_one_is_refused():
    reasons = _reasons(rollout={"group_size": 1}, filter=[{"kind": "mixed_outcomes"}]).split("\n")
    assert reasons == [
        f"{piece} needs rollout.group_size >= 2: a group of one has nothing to be compared with"
        for piece in ("filter 'mixed_outcomes'", "advantage 'group_mean'", "normalize 'group_std'")
    ]


def test_one_response_per_prompt_is_fine_without_group_pieces():
    bind(_changed(rollout={"group_size": 1}, advantage={"kind": "outcome"}, normalize={"kind": "whiten"}))


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 50}])
def test_cut_sampling_does_not_go_with_recomputed_log_probabilities(cut):
    assert _reasons(rollout=cut).startswith("loss 'clipped_surrogate' needs rollout.top_p = 1 and no top_k")
    bind(_changed(rollout=cut, loss=[{"kind": "policy_gradient"}]))


def test_first_takes_no_more_than_there_are():
    bind(_changed(filter=[{"kind": "first", "n": 64}]))
    assert _reasons(filter=[{"kind": "first", "n": 65}]) == (
        "filter 'first': n = 65 is more than rollout.group_size = 64"
    )


def test_the_slope_of_the_overlong_penalty_starts_after_the_first_token():
    bind(_changed(shape=[{"kind": "overlong_penalty", "limit": 8, "buffer": 8}]))
    assert _reasons(shape=[{"kind": "overlong_penalty", "limit": 8, "buffer": 9}]) == (
        "shape 'overlong_penalty': buffer = 9 is more than limit = 8"
    )


def test_a_greedy_response_that_nobody_reads_is_refused():
    assert "rollout.greedy" in _reasons(rollout={"greedy": True})
