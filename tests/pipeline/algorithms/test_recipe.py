"""A recipe is plain data."""

import pytest

from pipeline.algorithms.recipe import LossLine, Recipe
from pipeline.algorithms.shelf import Line
from pipeline.errors import ExperimentError, RecipeError

MINIMAL = {
    "name": "mine",
    "paper": "none",
    "idea": "as little as possible",
    "rollout": {"group_size": 2},
    "label": {"kind": "verifier"},
    "advantage": {"kind": "outcome"},
    "loss": [{"kind": "policy_gradient"}],
    "update": {"weights": "token_mean"},
}


def test_a_known_name_is_read():
    recipe = Recipe.load("grpo")
    assert recipe.rollout.group_size == 64
    assert recipe.advantage == Line(kind="group_mean")
    assert recipe.loss[1] == LossLine(kind="kl", estimator="k3", coef=0.04)
    assert recipe.loss[1].settings == {"estimator": "k3"}


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(RecipeError) as error:
        Recipe.load("gpro")
    assert error.value.what == f"no recipe is called 'gpro'; there are: {', '.join(Recipe.names())}"
    assert error.value.do == "did you mean 'grpo'?"
    with pytest.raises(RecipeError, match="path of a TOML file"):
        Recipe.load("zzzzzz")


def test_a_path_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\npaper = "none"\nidea = "as little as possible"\nrollout = { group_size = 2 }\n'
        'label = { kind = "verifier" }\nadvantage = { kind = "outcome" }\nloss = [{ kind = "policy_gradient" }]\n'
        'update = { weights = "token_mean" }\n'
    )
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.read(MINIMAL)
    with pytest.raises(ExperimentError, match="no such file"):
        Recipe.load(tmp_path / "absent.toml")


def test_what_does_not_fit_is_named():
    broken = {**MINIMAL, "rollout": {"group_size": 0}, "losses": [], "update": {"weights": "mean"}}
    with pytest.raises(RecipeError) as error:
        Recipe.read(broken, where="recipe mine")
    assert error.value.where == "recipe mine"
    for part in ("rollout.group_size: Input should be greater than or equal to 1", "losses: Extra inputs", "'mean'"):
        assert part in error.value.what


def test_a_loss_without_terms_is_refused():
    with pytest.raises(RecipeError, match="loss: Tuple should have at least 1 item"):
        Recipe.read({**MINIMAL, "loss": []})


@pytest.mark.parametrize("name", Recipe.names())
def test_a_recipe_survives_json(name):
    recipe = Recipe.load(name)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.changed({}) == recipe


def test_changes_reach_into_tables_and_replace_lines_and_lists():
    changes = {
        "rollout": {"group_size": 8},
        "label": {"wrong": 0.0},
        "shape": [{"kind": "overlong_penalty", "limit": 1024, "buffer": 256}],
        "advantage": {"kind": "leave_one_out"},
        "normalize": False,
    }
    recipe = Recipe.load("dapo").changed(changes)
    assert recipe.changed(changes) == recipe
    assert (recipe.rollout.group_size, recipe.rollout.rounds) == (8, 10)
    assert recipe.label == Line(kind="verifier", correct=1.0, wrong=0.0)
    assert recipe.shape == (Line(kind="overlong_penalty", limit=1024, buffer=256),)
    assert recipe.advantage == Line(kind="leave_one_out")
    assert recipe.normalize is None
    assert recipe.changed({"normalize": {"kind": "whiten"}}).normalize == Line(kind="whiten")


def test_a_line_with_a_kind_stands_as_written():
    assert Recipe.load("dapo").changed({"label": {"kind": "verifier"}}).label == Line(kind="verifier")


def test_a_bad_change_says_where():
    with pytest.raises(RecipeError) as error:
        Recipe.load("grpo").changed({"rollout": {"groupsize": 8}})
    assert error.value.what == "rollout.groupsize: Extra inputs are not permitted [input_value=8]"
    assert error.value.where == "changes to recipe grpo"


def test_false_takes_out_only_what_is_optional():
    with pytest.raises(RecipeError, match="label"):
        Recipe.load("grpo").changed({"label": False})


def test_a_critic_is_changed_field_by_field_and_its_loss_as_a_line():
    recipe = Recipe.load("ppo")
    assert recipe.changed({"critic": {"start": "policy"}}).critic.loss == Line(kind="value_clipped", clip=0.2)
    squared = recipe.changed({"critic": {"loss": {"kind": "value_squared"}}}).critic
    assert (squared.start, squared.loss) == ("reward_model", Line(kind="value_squared"))


@pytest.mark.parametrize("part", ["sft", "mix", "critic", "normalize"])
def test_false_takes_out_a_part_and_its_table_puts_it_back(part):
    recipe = Recipe.load("instructgpt")
    without = recipe.changed({part: False})
    assert getattr(without, part) is None
    assert without.changed({part: recipe.model_dump()[part]}) == recipe


def test_log_probabilities_are_at_the_temperature_of_the_sampling_unless_told_otherwise():
    recipe = Recipe.load("rlsc")
    assert recipe.temperature == recipe.rollout.temperature == 0.5
    other = recipe.changed({"update": {"temperature": 1.0}})
    assert (other.temperature, other.rollout.temperature) == (1.0, 0.5)


def test_scaling_the_divergence_touches_its_coefficients_and_nothing_else():
    recipe = Recipe.load("grpo").changed(
        {"shape": [{"kind": "overlong_penalty", "limit": 8, "buffer": 4}, {"kind": "kl_penalty", "coef": 0.2}]}
    )
    scaled = recipe.with_divergence_scaled(1.5)
    assert scaled == recipe.changed(
        {
            "shape": [{"kind": "overlong_penalty", "limit": 8, "buffer": 4}, {"kind": "kl_penalty", "coef": 0.2 * 1.5}],
            "loss": [recipe.loss[0].model_dump(), {**recipe.loss[1].model_dump(), "coef": 0.04 * 1.5}],
        }
    )
    assert recipe.with_divergence_scaled(1.0) == recipe
