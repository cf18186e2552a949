import math
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from pipeline.algorithms.bind import bind
from pipeline.contracts import LABELS, ROLLOUTS
from pipeline.errors import ArtifactError, ContractError, ExperimentError, InputError
from pipeline.experiment import Experiment
from pipeline.models import abreast, checkpoint
from pipeline.models.checkpoint import fresh_critic, fresh_reward_model, save
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from pipeline.training.policies import divergence, mismatch
from stages.score import MODEL_OF, Settings, length_correlation, location, score


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
    assert 0 < scores.stats["kl/sampler_abs"] == measured["kl/sampler_abs", 0] < 1e-5
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


@pytest.mark.parametrize("most", [4_000_000, 0], ids=["small", "large"])
def test_a_small_model_is_read_once_while_it_is_what_it_was(rollouts, other_policy, tmp_path, monkeypatch, most):
    load, loaded = checkpoint.load_policy, []
    monkeypatch.setattr(checkpoint, "load_policy", lambda path, dtype: loaded.append(path.name) or load(path, dtype))
    monkeypatch.setattr(abreast, "MOST_WEIGHTS", most)
    monkeypatch.setattr("stages.score._small", {})
    shutil.copytree(other_policy, tmp_path / "reference")

    def column(out, **changes):
        made = score.run(
            tmp_path / out, settings("ref_logprobs", **changes), rollouts=[rollouts.path],
            reference=tmp_path / "reference",
        )  # fmt: skip
        return np.concatenate(made.table()["ref_logprobs"].to_pylist())

    first, again, colder = column("a"), column("b", micro_batch_tokens=100), column("c", temperature=0.5)
    np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-5)
    assert not np.allclose(first, colder, atol=0.1)
    assert len(loaded) == (1 if most else 3)
    model, tokenizer = load(other_policy, "float32"), Chat(other_policy).tokenizer
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    save(model, tokenizer, tmp_path / "reference")
    assert not np.allclose(first, column("d"), atol=0.1), "another model in its place"
    assert len(loaded) == (2 if most else 4)


def test_a_model_that_is_needed_and_not_named(rollouts, policy, tmp_path):
    with pytest.raises(InputError, match="ref_logprobs needs a reference") as error:
        score.run(tmp_path / "a", settings("ref_logprobs"), rollouts=[rollouts.path], policy=policy.path)
    assert "--reference PATH" in error.value.do
    with pytest.raises(InputError, match="old_logprobs needs a policy"):
        score.run(tmp_path / "b", settings("old_logprobs"), rollouts=[rollouts.path], reference=policy.path)
    with pytest.raises(InputError, match="asks no model"):
        score.run(tmp_path / "d", settings(), rollouts=[rollouts.path], policy=policy.path)
    with pytest.raises(InputError, match="values needs a critic"):
        score.run(tmp_path / "e", settings("values"), rollouts=[rollouts.path], policy=policy.path)
    with pytest.raises(InputError, match="reward_scores needs a reward_model") as error:
        score.run(tmp_path / "f", settings("reward_scores"), rollouts=[rollouts.path], policy=policy.path)
    assert "--reward-model PATH" in error.value.do
    with pytest.raises(ExperimentError, match="needs"):
        settings("returns")
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
    assert found["kl/sampler_abs"] == (pytest.approx((0.5 + 0 + 1) / 3), "nat")
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


BIAS = 0.25


@pytest.fixture(scope="module")
def judges(room, policy):
    """A critic and a reward model with heads of some opinion."""
    tokenizer = AutoTokenizer.from_pretrained(policy.path)
    made = {"critic": fresh_critic(policy.path, 1), "reward_model": fresh_reward_model(policy.path, 2)}
    made["reward_model"].config.reward_bias = BIAS
    for name, model in made.items():
        model.score.weight.data *= 10
        save(model, tokenizer, room / name)
    return {name: room / name for name in made}


@pytest.fixture(scope="module")
def all_scores(room, rollouts, labels, policy, other_policy, judges):
    return score.run(
        room / "all-scores", settings("old_logprobs", "ref_logprobs", "values", "reward_scores", micro_batch_tokens=99),
        rollouts=[rollouts.path], labels=[labels.path], policy=policy.path, reference=other_policy, **judges,
    )  # fmt: skip


