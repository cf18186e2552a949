"""The final table: what each policy came to, read from the evaluations of runs."""

import pyarrow as pa
import pytest

from flows.results import (
    ACCURACY,
    CHANGE,
    DECIDED,
    KL_RESPONSE,
    KL_TOKEN,
    LENGTH,
    LOSS,
    PAIRS,
    SCORE,
    WIN_RATE,
    table,
)
from pipeline.artifacts import InputRecord, Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import LABELS, PERPLEXITIES, ROLLOUTS, SCORES
from pipeline.errors import ArtifactError

SFT = {"p": [True, False], "q": [False, False]}
TRAINED = {"p": [True, True], "q": [True, False]}


def record(name):
    return [InputRecord(path=f"base/{name}", fingerprint=name, digest=name)]


class Evaluation:
    """Writes what `eval/NNNN` of a run holds."""

    def __init__(self, run, iteration, asked="first"):
        self.here, self.asked = run / "eval" / f"{iteration:04d}", asked
        run.mkdir(exist_ok=True)
        (run / EXPERIMENT_FILE).touch()

    def _write(self, name, contract, rows, stats=None, inputs=None):
        outbox = Outbox(self.here / name, contract, "hand", 1, self.asked, {}, inputs or {}, stats or {})
        outbox.write(0, pa.Table.from_pylist(rows, schema=contract.schema(rows[0])))
        outbox.commit()
        return self

    def rollouts(self, *lengths):
        rows = [
            {
                "prompt_id": "p", "sample": sample, "prompt_tokens": [1], "response_tokens": [2] * length,
                "response": "", "sampler_logprobs": None, "finish": "stop", "seed": 0,
            }
            for sample, length in enumerate(lengths)
        ]  # fmt: skip
        return self._write("rollouts", ROLLOUTS, rows)

    def labels(self, gold, accuracy=True):
        rows = [
            {
                "prompt_id": prompt, "sample": sample, "reward": 0.0, "correct": None, "gold": right, "extracted": None,
                "target": None, "verdict": None, "vote_share": None, "keep": True, "dropped": None,
            }
            for prompt, rights in gold.items() for sample, right in enumerate(rights)
        ]  # fmt: skip
        known = [[right for right in rights if right is not None] for rights in gold.values()]
        mean = sum(sum(rights) / len(rights) for rights in known) / len(known) if accuracy else None
        return self._write("labels", LABELS, rows, {"accuracy/mean": mean} if accuracy else {})

    def scores(self, scores, judge="reward", kl=None):
        rows = [
            {"prompt_id": prompt, "sample": sample, "reward_scores": score}
            for prompt, several in scores.items() for sample, score in enumerate(several)
        ]  # fmt: skip
        stats = {"reward_scores/mean": 0.0}
        if kl is not None:
            stats |= {"kl/reference_sum": kl[0], "kl/reference": kl[1]}
        return self._write("scores", SCORES, rows, stats, {"reward_model": record(judge)})

    def perplexity(self, loss):
        rows = [{field.name: value_of(field.type) for field in PERPLEXITIES.fields}]
        return self._write("perplexity", PERPLEXITIES, rows, {"loss/documents": loss})


def value_of(kind):
    """Something that a column of this type holds: only the stats are read."""
    if pa.types.is_string(kind):
        return "d"
    return [] if pa.types.is_list(kind) else 1


def cells(sheet):
    """Policy -> column -> cell."""
    return {row[0]: dict(zip(sheet.header[1:], row[1:], strict=True)) for row in sheet.rows}


@pytest.fixture
def whole(tmp_path):
    """A run of which everything is known."""
    run = tmp_path / "whole"
    first = Evaluation(run, 0).rollouts(2, 4).labels(SFT)
    first.scores({"p": [1.0, 1.0], "q": [0.0, 0.0]}, kl=(0.0, 0.0)).perplexity(1.25)
    last = Evaluation(run, 12, "last").rollouts(5, 6).labels(TRAINED)
    last.scores({"p": [2.0, 2.0], "q": [2.0, 4.0]}, kl=(3.21, 0.12345)).perplexity(1.30)
    return run


def test_a_whole_table_by_hand(whole):
    sheet = table([whole])
    assert sheet.header == (
        "policy", ACCURACY, WIN_RATE, PAIRS, DECIDED, SCORE, KL_RESPONSE, KL_TOKEN, LOSS, CHANGE, LENGTH,
    )  # fmt: skip
    assert sheet.rows == (
        # accuracies of the prompts 0.5 and 0: their mean, half their difference
        ("SFT", "0.250 ± 0.250", "", "", "", "0.500 ± 0.500", "0.000", "0.0000", "1.2500", "", "3.0"),
        # p: 2 of 4 pairs won, 2 tied; q: 2 won, 2 tied
        ("whole, iteration 12", "0.750 ± 0.250", "0.750 ± 0.000", "0.500 / 0.500 / 0.000", "1.000",
         "2.500 ± 0.500", "3.210", "0.1235", "1.3000", "+4.00", "5.5"),
    )  # fmt: skip


def test_the_last_policy_is_that_of_the_highest_iteration(whole):
    Evaluation(whole, 6, "between").rollouts(9)
    Evaluation(whole, 100, "later").rollouts(7)
    found = cells(table([whole]))
    assert list(found) == ["SFT", "whole, iteration 100"]
    assert found["whole, iteration 100"][LENGTH] == "7.0"


