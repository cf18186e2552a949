import json
import math
import random
import shutil

import duckdb
import numpy as np
import polars
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipeline.algorithms.recipe import Recipe
from pipeline.contracts import RANKINGS, ROLLOUTS
from pipeline.errors import ArtifactError, ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.models.checkpoint import load_reward_model
from pipeline.models.forward import response_scores
from pipeline.text import Chat
from pipeline.training.best import Judged
from pipeline.training.preference import elements
from stages.reward import PAIRS, Settings, reward
from stages.score import Settings as ScoreSettings
from stages.score import score

PREFERENCES = {"even": lambda text: int(text[-1]) % 2, "longer": lambda text: -len(text)}


def settings(**changes):
    given = {"epochs": 10, "batch": 10, "learning_rate": 3e-3, "tokens": 32, "held_out_share": 0.25, "seed": 3}
    return Settings.of(None, {**given, **changes})


def row(number, responses, ranks, prompt="1+2=", **changes):
    messages = [{"role": "user", "content": prompt}]
    return {
        "ranking_id": f"r{number}", "prompt_id": f"p{number}", "messages": messages, "responses": responses,
        "ranks": ranks, "annotator": None, "source": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranked(by_hand):
    """Rankings of three sums each, by one of the preferences."""

    def write(preference, count=80):
        drawn = random.Random(preference)
        rows = []
        for number in range(count):
            texts = {"".join(drawn.choices("0123456789", k=drawn.randint(1, 6))) for _ in range(4)}
            keys = [PREFERENCES[preference](text) for text in sorted(texts)]
            ranks = [sorted(set(keys)).index(key) for key in keys]
            rows.append(row(number, sorted(texts), ranks, f"{number % 10}+{number // 10}="))
        return by_hand(RANKINGS, rows)

    return write


@pytest.fixture(scope="module")
def even(ranked):
    return ranked("even")


@pytest.fixture(scope="module")
def made(room, even, policy, demonstrations):
    return reward.run(
        room / "reward", settings(), rankings=even.path, policy=policy.path, demonstrations=demonstrations.path
    )


def weights_of(path):
    return torch.cat([p.detach().flatten() for p in load_reward_model(path, "float32").parameters()])


def scores_of(path, texts):
    with torch.no_grad():
        return response_scores(load_reward_model(path, "float32"), *zip(*texts, strict=True))


def test_held_out_rankings_are_told_apart(made, numbers, sound):
    sound(made)
    measured = numbers(made)
    assert measured["accuracy/held_out", 0] > 0.9
    assert measured["loss/held_out", 0] < 0.5 * math.log(2)
    assert measured["accuracy/train", 0] > 0.9
    assert abs(measured["reward_scores/length_correlation", 0]) < 0.5
    assert measured["loss/ranking", 1] == pytest.approx(math.log(2), abs=0.1)
    assert measured["accuracy/pairs", made.stats["steps"]] > measured["accuracy/pairs", 1]
    opened = AutoModelForSequenceClassification.from_pretrained(made.path)
    assert (opened.config.num_labels, type(opened).__name__) == (1, "Qwen3ForSequenceClassification")


def test_what_prefers_length_shows(room, ranked, policy, numbers):
    found = reward.run(room / "longer", settings(), rankings=ranked("longer").path, policy=policy.path)
    assert numbers(found)["reward_scores/length_correlation", 0] > 0.8
    assert numbers(found)["accuracy/held_out", 0] > 0.9


def test_demonstrations_score_zero_on_average(made, demonstrations, numbers):
    chat = Chat(made.path)
    shown = [
        (chat.prompt_tokens(turns[:-1]), chat.demonstration(turns)[0][len(chat.prompt_tokens(turns[:-1])) :])
        for turns in demonstrations.table()["messages"].to_pylist()
    ]
    scores = scores_of(made.path, shown)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std() > 0.01
    bias = load_reward_model(made.path, "float32").config.reward_bias
    assert bias == numbers(made)["reward/bias", 0] != 0


def test_without_demonstrations_the_bias_is_zero_and_the_log_says_so(room, even, policy, made, numbers):
    bare = reward.run(room / "bare", settings(), rankings=even.path, policy=policy.path)
    assert load_reward_model(bare.path, "float32").config.reward_bias == 0
    assert "no demonstrations: the bias stays 0" in (bare.path / "log.txt").read_text()
    assert torch.equal(weights_of(bare.path), weights_of(made.path))
    assert numbers(bare)["accuracy/held_out", 0] == numbers(made)["accuracy/held_out", 0]


def test_what_fits_into_memory_changes_nothing_but_rounding(room, even, policy, made):
    one, other = (
        reward.run(
            room / f"budget-{budget}", settings(epochs=1, micro_batch_tokens=budget), rankings=even.path,
            policy=policy.path,
        )
        for budget in (1, 10**6)
    )  # fmt: skip
    distance = torch.linalg.vector_norm(weights_of(one.path) - weights_of(other.path))
    assert distance < 1e-5 * torch.linalg.vector_norm(weights_of(one.path))


def test_the_same_twice_and_something_else_with_another_seed(room, even, policy, demonstrations):
    def digest(name, **changes):
        given = {"rankings": even.path, "policy": policy.path, "demonstrations": demonstrations.path}
        manifest = reward.run(room / name, settings(epochs=2, check_every=3, **changes), **given).manifest
        assert PAIRS in manifest.files
        return manifest.digest

    assert digest("reward once") == digest("reward twice") != digest("reward seed", seed=4)


def test_without_held_out_prompts_nothing_is_said_of_them(room, even, policy, numbers):
    found = reward.run(room / "all", settings(epochs=1, held_out_share=0.0), rankings=even.path, policy=policy.path)
    assert not {name for name, _ in numbers(found)} & {"accuracy/held_out", "loss/held_out"}
    assert numbers(found)["rows/held_out", 0] == 0
    assert numbers(found)["rows/train", 0] == 80 - found.stats["rejected"]


def test_rankings_that_cannot_be_learned_from_are_counted(by_hand, policy, room, tmp_path, numbers):
    rows = [row(n, ["3", "4"], [0, 1]) for n in range(6)]
    rows += [row(6, ["3", "4", "5"], [1, 1, 1]), row(7, ["3", "1" * 40], [0, 1])]
    again = by_hand(RANKINGS, rows[:3])
    found = reward.run(
        room / "some", settings(epochs=1), rankings=[by_hand(RANKINGS, rows).path, again.path], policy=policy.path
    )
    measured = numbers(found)
    reasons = {"rejected/rankings_tie": 1, "rejected/rankings_too_long": 1, "rejected/rankings_repeated": 3}
    assert {name: measured[name, 0] for name in reasons} == reasons
    assert found.stats["rejected"] == measured["rows/rejected", 0] == 5
    assert measured["rows/train", 0] + measured["rows/held_out", 0] == 6
    told = "0 came before, 1 have more than 32 tokens, 1 have no pair"
    with pytest.raises(ContractError, match=f"none of the rankings can be used: {told}"):
        reward.run(tmp_path / "none", settings(), rankings=by_hand(RANKINGS, rows[6:]).path, policy=policy.path)


def test_a_long_response_takes_out_its_ranking_and_not_its_prompt(by_hand, policy, room, numbers):
    rows = [row(0, ["3", "4", "1" * 40], [0, 1, 2]), row(1, ["4", "5"], [0, 1]), row(2, ["3", "4"], [0, 1])]
    rows[1]["prompt_id"] = "p0"
    found = reward.run(
        room / "one long", settings(epochs=1, held_out_share=0), rankings=by_hand(RANKINGS, rows).path,
        policy=policy.path,
    )  # fmt: skip
    assert numbers(found)["rejected/rankings_too_long", 0] == 1
    assert numbers(found)["rows/train", 0] == 2


def test_nothing_longer_than_the_models_positions_is_read(by_hand, policy, room, numbers):
    rows = [row(n, ["3", "4"], [0, 1]) for n in range(3)] + [row(3, ["3", "1" * 80], [0, 1])]
    found = reward.run(
        room / "positions", settings(epochs=1, tokens=1000), rankings=by_hand(RANKINGS, rows).path, policy=policy.path
    )
    assert numbers(found)["rejected/rankings_too_long", 0] == 1


def test_demonstrations_that_are_too_long(by_hand, policy, demonstrations, tmp_path):
    rankings = by_hand(RANKINGS, [row(n, ["3", "4"], [0, 1]) for n in range(2)])
    with pytest.raises(ContractError, match="all 30 demonstrations are longer than 6 tokens"):
        reward.run(
            tmp_path / "out", settings(epochs=1, tokens=6), rankings=rankings.path, policy=policy.path,
            demonstrations=demonstrations.path,
        )  # fmt: skip


def test_it_goes_on_from_a_reward_model(room, even, made):
    kept = reward.run(
        room / "kept-reward", settings(epochs=1, learning_rate=1e-12), rankings=even.path, reward_model=made.path
    )
    assert torch.allclose(weights_of(kept.path), weights_of(made.path), rtol=0, atol=1e-9)
    bias = [load_reward_model(path, "float32").config.reward_bias for path in (kept.path, made.path)]
    assert bias[0] == bias[1] != 0


def test_it_starts_from_one_model(even, policy, made, tmp_path):
    with pytest.raises(ExperimentError, match="and neither is given"):
        reward.run(tmp_path / "out", settings(), rankings=even.path)
    with pytest.raises(ExperimentError, match="and both are given"):
        reward.run(tmp_path / "out", settings(), rankings=even.path, policy=policy.path, reward_model=made.path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        reward.run(tmp_path / "out", settings(), rankings=even.path, policy=tmp_path / "bare")


def judged(artifact, rankings, margin=0.0):
    """What the finished model says of rankings."""
    model, chat = load_reward_model(artifact.path, "float32"), Chat(artifact.path)
    return Judged.of(model, elements(rankings.table().to_pylist(), chat), 10**6, margin)


def looks(measured, name="accuracy/held_out"):
    return {step: value for (found, step), value in measured.items() if found == name and step > 0}


@pytest.fixture(scope="module")
def unsure(by_hand):
    """Rankings by the last digit, of which a third is the wrong way round."""
    drawn, rows = random.Random(5), []
    for number in range(60):
        texts = ["".join(drawn.choices("0123456789", k=3)) for _ in range(2)]
        ranks = [int(texts[0][-1]) % 2, int(texts[1][-1]) % 2]
        if ranks[0] != ranks[1]:
            ranks = ranks[::-1] if drawn.random() < 0.33 else ranks
            rows.append(row(number, texts, ranks, f"{number % 10}+{number // 10}="))
    return by_hand(RANKINGS, rows)


EARLY = {"check_every": 2, "patience": 3, "epochs": 40, "batch": 5, "learning_rate": 1e-2, "held_out_share": 0.4}


@pytest.fixture(scope="module")
def stopped(room, unsure, policy):
    return reward.run(room / "stopped", settings(**EARLY), rankings=unsure.path, policy=policy.path)


def test_training_ends_early_and_keeps_the_best_weights(stopped, numbers, sound):
    sound(stopped)
    measured, steps, kept = numbers(stopped), int(stopped.stats["steps"]), int(stopped.stats["steps_kept"])
    seen, losses = looks(measured), looks(measured, "loss/held_out")
    assert list(seen) == list(range(2, steps + 1, 2))
    best = max(seen.values())
    first_best = min(step for step in seen if seen[step] == best)
    assert steps == first_best + 2 * 3 < 40 * 4
    assert kept == min((step for step in seen if seen[step] == best), key=lambda step: losses[step])
    assert seen[steps] < best
    assert measured["accuracy/held_out", 0] == seen[kept] == best
    assert measured["loss/held_out", 0] == losses[kept]
    assert measured["steps/kept", 0] == kept
    assert max(looks(measured, "loss/ranking")) == steps
    assert f"kept the weights of step {kept} of {steps}" in (stopped.path / "log.txt").read_text()


def test_the_kept_weights_are_those_that_a_shorter_training_ends_with(room, unsure, policy):
    flat = {**EARLY, "batch": 1000, "final_share": 1.0, "learning_rate": 5e-3, "check_every": 1}  # a step is an epoch
    early = reward.run(room / "flat", settings(**flat), rankings=unsure.path, policy=policy.path)
    kept = int(early.stats["steps_kept"])
    assert 1 < kept < early.stats["steps"] < 40
    short = reward.run(
        room / "ended", settings(**{**flat, "epochs": kept, "check_every": 0}), rankings=unsure.path, policy=policy.path
    )
    assert torch.equal(weights_of(short.path), weights_of(early.path))


def test_looking_changes_nothing_but_what_is_kept(room, even, policy, made, numbers):
    """Where the last look is the best one, the weights are those of a training without looks."""
    looking = reward.run(
        room / "looking", settings(check_every=7, patience=100), rankings=even.path, policy=policy.path
    )
    assert looking.stats["steps"] == made.stats["steps"]
    shared = {key: value for key, value in numbers(made).items() if key[0] in ("loss/ranking", "grad/norm")}
    assert shared and shared.items() <= numbers(looking).items()
    assert "steps_kept" not in made.stats
    assert not looks(numbers(made))


def test_looking_without_anything_held_out_is_refused(even, policy, by_hand, tmp_path):
    with pytest.raises(ExperimentError, match=r"check_every = 5 with no prompt held out .*held_out_share = 0\n"):
        reward.run(tmp_path / "out", settings(check_every=5, held_out_share=0), rankings=even.path, policy=policy.path)
    single = by_hand(RANKINGS, [row(0, ["3", "4"], [0, 1])])
    with pytest.raises(ExperimentError, match=r"check_every = 5 with no prompt held out .*held_out_share = 0\.25"):
        reward.run(tmp_path / "out", settings(check_every=5), rankings=single.path, policy=policy.path)


@pytest.fixture(scope="module")
def exam(by_hand):
    """Rankings of other prompts, by two annotators with ratings."""
    drawn, rows = random.Random(9), []
    for number in range(30):
        texts = sorted({"".join(drawn.choices("0123456789", k=drawn.randint(1, 6))) for _ in range(3)})
        worst = [int(text[-1]) for text in texts]
        ranks = [sorted(set(worst)).index(digit) for digit in worst]
        if len(set(ranks)) > 1:
            rows.append(
                row(number, texts, ranks, prompt_id=f"test {number // 2}", annotator=["ann", "ben"][number % 2],
                    ratings=[10.0 - digit for digit in worst] if number % 3 else None)
            )  # fmt: skip
    return by_hand(RANKINGS, rows)


@pytest.fixture(scope="module")
def tested(room, even, policy, demonstrations, exam):
    return reward.run(
        room / "tested", settings(), rankings=even.path, policy=policy.path, demonstrations=demonstrations.path,
        held_out=exam.path,
    )  # fmt: skip


def test_rankings_held_out_only_measure(tested, made, exam, numbers, sound):
    sound(tested)
    assert torch.equal(weights_of(tested.path), weights_of(made.path))
    measured, without = numbers(tested), numbers(made)
    for name in ("accuracy/train", "accuracy/held_out", "loss/held_out", "reward/bias", "rows/train"):
        assert measured[name, 0] == without[name, 0]
    assert measured["rows/test", 0] == exam.stats["rows"]
    found = judged(tested, exam)
    assert tested.stats["accuracy/test"] == measured["accuracy/test", 0] == found.accuracy
    assert measured["accuracy/test_error", 0] == found.error > 0
    assert measured["loss/test", 0] == pytest.approx(found.loss, rel=1e-6)
    assert "accuracy/test" not in made.stats


def test_the_details_are_of_the_rankings_held_out(tested, made, exam, numbers):
    measured = {name: value for (name, step), value in numbers(tested).items() if step == 0}
    pairs = len(judged(tested, exam).comparisons.lead)
    for kind in ("length_gap", "annotator", "rank_gap"):
        assert sum(value for name, value in measured.items() if name.startswith(f"pairs/{kind}/")) == pairs
    assert {"accuracy/annotator/ann", "accuracy/annotator/ben"} <= measured.keys()
    rated = sum(value for name, value in measured.items() if name.startswith("pairs/rating_gap/"))
    assert 0 < rated < pairs
    without = {name for name, _ in numbers(made)}
    assert not {name for name in without if "annotator" in name or "rating_gap" in name}
    for artifact in (tested, made):
        assert {"calibration/error", "reward_scores/length_correlation"} <= artifact.stats.keys()


def test_the_same_prompt_trained_on_and_held_out_is_refused(room, even, policy, by_hand, tmp_path):
    leaking = by_hand(RANKINGS, [row(n, ["11", "12"], [0, 1], prompt_id=name) for n, name in enumerate(["x", "p3#1"])])
    with pytest.raises(ContractError, match=r"1 prompts of the held-out rankings are also trained on; first: p3") as e:
        reward.run(tmp_path / "out", settings(), rankings=even.path, policy=policy.path, held_out=leaking.path)
    assert str(leaking.path) in str(e.value)


def test_every_comparison_lies_beside_the_model(tested, exam):
    table = polars.read_parquet(tested.path / PAIRS)
    counted = duckdb.sql(f"select count(*) from read_parquet('{tested.path / PAIRS}')").fetchall()
    assert counted == [(table.height,)]
    found = judged(tested, exam).comparisons
    assert table.height == len(found.lead)
    assert table["right"].mean() == pytest.approx(tested.stats["accuracy/test"])
    assert table["lead"].to_list() == pytest.approx(found.lead.tolist(), abs=1e-6)
    rows = {ranking["ranking_id"]: ranking for ranking in exam.table().to_pylist()}
    for pair in table.to_dicts():
        ranking = rows[pair["ranking_id"]]
        better, worse = pair["better"], pair["worse"]
        assert ranking["ranks"][worse] - ranking["ranks"][better] == pair["rank_gap"] > 0
        assert len(ranking["responses"][better]) - len(ranking["responses"][worse]) == pair["length_gap"]
        assert (ranking["annotator"], ranking["prompt_id"]) == (pair["annotator"], pair["prompt_id"])
        if ranking["ratings"] is not None:
            assert ranking["ratings"][better] - ranking["ratings"][worse] == pair["rating_gap"]
        else:
            assert math.isnan(pair["rating_gap"])


def test_several_artifacts_of_rankings_are_one_set(by_hand, room, policy, numbers):
    rows = [row(n, ["3", str(n), "44"], [0, 1, 1], annotator="ann") for n in range(10, 18)]
    more = [row(n + 50, ["3", str(n + 2)], [1, 0], prompt_id=f"p{n}#1", annotator="ben") for n in range(10, 18)]
    together = by_hand(RANKINGS, rows + more)
    apart = [by_hand(RANKINGS, rows), by_hand(RANKINGS, more)]
    one = reward.run(room / "together", settings(epochs=2, batch=2), rankings=together.path, policy=policy.path)
    two = reward.run(room / "apart", settings(epochs=2, batch=2), rankings=[a.path for a in apart], policy=policy.path)
    assert torch.equal(weights_of(one.path), weights_of(two.path))
    held_out = numbers(one)["rows/held_out", 0]
    assert numbers(one)["rows/train", 0] + held_out == 16
    assert held_out % 2 == 0
    assert one.stats["steps"] == 2 * round((8 - held_out / 2) / 2)


def test_margins_change_what_is_learned_where_there_are_ratings(by_hand, room, policy, even, made, numbers):
    rated = by_hand(RANKINGS, [
        row(n, ["3", str(n)], [0, 1], ratings=[5.0, n / 10]) for n in range(10, 30)
    ])  # fmt: skip
    one, other = (
        reward.run(
            room / f"margin {m}", settings(epochs=2, check_every=1, margin=m), rankings=rated.path, policy=policy.path
        )
        for m in (0.0, 0.5)
    )
    assert not torch.equal(weights_of(one.path), weights_of(other.path))
    assert numbers(other)["loss/held_out", 0] == pytest.approx(judged_held_out(other, rated, 0.5), rel=1e-5)
    looked = numbers(other)["loss/held_out", int(other.stats["steps_kept"])]
    assert looked == numbers(other)["loss/held_out", 0]
    same = reward.run(room / "no ratings", settings(margin=0.5), rankings=even.path, policy=policy.path)
    assert torch.equal(weights_of(same.path), weights_of(made.path))


def judged_held_out(artifact, rankings, margin):
    """The loss on the pairs that lie beside the model."""
    table = polars.read_parquet(artifact.path / PAIRS)
    assert table.height < rankings.stats["rows"]
    return (table["lead"] - margin * table["rating_gap"]).map_elements(
        lambda lead: math.log(1 + math.exp(-lead)), return_dtype=polars.Float64
    ).mean()  # fmt: skip


@pytest.fixture(scope="module", params=["<pad>", "<eos>"])
def padded_with(request, room, policy):
    """The policy with a tokenizer that pads with a token of its own, or with the end token."""
    place = shutil.copytree(policy.path, room / f"padded with {request.param[1:-1]}")
    (place / "manifest.json").unlink()
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": request.param}))
    tokenizer = Chat(place).tokenizer
    assert (tokenizer.pad_token == tokenizer.eos_token) == (request.param == "<eos>")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    return place


def test_the_score_of_a_response_is_one_number_whoever_computes_it(
    padded_with, even, exam, demonstrations, by_hand, tmp_path
):
    """In the making, in the score stage, and in plain transformers; whatever token pads."""
    made = reward.run(
        tmp_path / "reward", settings(epochs=2), rankings=even.path, policy=padded_with, held_out=exam.path,
        demonstrations=demonstrations.path,
    )  # fmt: skip
    chat, ranked = Chat(made.path), exam.table().to_pylist()
    texts = [
        (f"{number}", chat.prompt_tokens(ranking["messages"]), text, chat.response_tokens(text))
        for number, ranking in enumerate(ranked) for text in ranking["responses"]
    ]  # fmt: skip
    assert all(response[-1] == chat.tokenizer.eos_token_id for _, _, _, response in texts)

    rollouts = by_hand(ROLLOUTS, [
        {"prompt_id": prompt_id, "sample": sample, "prompt_tokens": prompt, "response_tokens": response,
         "response": text, "sampler_logprobs": None, "finish": "stop", "seed": 0}
        for sample, (prompt_id, prompt, text, response) in enumerate(texts)
    ])  # fmt: skip
    asked = ScoreSettings.of(None, {"needs": ["reward_scores"]})
    read = score.run(tmp_path / "scores", asked, rollouts=[rollouts.path], reward_model=made.path)
    scores = np.array(read.table(["reward_scores"])["reward_scores"].to_pylist())
    assert scores.std() > 0.01

    plain = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    with torch.no_grad():
        for (_, prompt, _, response), wanted in zip(texts, scores, strict=True):
            ids = torch.tensor([prompt + response])
            found = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
            assert found + plain.config.reward_bias == pytest.approx(wanted, abs=1e-5)

    leads = {}
    for pair in polars.read_parquet(made.path / PAIRS).to_dicts():
        leads[pair["ranking_id"], pair["better"], pair["worse"]] = pair["lead"]
    by_ranking, at = {}, 0
    for ranking in ranked:
        by_ranking[ranking["ranking_id"]] = scores[at : at + len(ranking["responses"])]
        at += len(ranking["responses"])
    assert leads
    for (name, better, worse), lead in leads.items():
        assert by_ranking[name][better] - by_ranking[name][worse] == pytest.approx(lead, abs=1e-5)


def test_plain_transformers_scores_a_padded_batch_where_padding_is_not_the_end(padded_with, even, tmp_path):
    made = reward.run(tmp_path / "reward", settings(epochs=1), rankings=even.path, policy=padded_with)
    plain, chat = AutoModelForSequenceClassification.from_pretrained(made.path).eval(), Chat(made.path)
    prompt = chat.prompt_tokens([{"role": "user", "content": "1+2="}])
    rows = [prompt + chat.response_tokens(text) for text in ("3", "1+2=3;3", "44")]
    batch = chat.tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    wanted = scores_of(made.path, [(prompt, row[len(prompt) :]) for row in rows])
    if chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id:
        with pytest.raises(ValueError, match="batch sizes > 1 if no padding token"), torch.no_grad():
            plain(**batch)
        return
    with torch.no_grad():
        assert torch.allclose(plain(**batch).logits[:, 0], wanted, atol=1e-5)


def test_killed_while_it_trains_it_goes_on_to_the_same_model(survives, even, policy, demonstrations):
    chosen = settings(epochs=2, save_every=5)
    survives(
        reward, chosen, before=9, saved=5, rankings=even.path, policy=policy.path, demonstrations=demonstrations.path
    )


@pytest.mark.parametrize("late", [False, True])
def test_killed_it_ends_as_early_and_keeps_the_same_best_weights(survives, unsure, policy, stopped, late):
    """Killed before the best look, or between it and the early end."""
    kept, steps = int(stopped.stats["steps_kept"]), int(stopped.stats["steps"])
    before = steps if late else kept
    made = survives(
        reward, settings(**EARLY, save_every=1), before=before, saved=before - 1, rankings=unsure.path,
        policy=policy.path,
    )  # fmt: skip
    assert (made.stats["steps"], made.stats["steps_kept"]) == (steps, kept)
    assert torch.equal(weights_of(made.path), weights_of(stopped.path))


def test_settings_come_from_the_experiment():
    experiment = Experiment(
        name="run", base="base", recipe=Recipe.load("grpo"), models={"new": {"layers": 2}},
        data={"prompts": {}, "demonstrations": {}}, reward={"batch": 9},
        resources={"save_every": 7, "micro_batch_tokens": 50},
        scale={"iterations": 1, "groups": 4, "prompt_tokens": 8, "response_tokens": 16, "learning_rate": 1e-3},
    )  # fmt: skip
    found = Settings.of(experiment)
    assert (found.batch, found.tokens, found.save_every, found.micro_batch_tokens) == (9, 24, 7, 50)
