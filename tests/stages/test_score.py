import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.contracts import LABELS, ROLLOUTS
from pipeline.errors import ArtifactError, ContractError, ExperimentError, InputError
from stages.score import Settings, mismatch, score


def settings(*needs, **changes):
    return Settings.of(None, {"needs": needs, **changes})


def direct(path, row, temperature=1.0):
    """Log-probabilities of the response tokens, by the model's own forward pass over this row alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens, start = row["prompt_tokens"] + row["response_tokens"], len(row["prompt_tokens"])
    with torch.no_grad():
        logprobs = (model(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)
    return [logprobs[place - 1, tokens[place]].item() for place in range(start, len(tokens))]


def test_columns_equal_a_direct_computation_on_the_kept_rows(scores, rollouts, labels, policy, other_policy, sound):
    sound(scores)
    assert scores.table().column_names == ["prompt_id", "sample", "old_logprobs", "ref_logprobs"]
    keep = labels.table()["keep"].to_pylist()
    expected = [row for row, kept in zip(rollouts.table().to_pylist(), keep, strict=True) if kept]
    found = scores.table().to_pylist()
    assert 0 < len(found) == len(expected) < len(keep)
    for got, row in zip(found, expected, strict=True):
        assert (got["prompt_id"], got["sample"]) == (row["prompt_id"], row["sample"])
        np.testing.assert_allclose(got["old_logprobs"], direct(policy.path, row), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got["ref_logprobs"], direct(other_policy, row), rtol=1e-4, atol=1e-5)
        assert not np.allclose(got["old_logprobs"], got["ref_logprobs"], atol=0.1)


def test_the_reference_engine_agrees_with_the_training_stack(scores, numbers):
    measured = numbers(scores)
    assert abs(measured["kl/sampler", 0]) < 1e-6
    assert measured["kl/sampler_max", 0] < 1e-4
    assert measured["kl/sampler_outside", 0] == 0.0
    assert scores.stats["kl/sampler"] == measured["kl/sampler", 0]


def test_without_labels_every_row_is_read_whatever_fits_into_memory(rollouts, policy, room):
    made = [
        score.run(
            room / f"scores-{budget}", settings("old_logprobs", micro_batch_tokens=budget),
            rollouts=[rollouts.path], policy=policy.path,
        ).table()
        for budget in (1, 10**6)
    ]  # fmt: skip
    one, other = (table["old_logprobs"].to_pylist() for table in made)
    assert len(one) == len(other) == 48
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), rtol=1e-4, atol=1e-5)


def test_the_temperature_is_that_of_the_sampling(rollouts, policy, other_policy, room, tmp_path):
    made = score.run(
        tmp_path / "out", settings("old_logprobs", temperature=0.5), rollouts=[rollouts.path], policy=other_policy
    )
    row, got = rollouts.table().to_pylist()[0], made.table()["old_logprobs"].to_pylist()[0]
    np.testing.assert_allclose(got, direct(other_policy, row, temperature=0.5), rtol=1e-4, atol=1e-5)
    assert made.stats["kl/sampler_max"] > 0.1
    assert made.stats["kl/sampler_outside"] > 0


def test_the_same_twice(scores, rollouts, labels, policy, other_policy, tmp_path):
    again = score.run(
        tmp_path / "out", settings("old_logprobs", "ref_logprobs"), rollouts=[rollouts.path], labels=[labels.path],
        policy=policy.path, reference=other_policy,
    )  # fmt: skip
    assert again.manifest.digest == scores.manifest.digest


def test_a_model_that_is_needed_and_not_named(rollouts, policy, tmp_path):
    with pytest.raises(InputError, match="ref_logprobs needs a reference") as error:
        score.run(tmp_path / "a", settings("ref_logprobs"), rollouts=[rollouts.path], policy=policy.path)
    assert "--reference PATH" in error.value.do
    with pytest.raises(InputError, match="old_logprobs needs a policy"):
        score.run(tmp_path / "b", settings("old_logprobs"), rollouts=[rollouts.path], reference=policy.path)
    with pytest.raises(InputError, match="asks no model"):
        score.run(tmp_path / "d", settings(), rollouts=[rollouts.path], policy=policy.path)
    with pytest.raises(ExperimentError, match="needs"):
        settings("values")
    with pytest.raises(ArtifactError, match="no such checkpoint"):
        score.run(tmp_path / "c", settings("old_logprobs"), rollouts=[rollouts.path], policy=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def marks(*rows):
    return [
        {
            "prompt_id": name, "sample": sample, "reward": 0.0, "correct": None, "extracted": None, "target": None,
            "verdict": None, "vote_share": None, "keep": keep, "dropped": None if keep else "by hand",
        }
        for name, sample, keep in rows
    ]  # fmt: skip


def test_labels_of_other_rollouts_and_labels_that_keep_nothing(by_hand, rollouts, policy, tmp_path):
    keys = list(zip(*(rollouts.table()[name].to_pylist() for name in ("prompt_id", "sample")), strict=True))
    parts = [keys[:20], keys[20:40], keys[40:]]

    def run(*labels):
        score.run(
            tmp_path / "out", settings("old_logprobs"), rollouts=[rollouts.path], labels=[a.path for a in labels],
            policy=policy.path,
        )  # fmt: skip

    with pytest.raises(ContractError, match="no rows are kept"):
        run(by_hand(LABELS, *(marks(*((*key, False) for key in part)) for part in parts)))
    with pytest.raises(ContractError, match="labels are of other rollouts"):
        run(by_hand(LABELS, *(marks(*((f"{name}x", sample, True) for name, sample in part)) for part in parts)))
    with pytest.raises(ContractError, match="labels are of other rollouts"):
        run(by_hand(LABELS, marks(*((*key, True) for key in keys))))
    with pytest.raises(ContractError, match="labels are of other rollouts"):
        run(by_hand(LABELS, *(marks(*((*key, True) for key in part)) for part in parts[:2])))
    whole = by_hand(LABELS, *(marks(*((*key, True) for key in part)) for part in parts))
    with pytest.raises(ContractError, match="1 rollouts but 2 labels"):
        run(whole, whole)


def test_mismatch_by_hand():
    sampler = pa.chunked_array([[[-1.0, -2.0], None], [[-3.0]]], pa.list_(pa.float32()))
    trainer = pa.array([[-1.5, -2.0], [-9.0], [-2.0]], pa.list_(pa.float32()))
    found = mismatch(sampler, trainer)
    assert found["kl/sampler"] == (pytest.approx((0.5 + 0 - 1) / 3), "nat")
    assert found["kl/sampler_max"] == (1.0, "nat")
    assert found["kl/sampler_outside"] == (pytest.approx(1 / 3), "fraction")
    assert math.log(2) < 1.0
    assert mismatch(pa.chunked_array([pa.nulls(3, pa.list_(pa.float32()))]), trainer) == {}


def test_responses_from_elsewhere_have_no_mismatch(by_hand, policy, tmp_path, rollouts):
    rows = [{**row, "sampler_logprobs": None} for row in rollouts.table().to_pylist()[:4]]
    adopted = by_hand(ROLLOUTS, rows)
    made = score.run(tmp_path / "out", settings("old_logprobs"), rollouts=[adopted.path], policy=policy.path)
    assert made.stats["rows"] == 4
    assert "kl/sampler" not in made.stats


def test_rounds_are_joined_in_order(by_hand, rollouts, policy, tmp_path):
    rows = rollouts.table().to_pylist()
    first, second = by_hand(ROLLOUTS, rows[:4]), by_hand(ROLLOUTS, rows[8:12])
    made = score.run(tmp_path / "out", settings("old_logprobs"), rollouts=[first.path, second.path], policy=policy.path)
    made.check()
    keys = [(row["prompt_id"], row["sample"]) for row in (*rows[:4], *rows[8:12])]
    assert [(row["prompt_id"], row["sample"]) for row in made.table().to_pylist()] == keys
