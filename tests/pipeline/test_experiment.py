"""Experiments: read, changed, resolved, and read again."""

import pytest

from pipeline.algorithms.recipe import Recipe
from pipeline.errors import ExperimentError, RecipeError
from pipeline.experiment import Experiment


def loaded(path, *assignments, **choices):
    return Experiment.load(path, assignments, **choices)


def refusal(path, *assignments, **choices):
    with pytest.raises(ExperimentError) as caught:
        loaded(path, *assignments, **choices)
    return caught.value


@pytest.mark.parametrize("recipe", ["dapo", "grpo"])
@pytest.mark.parametrize(
    "assignments",
    [
        (),
        ("name=ü 1.5 +x", "seed=7", "sft.enabled=true"),
        ("models.policy=some/where", "data.demonstrations=", "sft.enabled=false"),
    ],
)
def test_a_resolved_experiment_reads_back_as_itself(experiment_file, tmp_path, recipe, assignments):
    first = loaded(experiment_file, *assignments, recipe=recipe)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(first.dump(), encoding="utf-8")
    second = loaded(resolved)
    assert second == first
    resolved.write_text(second.dump(), encoding="utf-8")
    assert loaded(resolved) == first and second.dump() == first.dump()


def test_changes_are_applied_once_and_recorded(experiment_file):
    experiment = loaded(experiment_file)
    published = Recipe.load("dapo")
    assert experiment.recipe.rollout.group_size == 4 and experiment.recipe.rollout.rounds == 2
    assert experiment.recipe.rollout.temperature == published.rollout.temperature
    assert [line.settings for line in experiment.recipe.shape] == [{"limit": 32, "buffer": 8}]
    assert experiment.recipe.normalize is None and published.normalize is not None
    assert experiment.recipe.loss == published.loss
    assert set(experiment.recipe_changes) == {"dapo", "grpo"}


def test_another_recipe_takes_its_own_changes_and_no_others(experiment_file, tmp_path):
    asked = loaded(experiment_file, recipe="grpo")
    published = Recipe.load("grpo")
    assert asked.recipe == published.changed({"rollout": {"group_size": 5}, "update": {"minibatches": 1}})
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(loaded(experiment_file).dump(), encoding="utf-8")
    assert loaded(resolved, recipe="grpo").recipe == asked.recipe


def test_names_come_from_the_caller_the_file_and_its_place_in_this_order(experiment_file):
    assert (loaded(experiment_file).name, loaded(experiment_file).base) == ("small", "small-base")
    assert loaded(experiment_file, "name=told").name == "told"
    assert loaded(experiment_file, "name=told", name="asked").name == "asked"
    assert loaded(experiment_file, "base=b").base == "b"


def test_a_recipe_can_be_a_file(experiment_file, tmp_path):
    path = tmp_path / "mine.toml"
    text = experiment_file.read_text().replace('recipe = "dapo"', "")
    lines = 'name = "mine"\npaper = "p"\nidea = "i"\nlabel = {kind = "verifier"}\nadvantage = {kind = "group_mean"}\n'
    lines += 'loss = [{kind = "policy_gradient"}]\nupdate = {weights = "token_mean"}\nrollout = {group_size = 2}\n'
    path.write_text(lines)
    experiment_file.write_text(f'recipe = "{path}"\n{text}')
    assert loaded(experiment_file).recipe.name == "mine"


@pytest.mark.parametrize(
    ("assignment", "place"),
    [
        ("sclae.groups=1", "sclae"), ("scale.gruops=1", "scale.gruops"), ("scale.groups=many", "scale.groups"),
        ("scale.groups=0", "scale.groups"), ("scale=5", "scale"), ("data.prompts=", "data.prompts"),
        ("data.prompts.files=3", "data.prompts.files"), ("resources.launcher=ssh", "resources.launcher"),
        ("evaluation.top_p=1.5", "evaluation.top_p"),
        ("evaluation.temperature=0", "evaluation.temperature"), ("name=2024-01-02", "name"), ("seed=1.5", "seed"),
        ("recipe=5", "recipe"), ("recipe_changes=5", "recipe_changes"), ("recipe_changes=x", "recipe_changes"),
        ("recipe_changes.dapo=5", "recipe_changes.dapo"), ("recipe_changes.dapo=false", "recipe_changes.dapo"),
        ("recipe_changes.dpao.name=x", "recipe_changes.dpao"), ("models.policy=7", "models.policy"),
    ],
)  # fmt: skip
def test_a_fault_names_file_place_and_value(experiment_file, assignment, place):
    error = refusal(experiment_file, assignment)
    assert error.where == str(experiment_file)
    assert error.what.startswith(f"{place}:") and error.do


