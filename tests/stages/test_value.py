import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pipeline.algorithms.losses import LOSSES
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shelf import Line
from pipeline.algorithms.weights import WEIGHTS
from pipeline.contracts import ADVANTAGES
from pipeline.errors import ArtifactError, ContractError, ExperimentError, InputError, RecipeError
from pipeline.experiment import Experiment
from pipeline.models.checkpoint import fresh_critic, fresh_reward_model, load_critic, load_reward_model, save
from pipeline.models.forward import response_scores, response_values
from pipeline.training.batches import held_out
from pipeline.training.explained import Convergence, Explained, explained_variance
from stages.value import Regression, Settings, dealt, value

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "value.json").read_text())
SQUARED, CLIPPED = {"kind": "value_squared"}, {"kind": "value_clipped", "clip": 0.2}
DIGITS = range(5, 15)


def settings(**changes):
    return Settings.of(None, {"loss": SQUARED, "learning_rate": 1e-3, "seed": 3, **changes})


def pretraining(**changes):
    return settings(
        **{"steps": 60, "batch": 16, "learning_rate": 3e-3, "held_out_share": 0.25, "patience": 99, **changes}
    )


def row(group, sample, prompt, response, returns, **more):
    return {
        "prompt_id": f"p{group:02d}", "sample": sample, "prompt_tokens": prompt, "response_tokens": response,
        "advantages": [0.0] * len(response), "returns": returns, "reward": 0.0, "shaped_reward": 0.0,
        "correct": None, "finished": True, **more,
    }  # fmt: skip


def written(groups, samples, wanted, **more):
    """Responses of chance, of 1 to 9 tokens, whose return is `wanted(prompt)` on every token."""
    drawn, rows = random.Random(0), []
    for group in range(groups):
        prompt = drawn.choices(DIGITS, k=4)
        for sample in range(samples):
            response = drawn.choices(DIGITS, k=drawn.randint(1, 9))
            rows.append(row(group, sample, prompt, response, [wanted(prompt)] * len(response), **more))
    return rows


def by_first(prompt):
    """1 for prompts that start with one of five tokens, -1 for others."""
    return 1.0 if prompt[0] < 10 else -1.0


@pytest.fixture(scope="module")
def table(by_hand):
    """A hundred and twenty prompts, a response each; the return depends on the first token of the prompt."""
    return by_hand(ADVANTAGES, written(120, 1, by_first))


@pytest.fixture(scope="module")
def noise(by_hand):
    """Returns that nothing tells beforehand."""
    drawn = random.Random(1)
    return by_hand(ADVANTAGES, written(30, 2, lambda prompt: drawn.choice([-1.0, 1.0])))


@pytest.fixture(scope="module")
def few(other_policy, by_hand):
    """Twelve responses with the values of the critic that `settings()` starts from, moved a little."""
    rows = written(6, 2, by_first)
    with torch.no_grad():
        read = response_values(
            fresh_critic(other_policy, 0), [r["prompt_tokens"] for r in rows], [r["response_tokens"] for r in rows]
        )
    for place, values in enumerate(read.values):
        moved = values[: len(rows[place]["response_tokens"])] + 0.3 * (-1) ** place
        rows[place]["values"] = moved.tolist()
    return by_hand(ADVANTAGES, rows[:6], rows[6:])


@pytest.fixture(scope="module")
def reward_model(room, other_policy):
    model = fresh_reward_model(other_policy, 1)
    model.config.reward_bias = 0.75
    save(model, AutoTokenizer.from_pretrained(other_policy), room / "value a reward model")
    return room / "value a reward model"


@pytest.fixture(scope="module")
def pretrained(room, table, other_policy):
    return value.run(room / "value critic", pretraining(), advantages=table.path, policy=other_policy)


def weights_of(model):
    model = model if isinstance(model, torch.nn.Module) else load_critic(model, "float32")
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def far(one, other):
    """Distance relative to the length of the first."""
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one))


