"""Padding, the order of rows, the border between parts and the size of micro-batches change no loss and no gradient."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.weights import WEIGHTS
from pipeline.artifacts import Artifact, Outbox
from pipeline.models import checkpoint
from pipeline.training import batches
from stages.advantage import Settings as AdvantageSettings
from stages.advantage import advantage
from stages.update import Improvement, Term

TOLERANCE = 1e-6


def gradient(run, table, policy, budget, order):
    """Loss and gradient of one optimizer step over all rows, cut into micro-batches of `budget` tokens."""
    recipe = run.experiment.recipe
    terms = [Term.of(line) for line in recipe.loss]
    objective = Improvement(table, terms, WEIGHTS[recipe.update.weights], recipe.temperature, one_step=True)
    model = checkpoint.load_policy(policy, "float32")
    weighed, total = objective.step(order), 0.0
    for micro in batches.micro_batches(order, objective.lengths, budget):
        losses = objective.losses(model, micro, weighed)
        losses.total.backward()
        total += float(losses.total.detach())
    return total, torch.cat([p.grad.double().flatten() for p in model.parameters()])


def rearranged(artifact, out, order, parts):
    """The same rows with their groups in another order and in other parts."""
    table = artifact.table()
    ids = table["prompt_id"].to_pylist()
    rows = {}
    for row, prompt in enumerate(ids):
        rows.setdefault(prompt, []).append(row)
    box = Outbox(out, artifact.contract, "hand", 1, "0" * 64, {}, {})
    for index, groups in enumerate(np.array_split(order, parts)):
        picked = [row for group in groups for row in rows.get(group, [])]
        if picked:
            box.write(index, table.take(picked))
    return box.commit()


def close(one, other):
    (loss, grad), (other_loss, other_grad) = one, other
    assert other_loss == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE * max(1.0, abs(loss)))
    assert float((grad - other_grad).norm() / grad.norm()) < TOLERANCE


@pytest.fixture(params=Recipe.names())
def made(request, walked):
    """A recipe's run and its second iteration: the policy has moved, so ratios and divergences are not trivial."""
    run = walked(request.param)
    here = run.iteration(1)
    return run, here, Artifact.open(here / "advantages").table()


def rows_of(table):
    return np.arange(table.num_rows)


def test_the_size_of_micro_batches_and_their_padding(made):
    run, here, table = made
    whole = gradient(run, table, here / "policy", 10**9, rows_of(table))
    assert float(whole[1].norm()) > 0
    for budget in (1, 50, 200):
        close(whole, gradient(run, table, here / "policy", budget, rows_of(table)))


def test_the_order_of_rows(made):
    run, here, table = made
    order = np.random.default_rng(0).permutation(table.num_rows)
    whole = gradient(run, table, here / "policy", 300, rows_of(table))
    close(whole, gradient(run, table, here / "policy", 300, order))
    close(whole, gradient(run, table.take(order), here / "policy", 300, rows_of(table)))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_order_of_groups_and_the_border_between_parts(made, tmp_path, parts):
    run, here, table = made
    kept = {name: sorted(here.glob(f"{name}-*")) for name in ("rollouts", "labels")}
    groups = sorted({p for path in kept["rollouts"] for p in Artifact.open(path).table()["prompt_id"].to_pylist()})
    order = np.random.default_rng(parts).permutation(groups)
    moved = {
        name: [rearranged(Artifact.open(path), tmp_path / path.name, order, parts).path for path in paths]
        for name, paths in kept.items()
    }
    scores = None
    if (here / "scores").exists():
        scores = rearranged(Artifact.open(here / "scores"), tmp_path / "scores", order, parts).path
    settings = AdvantageSettings.of(None, Artifact.open(here / "advantages").manifest.settings)
    anew = advantage.run(tmp_path / "advantages", settings, scores=scores, **moved).table()
    same = pa.concat_tables([anew])
    place = {key: row for row, key in enumerate(keys(same))}
    back = same.take([place[key] for key in keys(table)])
    for name in ("advantages", "returns"):
        one, other = (np.array(t[name].combine_chunks().flatten().to_pylist(), float) for t in (table, back))
        assert other == pytest.approx(one, rel=TOLERANCE, abs=TOLERANCE)
    close(
        gradient(run, table, here / "policy", 300, rows_of(table)),
        gradient(run, anew, here / "policy", 300, rows_of(anew)),
    )


def keys(table):
    return list(zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