def test_what_is_not_known_is_empty_and_what_nobody_knows_is_left_out(whole, tmp_path):
    bare = tmp_path / "bare"
    Evaluation(bare, 0).rollouts(3)
    Evaluation(bare, 2, "last").rollouts(4).labels({"p": [None], "q": [None]}, accuracy=False)
    sheet = table([bare])
    assert sheet.header == ("policy", LENGTH)
    assert sheet.rows == (("SFT", "3.0"), ("bare, iteration 2", "4.0"))
    both = cells(table([bare, whole]))
    assert both["bare, iteration 2"] == dict.fromkeys(both["SFT"], "") | {LENGTH: "4.0"}


def test_documents_alone_are_an_evaluation(tmp_path):
    run = tmp_path / "texts"
    Evaluation(run, 0).perplexity(2.0)
    Evaluation(run, 1, "last").perplexity(1.9)
    assert cells(table([run])) == {
        "SFT": {LOSS: "2.0000", CHANGE: ""},
        "texts, iteration 1": {LOSS: "1.9000", CHANGE: "-5.00"},
    }


def test_pairs_without_a_verdict_do_not_count(tmp_path):
    run = tmp_path / "timeouts"
    Evaluation(run, 0).rollouts(1).labels({"p": [True, None], "q": [False], "r": [False]})
    Evaluation(run, 1, "last").rollouts(1).labels({"p": [False], "q": [None, False], "s": [True]})
    last = cells(table([run]))["timeouts, iteration 1"]
    assert (last[WIN_RATE], last[PAIRS], last[DECIDED]) == ("0.250 ± 0.250", "0.000 / 0.500 / 0.500", "0.000")


def test_ties_alone_leave_the_wins_among_decided_empty(whole, tmp_path):
    run = tmp_path / "same"
    Evaluation(run, 0).rollouts(1).labels(SFT)
    Evaluation(run, 1, "last").rollouts(1).labels({"p": [True], "q": [False]})
    Evaluation(run, 2, "later").rollouts(1).labels({"q": [False]})
    last = cells(table([run, whole]))["same, iteration 2"]
    assert (last[WIN_RATE], last[PAIRS], last[DECIDED]) == ("0.500", "0.000 / 1.000 / 0.000", "")


def test_a_first_policy_that_runs_share_stands_once_with_what_any_of_them_knows(whole, tmp_path):
    other = tmp_path / "other"
    Evaluation(other, 0).rollouts(2, 4).labels(SFT)
    Evaluation(other, 3, "other").rollouts(8).labels(SFT)
    for runs in ([whole, other], [other, whole]):
        found = cells(table(runs))
        assert list(found) == ["SFT", *(f"{run.name}, iteration {12 if run == whole else 3}" for run in runs)]
        assert found["SFT"][SCORE] == "0.500 ± 0.500"
        assert found["SFT"][ACCURACY] == "0.250 ± 0.250"
        assert found["other, iteration 3"][SCORE] == ""


def test_different_first_policies_name_their_runs(whole, tmp_path):
    own = tmp_path / "own"
    Evaluation(own, 0, "another").rollouts(2).labels({"p": [True], "q": [True]})
    Evaluation(own, 3, "last").rollouts(8).labels(SFT)
    found = cells(table([whole, own]))
    assert list(found) == ["SFT of whole", "SFT of own", "whole, iteration 12", "own, iteration 3"]
    assert found["own, iteration 3"][WIN_RATE] == "0.125 ± 0.125"  # against its own first policy


def test_scores_of_two_reward_models_do_not_share_a_column(whole, tmp_path):
    own = tmp_path / "own"
    Evaluation(own, 0).rollouts(2, 4).scores({"p": [7.0]}, judge="other")
    Evaluation(own, 3, "last").rollouts(8).scores({"p": [9.0]}, judge="other")
    sheet = table([whole, own])
    found = cells(sheet)
    assert [name for name in sheet.header if name.startswith(SCORE)] == ["score by base/reward", "score by base/other"]
    assert found["SFT"]["score by base/other"] == "7.000"  # one prompt: no error
    assert found["own, iteration 3"]["score by base/reward"] == ""
    assert found["own, iteration 3"]["score by base/other"] == "9.000"


def test_runs_of_the_same_name_are_told_by_their_paths(whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "elsewhere" / "whole"
    Evaluation(run, 0).rollouts(1)
    Evaluation(run, 1, "last").rollouts(1)
    assert list(cells(table([whole, run, whole]))) == ["SFT", f"{whole}, iteration 12", f"{run}, iteration 1"]


def test_what_is_no_run_or_not_evaluated_is_refused(whole, tmp_path):
    with pytest.raises(ArtifactError, match="not a run") as refused:
        table([whole, tmp_path / "nowhere"])
    assert refused.value.exit_code == 2
    assert "rlhf run" in refused.value.do
    run = tmp_path / "begun"
    run.mkdir()
    (run / EXPERIMENT_FILE).touch()
    with pytest.raises(ArtifactError, match="evaluated iterations there: none") as refused:
        table([run])
    assert refused.value.where == str(run / "eval")
    assert "data.held_out" in refused.value.do
    Evaluation(run, 0).rollouts(1)
    with pytest.raises(ArtifactError, match="evaluated iterations there: 0"):
        table([run])


def test_an_evaluation_without_the_first_policy_is_refused(tmp_path):
    run = tmp_path / "odd"
    Evaluation(run, 3).rollouts(1)
    Evaluation(run, 6).rollouts(1)
    with pytest.raises(ArtifactError, match="evaluated iterations there: 3, 6"):
        table([run])


def test_the_table_of_a_real_run_says_what_the_run_said(finished):
    desk, said = finished
    found = cells(table([desk.folder / "runs/small"]))
    before, after = (line.split()[3] for line in said.stdout.splitlines()[:2])
    assert [row[ACCURACY].split()[0] for row in found.values()] == [before, after]
    assert list(found) == ["SFT", "small, iteration 2"]
    assert found["small, iteration 2"][WIN_RATE]
