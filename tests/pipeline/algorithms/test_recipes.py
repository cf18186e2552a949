"""Every recipe that comes with the project: it loads, binds, needs what it should, and computes its paper's numbers."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.bind import bind
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shaping import on_last_token

GOLDEN_FOLDER = Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "recipes.json").read_text())
NEEDS = {name: set(needs) for name, needs in json.loads((GOLDEN_FOLDER / "needs.json").read_text()).items()}
FOR_LOSSES_ALONE = {
    "dapo": {"old_logprobs"},
    "grpo": {"ref_logprobs"},
    "reinforce_pp_baseline": {"ref_logprobs"},
    "ttrl": {"old_logprobs", "ref_logprobs"},
    "vapo": {"old_logprobs"},
    "vc_ppo": {"old_logprobs"},
}

CLIP = {"clip_low": 0.2, "clip_high": 0.2, "ratio": "token"}
WIDE = CLIP | {"clip_high": 0.28}
VERIFIER = {"correct": 1.0, "wrong": 0.0}
SIGNED = VERIFIER | {"wrong": -1.0}
GROUP_STD = {"ddof": 1, "eps": 1e-6}
WHITEN = {"ddof": 0, "eps": 1e-8, "center": True, "over": "tokens"}
BESSEL = WHITEN | {"ddof": 1}
GAE = {"gamma": 1.0, "lam": 0.95}


def _k1(coef):
    return {"estimator": "k1", "coef": coef}


# Recipe: sampling; pieces with all their settings; weights, passes, steps per pass; and what few recipes have.
PAPERS = {
    "instructgpt": (
        {"group_size": 1, "temperature": 1.0},
        {"reward_model": {}, "kl_penalty": _k1(0.02), "gae": GAE, "whiten": WHITEN, "clipped_surrogate": CLIP,
         "value_clipped": {"clip": 0.2}},
        ("token_mean", 1, 8),
        {"critic": ("reward_model", 0), "ema": 0.992, "mix": (27.8, 8), "sft": (2, 0.1)},
    ),
    "ppo": (
        {"group_size": 1, "temperature": 0.7},
        {"reward_model": {}, "kl_penalty": _k1(0.15), "gae": GAE, "whiten": WHITEN, "clipped_surrogate": CLIP,
         "value_clipped": {"clip": 0.2}},
        ("token_mean", 4, 1),
        {"critic": ("reward_model", 0), "kl_controller": (6.0, 10000)},
    ),
    "grpo": (
        {"group_size": 64, "temperature": 1.0},
        {"verifier": VERIFIER, "group_mean": {}, "group_std": GROUP_STD, "clipped_surrogate": CLIP,
         "kl": {"estimator": "k3", "coef": 0.04}},
        ("sequence_mean", 1, 1),
        {},
    ),
    "rloo": (
        {"group_size": 4, "temperature": 1.0},
        {"reward_model": {}, "kl_penalty": _k1(0.03), "leave_one_out": {}, "policy_gradient": {}},
        ("sequence_sum", 1, 2),
        {},
    ),
    "remax": (
        {"group_size": 1, "temperature": 1.0, "greedy": True},
        {"reward_model": {}, "kl_penalty": _k1(0.05), "greedy_baseline": {"credit": "response"}, "policy_gradient": {}},
        ("sequence_sum", 1, 1),
        {},
    ),
    "reinforce_pp": (
        {"group_size": 1, "temperature": 1.0},
        {"reward_model": {}, "kl_penalty": _k1(0.01), "reward_to_go": {"gamma": 1.0}, "whiten": WHITEN,
         "clipped_surrogate": CLIP},
        ("sequence_mean", 1, 8),
        {},
    ),
    "reinforce_pp_baseline": (
        {"group_size": 4, "temperature": 1.0},
        {"verifier": VERIFIER, "group_mean": {}, "whiten": WHITEN, "clipped_surrogate": CLIP,
         "kl": {"estimator": "k2", "coef": 1e-5}},
        ("sequence_mean", 1, 1),
        {},
    ),
    "dapo": (
        {"group_size": 16, "temperature": 1.0, "rounds": 10},
        {"verifier": SIGNED, "mixed_outcomes": {}, "overlong_penalty": {"limit": 20480, "buffer": 4096},
         "group_mean": {}, "group_std": GROUP_STD, "clipped_surrogate": WIDE},
        ("token_mean", 1, 16),
        {},
    ),
    "vc_ppo": (
        {"group_size": 1, "temperature": 1.0},
        {"verifier": SIGNED, "gae": GAE | {"critic_lam": 1.0}, "whiten": BESSEL, "clipped_surrogate": CLIP,
         "value_squared": {}},
        ("sequence_mean", 1, 16),
        {"critic": ("policy", 100)},
    ),
    "vapo": (
        {"group_size": 16, "temperature": 1.0},
        {"verifier": VERIFIER, "gae": GAE | {"critic_lam": 1.0, "adapt": 0.05}, "whiten": BESSEL,
         "clipped_surrogate": WIDE, "nll": {"coef": 0.1, "on": "correct"}, "value_squared": {}},
        ("token_mean", 1, 16),
        {"critic": ("policy", 50)},
    ),
    "ttrl": (
        {"group_size": 64, "temperature": 1.0},
        {"majority_vote": VERIFIER, "first": {"n": 32}, "group_mean": {}, "group_std": GROUP_STD,
         "clipped_surrogate": CLIP, "kl": {"estimator": "k3", "coef": 0.001}},
        ("token_mean", 1, 8),
        {},
    ),
    "rlsc": (
        {"group_size": 16, "temperature": 0.5},
        {"self_confidence": {"alpha": 0.1}, "outcome": {}, "policy_gradient": {}},
        ("sequence_sum", 1, 1),
        {},
    ),
}  # fmt: skip


def _pieces(bound):
    """Each piece's settings without those that are off; `coef` and `on` of loss lines where they say something."""
    words = {term.piece.name: {"coef": term.coef, "on": term.on} for term in bound.losses}
    plain = {"coef": 1.0, "on": "all"}
    return {
        piece.name: {name: value for name, value in piece.settings.items() if value is not None}
        | {name: value for name, value in words.get(piece.name, {}).items() if value != plain[name]}
        for piece in bound.pieces
    }


