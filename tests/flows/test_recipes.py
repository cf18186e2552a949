"""Every recipe walks the loop three times on the built-in world, sampled by vLLM, and runs the models that it needs."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flows import compare
from flows.execute import check, walk
from flows.run import Run
from pipeline.algorithms.recipe import Recipe
from pipeline.artifacts import Artifact
from pipeline.catalog import artifacts_of, gather_metrics
from pipeline.contracts import METRICS
from pipeline.experiment import Experiment
from pipeline.models import checkpoint

OF_MODELS = {
    name: set(needs)
    for name, needs in json.loads((Path(__file__).parents[1] / "golden" / "needs.json").read_text()).items()
}
"""Columns that models fill, recipe by recipe: what a run is seen to make."""


def columns_of_models(run: Run, iteration: int) -> set[str]:
    found: set[str] = set()
    for path in run.iteration(iteration).glob("*"):
        if path.name.startswith(("scores", "judgements")):
            found |= set(Artifact.open(path).table().column_names) - {"prompt_id", "sample"}
    return found


def test_every_recipe_is_walked():
    assert set(OF_MODELS) == set(Recipe.names())


@pytest.mark.parametrize("name", sorted(OF_MODELS))
def test_three_iterations_with_the_models_that_the_recipe_needs(walked, name):
    run = walked(name)
    check(run.experiment)
    for iteration in range(3):
        assert columns_of_models(run, iteration) == OF_MODELS[name]
        assert (run.iteration(iteration) / "critic").exists() == ("values" in OF_MODELS[name])
    policies = [Artifact.open(run.iteration(i) / "policy") for i in range(3)]
    assert len({policy.manifest.digest for policy in policies}) == 3
    for policy in policies:
        checkpoint.inspect(policy.path)
    for artifact in artifacts_of(run.folder):
        artifact.check()
    metrics = gather_metrics(run.folder)
    METRICS.check(metrics)
    assert all(math.isfinite(value) for value in metrics["value"].to_pylist())


def test_the_policy_of_human_feedback_has_a_fine_tuning_of_its_own_and_keeps_an_average(walked):
    run = walked("instructgpt")
    own = Artifact.open(run.base / f"sft-{run.experiment.recipe.name}")
    assert own.manifest.settings["documents_share"] == 0.1
    first = Artifact.open(run.iteration(0) / "policy").manifest.inputs
    assert first["policy"][0].digest == own.manifest.digest
    scores = Artifact.open(run.iteration(2) / "scores").manifest.inputs
    assert scores["reference"][0].digest == own.manifest.digest
    candidates = Artifact.open(run.base / "candidates").manifest.inputs
    assert candidates["policy"][0].digest == Artifact.open(run.base / "sft").manifest.digest
    last = run.iteration(2) / "policy"
    checkpoint.inspect(last / "ema")
    assert "loss/documents" in pq.read_table(last / "metrics.parquet")["name"].to_pylist()


def test_greedy_responses_lie_beside_the_sampled_ones_and_do_not_train(walked):
    run = walked("remax")
    labels = Artifact.open(run.iteration(0) / "labels-0").table()
    greedy = labels.filter(pc.equal(labels["sample"], -1))
    assert greedy["keep"].to_pylist() == [False] * run.experiment.scale.groups
    assert -1 not in Artifact.open(run.iteration(0) / "advantages").table()["sample"].to_pylist()


def test_value_pretraining_learns_monte_carlo_returns_before_the_loop(walked):
    run = walked("vapo")
    table = Artifact.open(run.folder / "pretraining" / "advantages").table()
    for reward, returns in zip(table["reward"].to_pylist(), table["returns"].to_pylist(), strict=True):
        assert returns == pytest.approx([reward] * len(returns))
    critic = Artifact.open(run.folder / "pretraining" / "critic")
    names = set(pq.read_table(critic.path / "metrics.parquet")["name"].to_pylist())
    assert {"value/explained_variance_before", "value/explained_variance", "loss/value_after"} <= names


def test_the_controller_moves_the_price_of_divergence(walked):
    run = walked("ppo")
    prices = [Artifact.open(run.iteration(i) / "advantages").manifest.settings["shape"][0]["coef"] for i in range(3)]
    first = Artifact.open(run.iteration(0) / "scores").stats
    controller = run.experiment.recipe.kl_controller
    assert prices[1] == pytest.approx(prices[0] * controller.next(1.0, first["kl/reference_sum"], int(first["rows"])))
    assert prices[2] != prices[1]


def test_stored_rollouts_are_credited_anew_by_every_recipe_whose_needs_they_meet(walked):
    run = walked("rloo")
    rollouts = run.iteration(0) / "rollouts-0"
    before = (rollouts / "manifest.json").stat().st_mtime_ns
    made = compare.compare(compare.stored(run.folder, 0), Recipe.names())
    assert {one.recipe for one in made.credited} == {
        "dapo", "grpo", "reinforce_pp", "reinforce_pp_baseline", "rloo", "rlsc", "ttrl",
    }  # fmt: skip
    assert "greedy" in made.unmet["remax"]
    assert all("values" in made.unmet[name] for name in ("ppo", "instructgpt", "vapo", "vc_ppo"))
    correlation, flips = made.agreement()
    assert correlation.diagonal() == pytest.approx(1.0, nan_ok=True)
    assert (flips.diagonal() == 0).all()
    own = next(one for one in made.credited if one.recipe == "rloo")
    places = compare._places(made.stored.rollouts)
    assert own.tokens == pytest.approx(places.spread(Artifact.open(run.iteration(0) / "advantages")))
    assert (rollouts / "manifest.json").stat().st_mtime_ns == before
    page = compare.picture(made)
    text = page.read_text(encoding="utf-8")
    assert "opposite signs" in text
    assert "<script src" not in text


def test_stored_rewards_can_stand_in_for_what_a_labeler_would_need(walked):
    run = walked("dapo")
    source = compare.stored(run.folder, 0)
    assert set(compare.compare(source, ["rlsc", "rloo"]).unmet) == {"rloo"}
    (credited,) = compare.compare(source, ["rlsc"], "stored").credited
    table = Artifact.open(run.iteration(0) / "advantages").table()
    assert credited.rows == table.num_rows
    assert set(credited.tokens[~np.isnan(credited.tokens)]) == set(table["reward"].to_pylist())


def test_a_walked_run_is_read_back_and_not_walked_again(walked):
    run = walked("grpo")
    times = {a.path: (a.path / "manifest.json").stat().st_mtime_ns for a in artifacts_of(run.folder)}
    walk(run)
    assert times == {a.path: (a.path / "manifest.json").stat().st_mtime_ns for a in artifacts_of(run.folder)}


def test_rankings_that_people_made_take_the_place_of_sampled_candidates(recipes_folder, walked):
    sums = [(a, b) for a in range(1, 7) for b in range(1, 7)]
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": f"{a}+{b}={a + b};{a + b}", "rejected": f"{a}+{b}={a};{a}"} for a, b in sums
    ]
    (recipes_folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = [f"data.folder={recipes_folder}", "data.rankings.files=['pairs.jsonl']", "scale.iterations=1"]
    experiment = Experiment.load(recipes_folder / "small.toml", ["base=ranked", *given], "rloo", "ranked-rloo")
    run = Run(experiment, recipes_folder / "runs", walked("rloo").perform)
    walk(run)
    assert Artifact.open(run.base / "rankings").stats["rows"] == len(pairs)
    assert not (run.base / "candidates").exists()
    assert columns_of_models(run, 0) == OF_MODELS["rloo"]
