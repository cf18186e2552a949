import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipeline.contracts import RANKINGS
from pipeline.errors import ArtifactError, ContractError, ExperimentError
from pipeline.models.checkpoint import fresh_reward_model, load_reward_model
from pipeline.models.forward import response_scores
from pipeline.text import Chat
from stages.reward import Judged, Preference, Ranked, Settings, Text, reward

PREFERENCES = {"even": lambda text: int(text[-1]) % 2, "longer": lambda text: -len(text)}


def settings(**changes):
    given = {"epochs": 10, "batch": 10, "learning_rate": 3e-3, "tokens": 32, "held_out_share": 0.25, "seed": 3}
    return Settings.of(None, {**given, **changes})


def row(number, responses, ranks, prompt="1+2="):
    messages = [{"role": "user", "content": prompt}]
    return {
        "ranking_id": f"r{number}", "prompt_id": f"p{number}", "messages": messages, "responses": responses,
        "ranks": ranks, "annotator": None, "source": None,
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


@pytest.fixture(scope="module")
def text(policy):
    chat = Chat(policy.path)
    return lambda prompt, response: Text(chat.response_tokens(prompt, finished=False), chat.response_tokens(response))


@pytest.fixture(scope="module")
def model(policy):
    return fresh_reward_model(policy.path, 0)


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


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [2, 0, 1, 0], [0, 1, 1, 1]])
def test_the_loss_is_the_mean_over_pairs_and_every_response_is_read_once(model, text, ranks):
    texts = [text("1+2=", response) for response in ("3", "1+2=3;3", "7", "22")]
    with torch.no_grad():
        scores = response_scores(model, *zip(*texts, strict=True)).tolist()
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(4), 2) if ranks[i] != ranks[j]]
    expected = np.mean([math.log(1 + math.exp(scores[j] - scores[i])) for i, j in pairs])
    right = np.mean([scores[i] > scores[j] for i, j in pairs])
    read = []
    hook = model.base_model.register_forward_hook(
        lambda _, given, kwargs, out: read.append(len(out.last_hidden_state)), with_kwargs=True
    )
    losses = Preference([Ranked("r", "p", texts, ranks)]).losses(model, np.array([0]), 1)
    hook.remove()
    assert sum(read) == 4
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)
    assert losses.parts["accuracy/pairs"] == pytest.approx(right)
    judged = Judged.of(model, [Ranked("r", "p", texts, ranks)], 10**6)
    assert (judged.loss, judged.accuracy) == (pytest.approx(expected, rel=1e-5), pytest.approx(right))


def test_a_rankings_weight_does_not_depend_on_how_many_pairs_it_has(model, text):
    """The mean over two rankings is the mean of their losses, six pairs in the one and one in the other."""
    four = Ranked("four", "p", [text("1+2=", response) for response in ("3", "4", "5", "66")], [0, 1, 2, 3])
    two = Ranked("two", "q", [text("2+2=", response) for response in ("4", "77")], [1, 0])
    both = Preference([four, two])
    together = both.losses(model, np.arange(2), both.step(np.arange(2))).total.item()
    alone = [both.losses(model, np.array([n]), 1).total.item() for n in (0, 1)]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-5)


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
        return reward.run(room / name, settings(epochs=1, **changes), **given).manifest.digest

    assert digest("reward once") == digest("reward twice") != digest("reward seed", seed=4)


def test_without_held_out_prompts_nothing_is_said_of_them(room, even, policy, numbers):
    found = reward.run(room / "all", settings(epochs=1, held_out_share=0.0), rankings=even.path, policy=policy.path)
    assert not {name for name, _ in numbers(found)} & {"accuracy/held_out", "loss/held_out"}
    assert numbers(found)["rows/held_out", 0] == 0
    assert numbers(found)["rows/train", 0] == 80 - found.stats["rejected"]


def test_rankings_that_cannot_be_learned_from_are_counted(by_hand, policy, room, tmp_path, numbers):
    rows = [row(n, ["3", "4"], [0, 1]) for n in range(6)]
    rows += [row(6, ["3", "4", "5"], [1, 1, 1]), row(7, ["3", "1" * 40], [0, 1])]
    found = reward.run(room / "some", settings(epochs=1), rankings=by_hand(RANKINGS, rows).path, policy=policy.path)
    measured = numbers(found)
    assert (measured["rejected/tie", 0], measured["rejected/too_long", 0]) == (1, 1)
    assert found.stats["rejected"] == measured["rows/rejected", 0] == 2
    assert measured["rows/train", 0] + measured["rows/held_out", 0] == 6
    with pytest.raises(ContractError, match="no ranking to learn from: 1 have more than 32 tokens, 1 have no pair"):
        reward.run(tmp_path / "none", settings(), rankings=by_hand(RANKINGS, rows[6:]).path, policy=policy.path)


def test_nothing_longer_than_the_models_positions_is_read(by_hand, policy, room, numbers):
    rows = [row(n, ["3", "4"], [0, 1]) for n in range(3)] + [row(3, ["3", "1" * 80], [0, 1])]
    found = reward.run(
        room / "positions", settings(epochs=1, tokens=1000), rankings=by_hand(RANKINGS, rows).path, policy=policy.path
    )
    assert numbers(found)["rejected/too_long", 0] == 1


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