def regression(artifact_or_table, loss=SQUARED):
    found = artifact_or_table if isinstance(artifact_or_table, pa.Table) else artifact_or_table.table()
    return Regression(found, LOSSES.take(Line.model_validate(loss)))


@pytest.mark.parametrize("case", GOLDEN["explained_variance"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "near"), [("float64", 1e-6), ("float32", 1e-4)])
def test_explained_variance_golden(case, dtype, near):
    values, returns = (np.array(case["inputs"][name], dtype) for name in ("values", "returns"))
    found = Explained.of(values, returns, np.ones(values.shape, bool))
    assert found.variance == pytest.approx(case["outputs"]["variance"], abs=near)
    assert found.loss == pytest.approx(case["outputs"]["loss"], abs=near)
    assert explained_variance(values.ravel(), returns.ravel()) == pytest.approx(found.variance, abs=near)


def test_positions_are_taken_together_by_powers_of_two():
    drawn = np.random.default_rng(0)
    values, returns = drawn.normal(size=(2, 5, 20))
    mask = np.arange(20) < np.array([20, 18, 9, 4, 1])[:, None]
    returns[:, 0] = 1
    found = Explained.of(values, returns, mask).by_position
    assert sorted(found) == [1, 2, 4, 8, 16]
    for first, last in ((1, 1), (2, 3), (4, 7), (8, 15), (16, 19)):
        some = mask.copy()
        some[:, :first] = some[:, last + 1 :] = False
        assert found[first] == pytest.approx(explained_variance(values[some], returns[some]))


@pytest.mark.parametrize(
    ("checks", "stops_at"),
    [
        ([(1.0, 0.0), (1.0, 0.0), (1.0, 0.0)], 1),
        ([(0.98, 0.0), (0.97, 0.0), (0.96, 0.0), (0.96, 0.0), (0.96, 0.0)], 4),
        ([(0.995, 0.0), (0.985, 0.0), (0.981, 0.0), (0.98, 0.0)], 3),
        ([(2.0, 0.02), (3.0, 0.025), (4.0, 0.035), (4.0, 0.04), (4.0, 0.04)], 4),
        ([(1.0, 0.0), (0.5, 0.0), (0.5, 0.0), (0.5, 0.5)], None),
    ],
)
def test_convergence_is_a_row_of_checks_without_a_gain_in_either(checks, stops_at):
    watch = Convergence(loss=1.0, variance=0.0, min_gain=0.01, patience=2)
    reached = [watch.reached(Explained(loss, variance, {})) for loss, variance in checks]
    assert (reached.index(True) if True in reached else None) == stops_at


def test_a_known_function_is_learned_and_shows_on_held_out_prompts(pretrained, numbers, sound, other_policy):
    sound(pretrained)
    measured = numbers(pretrained)
    assert measured["value/explained_variance", 0] == pretrained.stats["value/explained_variance"] > 0.8
    assert measured["value/explained_variance_before", 0] < 0.3
    assert measured["loss/value_after", 0] < 0.3 * measured["loss/value_before", 0]
    curve = [measured["value/explained_variance", step] for step in range(5, 61, 5)]
    assert curve[-1] == measured["value/explained_variance", 0]
    assert len({measured["value/explained_variance/from_4", step] for step in range(5, 61, 5)}) == 12
    for first in (0, 1, 2, 4):
        assert measured[f"value/explained_variance/from_{first}", 0] > 0.5
    assert {("grad/norm", 60), ("loss/value", 60), ("value/mean", 60), ("learning_rate", 60)} <= set(measured)
    assert measured["rows/train", 0] + measured["rows/held_out", 0] == 120
    assert 15 < measured["rows/held_out", 0] < 45
    opened = AutoModelForTokenClassification.from_pretrained(pretrained.path)
    assert (opened.config.num_labels, opened.score.weight.shape) == (1, (1, 64))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (pretrained.path, other_policy)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_what_is_measured_is_what_the_kept_weights_say_of_held_out_prompts(pretrained, table, numbers):
    rows = table.table().to_pylist()
    apart = np.flatnonzero(held_out([row["prompt_id"] for row in rows], 0.25, 3))
    rows = [rows[place] for place in apart]
    with torch.no_grad():
        texts = ([row[name] for row in rows] for name in ("prompt_tokens", "response_tokens"))
        read = response_values(load_critic(pretrained.path, "float32"), *texts)
    said, wanted = read.values[read.mask].numpy(), np.concatenate([row["returns"] for row in rows])
    measured = numbers(pretrained)
    assert measured["value/explained_variance", 0] == pytest.approx(explained_variance(said, wanted), rel=1e-5)
    assert measured["loss/value_after", 0] == pytest.approx(0.5 * np.mean((said - wanted) ** 2), rel=1e-5)