def _rare(recipe):
    """What few recipes have, as numbers."""
    found = {
        "critic": recipe.critic and (recipe.critic.start, recipe.critic.pretrain_steps),
        "ema": recipe.update.ema,
        "kl_controller": recipe.kl_controller and (recipe.kl_controller.target, recipe.kl_controller.horizon),
        "mix": recipe.mix and (recipe.mix.coef, recipe.mix.per_response),
        "sft": recipe.sft and (recipe.sft.epochs, recipe.sft.documents_share),
        "importance": recipe.importance,
        "update.temperature": recipe.update.temperature,
    }
    return {name: value for name, value in found.items() if value is not None}


def credited(bound, columns):
    """From rewards (or what the labeler reads) to the credit of tokens, and a critic's targets."""
    columns = {name: np.array(values, np.float64) for name, values in columns.items()}
    columns["mask"] = columns["mask"].astype(bool)
    columns["group"] = columns.get("group", np.zeros(len(columns["mask"]))).astype(np.int64)
    rewards = columns["rewards"] if "rewards" in columns else bound.labeler(columns).rewards.astype(np.float64)
    columns["rewards"] = on_last_token(rewards, columns["mask"])
    for shaper in bound.shapers:
        columns["rewards"] = shaper(columns)
    credit = bound.advantage(columns)
    columns["advantages"] = credit.advantages
    return (bound.normalizer(columns) if bound.normalizer else credit.advantages), credit.returns


def _of(case):
    return bind(Recipe.load(case["inputs"]["recipe"]).changed(case["inputs"]["changes"]))


def golden(section):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[section]])


def test_the_table_of_needs_is_complete():
    bound = {name: bind(Recipe.load(name)) for name in Recipe.names()}
    assert {name: set(one.needs) for name, one in bound.items()} == NEEDS
    spared = {name: set(one.needs - one.credit_needs) for name, one in bound.items()}
    assert {name: columns for name, columns in spared.items() if columns} == FOR_LOSSES_ALONE


