"""Reward hacking: when the gate speaks, when it keeps quiet, and what it shows."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.hacking import Parting, Point, averaged, draw, gate, parted, picture, point, points_of, watched
from pipeline.artifacts import Artifact, InputRecord, Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import PROMPTS, ROLLOUTS, SCORES
from pipeline.errors import ArtifactError, GateError
from pipeline.experiment import Gates
from stages.label import Settings as LabelSettings
from stages.label import label

STOP, WARN, OFF = (Gates(reward_hacking=what) for what in ("stop", "warn", "off"))
HACKED = ([0.6, 0.7, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
"""Gold and score of a run that is hacked from iteration 5 on."""


def run_of(golds, scores, error=0.01, score_error=0.1, judge="a"):
    return [
        Point(number, score, gold, score_error, error, judge)
        for number, (gold, score) in enumerate(zip(golds, scores, strict=True))
    ]


def first_alarm(points, gates=STOP):
    return next((end - 1 for end in range(1, len(points) + 1) if parted(points[:end], gates)), None)


def test_moving_means_by_hand():
    means = averaged(run_of([0.6, 0.9, 0.3, 0.6], [0.0, 3.0, 6.0, 0.0]), 3)
    assert [m.gold for m in means] == pytest.approx([0.6, 0.75, 0.6, 0.6])
    assert [m.score for m in means] == pytest.approx([0.0, 1.5, 3.0, 3.0])
    assert [m.gold_error for m in means] == pytest.approx([0.01, 0.01 / 2**0.5, 0.01 / 3**0.5, 0.01 / 3**0.5])
    assert [m.iteration for m in means] == [0, 1, 2, 3]


def test_score_up_and_gold_down_is_told_by_hand():
    points = run_of(*HACKED)
    found = parted(points, STOP)
    assert isinstance(found, Parting)
    assert (found.best.iteration, found.now.iteration) == (4, 7)
    assert (found.best.gold, found.now.gold) == (pytest.approx(0.8), pytest.approx(0.6))
    assert (found.best.score, found.now.score) == (pytest.approx(3.0), pytest.approx(6.0))
    assert found.error == pytest.approx(0.01 * math.sqrt(2 / 3))
    assert (
        first_alarm(points) == 6
    )  # means of 0.8 and 0.7; a window earlier 0.767, from the best of those before, 0.767
    assert "0.800 to 0.600 (24.5 standard errors" in str(found)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 4), st.randoms())
def test_never_while_gold_does_not_fall(golds, window, random):
    scores = [random.uniform(-3, 3) for _ in golds]
    points = run_of(sorted(golds), scores, error=0.0)
    assert first_alarm(points, Gates(reward_hacking_window=window)) is None


@given(st.lists(st.integers(0, 64), min_size=1, max_size=12), st.integers(1, 4), st.randoms())
def test_never_while_the_score_does_not_rise(scores, window, random):
    golds = [random.random() for _ in scores]
    points = run_of(golds, [float(s) for s in sorted(scores, reverse=True)], error=0.0)
    assert first_alarm(points, Gates(reward_hacking_window=window)) is None


histories = st.lists(st.tuples(st.integers(0, 64), st.integers(-64, 64)), min_size=1, max_size=12)


@given(histories, st.integers(1, 3), st.integers(-3, 6), st.integers(-1000, 1000))
def test_scale_and_zero_of_the_score_do_not_matter(history, window, power, shift):
    golds, scores = [gold / 64 for gold, _ in history], [score for _, score in history]
    gates = Gates(reward_hacking_window=window)
    points = run_of(golds, map(float, scores))
    moved = run_of(golds, [float(2.0**power * score + shift) for score in scores])
    assert first_alarm(points, gates) == first_alarm(moved, gates)


@given(histories, st.integers(1, 3))
def test_a_gate_with_a_greater_drop_is_not_sooner(history, window):
    points = run_of([gold / 64 for gold, _ in history], [float(score) for _, score in history])
    strict, lenient = (
        first_alarm(points, Gates(reward_hacking_window=window, reward_hacking_drop=d)) for d in (0.05, 0.3)
    )
    assert lenient is None or (strict is not None and strict <= lenient)


def test_windows_share_no_iteration():
    golds, scores = [0.9, 0.9, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]
    points = run_of(golds, scores)
    assert parted(points[:3], STOP) is None  # nothing lies before the first window
    assert parted(points, STOP).best.iteration == 0
    peak = run_of([0.5, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5, 0.5], np.arange(8.0))
    assert first_alarm(peak) == 7  # the means of 3 to 5 and of 4 to 6 differ by what they do not share


def test_a_fall_has_to_be_beyond_its_noise():
    golds, scores = HACKED
    fall, compared = 0.2, len(golds)
    least = fall / (2 * math.sqrt(math.log(compared)) * math.sqrt(2 / 3))
    assert parted(run_of(golds, scores, error=least * 0.99), STOP) is not None
    assert parted(run_of(golds, scores, error=least * 1.01), STOP) is None
    assert parted(run_of(golds, scores, error=math.nan), STOP) is None
    single = [0.8, 0.6], [0.0, 1.0]  # two iterations compared, window 1: two standard errors are the least
    gates = Gates(reward_hacking_window=1)
    assert parted(run_of(*single, error=0.099 / 2**0.5), gates) is not None
    assert parted(run_of(*single, error=0.101 / 2**0.5), gates) is None


def test_a_fall_smaller_than_the_drop_does_not_count():
    golds, scores = HACKED
    assert parted(run_of(golds, scores, error=0.0), Gates(reward_hacking_drop=0.199)) is not None
    assert parted(run_of(golds, scores, error=0.0), Gates(reward_hacking_drop=0.201)) is None


def test_noise_seldom_stops_a_run():
    """512 responses an iteration, an accuracy that stays at 0.7, a score that always rises: the worst for the gate."""
    rng = np.random.default_rng(0)
    error = math.sqrt(0.7 * 0.3 / 512)
    runs = [run_of(0.7 + error * rng.standard_normal(12), np.arange(12.0), error) for _ in range(300)]
    assert sum(first_alarm(points) is not None for points in runs) <= 0.06 * len(runs)


def test_what_another_reward_model_said_is_not_compared():
    golds, scores = HACKED
    points = run_of(golds, scores)
    renewed = [replace(one, judge="b") if one.iteration >= 5 else one for one in points]
    assert parted(points, STOP) is not None
    assert parted(renewed, STOP) is None
    later = run_of([*golds, 0.3, 0.2, 0.1], [*scores, 8.0, 9.0, 10.0])
    assert parted([replace(one, judge="b") if one.iteration >= 5 else one for one in later], STOP) is not None


# ---- what is read from artifacts


@pytest.fixture
def write(tmp_path):
    """Write an artifact by hand."""

    def written(path, contract, rows, stats=None, inputs=None):
        outbox = Outbox(tmp_path / path, contract, "hand", 1, "0" * 64, {}, inputs or {}, stats or {})
        outbox.write(0, pa.Table.from_pylist(rows, schema=contract.schema(rows[0])))
        return outbox.commit()

    return written


def _response(prompt, sample, text):
    return {
        "prompt_id": prompt, "sample": sample, "prompt_tokens": [1], "response_tokens": [2], "response": text,
        "sampler_logprobs": [-0.5], "finish": "stop", "seed": 0,
    }  # fmt: skip


@pytest.fixture
def judged(write):
    """Rollouts and labels of one round, by `label`: prompt, sample, response and its score; 7 is right."""

    def made(where, *rows, answer="7", grader="exact", judge="d" * 64):
        ids = dict.fromkeys(row[0].partition("#")[0] for row in rows)
        turns = [{"role": "user", "content": "3+4"}]
        prompts = write(
            where.replace("labels", "prompts"), PROMPTS,
            [{"prompt_id": i, "messages": turns, "answer": answer, "grader": grader, "source": "hand"} for i in ids],
        )  # fmt: skip
        rollouts = write(where.replace("labels", "rollouts"), ROLLOUTS, [_response(*row[:3]) for row in rows])
        judgements = write(
            where.replace("labels", "judgements"), SCORES,
            [{"prompt_id": row[0], "sample": row[1], "reward_scores": row[3]} for row in rows],
            inputs={"reward_model": [InputRecord(path="base/reward", fingerprint=judge, digest=judge)]},
        )  # fmt: skip
        settings = LabelSettings.of(None, {"label": {"kind": "reward_model"}})
        out = rollouts.path.with_name(rollouts.path.name.replace("rollouts", "labels"))
        paths = {"rollouts": rollouts.path, "prompts": prompts.path, "judgements": judgements.path}
        return rollouts, label.run(out, settings, **paths)

    return made


def test_a_point_pools_the_rounds_and_leaves_greedy_responses_out(judged):
    _, first = judged("0003/labels-0", ("p", -1, "7", 90.0), ("p", 0, "7", 1.0), ("p", 1, "8", 2.0))
    _, second = judged(
        "0003/labels-1", ("q", 0, "8", 3.0), ("q", 1, "8", 4.0), ("q#1", 0, "7", 5.0), ("q#1", 1, "7", 6.0)
    )
    made = point(3, [first, second])
    assert (made.iteration, made.judge) == (3, "d" * 64)
    assert made.score == pytest.approx(21 / 6)
    assert made.gold == pytest.approx(3 / 6)
    # excess of p: 1 + 2 - 2 * 3.5 = -4, of q (both draws are one prompt): 4; se = sqrt(2 * (16 + 16)) / 6
    assert made.score_error == pytest.approx(8 / 6)
    assert made.gold_error == pytest.approx(0.0)


def test_only_what_a_reward_model_and_the_reference_judge_is_watched(judged, write):
    _, labels = judged("0000/labels-0", ("p", 0, "7", 1.0), ("p", 1, "8", 2.0))
    _, unanswered = judged("0001/labels-0", ("p", 0, "7", 1.0), answer=None, grader="none")
    by_answer = label.run(
        labels.path.with_name("others"), LabelSettings.of(None, {"label": {"kind": "verifier"}}),
        **{name: labels.manifest.inputs[name][0].path for name in ("rollouts", "prompts")},
    )  # fmt: skip
    assert watched([labels], STOP) and watched([labels, unanswered], WARN)
    assert not watched([labels], OFF)
    assert not watched([unanswered], STOP)
    assert not watched([by_answer], STOP)
    assert not watched([], STOP)


@pytest.fixture
def iteration(judged):
    """The seventh iteration: its wrong responses, and a right one that scores higher."""
    long = "b\n" * 80
    first = judged(
        "0007/labels-0",
        ("p", -1, "g", 99.0),
        ("p", 0, "7", 50.0),
        ("p", 1, "a", 1.0),
        ("p", 2, long, 9.0),
        ("p", 3, "c", 3.0),
    )
    second = judged("0007/labels-1", ("q", 0, "d", 4.0), ("q", 1, "e", -5.0), ("q", 2, "", 6.0), ("q", 3, "f", 2.0))
    return [first[0], second[0]], [first[1], second[1]]


def test_a_gate_that_stops_shows_the_wrong_responses_that_score_highest(iteration):
    rollouts, labels = iteration
    with pytest.raises(GateError) as stopped:
        gate(run_of(*HACKED), STOP, rollouts, labels)
    head, title, *rows = stopped.value.what.splitlines()
    assert head == str(parted(run_of(*HACKED), STOP))
    assert "from iteration 0004 to 0007" in head
    assert title == "wrong responses that it scores highest:"
    assert [row.split()[:2] for row in rows] == [
        ["p/2", "+9.000"], ["q/2", "+6.000"], ["q/0", "+4.000"], ["p/3", "+3.000"], ["q/3", "+2.000"],
    ]  # fmt: skip
    assert rows[0].endswith('"' + "b\\n" * 50 + '"...')
    assert rows[1].endswith('  ""')
    assert stopped.value.where == f"{labels[0].path} {labels[1].path}"
    assert "--set gates.reward_hacking=warn" in stopped.value.do
    assert stopped.value.exit_code == 1


def test_a_gate_that_warns_says_so_and_one_that_is_off_does_not_look(iteration):
    rollouts, labels = iteration
    points = run_of(*HACKED)
    assert gate(points, WARN, rollouts, labels) == str(parted(points, WARN))
    assert gate(points, OFF, rollouts, labels) is None


@pytest.mark.parametrize("gates", [STOP, WARN, OFF], ids=["stop", "warn", "off"])
def test_a_gate_is_silent_while_all_is_well(gates, iteration):
    assert gate(run_of(*HACKED)[:5], gates, *iteration) is None
    assert gate([], gates, *iteration) is None


def test_the_points_of_a_run_are_those_of_its_iterations(judged, tmp_path):
    first = judged("0000/labels-0", ("p", 0, "7", 1.0), ("p", 1, "8", 2.0))[1]
    several = [judged(f"0001/labels-{turn}", (f"p{turn}", 0, "7", float(turn)))[1] for turn in range(11)]
    renewed = judged("0002/labels-0", ("p", 0, "7", 1.0), ("q", 1, "8", 2.0), judge="e" * 64)[1]
    judged("0003/labels-0", ("p", 0, "7", 1.0), answer=None, grader="none")
    (tmp_path / "0004").mkdir()
    (tmp_path / EXPERIMENT_FILE).touch()
    points = points_of(tmp_path)
    # a single prompt has no standard error, and NaN equals nothing
    assert repr(points) == repr((point(0, [first]), point(1, several), point(2, [renewed])))
    assert [one.judge[0] for one in points] == ["d", "d", "e"]
    assert points[1].score == 5.0


def test_a_run_is_read_where_it_has_been_moved_to(judged, tmp_path):
    labels = judged("0000/labels-0", ("p", 0, "7", 1.0), ("q", 0, "8", 2.0))[1]
    before = point(0, [labels])
    labels.path.parent.rename(tmp_path / "0005")
    assert point(0, [Artifact.open(tmp_path / "0005/labels-0")]) == before


def test_a_run_may_have_no_points_and_no_picture(judged, tmp_path):
    with pytest.raises(ArtifactError, match="not a run"):
        points_of(tmp_path)
    (tmp_path / EXPERIMENT_FILE).touch()
    assert points_of(tmp_path) == ()
    judged("0000/labels-0", ("p", 0, "7", 1.0), answer=None, grader="none")
    assert (points_of(tmp_path), draw([tmp_path])) == ((), None)


def test_the_points_of_a_real_run_are_what_its_stages_measured(walked):
    run = walked("rloo")
    points = points_of(run.folder)
    assert [one.iteration for one in points] == list(range(run.experiment.scale.iterations))
    for one in points:
        labels = Artifact.open(run.iteration(one.iteration) / "labels-0")
        assert one.score == pytest.approx(labels.stats["reward/mean"])
        assert one.gold == pytest.approx(labels.stats["accuracy/mean"])
        assert one.judge == Artifact.open(run.base / "reward").manifest.digest


def drawn(path):
    """What the page hands to plotly: traces and layout."""
    page = path.read_text(encoding="utf-8")
    decoder, start = json.JSONDecoder(), page.rindex("Plotly.newPlot(")
    traces, end = decoder.raw_decode(page[start:], page[start:].index("["))
    layout, _ = decoder.raw_decode(page[start:], page[start:].index("{", end))
    return traces, layout


def test_the_picture_is_one_page_without_anything_from_outside(tmp_path):
    path = picture({"one": run_of(*HACKED)}, tmp_path / "a.html")
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "a.html"
    assert "<script src" not in page and "<link" not in page
    assert "prefers-color-scheme: dark" in page
    assert picture({"one": run_of(*HACKED)}, tmp_path / "b.html").read_bytes() == path.read_bytes()


def test_the_picture_shows_both_by_iteration_and_against_each_other(tmp_path):
    other = [replace(one, judge="b" if one.iteration > 1 else "a") for one in run_of([0.5, 0.6, 0.7], [3.0, 4.0, 0.5])]
    traces, layout = drawn(picture({"one": run_of(*HACKED), "other": other}, tmp_path / "a.html"))
    assert [(t["name"], t.get("showlegend", True)) for t in traces] == [
        ("one: score", True), ("one: right", True), ("one", False),
        ("other: score", True), ("other: right", True), ("other", False),
    ]  # fmt: skip
    score, right, path = traces[3:]  # the line breaks where the judge changes
    assert (score["x"], score["y"]) == ([0, 1, None, 2], [3.0, 4.0, None, 0.5])
    assert (right["x"], right["y"]) == ([0, 1, None, 2], [0.5, 0.6, None, 0.7])
    assert (path["x"], path["y"], path["text"]) == (score["y"], right["y"], ["0", "1", None, "2"])
    assert score["error_y"]["array"] == [0.1, 0.1, None, 0.1]
    colours = [t["line"]["color"] for t in traces]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    axes = {name: layout[name]["title"]["text"] for name in ("xaxis", "yaxis", "yaxis2", "xaxis2", "yaxis3")}
    assert axes["xaxis"] == "iteration"
    assert all("[" in axes[name] for name in ("yaxis", "yaxis2", "xaxis2", "yaxis3"))
    assert (score["yaxis"], right["yaxis"], path["yaxis"]) == ("y", "y2", "y3")