def test_pretraining_stops_when_nothing_more_is_learned(room, noise, other_policy, numbers):
    def pretrain(name, **changes):
        chosen = pretraining(learning_rate=1e-9, check_every=2, **{"patience": 3, **changes})
        return value.run(room / f"value {name}", chosen, advantages=noise.path, policy=other_policy)

    stopped, longer = pretrain("stopped"), pretrain("longer", patience=5)
    assert (stopped.stats["steps"], longer.stats["steps"]) == (6, 10)
    assert "6 steps of 60: no gain in 3 checks" in (stopped.path / "log.txt").read_text()
    assert sorted(step for name, step in numbers(stopped) if name == "value/explained_variance") == [0, 2, 4, 6]


def test_held_out_prompts_are_never_trained_on(by_hand, room, table, other_policy, pretrained):
    """Their returns may be anything: the weights are the same, and only what is measured differs."""
    rows = table.table().to_pylist()
    for place in np.flatnonzero(held_out([row["prompt_id"] for row in rows], 0.25, 3)):
        rows[place]["returns"] = [5.0 * place] * len(rows[place]["returns"])
    other = value.run(
        room / "value other returns", pretraining(), advantages=by_hand(ADVANTAGES, rows).path, policy=other_policy
    )
    assert torch.equal(weights_of(other.path), weights_of(pretrained.path))
    assert other.stats["value/explained_variance"] < 0.5


def test_in_pretraining_no_value_is_clipped(room, table, other_policy, pretrained):
    """Its loss is the plain one, and needs no old values, whatever the recipe's is."""
    clipped = value.run(room / "value clipped", pretraining(loss=CLIPPED), advantages=table.path, policy=other_policy)
    assert torch.equal(weights_of(clipped.path), weights_of(pretrained.path))


def test_pretraining_walks_over_the_rows_again_and_again_and_an_iteration_as_often_as_the_policy():
    trained = np.array([2, 3, 5, 7, 11])
    steps = dealt(trained, pretraining(steps=5, batch=3), 0)
    assert [len(rows) for rows in steps] == [3] * 5
    passes = np.concatenate(steps).reshape(3, 5)
    assert np.array_equal(np.sort(passes), np.tile(trained, (3, 1)))
    assert len({tuple(walk) for walk in passes}) > 1
    steps = dealt(trained, settings(epochs=2, minibatches=2), 0)
    assert [len(rows) for rows in steps] == [3, 2, 3, 2]
    assert sorted(np.concatenate(steps)) == sorted([*trained, *trained])
    for chosen in (settings(minibatches=5), pretraining(steps=5, batch=3)):
        orders = {tuple(np.concatenate(dealt(trained, chosen, taken))) for taken in (0, 4, 8)}
        assert len(orders) == 3


