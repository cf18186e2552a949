"""Curves and histograms: the numbers are those of the files, what is not measured is named."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import LABELS, POLICY
from pipeline.grading.measures import clustered
from pipeline.inspecting.figures import BINS, colour, cost, curves, histograms
from pipeline.inspecting.measured import CURVES
from pipeline.inspecting.subject import Z, differences, subjects


def labels(folder, contract=LABELS, gold=(True, False, False, True), **numbers):
    """An artifact that measured something."""
    outbox = Outbox(folder, contract, "label" if contract is LABELS else "update", 1, folder.parent.name * 4, {}, {})
    for name, value in numbers.items():
        outbox.metrics.add(name.replace("__", "/"), value)
    if contract is LABELS:
        rows = [
            {"prompt_id": f"p{number // 2}", "sample": number % 2, "reward": float(right), "correct": right,
             "gold": right, "extracted": None, "target": None, "verdict": None,
             "vote_share": None, "keep": True, "dropped": None}
            for number, right in enumerate(gold)
        ]  # fmt: skip
        outbox.write(0, pa.Table.from_pylist(rows, schema=LABELS.schema()))
    else:
        (outbox.path / "weights").write_text(str(folder))
    return outbox.commit()


@pytest.fixture
def run(tmp_path):
    """Three iterations with a reward, two evaluations, an entropy in the last two."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / EXPERIMENT_FILE).write_text('name = "mine"\n[recipe]\nname = "r"\n[scale]\niterations = 3\n')
    for iteration, reward in enumerate((0.25, 0.5, 0.75)):
        labels(folder / f"000{iteration}" / "labels-0", reward__mean=reward, accuracy__mean=reward)
        policy = folder / f"000{iteration}" / "policy"
        labels(policy, POLICY, **({"entropy__mean": 1.0 - reward, "grad__norm": 2.0} if iteration else {}))
    labels(folder / "eval" / "0000" / "labels", gold=(True, False, False, False), accuracy__mean=0.25)
    labels(folder / "eval" / "0003" / "labels", accuracy__mean=0.5)
    return folder


def chart(charts, name):
    return next(one for one in charts if one.name == name)


def test_a_curve_has_the_numbers_of_its_metric(run):
    charts, _ = curves(subjects([run]))
    reward, entropy = chart(charts, "reward").figure.data[0], chart(charts, "entropy").figure.data[0]
    assert (list(reward.x), list(reward.y)) == ([0, 1, 2], [0.25, 0.5, 0.75])
    assert (list(entropy.x), list(entropy.y)) == ([1, 2], [0.5, 0.25])
    assert chart(charts, "reward").told == "0.25 → 0.75"


def test_held_out_accuracy_has_the_interval_over_prompts(run):
    held_out, training = chart(curves(subjects([run]))[0], "held-out accuracy").figure.data
    assert (list(held_out.x), list(held_out.y)) == ([0, 3], [0.25, 0.5])
    _, error = clustered(np.array([1.0, 0, 0, 0]), np.array(["p0", "p0", "p1", "p1"]))
    assert held_out.error_y.array[0] == pytest.approx(Z * error, rel=1e-4)
    assert held_out.error_y.arrayminus[0] == pytest.approx(0.25), "no share is below 0"
    assert held_out.error_y.array[1] == 0, "both prompts have the same share"
    assert list(training.y) == [0.25, 0.5, 0.75]
    assert training.line.dash == "dot"


def test_axes_have_units(run):
    for one in curves(subjects([run]))[0]:
        assert one.figure.layout.xaxis.title.text == "iteration"
        assert one.figure.layout.yaxis.title.text == one.unit != ""
        assert one.doc.endswith(".")


def test_what_nothing_measured_is_not_drawn_but_named(run):
    charts, missing = curves(subjects([run]))
    assert {one.name for one in charts} == {"reward", "held-out accuracy", "entropy", "gradient norm, policy"}
    assert missing["explained variance"] == "the recipe has no critic"
    assert "reward" not in missing
    assert set(missing) == {curve.name for curve in CURVES if curve.lack} - {one.name for one in charts}


