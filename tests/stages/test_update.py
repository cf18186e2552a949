import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.weights import WEIGHTS
from pipeline.contracts import ADVANTAGES
from pipeline.errors import ArtifactError, ContractError, NumericsError
from pipeline.metrics import Metrics
from pipeline.models.checkpoint import load_policy
from pipeline.models.forward import response_logprobs
from pipeline.seeds import derive
from pipeline.training.loop import Plan, fit
from pipeline.training.optimizer import adamw, constant
from stages.update import Improvement, Settings, Term, update


def settings(recipe="grpo", minibatches=1, epochs=1, **changes):
    chosen = Recipe.load(recipe)
    plan = chosen.update.model_copy(update={"minibatches": minibatches, "epochs": epochs})
    return Settings.of(None, {"loss": chosen.loss, "update": plan, "learning_rate": 1e-3, "seed": 3, **changes})


def weights_of(path_or_model):
    model = path_or_model
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def far(one, other):
    """Distance relative to the length of the first."""
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one))


def logprobs(path, rows):
    """Log-probabilities of the responses' tokens, one list per row."""
    model = load_policy(path, "float32")
    with torch.no_grad():
        read = response_logprobs(model, [r["prompt_tokens"] for r in rows], [r["response_tokens"] for r in rows])
    return [values[mask].tolist() for values, mask in zip(read.logprobs, read.mask, strict=True)]


@pytest.fixture(scope="module")
def table(rollouts, policy, other_policy, by_hand):
    """Twelve responses of several lengths with advantages of both signs, and the log-probabilities they have."""
    rows = rollouts.table().to_pylist()[:12]
    signs = np.resize([1.0, -1.0, 0.5], len(rows))
    old, ref = logprobs(policy.path, rows), logprobs(other_policy, rows)
    made = [
        {
            "prompt_id": r["prompt_id"], "sample": r["sample"], "prompt_tokens": r["prompt_tokens"],
            "response_tokens": r["response_tokens"], "advantages": [sign] * len(r["response_tokens"]), "returns": None,
            "old_logprobs": o, "ref_logprobs": f, "reward": sign, "shaped_reward": sign, "correct": sign > 0,
        }
        for r, sign, o, f in zip(rows, signs, old, ref, strict=True)
    ]  # fmt: skip
    assert len({len(r["response_tokens"]) for r in made}) > 1
    return by_hand(ADVANTAGES, made[:8], made[8:])


def objective(table, recipe="grpo"):
    chosen = Recipe.load(recipe)
    return Improvement(table, [Term.of(line) for line in chosen.loss], WEIGHTS[chosen.update.weights], 1.0)


def gradient(model, wanted, budget):
    """The gradient of one step over the first eight rows, by plain descent with rate 1."""
    before = weights_of(model)
    step = wanted.step(np.arange(8))
    for start in range(0, 8, budget):
        wanted.losses(model, np.arange(8)[start : start + budget], step).total.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    model.zero_grad()
    assert torch.equal(before, weights_of(model))
    return found


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_the_gradient_depends_neither_on_micro_batches_nor_on_padding(table, policy, recipe):
    model, whole = load_policy(policy.path, "float32"), table.table()
    together = gradient(model, objective(whole, recipe), 8)
    assert torch.linalg.vector_norm(together) > 0
    for budget in (1, 3):
        assert far(together, gradient(model, objective(whole, recipe), budget)) < 1e-6
    long = {**whole.to_pylist()[-1], "sample": 99, "response_tokens": [5] * 40}
    long |= {name: [-1.0] * 40 for name in ("advantages", "old_logprobs", "ref_logprobs")}
    padded = pa.concat_tables([whole, pa.Table.from_pylist([long], schema=whole.schema)])
    assert far(together, gradient(model, objective(padded, recipe), 8)) < 1e-6


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_the_policy_does_not_depend_on_what_fits_into_memory(table, policy, room, recipe):
    made = [
        update.run(
            room / f"update-{recipe}-{budget}", settings(recipe, minibatches=3, micro_batch_tokens=budget),
            advantages=table.path, policy=policy.path,
        )
        for budget in (1, 40, 10**6)
    ]  # fmt: skip
    one, *others = [weights_of(artifact.path) for artifact in made]
    moved = far(weights_of(policy.path), one)
    assert moved > 1e-3
    assert all(far(one, other) < 1e-6 + 1e-4 * moved for other in others)