@pytest.mark.parametrize("loss", [SQUARED, CLIPPED])
def test_the_loss_is_the_mean_over_the_tokens_of_the_step(few, other_policy, loss):
    wanted, rows = regression(few, loss), few.table().to_pylist()
    everything = np.arange(len(rows))
    model = fresh_critic(other_policy, 0)
    losses = wanted.losses(model, everything, wanted.step(everything))
    tokens = []
    for row in rows:
        read = response_values(model, [row["prompt_tokens"]], [row["response_tokens"]]).values[0].tolist()
        for now, old, target in zip(read, row["values"], row["returns"], strict=True):
            near = min(max(now, old - 0.2), old + 0.2)
            worst = max((now - target) ** 2, (near - target) ** 2 if loss is CLIPPED else 0)
            tokens.append((0.5 * worst, now))
    assert len(tokens) == wanted.step(everything)
    assert float(losses.total.detach()) == losses.parts["loss/value"] == pytest.approx(np.mean(tokens, 0)[0], rel=1e-5)
    assert losses.parts["value/mean"] == pytest.approx(np.mean(tokens, 0)[1], rel=1e-4)
    mask = torch.from_numpy(wanted.mask)
    shares = WEIGHTS["token_mean"](mask, torch.zeros(len(mask), dtype=torch.long))
    assert shares.max() == pytest.approx(1 / wanted.step(everything))


def gradient(model, wanted, budget):
    """The gradient of one step over the first eight rows."""
    rows = np.arange(8)
    step = wanted.step(rows)
    for start in range(0, 8, budget):
        wanted.losses(model, rows[start : start + budget], step).total.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", [SQUARED, CLIPPED])
def test_the_gradient_depends_neither_on_micro_batches_nor_on_padding(few, other_policy, loss):
    model, whole = fresh_critic(other_policy, 0), few.table()
    together = gradient(model, regression(whole, loss), 8)
    assert torch.linalg.vector_norm(together) > 0
    for budget in (1, 3):
        assert far(together, gradient(model, regression(whole, loss), budget)) < 1e-6
    long = {**whole.to_pylist()[-1], "sample": 99, "response_tokens": [5] * 40}
    long |= {name: [-1.0] * 40 for name in ("advantages", "returns", "values")}
    padded = pa.concat_tables([whole, pa.Table.from_pylist([long], schema=whole.schema)])
    assert far(together, gradient(model, regression(padded, loss), 8)) < 1e-6


def test_the_critic_does_not_depend_on_what_fits_into_memory(room, few, other_policy, numbers):
    chosen = {"loss": CLIPPED, "epochs": 2, "minibatches": 2}
    made = [
        value.run(
            room / f"budget {budget}", settings(**chosen, micro_batch_tokens=budget), advantages=few.path,
            policy=other_policy,
        )
        for budget in (1, 40, 10**6)
    ]  # fmt: skip
    one, *others = [weights_of(artifact.path) for artifact in made]
    moved = far(weights_of(fresh_critic(other_policy, 0)), one)
    assert moved > 1e-3
    assert all(far(one, other) < 1e-6 + 1e-4 * moved for other in others)
    variances = [artifact.stats["value/explained_variance"] for artifact in made]
    assert variances == pytest.approx([variances[0]] * 3, rel=1e-3)


def test_a_look_in_the_middle_of_training_leaves_the_model_in_training(few, other_policy):
    model, wanted = fresh_critic(other_policy, 0).train(), regression(few)
    values = wanted.values(model, np.array([3, 1]), 1)
    assert model.training
    assert values[0, : len(wanted.responses[3])].all()
    assert not values[~wanted.mask[[3, 1]]].any()


def test_before_an_iteration_stand_the_values_that_the_advantages_were_made_of(room, few, other_policy, numbers):
    measured = numbers(
        value.run(room / "value with values", settings(minibatches=2), advantages=few.path, policy=other_policy)
    )
    values, returns = (np.concatenate(few.table()[name].to_pylist()) for name in ("values", "returns"))
    expected = explained_variance(values, returns)
    assert measured["value/explained_variance_before", 0] == pytest.approx(expected, rel=1e-5)
    assert measured["loss/value_before", 0] == pytest.approx(0.5 * np.mean((values - returns) ** 2), rel=1e-5)
    assert (measured["rows/train", 0], measured["rows/held_out", 0]) == (12, 0)
    assert [step for name, step in measured if name == "value/explained_variance"] == [0]


