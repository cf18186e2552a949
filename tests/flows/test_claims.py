import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flows import claiming, claims_page, cli
from flows.claims import CLAIMS, SCHEMA, Claim, Interval, Measure, names, verdict
from flows.execute import check
from pipeline.errors import ArtifactError, ExperimentError

FILE = """
title      = "more is more"
source     = "arXiv:0000.00000"
paper      = "two is more than one"
hypothesis = "it is"
written    = "2026-11-23"
experiment = "small"

[arms.one]
doc     = "one iteration"
recipe  = "grpo"
changes = ["scale.iterations=1"]

[arms.two]
doc     = "two iterations"
recipe  = "grpo"
changes = ["scale.iterations=2"]

[measures.rows]
doc   = "responses"
phase = "loop"
kind  = "rollouts"
name  = "length/mean"

[measures.accuracy]
doc   = "accuracy"
phase = "evaluation"
kind  = "labels"
name  = "accuracy/mean"

[[checks]]
says = "responses are longer than half a token"
a    = "one.rows"
b    = 0.5

[[checks]]
says = "half a token is longer"
a    = 0.5
b    = "two.rows"

[[checks]]
says = "ratios are numbers too"
a    = "one.rows / one.rows"
b    = 0.0
least = 0.999

[[pictures]]
title = "accuracy"
phase = "evaluation"
kind  = "labels"
name  = "accuracy/mean"
"""


def numbers(*rows):
    """Rows of arm, seed, iteration, value: held-out accuracy."""
    frame = pl.DataFrame(
        rows, schema={"arm": pl.String, "seed": pl.Int32, "iteration": pl.Int32, "value": pl.Float64}, orient="row"
    )
    rest = {
        "phase": "evaluation",
        "kind": "labels",
        "name": "accuracy/mean",
        "unit": "fraction",
        "experiment": "e",
        "commit": "c",
    }
    return frame.with_columns(**{key: pl.lit(value) for key, value in rest.items()}).select(
        pl.col(column).cast(kind) for column, kind in SCHEMA.items()
    )


def claim(*checks, take="last"):
    arm = {"doc": "an arm", "recipe": "grpo"}
    measure = {"doc": "accuracy", "phase": "evaluation", "kind": "labels", "name": "accuracy/mean", "take": take}
    return Claim.model_validate({
        "name": "planted", "folder": ".", "experiment": "sums",
        **dict.fromkeys(("title", "source", "paper", "hypothesis", "written"), ""),
        "arms": {"a": arm, "b": arm}, "measures": {"m": measure},
        "checks": [{"says": "a is above b", "a": "a.m", "b": "b.m", **one} for one in checks or ({},)],
    })  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_every_arm_of_every_claim_is_an_experiment_that_can_be_run(name):
    one = Claim.load(name)
    for arm in one.arms:
        _, _, experiment = claiming.prepared(one, arm, 3)
        check(experiment)
        assert experiment.name == f"{name}-{arm}-3"
        assert experiment.seed == 3 and experiment.base.endswith("-3")


@pytest.mark.parametrize("name", names())
def test_every_claim_says_what_was_expected_and_has_a_picture(name):
    one = Claim.load(name)
    assert one.hypothesis and one.paper and one.source.startswith("arXiv:") and one.pictures


def test_every_world_is_used():
    used = {arm.experiment or Claim.load(name).experiment for name in names() for arm in Claim.load(name).arms.values()}
    assert used == {path.stem for path in (CLAIMS / "worlds").glob("*.toml")}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_an_interval_is_students(values):
    found = Interval.of(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values) or 1e-300)
    assert found.low == pytest.approx(low, abs=1e-9) and found.high == pytest.approx(high, abs=1e-9)


def test_one_seed_says_nothing():
    assert Interval.of([3.0]) == Interval(3.0, -math.inf, math.inf, 1)
    assert str(Interval.of([3.0])) == "3"


def planted(differences):
    """b is at 0.5, a at 0.5 and something."""
    rows = [("b", seed, 0, 0.5) for seed in range(len(differences))]
    return numbers(*rows, *(("a", seed, 0, 0.5 + difference) for seed, difference in enumerate(differences)))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.10, 0.12, 0.09, 0.11, 0.10], "reproduced"),
        ([-0.10, -0.12, -0.09, -0.11, -0.10], "not reproduced"),
        ([0.10, -0.12, 0.09, -0.11, 0.01], "inconclusive"),
        ([0.10, 0.12], "inconclusive"),
        ([0.1, 0.1, 0.1], "reproduced"),
        ([], "not run"),
    ],
)
def test_the_interval_decides(differences, expected):
    (finding,) = claim().findings(planted(differences))
    assert finding.verdict == expected
    if len(differences) >= 3:
        wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95) if len(set(differences)) > 1 else None
        if wanted is not None:
            assert finding.difference.low == pytest.approx(wanted.low)


