"""The loop: steps, accumulation that does not matter, and losses that are not numbers."""

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import NumericsError
from pipeline.metrics import Metrics
from pipeline.training.batches import dealt
from pipeline.training.loop import Losses, Plan, fit
from pipeline.training.optimizer import constant, cosine


@dataclass
class Regression:
    """Mean squared error over the tokens of a step: rows of unequal length, one target per token."""

    rows: list
    seen: list = field(default_factory=list)

    @classmethod
    def of(cls, lengths, seed=0):
        random = np.random.default_rng(seed)
        return cls([(random.normal(size=(n, 3)), random.normal(size=n)) for n in lengths])

    @property
    def lengths(self):
        return np.array([len(y) for _, y in self.rows])

    groups = None

    def passes(self, rows):
        return [rows]

    def step(self, rows):
        self.seen.append(sorted(rows.tolist()))
        return 1.0 / self.lengths[rows].sum()

    def losses(self, model, rows, step):
        x = torch.tensor(np.concatenate([self.rows[row][0] for row in rows]))
        y = torch.tensor(np.concatenate([self.rows[row][1] for row in rows]))
        total = ((model(x)[:, 0] - y).square() * step).sum()
        parts = {"rows": float(len(rows)), "error/squared": float(total.detach())}
        return Losses(total, parts, {"length/max": float(self.lengths[rows].max()), "below": -float(len(rows))})

    def names(self, rows):
        return [f"row-{row}" for row in rows]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


AT_ONCE = constant(0)


def plan(objective, epochs=1, minibatches=1, seed=0, **changes):
    steps = dealt(len(objective.lengths), epochs, minibatches, seed)
    return Plan(**{"steps": steps, "micro_batch_tokens": 1000, "gradient_clip": 1e9, **changes})


def trained(objective, schedule=AT_ONCE, learning_rate=0.1, model=None, watcher=None, **changes):
    model = network() if model is None else model
    metrics = Metrics("run", 0, "fit")
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    steps = fit(model, objective, optimizer, schedule, plan(objective, **changes), metrics, watcher)
    return model, metrics, steps


def numbers(metrics, name):
    return [row["value"] for row in metrics.rows if row["name"] == name]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60), st.integers(1, 4))
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(lengths, budget, minibatches):
    objective = Regression.of(lengths)
    whole, split = (
        trained(objective, minibatches=minibatches, epochs=2, micro_batch_tokens=tokens) for tokens in (10**6, budget)
    )
    for a, b in zip(whole[0].parameters(), split[0].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    for name in ("loss/total", "grad/norm", "rows", "error/squared"):
        assert np.allclose(numbers(whole[1], name), numbers(split[1], name), rtol=0, atol=1e-6)


def test_a_step_is_the_gradient_of_the_mean_over_its_tokens():
    objective = Regression.of([2, 5, 3])
    expected = network()
    x, y = (torch.tensor(np.concatenate([row[i] for row in objective.rows])) for i in (0, 1))
    loss = (expected(x)[:, 0] - y).square().mean()
    loss.backward()
    model, metrics, _ = trained(objective, learning_rate=0.1, micro_batch_tokens=1)
    for before, after in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.allclose(before.detach() - 0.1 * before.grad, after, rtol=0, atol=1e-12)
    assert numbers(metrics, "loss/total") == [pytest.approx(float(loss.detach()))]
    assert numbers(metrics, "rows") == [3.0]


def test_a_step_forgets_the_gradient_of_the_one_before():
    objective, expected = Regression.of([2, 5, 3]), network()
    x, y = (torch.tensor(np.concatenate([row[i] for row in objective.rows])) for i in (0, 1))
    for _ in range(3):
        gradients = torch.autograd.grad((expected(x)[:, 0] - y).square().mean(), list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)
    model, _, _ = trained(objective, learning_rate=0.1, epochs=3, micro_batch_tokens=5)
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def noisy():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1)).double()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60))
def test_two_processors_take_the_same_steps_as_one(lengths, budget):
    objective, before = Regression.of(lengths), torch.get_num_threads()
    one = trained(objective, epochs=3, micro_batch_tokens=budget)
    torch.set_num_threads(2)
    try:
        two, again = (trained(objective, epochs=3, micro_batch_tokens=budget) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one[0].parameters(), two[0].parameters(), again[0].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)
        assert torch.equal(b, c)
    for name in ("loss/total", "grad/norm", "rows", "error/squared", "length/max"):
        assert np.allclose(numbers(one[1], name), numbers(two[1], name), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("two_processors")
def test_dropout_is_a_function_of_the_seed_on_two_processors():
    objective = Regression.of([5] * 40)
    models = [trained(objective, epochs=4, micro_batch_tokens=10, model=noisy())[0] for _ in range(4)]
    for weights, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(weights, other) for other in others)


def test_every_epoch_deals_all_rows_over_its_steps():
    objective = Regression.of([1] * 7)
    _, metrics, steps = trained(objective, epochs=3, minibatches=2)
    assert steps == len(objective.seen) == 6
    for epoch in range(3):
        first, second = objective.seen[2 * epoch : 2 * epoch + 2]
        assert sorted(first + second) == list(range(7)) and {len(first), len(second)} == {3, 4}
    assert len({tuple(rows) for rows in objective.seen}) > 2
    assert [row["step"] for row in metrics.rows if row["name"] == "loss/total"] == [1, 2, 3, 4, 5, 6]


def test_earlier_steps_count_and_the_schedule_goes_on_from_there():
    schedule = cosine(2, 10, 0.1)
    _, metrics, steps = trained(Regression.of([1] * 4), schedule, minibatches=2, first_step=5)
    assert steps == 7
    assert numbers(metrics, "learning_rate") == [0.1 * schedule(5), 0.1 * schedule(6)]
    assert [row["step"] for row in metrics.rows if row["name"] == "learning_rate"] == [6, 7]