def test_all_four_models_in_one_go(all_scores, scores, rollouts, labels, judges, sound):
    sound(all_scores)
    table = all_scores.table()
    names = ["prompt_id", "sample", "old_logprobs", "ref_logprobs", "values", "reward_scores"]
    assert table.column_names == names
    for name in ("old_logprobs", "ref_logprobs"):
        both = [np.concatenate(made.table()[name].to_pylist()) for made in (all_scores, scores)]
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)
    critic = AutoModelForTokenClassification.from_pretrained(judges["critic"])
    reward_model = AutoModelForSequenceClassification.from_pretrained(judges["reward_model"])
    reward_model.config.pad_token_id = None  # it reads the last token of a row alone
    rows = rollouts.table().filter(labels.table()["keep"]).to_pylist()
    assert len(rows) == table.num_rows
    for got, row in zip(table.to_pylist(), rows, strict=True):
        tokens, start = torch.tensor([row["prompt_tokens"] + row["response_tokens"]]), len(row["prompt_tokens"])
        with torch.no_grad():
            values, judged = critic(tokens).logits[0, start - 1 : -1, 0], reward_model(tokens).logits.item()
        np.testing.assert_allclose(got["values"], values, rtol=1e-4, atol=1e-5)
        assert got["reward_scores"] == pytest.approx(judged + BIAS, rel=1e-4, abs=1e-5)


def test_what_is_measured_of_four_models(all_scores, scores, rollouts, labels, numbers):
    rows = all_scores.table().to_pylist()
    gaps = [np.subtract(row["old_logprobs"], row["ref_logprobs"]) for row in rows]
    values, judged = np.concatenate([row["values"] for row in rows]), np.array([row["reward_scores"] for row in rows])
    kept = rollouts.table().filter(labels.table()["keep"])
    lengths = [len(tokens) for tokens in kept["response_tokens"].to_pylist()]
    expected = {
        "kl/reference": np.concatenate(gaps).mean(),
        "kl/reference_sum": np.mean([gap.sum() for gap in gaps]),
        "value/mean": values.mean(),
        "value/std": values.std(),
        "reward_scores/mean": judged.mean(),
        "reward_scores/std": judged.std(),
        "reward_scores/length_correlation": np.corrcoef(judged, lengths)[0, 1],
    }
    measured = numbers(all_scores)
    for name, value in expected.items():
        assert measured[name, 0] == pytest.approx(value, rel=1e-5), name
        assert all_scores.stats[name] == measured[name, 0]
    assert scores.stats["kl/reference_sum"] == pytest.approx(expected["kl/reference_sum"], rel=1e-4)
    assert not [name for name in scores.stats if name.startswith(("value/", "reward_scores/"))]


def test_a_judgement_before_there_are_labels_needs_no_policy(rollouts, judges, sound, tmp_path):
    made = score.run(
        tmp_path / "judgements",
        settings("reward_scores"),
        rollouts=[rollouts.path],
        reward_model=judges["reward_model"],
    )
    sound(made)
    assert made.table().column_names == ["prompt_id", "sample", "reward_scores"]
    assert made.stats["rows"] == 48
    assert not [name for name in made.stats if name.startswith("kl/")]


@pytest.mark.parametrize(
    ("need", "model", "message"),
    [
        ("values", "policy", "not a critic"), ("values", "reward_model", "not a critic"),
        ("reward_scores", "critic", "not a reward_model"), ("old_logprobs", "critic", "not a causal language model"),
    ],
)  # fmt: skip
def test_a_model_in_the_place_of_another_is_refused(rollouts, other_policy, judges, tmp_path, need, model, message):
    place = {"values": "critic", "reward_scores": "reward_model", "old_logprobs": "policy"}[need]
    with pytest.raises(ArtifactError, match=message):
        score.run(
            tmp_path / "out", settings(need), rollouts=[rollouts.path],
            **{place: {"policy": other_policy, **judges}[model]},
        )  # fmt: skip


@pytest.fixture(scope="module")
def foreign(room):
    """A policy with other characters, more of them."""
    spec = ModelSpec(layers=1, width=32, heads=1, kv_heads=1, max_position=64)
    save(*create(spec, ["".join(map(chr, range(ord("!"), ord("A"))))], seed=0), room / "foreign")
    return room / "foreign"