@pytest.mark.parametrize("name", Recipe.names())
def test_a_recipe_is_called_as_its_file_short_and_sourced(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.paper.startswith("arXiv:")
    assert len(recipe.idea.split()) <= 6
    assert recipe.reference
    text = resources.files("pipeline.algorithms").joinpath("recipes", f"{name}.toml").read_text()
    lines = text.splitlines()
    for part in ("# What matters", "where the number comes from", "# Left to the experiment: ", "# Not done"):
        assert part in text
    assert sum(1 for line in lines if line and not line.startswith("#")) <= 24
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", Recipe.names())
def test_a_recipe_says_what_the_three_systems_do_differently(name):
    differs = Recipe.load(name).differs
    assert set(differs) == {"verl", "OpenRLHF", "TRL"}
    assert all(text.startswith("not there") or text.endswith(".") for text in differs.values())
    assert all(text.count(". ") == 0 for text in differs.values())


def test_every_recipe_has_its_numbers_in_the_table():
    assert set(PAPERS) == set(Recipe.names())


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_its_papers_numbers(name):
    recipe = Recipe.load(name)
    sampling, pieces, stepping, rare = PAPERS[name]
    assert recipe.rollout.model_dump() == recipe.rollout.model_validate(sampling).model_dump()
    assert _pieces(bind(recipe)) == pieces
    assert (recipe.update.weights, recipe.update.epochs, recipe.update.minibatches) == stepping
    assert _rare(recipe) == rare


@golden("whole_loss")
def test_from_rewards_to_the_loss(case):
    bound, columns, expected = _of(case), case["inputs"]["columns"], case["outputs"]
    advantages, _ = credited(bound, columns)
    np.testing.assert_allclose(advantages, expected["advantages"], rtol=1e-6)
    tensors = {name: torch.tensor(columns[name], dtype=torch.float64) for name in columns if name.endswith("logprobs")}
    mask = torch.tensor(columns["mask"], dtype=torch.bool)
    tensors |= {"advantages": torch.from_numpy(advantages), "mask": mask}
    token_losses = [term.piece(tensors) for term in bound.losses]
    for token_loss, values in zip(token_losses, expected.get("terms", []), strict="terms" in expected):
        np.testing.assert_allclose(token_loss * mask, values, rtol=1e-6, atol=1e-8)
    weights = bound.weights(mask, torch.zeros(len(mask), dtype=torch.int64))
    loss = sum(term.coef * (weights * values).sum() for term, values in zip(bound.losses, token_losses, strict=True))
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)


@golden("credit")
def test_from_rewards_to_the_credit(case):
    advantages, returns = credited(_of(case), case["inputs"]["columns"])
    np.testing.assert_allclose(advantages, case["outputs"]["advantages"], rtol=1e-6, atol=1e-8)
    if "returns" in case["outputs"]:
        np.testing.assert_allclose(returns, case["outputs"]["returns"], rtol=1e-6)


@golden("reversed_lambdas")
def test_reversed_lambdas_can_be_written_and_are_not_what_vapo_does(case):
    columns, expected = case["inputs"]["columns"], case["outputs"]
    swapped, targets = credited(_of(case), columns)
    np.testing.assert_allclose(swapped, expected["advantages"], rtol=1e-6)
    np.testing.assert_allclose(targets, expected["returns"], rtol=1e-6)
    for name in ("vapo", "vc_ppo"):
        advantages, returns = credited(bind(Recipe.load(name).changed({"normalize": False})), columns)
        assert not np.allclose(advantages, swapped, atol=0.05)
        assert not np.allclose(returns, targets, atol=0.05)
        np.testing.assert_allclose(returns, np.ones_like(returns))