def test_the_reason_names_the_number_and_which_side_was_wanted():
    one_sided = claim({"b": 0.5}, {"a": 0.7, "b": "a.m"}, {"a": 0.7, "b": "a.m", "least": 0.3})
    first, second, third = one_sided.findings(planted([0.1, 0.1, 0.1]))
    assert first.why == "a.m: 0.60 [0.60, 0.60] over 3 seeds, wanted above 0.5"
    assert second.why == "a.m: 0.60 [0.60, 0.60] over 3 seeds, wanted below 0.7"
    assert third.why == "a.m: 0.60 [0.60, 0.60] over 3 seeds, wanted below 0.4"
    assert [one.verdict for one in (first, second, third)] == ["reproduced", "reproduced", "not reproduced"]


def test_a_margin_moves_the_line():
    found = claim({"least": 0.05}, {"least": 0.2}).findings(planted([0.10, 0.12, 0.09, 0.11, 0.10]))
    assert [one.verdict for one in found] == ["reproduced", "not reproduced"]
    assert "wanted above 0.05" in found[0].why


def test_only_seeds_of_both_arms_are_compared():
    frame = numbers(*(("a", seed, 0, 1.0 + seed) for seed in range(5)), *(("b", seed, 0, 0.5) for seed in (1, 2, 4)))
    (finding,) = claim().findings(frame)
    assert finding.difference.seeds == 3 and finding.difference.mean == pytest.approx(0.5 + 7 / 3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "inconclusive"], "inconclusive"),
        (["inconclusive", "not reproduced"], "not reproduced"),
        (["not reproduced", "not run"], "not run"),
    ],
)
def test_the_worst_check_is_the_claims_verdict(said, expected):
    class Said:
        def __init__(self, verdict):
            self.verdict = verdict

    assert verdict([Said(one) for one in said]) == expected


@pytest.mark.parametrize(
    ("take", "expected"),
    [("first", 0.25), ("last", 1.0), ("mean", 2.25 / 4), ("greatest", 1.0), ("least", 0.25), ("change", 0.75),
     ("mean_square", (2 * 0.0625 + 0.5625 + 1) / 4)],
)  # fmt: skip
def test_a_measure_takes_one_number_of_a_run(take, expected):
    frame = numbers(("a", 0, 9, 1.0), ("a", 0, 0, 0.25), ("a", 0, 3, 0.25), ("a", 0, 6, 0.75))
    assert claim(take=take).values(frame)["a.m"] == {0: pytest.approx(expected)}