def test_the_loss_is_that_of_the_paper(table, policy, other_policy):
    """GRPO at ratio 1: mean over responses of the token mean of -A + 0.04 k3."""
    model, rows = load_policy(policy.path, "float32"), table.table().to_pylist()
    wanted = objective(table.table())
    everything = np.arange(len(rows))
    losses = wanted.losses(model, everything, wanted.step(everything))
    terms = []
    for row in rows:
        d = np.array(row["old_logprobs"]) - np.array(row["ref_logprobs"])
        terms.append((-row["advantages"][0], float((np.exp(-d) + d - 1).mean())))
    surrogate, divergence = np.mean(terms, axis=0)
    assert float(losses.total.detach()) == pytest.approx(surrogate + 0.04 * divergence, rel=1e-4)
    assert losses.parts["loss/clipped_surrogate"] == pytest.approx(surrogate, rel=1e-4)
    assert losses.parts["loss/kl"] == pytest.approx(divergence, rel=1e-4)
    assert losses.parts["kl/old"] == pytest.approx(0, abs=1e-9)
    assert losses.parts["clip/low"] == losses.parts["clip/high"] == 0
    counts = np.array([len(row["response_tokens"]) for row in rows])
    reference = sum(
        np.sum(np.exp(-d) + d - 1) for row in rows for d in [np.array(row["old_logprobs"]) - row["ref_logprobs"]]
    )
    assert losses.parts["kl/reference"] == pytest.approx(reference / counts.sum(), rel=1e-4)


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_rewarded_responses_become_likelier_and_punished_ones_less(by_hand, table, policy, tmp_path, recipe):
    rows = {tuple(row["response_tokens"]): row for row in table.table().to_pylist()}
    (_, good), (_, bad), *_ = sorted(rows.items())
    changes = ({"sample": 0, "prompt_id": "p", "advantages": [1.0] * len(good["response_tokens"])},
               {"sample": 1, "prompt_id": "p", "advantages": [-1.0] * len(bad["response_tokens"])})  # fmt: skip
    pair = [{**row, **change} for row, change in zip((good, bad), changes, strict=True)]
    made = update.run(
        tmp_path / "out", settings(recipe, learning_rate=3e-4), advantages=by_hand(ADVANTAGES, pair).path,
        policy=policy.path,
    )  # fmt: skip
    before, after = (np.array([sum(row) for row in logprobs(path, pair)]) for path in (policy.path, made.path))
    assert after[0] - after[1] > before[0] - before[1] + 1e-3


def test_a_term_for_correct_responses_alone(by_hand, table, policy):
    """`on = "correct"`: its mean is over the tokens of correct responses, and the others get no gradient."""
    rows = table.table().to_pylist()
    line = {"kind": "nll", "on": "correct", "coef": 0.5}
    chosen = Recipe.load("grpo").changed({"loss": [line]})
    wanted = Improvement(table.table(), [Term.of(chosen.loss[0])], WEIGHTS["token_mean"], 1.0)
    everything = np.arange(len(rows))
    losses = wanted.losses(load_policy(policy.path, "float32"), everything, wanted.step(everything))
    right = np.concatenate([row["old_logprobs"] for row in rows if row["correct"]])
    assert losses.parts["loss/nll"] == pytest.approx(-right.mean(), rel=1e-4)
    assert float(losses.total.detach()) == pytest.approx(-0.5 * right.mean(), rel=1e-4)


def test_two_updates_equal_one_process_that_does_both(table, policy, room, numbers):
    chosen = settings(minibatches=4, warmup_steps=6)
    first = update.run(room / "first", chosen, advantages=table.path, policy=policy.path)
    second = update.run(room / "second", chosen, advantages=table.path, policy=first.path)

    model = load_policy(policy.path, "float32")
    optimizer, taken = adamw(model, chosen.learning_rate, chosen.weight_decay), 0
    for _ in range(2):
        plan = Plan(1, 4, chosen.micro_batch_tokens, chosen.gradient_clip, derive(3, "update", taken), taken)
        taken = fit(
            model, objective(table.table()), optimizer, constant(chosen.warmup_steps), plan, Metrics("run", None, "s")
        )
    assert taken == second.stats["steps"] == 8
    assert far(weights_of(model), weights_of(second.path)) < 1e-9
    rates = [
        numbers(artifact)["learning_rate", step]
        for artifact, step in [(first, 1), (first, 4), (second, 5), (second, 8)]
    ]
    assert rates == pytest.approx([1e-3 / 7, 4e-3 / 7, 5e-3 / 7, 1e-3])
    assert min(step for name, step in numbers(second) if name == "loss/total") == 5


def test_moments_of_the_optimizer_matter_and_are_kept(table, policy, room, tmp_path):
    chosen = settings(minibatches=4)
    first = update.run(room / "with moments", chosen, advantages=table.path, policy=policy.path)
    with_state = update.run(tmp_path / "with", chosen, advantages=table.path, policy=first.path)
    for path in first.path.iterdir():
        if path.name not in ("trainer", "manifest.json"):
            (tmp_path / "bare").mkdir(exist_ok=True)
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    without = update.run(tmp_path / "without", chosen, advantages=table.path, policy=tmp_path / "bare")
    assert with_state.stats["steps"] == 8
    assert without.stats["steps"] == 4
    assert far(weights_of(with_state.path), weights_of(without.path)) > 1e-5
    (tmp_path / "bare" / "trainer").mkdir()
    (tmp_path / "bare" / "trainer" / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ArtifactError, match="optimizer state"):
        update.run(tmp_path / "broken", chosen, advantages=table.path, policy=tmp_path / "bare")


