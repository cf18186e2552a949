"""Promotion: a worse policy is not promoted, a better one is, a crash between the two leaves the old one."""

import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from flows.promotion import PROMOTED, compare, decide, evaluations, point, promote
from pipeline.artifacts import InputRecord, Outbox
from pipeline.contracts import LABELS, POLICY, ROLLOUTS, Contract
from pipeline.errors import ArtifactError
from pipeline.experiment import Experiment

PROMPTS = 60
UNKNOWN = {**dict.fromkeys(LABELS.schema().names), "reward": 0.0, "keep": True}


def committed(contract: Contract, path: Path, rows, stats=None, inputs=None):
    out = Outbox(path, contract, "hand", 1, f"{abs(hash(path)):064x}"[-64:], {}, inputs or {}, dict(stats or {}))
    if contract is POLICY:
        (out.path / "config.json").write_text(json.dumps({"name": str(path)}))
    else:
        import pyarrow as pa

        out.write(0, pa.Table.from_pylist(rows, schema=contract.schema(rows[0])))
    return out.commit()


@pytest.fixture
def run(tmp_path):
    """A run of evaluated policies: `evaluated(iteration, right)` has `right(prompt)` of 4 responses right."""
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(
        'recipe = "grpo"\n[models]\npolicy = "p"\n[sft]\nenabled = false\n[data]\nprompts = {source = "arithmetic"}\n'
        "[scale]\niterations = 3\ngroups = 4\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
    )

    def evaluated(iteration: int, right, stats=None):
        policy = committed(POLICY, folder / f"{iteration:04d}" / "policy", [])
        here = folder / "eval" / f"{iteration:04d}"
        keys = [(f"p{number}", sample) for number in range(PROMPTS) for sample in range(4)]
        rollouts = [
            {"prompt_id": p, "sample": s, "prompt_tokens": [1], "response_tokens": [2], "response": "", "seed": 0,
             "sampler_logprobs": [-1.0], "finish": "stop"} for p, s in keys
        ]  # fmt: skip
        record = InputRecord(path=str(policy.path), fingerprint="f", digest=policy.manifest.digest)
        committed(ROLLOUTS, here / "rollouts", rollouts, stats, {"policy": [record]})
        labels = [
            {"prompt_id": p, "sample": s, "reward": 0.0, "gold": s < right(int(p[1:])), "keep": True} for p, s in keys
        ]  # fmt: skip
        committed(LABELS, here / "labels", [{**dict.fromkeys(LABELS.schema().names), **row} for row in labels])
        return policy

    return folder, evaluated


def settled(folder, word="yes", *changes) -> list[str]:
    said: list[str] = []
    decide(folder, Experiment.load(folder / "experiment.toml", changes), said.append, lambda _: word)
    return said


def now(folder) -> Path:
    return (folder / PROMOTED).resolve()


def test_a_better_policy_is_promoted_and_a_worse_one_is_not(run):
    folder, evaluated = run
    first = evaluated(0, lambda p: 1 + p % 2)
    assert "the first to be evaluated" in settled(folder)[0] and now(folder) == first.path
    worse = evaluated(1, lambda p: p % 2)
    assert re.search(r"not promoted: .* -0.250 \[-0.250, -0.250\] over 60 prompts", settled(folder)[0])
    assert now(folder) == first.path != worse.path
    better = evaluated(2, lambda p: 2 + p % 2)
    assert "promoted: the policy of iteration 2 is better than that of iteration 0: +0.250" in settled(folder)[0]
    assert now(folder) == better.path
    assert settled(folder) == []
    assert str((folder / PROMOTED).readlink()) == "0002/policy"


def test_a_gain_within_the_noise_is_no_gain(run):
    folder, evaluated = run
    first = evaluated(0, lambda p: 2)
    evaluated(1, lambda p: 3 if p % 10 < 6 else 1)  # 36 prompts up, 24 down: +0.05 +- 0.06
    said = settled(folder)
    assert "not surely better" in said[-1] and now(folder) == first.path
    assert settled(folder, "yes", "promotion.confidence=0.6")[0].startswith("  promoted")


