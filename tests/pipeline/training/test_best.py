"""Best: looks at every so many steps, keeps the best weights, stops when nothing gets better."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.metrics import Metrics
from pipeline.training.best import Best, Judged
from pipeline.training.comparisons import Comparisons
from pipeline.training.progress import State


def judged(right, loss):
    """Of four comparisons, so many are right."""
    lead = np.where(np.arange(4) < right, 1.0, -1.0)
    ones = np.ones(4, int)
    made = Comparisons(["r"] * 4, ones, ones, ["p"] * 4, [""] * 4, lead, ones, np.full(4, np.nan), ones)
    return Judged(loss, made, lead, ones)


def walk(looks, *, every=1, patience=2, steps=100):
    """Train a single weight, which is the number of steps taken, and look."""
    model, metrics, left = nn.Linear(1, 1, bias=False), Metrics("run", None, "reward"), iter(looks)
    best = Best(model, lambda: judged(*next(left)), every, patience, metrics)
    for taken in range(1, steps + 1):
        model.train()
        with torch.no_grad():
            model.weight.fill_(taken)
        if best.after_step(taken):
            break
    assert model.training
    best.restore(taken)
    assert not model.training
    assert next(left, None) is None
    return best, taken, model.weight.item(), {(row["name"], row["step"]): row["value"] for row in metrics.rows}


@pytest.mark.parametrize(
    ("looks", "stopped", "kept"),
    [
        ([(2, 0.5), (3, 0.5), (1, 0.5), (2, 0.5)], 4, 2),
        ([(2, 0.5), (1, 0.5), (3, 0.5), (3, 0.5), (3, 0.5)], 5, 3),
        ([(2, 0.5), (2, 0.4), (2, 0.6)], 3, 2),
        ([(0, 0.9), (0, 0.9), (0, 0.9)], 3, 1),
    ],
    ids=["falls", "rises again", "the lower loss of equals", "never any better"],
)
def test_it_stops_after_patience_and_gives_back_the_best_weights(looks, stopped, kept):
    best, taken, weight, metrics = walk(looks)
    assert (taken, best.step, weight) == (stopped, kept, kept)
    for step, (right, loss) in enumerate(looks, start=1):
        assert (metrics["accuracy/held_out", step], metrics["loss/held_out", step]) == (right / 4, loss)
    assert best.accuracy == metrics["accuracy/held_out", kept]


def test_it_looks_every_so_many_steps_and_after_the_last():
    best, taken, weight, metrics = walk([(2, 0.5), (3, 0.5), (4, 0.5)], every=4, steps=10)
    assert [step for name, step in metrics if name == "accuracy/held_out"] == [4, 8, 10]
    assert (taken, best.step, weight) == (10, 10, 10)


def test_it_does_not_look_twice_at_the_last_step():
    best, taken, weight, metrics = walk([(3, 0.5), (2, 0.5)], every=4, steps=8)
    assert [step for name, step in metrics if name == "accuracy/held_out"] == [4, 8]
    assert (taken, best.step, weight) == (8, 4, 4)


def test_a_best_that_was_resumed_goes_on_as_if_it_had_seen_it_all():
    looks, ends = [(2, 0.5), (3, 0.5), (1, 0.5), (2, 0.5)], []
    for saved_at in (1, 2, 3):
        model, left = nn.Linear(1, 1, bias=False), iter(looks)
        best = Best(model, lambda left=left: judged(*next(left)), 1, 2, Metrics("run", None, "reward"))
        for taken in range(1, 5):
            with torch.no_grad():
                model.weight.fill_(taken)
            stop = best.after_step(taken)
            if taken == saved_at:
                tensors, values = best.state()
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                best = Best(model, best.judge, 1, 2, best.metrics)
                best.resume(State(tensors, json.loads(json.dumps(values))))
                tensors.clear()
        best.restore(4)
        ends.append((stop, best.step, best.accuracy, best.loss, model.weight.item()))
    assert ends == [(True, 2, 0.75, 0.5, 2.0)] * 3


def test_accuracy_and_its_error_are_of_prompts():
    found = judged(3, 0.1)
    assert found.accuracy == 0.75
    assert np.isnan(found.error)