def test_two_walks_go_on_where_the_first_ended(room, few, other_policy, numbers, tmp_path):
    chosen = settings(minibatches=3, warmup_steps=5)
    first = value.run(room / "value walk one", chosen, advantages=few.path, policy=other_policy)
    second = value.run(room / "value walk two", chosen, advantages=few.path, critic=first.path)
    assert (first.stats["steps"], second.stats["steps"]) == (3, 6)
    rates = [numbers(made)["learning_rate", step] for made, step in ((first, 1), (first, 3), (second, 4), (second, 6))]
    assert rates == pytest.approx([1e-3 / 6, 3e-3 / 6, 4e-3 / 6, 1e-3])
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in first.path.iterdir():
        if path.name not in ("trainer", "manifest.json"):
            (bare / path.name).write_bytes(path.read_bytes())
    forgetful = value.run(tmp_path / "forgetful", settings(minibatches=3), advantages=few.path, critic=bare)
    remembers = value.run(tmp_path / "remembers", settings(minibatches=3), advantages=few.path, critic=first.path)
    assert forgetful.stats["steps"] == 3
    assert far(weights_of(forgetful.path), weights_of(remembers.path)) > 1e-5


def test_the_same_twice_and_something_else_with_another_seed(room, few, other_policy, pretrained, table):
    def digest(name, **changes):
        chosen = settings(minibatches=2, **changes)
        return value.run(room / f"value {name}", chosen, advantages=few.path, policy=other_policy).manifest.digest

    assert digest("once") == digest("twice") != digest("seed", seed=4)
    again = value.run(room / "value critic again", pretraining(), advantages=table.path, policy=other_policy)
    assert again.manifest.digest == pretrained.manifest.digest
    assert {path.name for path in again.path.iterdir()} >= {"trainer", "model.safetensors", "tokenizer.json"}


def test_a_critic_without_pretraining_is_what_it_starts_from(room, few, other_policy, reward_model, pretrained, sound):
    def start(name, **given):
        made = value.run(room / f"value {name}", settings(steps=0), **given)
        sound(made)
        assert made.stats["steps"] == (60 if "critic" in given else 0)
        return load_critic(made.path, "float32")

    prompt, response = [[5, 6, 7]], [[8, 9, 10]]
    with torch.no_grad():
        judged = response_scores(load_reward_model(reward_model, "float32"), prompt, response)
        read = response_values(start("of a reward model", reward_model=reward_model), prompt, [[*response[0], 5]])
    assert read.values[0, -1].item() == pytest.approx(judged.item(), rel=1e-5)
    from_policy = start("of a policy", policy=other_policy)
    assert abs(judged.item()) > 0.1
    assert from_policy.score.weight.abs().max() > 0
    assert from_policy.score.bias.item() == 0
    assert torch.equal(weights_of(start("of a critic", critic=pretrained.path)), weights_of(pretrained.path))
    looked_at = value.run(room / "value looked at", settings(steps=0), advantages=few.path, policy=other_policy)
    assert torch.equal(weights_of(looked_at.path), weights_of(from_policy))
    assert "value/explained_variance" in looked_at.stats


def test_it_starts_from_one_model(few, other_policy, reward_model, pretrained, tmp_path):
    def attempt(**given):
        return value.run(tmp_path / "out", settings(), advantages=few.path, **given)

    with pytest.raises(InputError, match="and none is given"):
        attempt()
    with pytest.raises(InputError, match="and 2 are given"):
        attempt(policy=other_policy, reward_model=reward_model)
    with pytest.raises(InputError, match="and 3 are given"):
        attempt(policy=other_policy, reward_model=reward_model, critic=pretrained.path)
    with pytest.raises(ArtifactError, match="not a critic"):
        attempt(critic=other_policy)
    with pytest.raises(ArtifactError, match="not a causal language model"):
        attempt(policy=reward_model)
    with pytest.raises(InputError, match="no responses to learn from"):
        value.run(tmp_path / "out", settings(), policy=other_policy)


