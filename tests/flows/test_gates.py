"""Gates between stages: each stops a real run with its worst rows, warns when told to, and leaves all readable."""

import json
import re

import pyarrow as pa
import pytest

from flows import gates
from flows.execute import walk
from flows.gates import GATES, look, worst
from flows.run import Run
from pipeline.catalog import artifacts_of
from pipeline.contracts import CONTRACTS
from pipeline.errors import GateError
from pipeline.experiment import Experiment, Gates

TIGHT = {  # each is broken by any run of this size
    "truncation": ("gates.truncation_most=0", "scale.response_tokens=4", "base=short"),
    "duplicates": ("gates.duplicates_most=0", "recipe_changes.dapo.rollout.temperature=0.01"),
    "zero_spread": ("gates.zero_spread_most=0",),
    "mismatch": ("gates.mismatch_most=1e-9",),
    "entropy": ("gates.entropy_least=5",),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where all runs of these tests lie, on one base."""
    return tmp_path_factory.mktemp("gates") / "runs"


@pytest.fixture
def run(request, desk, root, here_and_now):
    """A run of this test, and what it says; asked for again it is the same run with other settings."""

    def made(*changes: str) -> tuple[Run, list[str]]:
        said: list[str] = []
        name = re.sub(r"\W+", "-", request.node.name)
        experiment = Experiment.load(desk.experiment, ("scale.iterations=1", *changes), name=name)
        return Run(experiment, root, here_and_now, said.append), said

    return made


@pytest.fixture(scope="module")
def fine(desk, root, here_and_now):
    """A run that meets its gates, and what it said."""
    said: list[str] = []
    run = Run(Experiment.load(desk.experiment, name="fine"), root, here_and_now, said.append)
    walk(run)
    return run, said


@pytest.mark.parametrize("name", TIGHT)
def test_a_gate_that_fails_stops_the_run_with_five_rows_and_leaves_what_it_looked_at(run, name):
    tight, _ = run(
        f"gates.{name}=stop", *TIGHT[name], "gates.zero_spread_most=1" if name != "zero_spread" else "seed=0"
    )
    with pytest.raises(GateError, match=f"gate {name}: ") as caught:
        walk(tight)
    headline, heading, *rows = caught.value.what.splitlines()
    assert heading == "the worst rows:" and 1 <= len(rows) <= 5 and all("/" in row and '"' in row for row in rows)
    assert f"gates.{name}=warn" in caught.value.do
    where = next(one for one in artifacts_of(tight.folder) if str(one.path) == caught.value.where)
    assert where.faults() == [] and where.stats[next(gate.number for gate in GATES if gate.name == name)] is not None
    with pytest.raises(GateError, match=f"gate {name}"):
        walk(tight)
    warned, said = run(f"gates.{name}=warn", *TIGHT[name])
    walk(warned)
    assert any(headline.split(":")[0] in line for line in said)
    off, said = run(f"gates.{name}=off", *TIGHT[name])
    walk(off)
    assert not any(f"gate {name}" in line for line in said)


def test_an_ordinary_run_meets_every_gate_but_those_about_signal(fine):
    _, said = fine
    assert [line for line in said if "gate " in line and "zero_spread" not in line and "duplicates" not in line] == []


def test_every_gate_has_its_settings_and_looks_at_a_known_kind():
    fields = Gates.model_fields
    for gate in GATES:
        assert set(gate.kinds) <= set(CONTRACTS) and gate.name in fields
        assert gate.limit(Gates())[1] in (1, -1)
    named = {gate.name for gate in GATES} | {"reward_hacking"}
    assert {name for name in fields if not name.endswith(("_most", "_least", "_drop", "_window"))} == named


def test_grader_failures_stop_and_show_what_could_not_be_graded(run, tmp_path):
    """The math grader gets next to no time: judgements time out, really; on a busy machine one may get through."""
    sums = [{"question": f"{n}+{n + 1}", "answer": str(2 * n + 1)} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sums))
    prompts = 'data.prompts={source="files", files=["sums.jsonl"], grader="math"}'
    few = (
        "data.held_out=",
        "scale.groups=2",
        "recipe_changes.dapo.rollout.group_size=2",
        "resources.grader_seconds=1e-6",
    )
    stopped, _ = run(f"data.folder={tmp_path}", prompts, "base=graded", *few)
    with pytest.raises(GateError, match=r"gate grader_failures: .* grader/failures = ") as caught:
        walk(stopped)
    share = float(re.search(r"grader/failures = ([\d.]+)", caught.value.what)[1])
    assert "grader_seconds" in caught.value.do and len(caught.value.what.splitlines()) == 2 + 4 * share


def test_malformed_rows_and_a_policy_too_far_are_found(fine):
    """Numbers that a sound engine does not give: what the gate says of a manifest that has them."""
    run, _ = fine
    rollouts = next(one for one in artifacts_of(run.folder) if one.manifest.kind == "rollouts")
    scores = next(one for one in artifacts_of(run.folder) if one.manifest.kind == "scores")
    for artifact, number, name in (
        (rollouts, "rows/malformed", "malformed"),
        (scores, "kl/reference_sum", "divergence"),
    ):
        bad = type(artifact)(artifact.path, artifact.manifest.model_copy(update={"stats": {number: 1e6}}))
        gate = next(gate for gate in GATES if gate.name == name)
        assert gate.failure(bad, Gates()) is not None
        assert gates.failures([bad], Gates(), (name,)) != [] and gates.failures([artifact], Gates(), (name,)) == []
    with pytest.raises(GateError, match="gate malformed"):
        look(
            run,
            type(rollouts)(rollouts.path, rollouts.manifest.model_copy(update={"stats": {"rows/malformed": 1}})),
            [rollouts],
        )


def test_the_worst_rows_come_first_and_their_texts_stay_on_one_line(fine):
    rollouts = next(one for one in artifacts_of(fine[0].folder) if one.manifest.kind == "rollouts")
    keys = [(row["prompt_id"], row["sample"]) for row in rollouts.table(["prompt_id", "sample"]).to_pylist()]
    lines = worst(((float(number), *key) for number, key in enumerate(keys)), [rollouts])
    assert len(lines) == 5 and lines[0].startswith(f"  {keys[-1][0]}/{keys[-1][1]}  +{len(keys) - 1}")
    assert gates.shown("a\nb" * 60).count("\n") == 0 and gates.shown("a\nb" * 60).endswith("...")
    assert isinstance(rollouts.table(), pa.Table)
