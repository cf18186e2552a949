"""A recipe's pieces fit each other and the way it samples, or the recipe is refused with every reason."""

import inspect

import pytest

from pipeline.algorithms.bind import SHELVES, bind
from pipeline.algorithms.recipe import LossLine, Recipe
from pipeline.algorithms.shelf import FROM_MODELS, OFFERED
from pipeline.algorithms.weights import WEIGHTS
from pipeline.errors import RecipeError

CARDS = [card for shelf in SHELVES.values() for card in shelf]
SQUARED = {"start": "policy", "loss": {"kind": "value_squared"}}
NECESSARY = {"clipped_surrogate": {"clip_low": 0.2, "clip_high": 0.2}, "kl": {"estimator": "k3"}}
"""Settings without a default."""


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
            advantage={"kind": "gae"},
            importance={"kind": "token_truncated"},
            loss=[{"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 0.3, "on": "correct", "coef": 2}],
            critic=SQUARED,
        )
    )
    assert [piece.name for piece in bound.pieces] == [
        "verifier", "mixed_outcomes", "first", "kl_penalty", "gae", "group_std", "token_truncated",
        "clipped_surrogate", "value_squared",
    ]  # fmt: skip
    assert [piece.name for piece in bound.crediting] == [piece.name for piece in bound.pieces[:7]]
    assert (bound.importance.name, bound.critic_loss.name) == ("token_truncated", "value_squared")
    (term,) = bound.losses
    assert (term.coef, term.on) == (2.0, "correct")
    assert term.piece.settings == {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None, "ratio": "token"}


def test_what_is_optional_is_none():
    bound = bind(_changed(normalize=False))
    assert (bound.normalizer, bound.importance, bound.critic_loss) == (None, None, None)


PLAIN = {"normalize": False, "loss": [{"kind": "policy_gradient"}]}
PENALTY = [{"kind": "kl_penalty", "coef": 0.1}]
SHAPED = {"shape": PENALTY}


@pytest.mark.parametrize(
    ("changes", "credit", "losses"),
    [
        (PLAIN, set(), set()),
        ({}, set(), {"ref_logprobs"}),
        ({"update": {"weights": "token_mean", "epochs": 2}}, set(), {"old_logprobs", "ref_logprobs"}),
        ({"update": {"weights": "token_mean", "minibatches": 2}}, set(), {"old_logprobs", "ref_logprobs"}),
        (SHAPED, {"old_logprobs", "ref_logprobs"}, {"old_logprobs", "ref_logprobs"}),
        (PLAIN | {"shape": PENALTY}, {"old_logprobs", "ref_logprobs"}, set()),
        (PLAIN | {"label": {"kind": "reward_model"}}, {"reward_scores"}, set()),
        (PLAIN | {"importance": {"kind": "token_truncated"}}, {"old_logprobs"}, set()),
        (PLAIN | {"advantage": {"kind": "gae"}, "critic": SQUARED}, {"values"}, set()),
        (PLAIN | {"advantage": {"kind": "reward_to_go"}, "critic": SQUARED}, set(), {"values"}),
    ],
    ids=[
        "nothing",
        "losses",
        "two_passes",
        "two_steps",
        "one_step_and_credit",
        "shape",
        "label",
        "importance",
        "values_for_credit",
        "values_for_the_critic",
    ],
)
def test_needs_follow_the_pieces(changes, credit, losses):
    bound = bind(_changed(**changes))
    assert bound.credit_needs == credit
    assert bound.needs == credit | losses
    assert bound.needs <= set(FROM_MODELS)


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
def test_cut_sampling_does_not_go_with_recomputed_log_probabilities_that_nothing_corrects(cut):
    reason = _reasons(rollout=cut)
    assert reason.startswith("loss 'clipped_surrogate' needs rollout.top_p = 1 and no top_k")
    assert "importance" in reason
    bind(_changed(rollout=cut, loss=[{"kind": "policy_gradient"}]))
    bind(_changed(rollout=cut, importance={"kind": "token_truncated", "cap": 2.0}))


@pytest.mark.parametrize("kind", ["first", "drawn"])
def test_a_filter_takes_no_more_than_there_are(kind):
    bind(_changed(filter=[{"kind": kind, "n": 64}]))
    assert _reasons(filter=[{"kind": kind, "n": 65}]) == (
        f"filter '{kind}': n = 65 is more than rollout.group_size = 64"
    )