@pytest.mark.parametrize("need", ["old_logprobs", "ref_logprobs", "values", "reward_scores"])
def test_a_model_with_another_tokenizer_than_the_rollouts_is_refused(rollouts, policy, judges, foreign, need, tmp_path):
    """The weights are right, the tokenizer beside them is not."""
    name = MODEL_OF[need]
    mixed = shutil.copytree({**judges}.get(name, policy.path), tmp_path / "mixed")
    (mixed / "manifest.json").unlink(missing_ok=True)
    for path in foreign.iterdir():
        if "token" in path.name:
            shutil.copy(path, mixed)
    digests = [Chat(path).metadata()["tokenizer_digest"] for path in (mixed, policy.path)]
    with pytest.raises(ContractError) as error:
        score.run(tmp_path / "out", settings(need), rollouts=[rollouts.path], **{name: mixed})
    shown = name.replace("_", " ")
    assert f"the {shown} has another tokenizer ({digests[0]}) than the rollouts ({digests[1]})" in error.value.what
    assert error.value.where == f"{mixed} and {rollouts.part_paths()[0]}"
    assert "copy those of that policy" in error.value.do
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_rollouts_that_name_no_tokenizer_are_read_with_any_model_that_knows_their_tokens(
    by_hand, rollouts, policy, foreign, tmp_path
):
    rows = rollouts.table().to_pylist()[:4]
    adopted = by_hand(ROLLOUTS, rows)
    made = score.run(tmp_path / "out", settings("old_logprobs"), rollouts=[adopted.path], policy=foreign)
    assert made.stats["rows"] == 4
    size = len(Chat(policy.path).tokenizer)
    for column in ("prompt_tokens", "response_tokens"):
        beyond = by_hand(ROLLOUTS, [{**rows[0], column: [3, size], "sampler_logprobs": None}])
        with pytest.raises(ArtifactError, match=f"hold token id {size}, and the model knows {size} tokens") as error:
            score.run(tmp_path / "other", settings("old_logprobs"), rollouts=[beyond.path], policy=policy.path)
        assert error.value.where == str(policy.path)


def test_divergence_by_hand():
    old, ref = (pa.array(rows, pa.list_(pa.float32())) for rows in ([[-1, -2], [-3]], [[-2, -2], [-2.5]]))
    assert divergence(old, ref) == {
        "kl/reference": (pytest.approx((1 + 0 - 0.5) / 3), "nat"),
        "kl/reference_sum": (pytest.approx((1 - 0.5) / 2), "nat"),
    }
    assert location("x", np.array([1.0, 3.0])) == {"x/mean": (2.0, "reward"), "x/std": (1.0, "reward")}


@pytest.mark.parametrize(
    ("scores", "lengths", "expected"),
    [([1, 2, 3], [2, 4, 6], 1.0), ([1, 2, 3], [6, 4, 2], -1.0), ([1, 1], [2, 4], None), ([1, 2], [4, 4], None)],
)
def test_length_correlation_by_hand(scores, lengths, expected):
    found = length_correlation(np.array(scores), np.array(lengths))
    assert [value for value, _ in found.values()] == ([] if expected is None else [pytest.approx(expected)])


def test_the_experiment_asks_after_labelling_and_for_a_judgement_by_name(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'recipe = "grpo"\n[recipe_changes.grpo]\nlabel = {kind = "reward_model"}\nupdate = {temperature = 0.7}\n'
        '[models.new]\nlayers = 2\n[data.demonstrations]\nsource = "arithmetic"\n'
        '[data.prompts]\nsource = "arithmetic"\n'
        "[scale]\niterations = 1\ngroups = 1\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
    )
    experiment = Experiment.load(path)
    assert "reward_scores" in bind(experiment.recipe).needs
    after = Settings.of(experiment)
    assert (after.needs, after.temperature) == (("ref_logprobs",), 0.7)
    assert experiment.recipe.rollout.temperature == 1.0
    assert Settings.of(experiment, {"needs": ["reward_scores"]}).needs == ("reward_scores",)
