import math
import shutil
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.weights import WEIGHTS
from pipeline.contracts import ADVANTAGES
from pipeline.errors import ArtifactError, ContractError, ExperimentError, NumericsError
from pipeline.experiment import Experiment
from pipeline.metrics import Metrics
from pipeline.models.checkpoint import load_policy
from pipeline.models.forward import response_logprobs
from pipeline.seeds import derive
from pipeline.text import Chat
from pipeline.training.batches import dealt, drawn
from pipeline.training.imitation import windows
from pipeline.training.loop import Plan, fit
from pipeline.training.optimizer import adamw, constant
from stages.update import Improvement, Rehearsal, Settings, Term, update, with_documents


def settings(recipe="grpo", minibatches=1, epochs=1, ema=None, **changes):
    chosen = Recipe.load(recipe)
    plan = chosen.update.model_copy(update={"minibatches": minibatches, "epochs": epochs, "ema": ema})
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
            "finished": number % 4 != 1,
        }
        for number, (r, sign, o, f) in enumerate(zip(rows, signs, old, ref, strict=True))
    ]  # fmt: skip
    assert len({len(r["response_tokens"]) for r in made}) > 1
    return by_hand(ADVANTAGES, made[:8], made[8:])


def objective(table, recipe="grpo"):
    chosen = Recipe.load(recipe)
    return Improvement(table, [Term.of(line) for line in chosen.loss], WEIGHTS[chosen.update.weights], 1.0)


def gradient(model, wanted, budget=10**6, rows=None):
    """The gradient of one step over the given rows, by default the first eight, `budget` of them at a time."""
    before, rows = weights_of(model), np.arange(8) if rows is None else rows
    step = wanted.step(rows)
    for kind in wanted.passes(rows):
        for start in range(0, len(kind), budget):
            wanted.losses(model, kind[start : start + budget], step).total.backward()
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
        assert far(together, gradient(model, objective(whole, recipe), budget)) < 5e-6
    long = {**whole.to_pylist()[-1], "sample": 99, "response_tokens": [5] * 40}
    long |= {name: [-1.0] * 40 for name in ("advantages", "old_logprobs", "ref_logprobs")}
    padded = pa.concat_tables([whole, pa.Table.from_pylist([long], schema=whole.schema)])
    assert far(together, gradient(model, objective(padded, recipe), 8)) < 5e-6


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