def test_every_fault_of_a_file_is_told_at_once(experiment_file):
    what = refusal(experiment_file, "scale.groups=0", "seed=x", "nonsense=1").what
    assert len(what.splitlines()) == 3


def test_a_recipe_must_be_named_and_known(experiment_file):
    assert "names no recipe" in refusal(experiment_file, "recipe=").what
    for error in (refusal(experiment_file, "recipe=dpao"), refusal(experiment_file, recipe="dpao")):
        assert isinstance(error, RecipeError) and "dapo" in error.do
    assert isinstance(refusal(experiment_file, "recipe={name = 3}"), RecipeError)
    assert refusal(experiment_file, "recipe={name = 3}").where == str(experiment_file)


@pytest.mark.parametrize("change", ["rollout.group_sise=4", "update.epochs=0", "rollout.group_size=0"])
def test_a_change_that_does_not_fit_the_recipe_is_refused(experiment_file, change):
    error = refusal(experiment_file, f"recipe_changes.dapo.{change}")
    assert isinstance(error, RecipeError) and "dapo" in error.where


@pytest.mark.parametrize(
    ("assignments", "what"),
    [
        (("scale.groups=1", "recipe_changes.dapo.update.minibatches=5"), "4 responses per iteration cannot be dealt"),
        (("models.new={}",), "name a `policy`, or describe a `new` one"),
        (("sft.enabled=false",), "sft.enabled = false needs models.policy"),
        (("data.demonstrations=",), "sft needs data.demonstrations"),
        (("models.policy=x", "data.demonstrations="), "sft needs data.demonstrations"),
        (("sft.lora={rank=4}",), "sft.lora: a new model has no weights to adapt"),
        (("scale.lora={rank=4}", "recipe_changes.dapo.update.ema=0.9"), "update.ema averages whole weights"),
        (("scale.overlap=true",), "recipe_changes.dapo.importance="),
        (("resources.tensor_parallel=2", "resources.engine=transformers"), "transformers samples on one device"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(experiment_file, assignments, what):
    error = refusal(experiment_file, *assignments)
    assert what in error.what and error.where == str(experiment_file)


def test_a_policy_from_elsewhere_needs_neither_sft_nor_a_new_model(experiment_file):
    experiment = loaded(
        experiment_file, "models.policy=x", "models.new={}", "sft.enabled=false", "data.demonstrations="
    )
    assert experiment.models.policy == "x" and experiment.data.demonstrations is None


def test_no_file_and_no_toml_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "x.toml").what
    (tmp_path / "x.toml").write_text("recipe = ")
    assert refusal(tmp_path / "x.toml").where == str(tmp_path / "x.toml")


def test_responses_per_iteration_become_groups_of_the_recipes_size(experiment_file):
    text = experiment_file.read_text().replace("groups", "responses", 1)
    experiment_file.write_text(text)
    for size in (1, 4):
        given = ("scale.responses=8", f"recipe_changes.dapo.rollout.group_size={size}")
        experiment = loaded(experiment_file, *given, "recipe_changes.dapo.update.minibatches=1")
        assert experiment.scale.groups == 8 // size
        assert "responses =" not in experiment.dump().partition("[scale]")[2].partition("[evaluation]")[0]


@pytest.mark.parametrize(
    ("assignments", "what"),
    [
        (("scale.responses=8",), "both groups and responses"),
        (("scale.groups=", "scale.responses=1", "recipe_changes.dapo.rollout.group_size=2"), "at least"),
        (("scale.groups=", "scale.responses=many"), "found 'many'"),
    ],
)
def test_responses_that_make_no_groups_are_refused(experiment_file, assignments, what):
    error = refusal(experiment_file, *assignments)
    assert what in error.what and error.where == str(experiment_file)
