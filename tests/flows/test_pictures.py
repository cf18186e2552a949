"""What Prefect's pages show of a run; test_prefect_server.py looks at the pages themselves."""

import base64
import re
import string
import threading
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from prefect import flow
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import pictures
from flows.run import Run, look_up
from pipeline.artifacts import Artifact
from pipeline.catalog import gather_metrics
from pipeline.experiment import Experiment


@pytest.fixture(scope="module")
def run(finished):
    desk, _ = finished
    folder = desk.folder / "runs/small"
    return Run(Experiment.load(folder / "experiment.toml"), folder.parent, look_up)


@pytest.fixture
def there(finished, monkeypatch):
    """In the folder where the run was made: manifests name its inputs from there."""
    desk, _ = finished
    monkeypatch.chdir(desk.folder)


def test_what_a_model_wrote_is_never_markup():
    for one in string.punctuation:
        assert pictures.text(one) == f"\\{one}"
    nasty = pictures.text("<script>x</script>\n# h | [l](http://x)\x1b[31m é 你")
    assert re.sub(r"\\([!-/:-@\[-`{-~])", "", nasty) == "scriptxscriptn h  lhttpxu001b31m é 你"
    assert pictures.text("a" * 1000) == "a" * pictures.LONGEST + r"\.\.\."


def test_a_row_of_an_iteration_holds_means_by_rows_and_the_seconds_of_all_stages(run):
    row = pictures._numbers(run.iteration(0))
    labels = [Artifact.open(path) for path in sorted(run.iteration(0).glob("labels-*"))]
    rows = [one.stats["rows"] for one in labels]
    rewards = sum(one.stats["reward/mean"] * count for one, count in zip(labels, rows, strict=True)) / sum(rows)
    assert row["reward"] == pytest.approx(rewards, abs=1e-6)
    steps = [
        found["value"] for found in gather_metrics(run.iteration(0)).to_pylist()
        if (found["stage"], found["name"]) == ("policy", "entropy/mean")
    ]  # fmt: skip
    assert row["entropy [nat/token]"] == pytest.approx(sum(steps) / len(steps), abs=1e-6)
    seconds = [Artifact.open(path.parent).stats["seconds"] for path in run.iteration(0).glob("*/manifest.json")]
    assert row["seconds"] == pytest.approx(sum(seconds), abs=1e-3)
    assert row["iteration"] == 0


def test_the_picture_is_an_svg_with_a_curve_for_each_number_that_there_is(run):
    rows = [pictures._numbers(run.iteration(number)) for number in range(2)]
    written = pictures.picture([*rows, {**rows[0], "iteration": 2, "accuracy": None}], "a [title]")
    svg = base64.b64decode(re.fullmatch(r"!\[.*\]\(data:image/svg\+xml;base64,(.*)\)", written)[1])
    tree = ElementTree.fromstring(svg)
    curves = tree.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(curves) == sum(rows[0][name] is not None for name in pictures.CURVES)
    points = [len(curve.get("points").split()) for curve in curves]
    assert sorted(set(points)) == [2, 3], "accuracy is known of two of the three"


def test_samples_are_best_worst_and_random_ones_and_the_same_again(run, there):
    lines = pictures.samples(run.iteration(1), 7).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {which}" for which in ("best", "worst", "random") for _ in "123"
    ]
    rewards = [float(line.split(" | ")[1]) for line in lines]
    labels = [Artifact.open(path) for path in run.iteration(1).glob("labels-*")]
    everything = [reward for one in labels for reward in one.table()["reward"].to_pylist()]
    assert rewards[0] == max(everything) and rewards[5] == min(everything)
    assert pictures.samples(run.iteration(1), 7).splitlines()[2:] == lines


def test_outside_a_flow_run_nothing_is_made(run, there):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # where nobody would take it
        pictures.show(run, 1)


def test_an_iteration_is_shown_unless_one_was_just_now_and_the_last_in_the_end(run, monkeypatch):
    shown, now = [], [100.0]
    monkeypatch.setattr(pictures, "_later", lambda make, run, number: shown.append(number))
    monkeypatch.setattr(pictures, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pictures, "FlowRunContext", SimpleNamespace(get=lambda: "a flow run"))
    for number, wait in enumerate((0.0, 3.0, 3.0, 0.0)):
        now[0] += wait
        pictures.show(run, number)
    assert shown == [0, 2]
    for _ in range(2):
        pictures.catch_up(run)
        assert shown == [0, 2, 3]


def test_what_is_shown_is_made_meanwhile_in_order_and_waited_for():
    made, begin = [], threading.Event()
    pictures._later(begin.wait, timeout=60)
    for number in range(3):
        pictures._later(partial(made.append, number))
    assert made == []
    begin.set()
    pictures.wait()
    assert made == [0, 1, 2]


def test_what_could_not_be_shown_is_told_to_who_waits():
    pictures._later(partial(int, "no number"))
    with pytest.raises(ValueError, match="no number"):
        pictures.wait()
    pictures.wait()


def test_a_link_belongs_to_the_flow_run_that_left_it(served, run, there):
    @flow(name="linking")
    def linking():
        pictures.link(Artifact.open(run.iteration(0) / "policy"), "linked-meanwhile")
        pictures.wait()
        return str(FlowRunContext.get().flow_run.id)

    with temporary_settings({PREFECT_API_URL: served.url}):
        number = linking()
    (link,) = served.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["linked-meanwhile"]}}})
    assert link["flow_run_id"] == number
