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

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "recipes.json").read_text())
NEEDS = {
    "dapo": {"old_logprobs"},
    "grpo": {"old_logprobs", "ref_logprobs"},
}


def test_the_table_of_needs_is_complete():
    assert {name: set(bind(Recipe.load(name)).needs) for name in Recipe.names()} == NEEDS


@pytest.mark.parametrize("name", Recipe.names())
def test_a_recipe_is_called_as_its_file_short_and_sourced(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.paper.startswith("arXiv:")
    assert len(recipe.idea.split()) <= 7
    text = resources.files("pipeline.algorithms").joinpath("recipes", f"{name}.toml").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert sum(1 for line in lines if line and not line.startswith("#")) <= 20


def test_grpo_has_the_papers_numbers():
    recipe = Recipe.load("grpo")
    assert (recipe.rollout.group_size, recipe.rollout.temperature, recipe.rollout.rounds) == (64, 1.0, 1)
    clipped, divergence = bind(recipe).losses
    assert (clipped.coef, dict(clipped.piece.settings)) == (1.0, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None})
    assert (divergence.coef, dict(divergence.piece.settings)) == (0.04, {"estimator": "k3"})
    assert (recipe.update.weights, recipe.update.epochs, recipe.update.minibatches) == ("sequence_mean", 1, 1)


def test_dapo_has_the_papers_numbers():
    recipe = Recipe.load("dapo")
    bound = bind(recipe)
    assert (recipe.rollout.group_size, recipe.rollout.rounds, recipe.rollout.top_p) == (16, 10, 1.0)
    assert bound.labeler.settings == {"correct": 1.0, "wrong": -1.0}
    assert [piece.name for piece in bound.filters] == ["mixed_outcomes"]
    assert [dict(piece.settings) for piece in bound.shapers] == [{"limit": 20480, "buffer": 4096}]
    (clipped,) = bound.losses
    assert dict(clipped.piece.settings) == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}
    assert (recipe.update.weights, recipe.update.epochs, recipe.update.minibatches) == ("token_mean", 1, 16)


@pytest.mark.parametrize("case", GOLDEN["whole_loss"], ids=lambda case: case["name"])
def test_from_rewards_to_the_loss(case):
    inputs, expected = case["inputs"], case["outputs"]
    bound = bind(
        Recipe.load(inputs["recipe"]).changed({"normalize": {"eps": inputs["eps"]}, "rollout": {"group_size": 2}})
    )
    mask = np.array(inputs["mask"], bool)
    columns = {
        "mask": mask,
        "group": np.zeros(len(mask), np.int64),
        "rewards": on_last_token(np.array(inputs["rewards"], np.float64), mask),
    }
    for shaper in bound.shapers:
        columns["rewards"] = shaper(columns)
    columns["advantages"] = bound.advantage(columns).advantages
    advantages = bound.normalizer(columns)
    np.testing.assert_allclose(advantages, np.where(mask, np.array(expected["advantages"])[:, None], 0), rtol=1e-6)

    tensors = {name: torch.tensor(inputs[name], dtype=torch.float64) for name in inputs if name.endswith("logprobs")}
    tensors["advantages"] = torch.from_numpy(advantages)
    weights, loss = bound.weights(torch.from_numpy(mask)), torch.zeros(())
    for term, values in zip(bound.losses, expected["terms"], strict=True):
        token_loss = term.piece(tensors)
        np.testing.assert_allclose(token_loss * torch.from_numpy(mask), values, rtol=1e-6, atol=1e-8)
        loss = loss + term.coef * (weights * token_loss).sum()
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["grpo_gradient"], ids=lambda case: case["name"])
def test_the_gradient_of_grpo_at_ratio_one(case):
    logprobs = torch.tensor([[case["inputs"]["logp"]]], dtype=torch.float64, requires_grad=True)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs.detach(),
        "ref_logprobs": torch.full_like(logprobs, case["inputs"]["ref_logp"], requires_grad=False),
        "advantages": torch.full_like(logprobs, case["inputs"]["A"], requires_grad=False),
    }
    sum(term.coef * term.piece(tensors).sum() for term in bind(Recipe.load("grpo")).losses).backward()
    np.testing.assert_allclose(-logprobs.grad.item(), case["outputs"], rtol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["dapo_credit"], ids=lambda case: case["name"])
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