@golden("grpo_gradient")
def test_the_gradient_of_grpo_at_ratio_one(case):
    logprobs = torch.tensor([[case["inputs"]["logp"]]], dtype=torch.float64, requires_grad=True)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs.detach(),
        "ref_logprobs": torch.full_like(logprobs, case["inputs"]["ref_logp"], requires_grad=False),
        "advantages": torch.full_like(logprobs, case["inputs"]["A"], requires_grad=False),
        "mask": torch.ones(1, 1, dtype=torch.bool),
    }
    sum(term.coef * term.piece(tensors).sum() for term in bind(Recipe.load("grpo")).losses).backward()
    np.testing.assert_allclose(-logprobs.grad.item(), case["outputs"], rtol=1e-6)


@golden("dapo_credit")
def test_dapo_credits_the_shaped_reward_and_filters_on_the_verdict(case):
    inputs, expected = case["inputs"], case["outputs"]
    bound = bind(Recipe.load("dapo").changed({"rollout": {"group_size": 4}}))
    lengths = np.array(inputs["lengths"])
    columns = {
        "verdicts": np.array(inputs["verdicts"], np.float64),
        "group": np.zeros(len(lengths), np.int64),
        "mask": np.arange(lengths.max())[None, :] < lengths[:, None],
    }
    labels = bound.labeler(columns)
    assert bound.filters[0](columns).keep.tolist() == [expected["keep"]] * len(lengths)
    columns["rewards"] = on_last_token(labels.rewards.astype(np.float64), columns["mask"])
    columns["rewards"] = bound.shapers[0](columns)
    np.testing.assert_allclose(columns["rewards"].sum(axis=1), expected["shaped"], atol=1e-8)
    columns["advantages"] = bound.advantage(columns).advantages
    np.testing.assert_allclose(bound.normalizer(columns)[:, 0], expected["advantages"], rtol=1e-6)


def _clipped(**words):
    return {"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 0.2, **words}


VARIANTS = {
    "dr_grpo": ("grpo", {"normalize": False, "update": {"weights": "sequence_sum"}, "loss": [_clipped(coef=1 / 1024)]}),
    "dual_clip": ("dapo", {"loss": [_clipped(clip_high=0.28, dual_clip=10.0)]}),
    "overlong_filtering": ("dapo", {"loss": [_clipped(clip_high=0.28, on="finished")]}),
    "dapo_eq_8_as_printed": ("dapo", {"update": {"weights": "group_token_mean"}}),
    "adaptive_divergence_in_the_loss": ("grpo", {"kl_controller": {"target": 6.0}}),
    "fixed_divergence": ("ppo", {"kl_controller": False}),
    "k3_in_the_reward": ("instructgpt", {"shape": [{"kind": "kl_penalty", "estimator": "k3", "coef": 0.02}]}),
    "ppo_without_documents": ("instructgpt", {"mix": False}),
    "value_clip_of_verl": ("vapo", {"critic": {"loss": {"kind": "value_clipped", "clip": 0.5}}}),
    "truncated_importance": ("grpo", {"importance": {"kind": "sequence_truncated", "cap": 2.0}}),
    "a_random_half": ("ttrl", {"filter": [{"kind": "drawn", "n": 32}]}),
    "confidence_at_temperature_1": ("rlsc", {"update": {"temperature": 1.0}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_matter_of_settings(name):
    recipe, changes = VARIANTS[name]
    changed = Recipe.load(recipe).changed(changes)
    assert bind(changed).recipe != Recipe.load(recipe)


def test_dr_grpo_sums_centred_rewards_over_a_constant_length():
    recipe, changes = VARIANTS["dr_grpo"]
    bound = bind(Recipe.load(recipe).changed({**changes, "rollout": {"group_size": 2}, "loss": [_clipped(coef=1 / 4)]}))
    mask = np.array([[1, 0, 0], [1, 1, 1]])
    advantages, _ = credited(bound, {"rewards": [1.0, 0.0], "mask": mask})
    np.testing.assert_allclose(advantages, [[0.5, 0, 0], [-0.5, -0.5, -0.5]])
    (term,) = bound.losses
    weights = term.coef * bound.weights(torch.from_numpy(mask == 1), torch.zeros(2, dtype=torch.int64))
    np.testing.assert_allclose(weights, mask / (2 * 4))