def test_a_gate_of_the_evaluation_keeps_a_better_policy_out(run):
    folder, evaluated = run
    first = evaluated(0, lambda p: 1)
    evaluated(1, lambda p: 4, {"rows/malformed": 3.0})
    assert "fails gate malformed" in settled(folder)[-1] and now(folder) == first.path
    settled(folder, "yes", "gates.malformed=off")
    assert now(folder) == folder / "0001" / "policy"


def test_a_person_may_wait_refuse_and_approve(run):
    folder, evaluated = run
    first, _ = evaluated(0, lambda p: 1), evaluated(1, lambda p: 2)
    assert "waits for a person's word: `rlhf promote" in settled(folder, "later")[-1] and now(folder) == first.path
    said: list[str] = []
    promote(folder, said.append, refused=True)
    assert "refused" in said[0] and now(folder) == first.path
    assert settled(folder) == []
    third = evaluated(2, lambda p: 3)
    promote(folder, said.append)
    assert now(folder) == third.path
    promote(folder, said.append)
    assert said[-1].startswith("nothing waits")


def test_what_is_better_is_compared_with_what_is_promoted_one_after_the_other(run):
    folder, evaluated = run
    for iteration, right in enumerate((1, 3, 2)):
        evaluated(iteration, lambda p, right=right: right)
    said = settled(folder)
    assert [line.split(":")[0].strip() for line in said] == ["promoted", "promoted", "not promoted"]
    assert now(folder) == folder / "0001" / "policy"


def _killed_while_pointing(folder: Path, policy: Path, moment: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Path, moment, die)
    point(folder, policy)


@pytest.mark.parametrize("moment", ["symlink_to", "replace"])
def test_a_crash_between_the_two_leaves_the_old_one_and_the_next_run_goes_on(run, moment):
    folder, evaluated = run
    first = evaluated(0, lambda p: 1)
    settled(folder)
    better = evaluated(1, lambda p: 3)
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_pointing, args=(folder, better.path, moment)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert now(folder) == first.path
    settled(folder)
    assert now(folder) == better.path and not list(folder.glob(".promoted*"))


def test_a_link_to_somewhere_else_is_left_alone(run, tmp_path):
    folder, evaluated = run
    evaluated(0, lambda p: 1)
    elsewhere = committed(POLICY, tmp_path / "elsewhere", [])
    point(folder, elsewhere.path)
    with pytest.raises(ArtifactError, match="points to what this run did not evaluate"):
        settled(folder)
    assert now(folder) == elsewhere.path


def test_a_policy_that_is_not_there_any_more_is_not_promoted(run):
    folder, evaluated = run
    policy = evaluated(0, lambda p: 1)
    (policy.path / "config.json").unlink()
    (policy.path / "manifest.json").unlink()
    with pytest.raises(ArtifactError):
        settled(folder)
    assert not (folder / PROMOTED).is_symlink()


def test_without_answers_policies_are_compared_by_reward_or_not_at_all(run):
    folder, evaluated = run
    for iteration in range(2):
        evaluated(iteration, lambda p: 1)
    one, other = evaluations(folder)
    blind = replace(other, labels=committed(LABELS, folder / "blind", [{**UNKNOWN, "prompt_id": "q", "sample": 0}]))
    experiment = Experiment.load(folder / "experiment.toml")
    [failure] = compare(blind, one, experiment).failures
    assert "promotion.metric = 'reward'" in failure
    by_reward = Experiment.load(folder / "experiment.toml", ["promotion.metric=reward"])
    [failure] = compare(blind, one, by_reward).failures
    assert "other prompts" in failure


def test_the_same_rewards_are_no_gain(run):
    folder, evaluated = run
    for iteration, right in enumerate((1, 4)):
        evaluated(iteration, lambda p, right=right: right)
    one, other = evaluations(folder)
    experiment = Experiment.load(folder / "experiment.toml", ["promotion.metric=reward"])
    same = compare(other, one, experiment)
    assert same.prompts == PROMPTS and same.gain == 0 and not same.better