def test_the_slope_of_the_overlong_penalty_starts_after_the_first_token():
    bind(_changed(shape=[{"kind": "overlong_penalty", "limit": 8, "buffer": 8}]))
    assert _reasons(shape=[{"kind": "overlong_penalty", "limit": 8, "buffer": 9}]) == (
        "shape 'overlong_penalty': buffer = 9 is more than limit = 8"
    )


def test_a_greedy_response_that_nobody_reads_is_refused():
    assert "rollout.greedy" in _reasons(rollout={"greedy": True})


def test_a_greedy_baseline_needs_the_greedy_response():
    baseline = {"advantage": {"kind": "greedy_baseline"}}
    bind(_changed(**baseline, rollout={"greedy": True}))
    assert _reasons(**baseline) == (
        "advantage 'greedy_baseline' needs rollout.greedy = true: the greedy response is what it compares with"
    )


def test_values_need_a_critic():
    assert _reasons(advantage={"kind": "gae"}) == "advantage 'gae' needs a critic: nothing else fills `values`"


@pytest.mark.parametrize("card", list(SHELVES["advantage"]), ids=lambda card: card.name)
def test_a_critic_needs_an_advantage_that_gives_returns(card):
    changes = {"advantage": {"kind": card.name}, "critic": SQUARED, "rollout": {"greedy": "greedy" in card.needs}}
    if card.name in ("gae", "reward_to_go"):
        bind(_changed(**changes))
    else:
        assert _reasons(**changes) == f"critic: advantage '{card.name}' gives no returns that it could learn"


@pytest.mark.parametrize("card", list(SHELVES["loss"]), ids=lambda card: card.name)
def test_a_loss_teaches_either_the_policy_or_the_critic(card):
    line = {"kind": card.name, **NECESSARY.get(card.name, {})}
    as_critic = {"advantage": {"kind": "gae"}, "critic": {"start": "policy", "loss": line}}
    if card.name.startswith("value_"):
        bind(_changed(**as_critic))
        assert _reasons(loss=[line]) == (
            f"loss '{card.name}' teaches a critic: write it as critic.loss, not on a line of loss"
        )
    else:
        bind(_changed(loss=[line]))
        assert _reasons(**as_critic) == f"critic.loss '{card.name}' does not read `returns`: it teaches no critic"


@pytest.mark.parametrize("label", ["reward_model", "self_confidence"])
def test_right_and_wrong_need_a_labeler_that_knows_them(label):
    changes = {"filter": [{"kind": "mixed_outcomes"}], "loss": [{"kind": "nll", "on": "correct"}]}
    lacking = f"needs a label that says right or wrong; label '{label}' does not"
    assert _reasons(**changes, label={"kind": label}).split("\n") == [
        f"filter 'mixed_outcomes' {lacking}",
        f"loss 'nll' with on = 'correct' {lacking}",
    ]
    for knowing in ("verifier", "majority_vote"):
        bind(_changed(**changes, label={"kind": knowing}))
    bind(_changed(label={"kind": label}, loss=[{"kind": "nll", "on": "finished"}]))


def test_a_controller_needs_a_divergence_to_steer():
    steered = {"kl_controller": {"target": 6.0}}
    bind(_changed(**steered))
    bind(_changed(**steered, **PLAIN, shape=PENALTY))
    assert _reasons(**steered, **PLAIN) == (
        "kl_controller: no line of the recipe has a divergence to steer (kl_penalty or kl)"
    )


def test_every_reason_is_told_at_once():
    reasons = _reasons(
        rollout={"top_p": 0.5, "greedy": True},
        label={"kind": "reward_model"},
        filter=[{"kind": "mixed_outcomes"}, {"kind": "first", "n": 100}],
        advantage={"kind": "gae"},
        loss=[{"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 0.2}],
        kl_controller={"target": 1.0},
    ).split("\n")
    told = ("top_p", "n = 100", "right or wrong", "a critic", "rollout.greedy", "kl_controller")
    assert len(reasons) == len(told)
    assert all(any(word in reason for reason in reasons) for word in told)