def test_the_peak_learning_rate_is_back_afterwards_and_the_model_evaluates():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    objective = Regression.of([1, 2])
    fit(model, objective, optimizer, constant(9), plan(objective), Metrics("run", 0, "fit"))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not model.training


def test_the_gradient_is_clipped_as_a_whole_and_its_norm_logged_before():
    free, metrics, _ = trained(Regression.of([3, 4]))
    clipped, same, _ = trained(Regression.of([3, 4]), gradient_clip=0.01)
    start = network()
    norm = numbers(metrics, "grad/norm")[0]
    assert numbers(same, "grad/norm") == [norm] and norm > 0.01
    for before, long, short in zip(start.parameters(), free.parameters(), clipped.parameters(), strict=True):
        assert torch.allclose(short - before, (long - before) * 0.01 / norm, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 1000])
def test_of_the_largest_numbers_the_step_has_the_largest_of_its_micro_batches(budget):
    _, metrics, _ = trained(Regression.of([19, 20, 20]), micro_batch_tokens=budget)
    assert numbers(metrics, "length/max") == [20.0]
    assert numbers(metrics, "below") == [-1.0 if budget == 1 else -3.0]


@dataclass
class Looks:
    """A watcher that ends the training after one step."""

    last: int
    seen: list = field(default_factory=list)

    def after_step(self, taken):
        self.seen.append(taken)
        return taken == self.last


def test_after_every_step_a_watcher_looks_and_may_end_the_training():
    ends, seen = [], []
    for last in (7, 99):
        watcher = Looks(last)
        _, metrics, steps = trained(
            Regression.of([1] * 6), minibatches=3, epochs=2, first_step=4, watcher=watcher
        )  # fmt: skip
        ends.append((steps, len(numbers(metrics, "loss/total")), len(numbers(metrics, "speed/tokens_per_second"))))
        seen += watcher.seen
    assert ends == [(7, 3, 1), (10, 6, 1)]
    assert seen == [5, 6, 7, 5, 6, 7, 8, 9, 10]


def test_the_steps_of_a_plan_may_hold_any_rows():
    objective = Regression.of([2, 5, 3])
    steps = [np.array([2]), np.array([0, 0, 1])]
    _, metrics, taken = trained(objective, steps=steps)
    assert taken == 2
    assert objective.seen == [[2], [0, 0, 1]]
    assert numbers(metrics, "rows") == [1.0, 3.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("budget", [1, 1000])
def test_a_loss_that_is_not_finite_names_its_rows_and_no_step_is_taken(value, budget):
    objective = Regression.of([2, 3, 1, 4])
    objective.rows[1][1][2] = value
    objective.rows[3][1][0] = value
    model = network()
    with pytest.raises(NumericsError, match="not finite") as caught:
        trained(objective, model=model, micro_batch_tokens=budget)
    assert sorted(caught.value.where.removeprefix("rows ").split(", ")) == ["row-1", "row-3"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))


def test_at_most_ten_rows_are_named():
    objective = Regression.of([1] * 30)
    for _, y in objective.rows:
        y[:] = np.nan
    with pytest.raises(NumericsError) as caught:
        trained(objective)
    assert caught.value.where.count("row-") == 10


@dataclass
class Overflowing(Regression):
    """Each row's loss is finite; the gradient of any is not."""

    def losses(self, model, rows, step):
        return Losses(sum(p.abs().sum().sub(p.abs().sum().detach()).sqrt() for p in model.parameters()) * step, {})


def test_a_gradient_that_is_not_finite_is_an_error_though_no_row_is_to_blame():
    model = network()
    with pytest.raises(NumericsError, match="none alone"):
        trained(Overflowing.of([1, 2]), model=model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))


def test_the_same_plan_gives_the_same_model_and_another_seed_another():
    runs = [trained(Regression.of([2] * 6), minibatches=3, seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("epochs", [1, 2], ids=["at the end", "seen in the next step"])
def test_weights_that_a_finite_gradient_made_infinite_are_named(epochs):
    objective = Regression.of([3, 4])
    objective.rows[:] = [(x, y + 1000) for x, y in objective.rows]
    with pytest.raises(NumericsError, match="weights are not finite after step 1") as caught:
        trained(objective, learning_rate=1e308, epochs=epochs)
    assert caught.value.where == "0.weight"


def with_dropout():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()


def test_what_dropout_leaves_out_follows_from_the_seed_and_the_steps_taken_whatever_was_drawn_before():
    weights = []
    for drawn, changes in ((0, {}), (1, {}), (2, {"plan_seed": 1}), (3, {"first_step": 1})):
        model = with_dropout()
        torch.rand(drawn)
        seed, first = changes.get("plan_seed", 0), changes.get("first_step", 0)
        objective = Regression.of([2] * 6)
        chosen = Plan(dealt(6, 1, 3, 0), 1000, 1e9, first, seed)
        fit(model, objective, torch.optim.SGD(model.parameters(), 0.1), AT_ONCE, chosen, Metrics("run", 0, "fit"))
        weights.append(model[0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_units_and_speed_are_logged():
    _, metrics, _ = trained(Regression.of([2, 2]))
    units = {row["name"]: row["unit"] for row in metrics.rows}
    assert units["speed/tokens_per_second"] == "tokens/s"
    assert metrics.last()["speed/tokens_per_second"] > 0
    assert copy.deepcopy(metrics.table()).num_rows == len(metrics.rows)