def test_a_curve_of_one_value_is_a_point(run):
    labels(run / "0002" / "labels-1", vote__entropy=0.5)
    entropy = chart(curves(subjects([run]))[0], "vote entropy").figure.data[0]
    assert (list(entropy.x), entropy.mode) == ([2], "markers")


def test_runs_lie_over_each_other_in_their_colours(run, tmp_path):
    other = tmp_path / "other"
    labels(other / "0000" / "labels-0", reward__mean=0.125)
    (other / EXPERIMENT_FILE).write_text('name = "other"\n[recipe]\nname = "r"\n[scale]\niterations = 9\n')
    several = subjects([run, other])
    traces = chart(curves(several)[0], "reward").figure.data
    assert [(one.name, one.line.color, list(one.y)) for one in traces] == [
        ("mine", colour(0), [0.25, 0.5, 0.75]), ("other", colour(1), [0.125]),
    ]  # fmt: skip
    assert differences(several) == [
        {"setting": "name", "values": ["mine", "other"]}, {"setting": "scale.iterations", "values": [3, 9]},
    ]  # fmt: skip


def test_runs_of_the_same_name_are_told_apart(run, tmp_path):
    twin = tmp_path / "elsewhere" / "mine"
    twin.mkdir(parents=True)
    (twin / EXPERIMENT_FILE).write_text("")
    assert [one.name for one in subjects([run, twin])] == [str(run), str(twin)]


def spread(run, lengths, rewards, iterations):
    frame = pl.DataFrame({"phase": "loop", "iteration": iterations, "length": lengths, "reward": rewards})
    return {one.name: one.figure.data[0] for one in histograms(subjects([run])[0], frame)}


def test_a_histogram_counts_every_response(run):
    rng = np.random.default_rng(0)
    lengths, iterations = rng.integers(1, 300, 5000), rng.integers(0, 5, 5000)
    rewards = rng.standard_normal(5000)
    made = spread(run, lengths, rewards, iterations)
    for name, values in (("length", lengths), ("reward", rewards)):
        counts = np.array([[cell[1] for cell in row] for row in made[name].customdata])
        assert len(counts) <= BINS
        assert counts.sum(axis=0).tolist() == np.bincount(iterations).tolist()
        assert np.allclose(np.array(made[name].z).sum(axis=0), 1, atol=0.01)
        width = made[name].y[1] - made[name].y[0]
        assert values.min() <= min(made[name].y) < max(made[name].y) < values.max() + width


def test_bins_of_lengths_hold_what_they_say(run):
    lengths = [3, 3, 4, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100]
    made = spread(run, lengths, [0.0] * 14, [0] * 14)["length"]
    told = {cell[0]: cell[1] for row in made.customdata for cell in row if cell[1]}
    for name, count in told.items():
        low, _, high = name.partition(" to ")
        assert sum(int(low) <= length <= int(high or low) for length in lengths) == count
    assert sum(told.values()) == 14


def test_few_rewards_are_values_of_their_own(run):
    made = spread(run, [1, 2, 3, 4], [-1.0, 1.0, 1.0, 0.5], [0, 0, 1, 1])["reward"]
    assert list(made.y) == ["-1", "0.5", "1"]
    assert [list(row) for row in made.z] == [[0.5, 0], [0, 0.5], [0.5, 0.5]]
    assert (made.zmin, made.zmax) == (0, 0.5)


def test_cost_is_what_the_manifests_say(run):
    subject = subjects([run])[0]
    spent = {
        path: json.loads(path.read_text())["stats"]["seconds"] for path in run.rglob("manifest.json")
    }  # fmt: skip
    assert sum(row["seconds"] for row in subject.costs()) == pytest.approx(sum(spent.values()))
    bars = {bar.name: list(bar.x) for bar in cost(subject).figure.data}
    assert bars == {"label": [0, 1, 2], "update": [0, 1, 2], "label (evaluation)": [0, 3]}


def test_a_run_without_anything_has_no_charts(tmp_path):
    (tmp_path / EXPERIMENT_FILE).write_text("")
    subject = subjects([tmp_path])[0]
    charts, missing = curves([subject])
    assert charts == []
    assert missing["reward"] == "no labels yet"
    assert cost(subject) is None
    assert subject.flows() == []