def test_a_table_that_cannot_teach_a_critic(by_hand, table, few, other_policy, tmp_path):
    def attempt(advantages, **changes):
        return value.run(tmp_path / "out", settings(**changes), advantages=advantages.path, policy=other_policy)

    rows = few.table().to_pylist()
    without = by_hand(ADVANTAGES, [{**row, "returns": None} for row in rows])
    with pytest.raises(ContractError, match="no returns") as error:
        attempt(without)
    assert "reward_to_go" in error.value.do
    with pytest.raises(ContractError, match="no column values") as error:
        attempt(table, loss=CLIPPED)
    assert "run `score` with the critic" in error.value.do
    with pytest.raises(ContractError, match="12 rows cannot be dealt to 13 minibatches"):
        attempt(few, minibatches=13)
    with pytest.raises(RecipeError, match="'nll' is none of a critic: it reads logprobs"):
        attempt(few, loss={"kind": "nll"})
    with pytest.raises(RecipeError, match="'value_clipped': clip"):
        attempt(few, loss={**CLIPPED, "clip": -1.0})
    assert not list(tmp_path.glob("out"))


def experiment(tmp_path, *critic, changes=""):
    path = tmp_path / "e.toml"
    path.write_text(
        f'recipe = "grpo"\n[recipe_changes.grpo]\nupdate = {{epochs = 4, minibatches = 8}}\n{changes}\n'
        '[models.new]\nlayers = 2\n'
        '[data.demonstrations]\nsource = "arithmetic"\n[data.prompts]\nsource = "arithmetic"\n'
        "[scale]\niterations = 1\ngroups = 1\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 0.5\n"
        + "[critic]\n" + "\n".join(critic),
        encoding="utf-8",
    )  # fmt: skip
    return Experiment.load(path)


def test_settings_come_from_recipe_and_experiment(tmp_path):
    critic = 'critic = {start = "policy", loss = {kind = "value_clipped", clip = 0.5}}\n[resources]\nsave_every = 7'
    plain = Settings.of(experiment(tmp_path, "warmup_steps = 7", "pretrain_batch = 9", changes=critic))
    assert (plain.loss.kind, plain.loss.settings, plain.steps) == ("value_clipped", {"clip": 0.5}, None)
    assert (plain.epochs, plain.minibatches, plain.learning_rate, plain.warmup_steps) == (4, 8, 0.5, 7)
    assert plain.save_every == 7
    looks = ("pretrain_check_every = 7", "pretrain_patience = 2")
    own = experiment(tmp_path, "learning_rate = 0.25", "pretrain_batch = 9", *looks, changes=critic)
    assert Settings.of(own).learning_rate == 0.25
    assert Settings.of(own).batch == Settings.model_fields["batch"].default
    pretraining = Settings.of(own, {"steps": 50})
    assert (pretraining.batch, pretraining.check_every, pretraining.patience) == (9, 7, 2)
    assert Settings.of(own, {"steps": 50, "batch": 3}).batch == 3


def test_a_recipe_without_a_critic_has_nothing_for_this_stage(tmp_path):
    assert Recipe.load("grpo").critic is None
    with pytest.raises(ExperimentError, match="recipe grpo has no critic"):
        Settings.of(experiment(tmp_path))


@pytest.mark.parametrize(("before", "saved"), [(4, 3), (6, 3), (9, 6)])
def test_pretraining_that_is_killed_ends_as_early_as_one_that_is_not(survives, noise, other_policy, before, saved):
    """Looks before and after the saving count alike."""
    chosen = pretraining(learning_rate=1e-9, check_every=2, patience=5, save_every=3)
    made = survives(value, chosen, before=before, saved=saved, advantages=noise.path, policy=other_policy)
    assert made.stats["steps"] == 10
    assert "10 steps of 60: no gain in 5 checks" in (made.path / "log.txt").read_text()


def test_killed_in_an_iteration_it_goes_on_to_the_same_critic(survives, room, few, other_policy):
    chosen = settings(minibatches=4, epochs=2, warmup_steps=10, loss=CLIPPED, save_every=2)
    first = value.run(room / "value survives", chosen, advantages=few.path, policy=other_policy)
    made = survives(value, chosen, before=6, saved=4, advantages=few.path, critic=first.path)
    assert made.stats["steps"] == 16