def without_old(table, by_hand, **more):
    rows = [{name: value for name, value in row.items() if name != "old_logprobs"} for row in table.table().to_pylist()]
    return by_hand(
        ADVANTAGES, [{**row, **{name: column[i] for name, column in more.items()}} for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("recipe", ["grpo", "reinforce_pp_baseline", "dapo"])
def test_in_one_step_the_first_forward_pass_has_the_old_log_probabilities(table, by_hand, policy, room, recipe):
    """Equal gradients, and the same policy, as with the log-probabilities that `score` writes."""
    model, bare = load_policy(policy.path, "float32"), without_old(table, by_hand)
    chosen = Recipe.load(recipe)
    terms, weigh = [Term.of(line) for line in chosen.loss], WEIGHTS[chosen.update.weights]
    scored = gradient(model, Improvement(table.table(), terms, weigh, 1.0))
    assert torch.linalg.vector_norm(scored) > 0
    for budget in (8, 3):
        unscored = gradient(model, Improvement(bare.table(), terms, weigh, 1.0, one_step=True), budget)
        assert far(scored, unscored) < 1e-6
    one, other = (
        update.run(room / f"first-{recipe}-{name}", settings(recipe), advantages=given.path, policy=policy.path)
        for name, given in (("scored", table), ("bare", bare))
    )
    moved = far(weights_of(policy.path), weights_of(one.path))
    assert moved > 1e-3 and far(weights_of(one.path), weights_of(other.path)) < 1e-6 + 1e-4 * moved


@pytest.mark.parametrize("steps", [{"minibatches": 2}, {"epochs": 2}])
def test_of_several_steps_the_later_ones_need_what_score_wrote(table, by_hand, policy, tmp_path, steps):
    with pytest.raises(ExperimentError, match="'clipped_surrogate' needs the column old_logprobs") as error:
        update.run(
            tmp_path / "out", settings("grpo", **steps), advantages=without_old(table, by_hand).path, policy=policy.path
        )
    assert "run `score`" in error.value.do


def test_the_first_forward_pass_measures_what_score_would_have(table, by_hand, policy, tmp_path, numbers):
    rows = table.table().to_pylist()
    sampler = [[value - 0.25 * (place % 2) for place, value in enumerate(row["old_logprobs"])] for row in rows]
    bare = without_old(table, by_hand, sampler_logprobs=sampler)
    made = update.run(tmp_path / "out", settings("grpo"), advantages=bare.path, policy=policy.path)
    flat = np.concatenate([np.arange(len(row["old_logprobs"])) % 2 * 0.25 for row in rows])
    assert made.stats["kl/sampler"] == pytest.approx(-flat.mean(), rel=1e-4)
    assert made.stats["kl/sampler_abs"] == pytest.approx(flat.mean(), rel=1e-4)
    assert made.stats["kl/sampler_max"] == pytest.approx(0.25, rel=1e-4)
    far_away = np.mean([np.subtract(row["old_logprobs"], row["ref_logprobs"]).sum() for row in rows])
    assert made.stats["kl/reference_sum"] == pytest.approx(far_away, rel=1e-4)
    assert numbers(made)["kl/sampler", 0] == made.stats["kl/sampler"]
    assert not {"ratio/max", "kl/old"} & made.stats.keys()


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
        steps = dealt(12, 1, 4, derive(3, "update", taken))
        plan = Plan(steps, chosen.micro_batch_tokens, chosen.gradient_clip, taken)
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
    shutil.copytree(first.path, tmp_path / "bare", ignore=shutil.ignore_patterns("trainer", "manifest.json"))
    without = update.run(tmp_path / "without", chosen, advantages=table.path, policy=tmp_path / "bare")
    assert with_state.stats["steps"] == 8
    assert without.stats["steps"] == 4
    assert far(weights_of(with_state.path), weights_of(without.path)) > 1e-5
    (tmp_path / "bare" / "trainer").mkdir()
    (tmp_path / "bare" / "trainer" / "state.json").write_bytes(b"not a state")
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
    assert measured["ratio/max", 1] == pytest.approx(math.e, rel=1e-4)
    certain = [
        {**row, "old_logprobs": [0.0] * count, "advantages": [-1.0] * count}
        for row, count in zip(rows, counts, strict=True)
    ]
    below = [sum(math.exp(value) < 0.8 for value in row["old_logprobs"]) for row in rows]
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


@pytest.mark.parametrize("ratio", ["token", "response"])
def test_clip_metrics_are_of_the_ratio_that_is_clipped(by_hand, table, policy, tmp_path, numbers, ratio):
    """The first token of every response has become e times as likely, and so has the response."""
    rows = table.table().to_pylist()
    shifted = [{**row, "old_logprobs": [row["old_logprobs"][0] - 1, *row["old_logprobs"][1:]]} for row in rows]
    counts = np.array([len(row["response_tokens"]) for row in rows])
    positive = np.array([row["advantages"][0] > 0 for row in rows])
    line = {"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 0.2, "ratio": ratio}
    chosen = settings(loss=Recipe.load("grpo").changed({"loss": [line]}).loss, micro_batch_tokens=60)
    made = update.run(tmp_path / "out", chosen, advantages=by_hand(ADVANTAGES, shifted).path, policy=policy.path)
    clipped = positive.sum() if ratio == "token" else counts[positive].sum()
    assert numbers(made)["clip/high", 1] == pytest.approx(clipped / counts.sum(), rel=1e-5)
    assert numbers(made)["ratio/max", 1] == pytest.approx(math.e, rel=1e-4)


WEIGHT_NAMES = ["token_mean", "group_token_mean", "sequence_mean", "sequence_sum"]


@pytest.mark.parametrize("weights", WEIGHT_NAMES)
@pytest.mark.parametrize("on", ["finished", "correct"])
def test_a_term_on_some_rows_is_the_term_with_the_others_left_out(table, policy, weights, on):
    whole, model = table.table(), load_policy(policy.path, "float32")
    lines = [{"kind": "clipped_surrogate", "clip_low": 0.2, "clip_high": 0.2}, {"kind": "nll", "coef": 0.3}]

    def of(rows, on):
        loss = Recipe.load("grpo").changed({"loss": [{**line, "on": on} for line in lines]}).loss
        wanted = Improvement(rows, [Term.of(line) for line in loss], WEIGHTS[weights], 1.0)
        return gradient(model, wanted, rows=np.arange(len(rows)))

    some = whole.filter(whole[on])
    assert 0 < len(some) < len(whole)
    assert far(of(some, "all"), of(whole, on)) < 1e-6
    assert far(of(whole, "all"), of(whole, on)) > 1e-3


def test_group_token_mean_is_the_mean_over_prompts_of_the_mean_over_their_tokens(table, policy):
    rows = table.table().to_pylist()
    loss = Recipe.load("grpo").changed({"loss": [{"kind": "nll"}]}).loss
    wanted = Improvement(table.table(), [Term.of(loss[0])], WEIGHTS["group_token_mean"], 1.0)
    chosen = np.array([11, 1, 2, 5, 4, 7])
    groups = {}
    for row in chosen:
        groups.setdefault(rows[row]["prompt_id"], []).extend(rows[row]["old_logprobs"])
    assert len(groups) == 3
    losses = wanted.losses(load_policy(policy.path, "float32"), chosen, wanted.step(chosen))
    expected = -np.mean([np.mean(values) for values in groups.values()])
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def documents(room, made_of):
    return made_of(room / "update-documents", "documents", 9)


MIX = {"coef": 27.8, "per_response": 0.5}
EVEN = 2e-3  # gradients of responses and documents are of about the same length then


@pytest.fixture(scope="module")
def examples(documents, policy):
    return windows(documents.table().to_pylist(), Chat(policy.path), 12)


def at_temperature(table):
    """The objective with log-probabilities at temperature 0.7; those of documents are at 1 all the same."""
    chosen = Recipe.load("grpo")
    return Improvement(table.table(), [Term.of(line) for line in chosen.loss], WEIGHTS["sequence_mean"], 0.7)


def test_the_gradient_with_documents_is_the_sum_of_both_gradients(table, policy, examples):
    model, coef = load_policy(policy.path, "float32"), EVEN
    ours, texts = np.arange(8), np.array([0, 3, 4])
    found = gradient(model, Rehearsal(at_temperature(table), examples, coef), rows=np.concatenate([ours, 12 + texts]))
    total = count = 0
    for index in texts:
        tokens = torch.tensor([*examples[index].prompt, *examples[index].targets])
        total = total - model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).sum()
        count += len(tokens) - 1
    (total / count).backward()
    of_documents = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    model.zero_grad()
    of_policy = gradient(model, at_temperature(table), rows=ours)
    assert far(of_policy + coef * of_documents, found) < 1e-5
    assert min(far(of_policy, found), far(coef * of_documents, found)) > 0.1


def test_documents_do_not_make_the_gradient_depend_on_micro_batches(table, policy, examples):
    model, wanted = load_policy(policy.path, "float32"), Rehearsal(at_temperature(table), examples, EVEN)
    rows = np.random.default_rng(0).permutation(np.concatenate([np.arange(8), 12 + np.array([0, 3, 4, 0])]))
    together = gradient(model, wanted, rows=rows)
    assert all(far(together, gradient(model, wanted, budget, rows)) < 5e-6 for budget in (1, 3, 5))


def test_numbers_of_responses_do_not_change_with_documents_and_theirs_is_unweighted(table, policy, examples):
    model, ours = load_policy(policy.path, "float32"), np.arange(12)
    alone, mixed = objective(table.table()), Rehearsal(objective(table.table()), examples, 27.8)
    texts, both = mixed.imitation, np.concatenate([ours, [12, 14]])
    before = alone.losses(model, ours, alone.step(ours))
    of_responses, of_documents = (mixed.losses(model, rows, mixed.step(both)) for rows in mixed.passes(both))
    read = texts.losses(model, np.array([0, 2]), texts.step(np.array([0, 2])))
    assert of_responses.parts == pytest.approx(before.parts, rel=1e-5)
    assert of_responses.largest == before.largest
    assert float(of_responses.total.detach()) == pytest.approx(float(before.total.detach()), rel=1e-5)
    assert of_documents.parts == {"loss/documents": pytest.approx(float(read.total.detach()), rel=1e-5)}
    assert float(of_documents.total.detach()) == pytest.approx(27.8 * of_documents.parts["loss/documents"], rel=1e-5)
    assert mixed.names(np.array([12, 0])) == [*alone.names(np.array([0])), examples[0].name]


def test_every_step_gets_its_documents_and_the_stream_goes_on():
    steps = [np.arange(5), np.arange(5, 8)]
    first, cursor = with_documents(steps, 1.5, 8, 6, 0, seed=2)
    second, end = with_documents(steps, 1.5, 8, 6, cursor, seed=2)
    assert [len(rows) for rows in first] == [5 + 8, 3 + 4]
    assert (cursor, end) == (12, 24)
    for before, after in zip(steps * 2, [*first, *second], strict=True):
        assert np.array_equal(after[: len(before)], before)
    taken = [rows[rows >= 8] - 8 for rows in (*first, *second)]
    assert np.array_equal(np.concatenate(taken), drawn(6, 0, 24, 2))


def test_the_next_update_goes_on_in_the_stream_of_documents(table, policy, documents, tmp_path, numbers):
    chosen, paths = settings(minibatches=3, mix=MIX), {"advantages": table.path, "documents": documents.path}
    first = update.run(tmp_path / "first", chosen, policy=policy.path, **paths)
    second = update.run(tmp_path / "second", chosen, policy=first.path, **paths)
    assert [artifact.stats["documents"] for artifact in (first, second)] == [6, 12]
    assert [numbers(artifact)["rows/documents", 0] for artifact in (first, second)] == [6, 6]
    losses = [numbers(second)["loss/documents", step] for step in (4, 5, 6)]
    assert all(0 < loss < 10 for loss in losses)
    bare = shutil.copytree(first.path, tmp_path / "bare", ignore=shutil.ignore_patterns("manifest.json"))
    from_the_start = update.run(tmp_path / "from the start", chosen, policy=bare, **paths)
    assert from_the_start.stats["documents"] == 6
    assert numbers(from_the_start)["loss/documents", 4] != pytest.approx(losses[0], rel=1e-4)


def test_a_policy_rehearses_what_it_would_forget(table, policy, documents, tmp_path, numbers):
    """Only the documents' likelihood moves where the policy's own gradient is nothing."""
    chosen = settings(loss=Recipe.load("grpo").changed({"loss": [{"kind": "nll", "coef": 0.0}]}).loss,
                      mix={"coef": 1.0, "per_response": 1.0}, epochs=8)  # fmt: skip
    made = update.run(tmp_path / "out", chosen, advantages=table.path, policy=policy.path, documents=documents.path)
    assert numbers(made)["loss/documents", 8] < numbers(made)["loss/documents", 1] - 0.1


def test_a_mix_without_documents(table, policy, tmp_path):
    with pytest.raises(ExperimentError, match=r"data\.documents"):
        update.run(tmp_path / "out", settings(mix=MIX), advantages=table.path, policy=policy.path)
    assert not list(tmp_path.iterdir())


def test_documents_without_a_mix_change_nothing(table, policy, documents, room):
    paths = {"advantages": table.path, "policy": policy.path}
    one = update.run(room / "without documents", settings(), **paths)
    other = update.run(room / "unused documents", settings(), documents=documents.path, **paths)
    assert one.manifest.digest == other.manifest.digest


@dataclass
class Sees:
    """A watcher that keeps the weights after every step."""

    model: torch.nn.Module
    seen: list

    def after_step(self, taken):
        self.seen.append(weights_of(self.model))
        return False


def test_the_average_of_the_weights_goes_on_from_update_to_update(table, policy, room, sound):
    chosen = settings(minibatches=2, ema=0.9)
    first = update.run(room / "ema 1", chosen, advantages=table.path, policy=policy.path)
    second = update.run(room / "ema 2", chosen, advantages=table.path, policy=first.path)
    plain = update.run(room / "ema off", settings(minibatches=2), advantages=table.path, policy=policy.path)
    assert not (plain.path / "ema").exists()
    assert torch.equal(weights_of(plain.path), weights_of(first.path))
    model, average, taken = load_policy(policy.path, "float32"), weights_of(policy.path), 0
    optimizer = adamw(model, chosen.learning_rate, chosen.weight_decay)
    for made in (first, second):
        seen = []
        plan = Plan(dealt(12, 1, 2, derive(3, "update", taken)), chosen.micro_batch_tokens, 1.0, taken)
        taken = fit(
            model, objective(table.table()), optimizer, constant(0), plan, Metrics("run", None, "s"),
            Sees(model, seen),
        )  # fmt: skip
        for weights in seen:
            average = 0.9 * average + 0.1 * weights
        assert far(average, weights_of(made.path / "ema")) < 1e-6
    assert far(average, weights_of(second.path)) > 1e-4
    sound(second)


def test_settings_come_from_recipe_and_scale():
    changes = {"rollout": {"temperature": 0.6}, "mix": MIX}
    tables = {
        "name": "run", "base": "base", "data": {"prompts": {}}, "models": {"policy": "p"}, "sft": {"enabled": False},
        "resources": {"save_every": 7},
        "scale": {"iterations": 1, "groups": 4, "prompt_tokens": 8, "response_tokens": 16, "learning_rate": 1e-3},
    }  # fmt: skip
    one, other = (
        Settings.of(Experiment(recipe=Recipe.load("grpo").changed({**changes, **more}), **tables), {})
        for more in ({}, {"update": {"temperature": 1.1, "ema": 0.99}})
    )
    assert (one.temperature, other.temperature) == (0.6, 1.1)
    assert (one.update.ema, other.update.ema) == (None, 0.99)
    assert one.mix is not None
    assert one.mix.model_dump() == MIX
    assert one.document_tokens == 24
    assert one.save_every == 7


@pytest.mark.parametrize("ema", [None, 0.9])
def test_killed_while_it_trains_it_goes_on_to_the_same_policy(survives, table, policy, documents, room, ema):
    """In the second update of a run, with an optimizer, a schedule and a stream of documents that go on."""
    chosen = settings(minibatches=6, epochs=2, ema=ema, warmup_steps=20, mix=MIX, save_every=3)
    paths = {"advantages": table.path, "documents": documents.path}
    first = update.run(room / f"survives {ema}", chosen, policy=policy.path, **paths)
    made = survives(update, chosen, before=9, saved=6, policy=first.path, **paths)
    assert made.stats["steps"] == 24
    assert (made.path / "ema").exists() == (ema is not None)


def test_dropout_is_the_same_after_a_crash(survives, table, forgetting):
    survives(
        update, settings(minibatches=4, epochs=2, save_every=5), before=8, saved=5, advantages=table.path,
        policy=forgetting,
    )  # fmt: skip


def test_what_gates_look_at_is_left_in_the_stats(table, policy, by_hand, tmp_path, numbers):
    chosen = settings(minibatches=4, epochs=2, learning_rate=1e-2)
    made = update.run(tmp_path / "out", chosen, advantages=table.path, policy=policy.path)
    measured = numbers(made)
    entropies, ratios, norms = (
        [measured[name, step] for step in range(1, 9)] for name in ("entropy/mean", "ratio/max", "grad/norm")
    )
    assert made.stats["entropy/mean"] == pytest.approx(np.mean(entropies))
    assert len(set(entropies)) == 8
    assert made.stats["ratio/max"] == max(ratios) > 1
    assert made.stats["grad/norm"] == max(norms) > min(norms)
    assert made.stats["kl/old"] == measured["kl/old", 8] > 0
    rows = [{name: value for name, value in row.items() if name != "old_logprobs"} for row in table.table().to_pylist()]
    nll = Recipe.load("grpo").changed({"loss": [{"kind": "nll", "coef": 1.0}]}).loss
    bare = update.run(
        tmp_path / "bare", settings(loss=nll), advantages=by_hand(ADVANTAGES, rows).path, policy=policy.path
    )
    assert {"entropy/mean", "grad/norm"} <= bare.stats.keys()
    assert not {"ratio/max", "kl/old"} & bare.stats.keys()


def test_half_precision_trains_float32_weights_to_another_policy_nearby(table, policy, room, sound):
    plain = update.run(room / "float32", settings(), advantages=table.path, policy=policy.path)
    half = update.run(
        room / "bfloat16", settings(compute_dtype="bfloat16", recompute=True), advantages=table.path, policy=policy.path
    )
    sound(half)
    assert half.manifest.digest != plain.manifest.digest
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(half.path, dtype="auto").parameters()} == {
        torch.float32
    }
    before = weights_of(policy.path)
    moved, of_plain = weights_of(half.path) - before, weights_of(plain.path) - before
    assert torch.nn.functional.cosine_similarity(moved, of_plain, 0) > 0.9


def test_recomputing_makes_the_same_policy(table, policy, room):
    made = [
        update.run(room / f"recompute-{how}", settings(recompute=how), advantages=table.path, policy=policy.path)
        for how in (False, True)
    ]
    assert made[0].manifest.digest == made[1].manifest.digest


def test_moments_in_the_host_s_memory_change_no_bit(room, table, policy, survives):
    given = {"advantages": table.path, "policy": policy.path}
    here = update.run(room / "moments here", settings(minibatches=4), **given)
    there = survives(update, settings(minibatches=4, offload=True, save_every=1), before=3, saved=2, **given)
    assert there.manifest.digest == here.manifest.digest