def test_the_result_is_a_policy_and_the_same_twice(advantages, policy, room, sound):
    one, two = (
        update.run(room / name, settings(minibatches=2), advantages=advantages.path, policy=policy.path)
        for name in ("updated", "updated again")
    )
    sound(one)
    assert one.manifest.digest == two.manifest.digest
    assert far(weights_of(policy.path), weights_of(one.path)) > 0
    assert sorted(path.name for path in one.path.iterdir()) == sorted(
        [*(path.name for path in policy.path.iterdir()), "trainer"]
    )


def test_another_seed_deals_the_rows_differently(table, policy, room):
    digests = {
        update.run(
            room / f"seed-{seed}", settings(minibatches=4, seed=seed), advantages=table.path, policy=policy.path
        ).manifest.digest
        for seed in (1, 2)
    }
    assert len(digests) == 2


def test_fewer_rows_than_minibatches(table, policy, tmp_path):
    with pytest.raises(ContractError, match="12 rows cannot be dealt to 13 minibatches"):
        update.run(tmp_path / "out", settings(minibatches=13), advantages=table.path, policy=policy.path)
    assert not (tmp_path / "out").exists()


def test_steps_and_epochs(table, policy, room, numbers):
    made = update.run(
        room / "epochs", settings("dapo", minibatches=12, epochs=2), advantages=table.path, policy=policy.path
    )
    assert made.stats["steps"] == 24
    steps = {step for name, step in numbers(made) if name == "grad/norm"}
    assert steps == set(range(1, 25))


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_clip_metrics_count_the_tokens_whose_gradient_stops(by_hand, table, policy, tmp_path, numbers, recipe):
    """Old log-probabilities one nat lower: every ratio is e, above both clips; one nat higher: 1/e, below."""
    rows = table.table().to_pylist()
    shifted = [{**row, "old_logprobs": [value - 1 for value in row["old_logprobs"]]} for row in rows]
    counts = np.array([len(row["response_tokens"]) for row in rows])
    positive = np.array([row["advantages"][0] > 0 for row in rows])
    made = update.run(
        tmp_path / "above", settings(recipe), advantages=by_hand(ADVANTAGES, shifted).path, policy=policy.path
    )
    measured = numbers(made)
    assert measured["clip/high", 1] == pytest.approx(counts[positive].sum() / counts.sum(), rel=1e-5)
    assert measured["clip/low", 1] == 0
    assert measured["kl/old", 1] == pytest.approx(math.exp(-1) + 1 - 1, rel=1e-4)
    certain = [{**row, "old_logprobs": [0.0] * len(row["old_logprobs"])} for row in rows]
    below = [
        sum(math.exp(value) < 0.8 for value in row["old_logprobs"]) * (row["advantages"][0] < 0) for row in rows
    ]  # fmt: skip
    made = update.run(
        tmp_path / "below", settings(recipe), advantages=by_hand(ADVANTAGES, certain).path, policy=policy.path
    )
    assert sum(below) > 0
    assert numbers(made)["clip/low", 1] == pytest.approx(sum(below) / counts.sum(), rel=1e-5)
    assert numbers(made)["clip/high", 1] == 0


def test_the_numbers_of_a_step_have_units(table, policy, room):
    made = update.run(room / "units", settings(), advantages=table.path, policy=policy.path)
    metrics = pa.parquet.read_table(made.path / "metrics.parquet").to_pylist()
    units = {row["name"]: row["unit"] for row in metrics}
    assert units["entropy/mean"] == units["kl/old"] == units["kl/reference"] == "nat"
    assert units["clip/low"] == units["clip/high"] == "fraction"
    assert {row["value"] > 0 for row in metrics if row["name"] == "entropy/mean"} == {True}


def test_a_loss_that_is_not_finite_names_the_rows(by_hand, table, policy, tmp_path):
    rows = table.table().to_pylist()
    rows[5] = {**rows[5], "advantages": [3e38] * len(rows[5]["response_tokens"])}
    rows[5]["old_logprobs"] = [value - 5 for value in rows[5]["old_logprobs"]]
    name = f"{rows[5]['prompt_id']}/{rows[5]['sample']}"
    chosen = Recipe.load("grpo").changed({"loss": [{"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 99.0}]})
    with pytest.raises(NumericsError) as error:
        update.run(
            tmp_path / "out", settings(loss=chosen.loss), advantages=by_hand(ADVANTAGES, rows).path, policy=policy.path
        )
    assert name in error.value.where
    assert error.value.where.count("/") == 1