def test_a_measure_may_look_at_some_iterations_only():
    measure = Measure(doc="", phase="evaluation", kind="labels", name="accuracy/mean", since=3, until=6, take="mean")
    frame = numbers(("a", 0, 9, 1.0), ("a", 0, 0, 0.0), ("a", 0, 3, 0.25), ("a", 0, 6, 0.75))
    assert measure.of(frame) == pytest.approx(0.5)
    assert measure.of(frame.filter(pl.col("iteration") > 6)) is None


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ('a    = "one.rows"', 'a    = "three.rows"', "check 'three.rows': write ARM.MEASURE"),
        ('a    = "one.rows"', 'a    = "one.columns"', "check 'one.columns'"),
        ('a    = "one.rows"\nb    = 0.5', "a    = 1.0\nb    = 0.5", "compares two numbers"),
        ("[[pictures]]", '[[pictures]]\narms = ["four"]', "no arm is called four"),
        ('doc     = "one iteration"', "", "arms.one.doc"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name_and_place(tmp_path, line, wrong, message):
    (tmp_path / "wrong.toml").write_text(FILE.replace(line, wrong, 1))
    with pytest.raises(ExperimentError) as error:
        Claim.load("wrong", tmp_path)
    assert message in str(error.value) and "wrong.toml" in str(error.value)


def test_what_does_not_exist_is_refused_with_what_does(tmp_path):
    with pytest.raises(ExperimentError, match=r"no claim is called 'nothing'; there are: .*majority"):
        Claim.load("nothing")
    (tmp_path / "lost.toml").write_text(FILE.replace('experiment = "small"', 'experiment = "nowhere"'))
    with pytest.raises(ExperimentError, match=r"arm 'one': no world is called 'nowhere'"):
        claiming.prepared(Claim.load("lost", tmp_path), "one", 0)


@pytest.fixture
def folder(tmp_path, desk):
    """A folder of claims with one claim in it, and the small experiment as its world."""
    (tmp_path / "claims" / "worlds").mkdir(parents=True)
    shutil.copy(desk.experiment, tmp_path / "claims" / "worlds" / "small.toml")
    (tmp_path / "claims" / "more.toml").write_text(FILE)
    return tmp_path / "claims"


def test_a_claim_is_run_stored_resumed_and_told(folder, tmp_path, capsys, monkeypatch):
    one, said = Claim.load("more", folder), []
    commits = iter(["begun", "ended"])
    monkeypatch.setattr(claiming, "commit", lambda: next(commits))
    claiming.run(one, 1, tmp_path / "runs", 2, said.append)
    stored = one.numbers()
    assert stored["commit"].unique().to_list() == ["begun"]
    assert stored.columns == list(SCHEMA)
    assert set(stored["arm"].unique()) == {"one", "two"} and stored["seed"].unique().to_list() == [0]
    of_two = stored.filter(pl.col("arm") == "two", pl.col("phase") == "loop", pl.col("name") == "length/mean")
    assert of_two["iteration"].to_list() == [0, 1]
    assert stored.filter(pl.col("phase") == "evaluation", pl.col("name") == "accuracy/mean").height == 4
    assert one.values(stored)["one.rows"][0] > 0.5

    monkeypatch.setattr(claiming, "_run_arm", None)  # nothing is run again
    claiming.run(one, 1, tmp_path / "runs", 1, said.append)
    assert said[-2:] == ["more: one, seed 0: stored", "more: two, seed 0: stored"]
    assert claiming.stored(one, stored) == {("one", 0), ("two", 0)}

    (folder / "more.toml").write_text(FILE.replace("scale.iterations=2", "scale.iterations=3"))
    changed = Claim.load("more", folder)
    assert claiming.stored(changed, stored) == {("one", 0)}
    assert "(of older files)" in claims_page.overview(folder).rows[0][3]

    claims_page.write(folder)
    page = (folder / "README.md").read_text()
    assert "inconclusive (of older files)" in page and "one iteration" in page and "ratios are numbers too" in page
    picture = ET.parse(folder / "pictures" / "more-0.svg")
    assert {"one", "two"} <= {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    monkeypatch.setattr("sys.argv", ["rlhf", "claims", "--folder", str(folder)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0 and "more" in capsys.readouterr().out


def test_changed_code_is_dirty_and_a_changed_page_is_not(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    for path in ("pipeline/losses/clip.py", "stages/rollout.py", "flows/run.py", "flows/experiments/claims/README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("as committed")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    monkeypatch.setattr(claiming, "CLAIMS", tmp_path / "flows" / "experiments" / "claims")
    clean = claiming.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for path in ("flows/experiments/claims/README.md", "flows/experiments/claims/results/a.parquet", "tests/test_a.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("changed since")
        assert claiming.commit() == clean
    for path in ("pipeline/losses/clip.py", "stages/rollout.py", "flows/run.py", "pipeline/losses/untracked.py"):
        (tmp_path / path).write_text("changed since")
        assert claiming.commit() == f"{clean}-dirty"
        git("stash", "--quiet", "--include-untracked", "--", path)


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    one = Claim.load("more", folder)
    one.results.parent.mkdir()
    one.results.write_bytes(b"PAR1 and no more")
    with pytest.raises(ArtifactError, match="unreadable results") as error:
        one.numbers()
    assert str(one.results) in str(error.value)
    with pytest.raises(ExperimentError, match="no claims there"):
        claims_page.text(tmp_path)


def test_numbers_of_a_run_take_the_place_of_older_ones(folder):
    one = Claim.load("more", folder)
    old = pl.DataFrame({"phase": ["loop"], "iteration": [0], "kind": ["labels"], "name": ["reward/mean"], "unit": [""],
                        "value": [1.0], "experiment": ["x"], "commit": ["c"]})  # fmt: skip
    claiming.store(one, "one", 0, old)
    claiming.store(one, "one", 1, old)
    claiming.store(one, "one", 0, old.with_columns(value=pl.lit(2.0)))
    assert one.numbers().select("seed", "value").rows() == [(0, 2.0), (1, 1.0)]
    assert [path.name for path in (folder / "results").iterdir()] == ["more.parquet"]


def test_the_page_is_that_of_the_stored_numbers():
    """Everybody who changes a claim or its results runs `rlhf claims page`."""
    assert claims_page.text(CLAIMS) == (CLAIMS / "README.md").read_text()
    linked = re.findall(r"\]\((pictures/.*?)\)", claims_page.text(CLAIMS))
    assert sorted(linked) == sorted(str(path.relative_to(CLAIMS)) for path in CLAIMS.glob("pictures/*"))
    for path in linked:
        ET.parse(CLAIMS / path)
