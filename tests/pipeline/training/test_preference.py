"""Preference: all rankings of a prompt are one element, and its loss is the mean over all their pairs."""

import math

import numpy as np
import pytest
import torch

from pipeline.models.checkpoint import fresh_reward_model, save
from pipeline.models.forward import response_scores
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat
from pipeline.training.best import Judged
from pipeline.training.preference import Compared, Element, Preference, Ranked, elements, scored

NUMBERS = iter(range(10**6))


def row(responses, ranks, prompt="p", **changes):
    return {
        "ranking_id": f"r{next(NUMBERS)}", "prompt_id": prompt, "messages": [{"role": "user", "content": "ab"}],
        "responses": responses, "ranks": ranks, "annotator": None, "source": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    place = tmp_path_factory.mktemp("preference") / "policy"
    save(*create(ModelSpec(layers=1, width=32, heads=2, kv_heads=1, init_std=0.3), ["abcdef"], 0), place)
    return place


@pytest.fixture(scope="module")
def chat(policy):
    return Chat(policy)


@pytest.fixture
def model(policy):
    made = fresh_reward_model(policy, 0)
    with torch.no_grad():
        made.score.weight *= 20  # scores of about 1
    return made


@pytest.fixture
def scores(model, chat):
    """What the model says of one text, read alone."""

    def read(*texts):
        with torch.no_grad():
            prompt = chat.prompt_tokens([{"role": "user", "content": "ab"}])
            return {text: float(response_scores(model, [prompt], [chat.response_tokens(text)])) for text in texts}

    return read


def loss(objective, model, rows):
    return float(objective.losses(model, np.array(rows), objective.step(np.array(rows))).total.detach())


SEVERAL = [
    row(["a", "bb", "c"], [0, 1, 2], annotator="ann"),
    row(["a", "bb", "c"], [2, 1, 0], annotator="ben"),
    row(["x", "y"], [0, 1], prompt="q"),
    row(["bb", "d"], [0, 1], annotator="cem"),
    row(["e", "a"], [1, 0], prompt="p#1"),
]


def test_all_rankings_of_a_prompt_are_one_element_that_holds_each_text_once(chat):
    p, q = elements(SEVERAL, chat)
    assert (p.prompt_id, q.prompt_id) == ("p", "q")
    assert p.responses == [chat.response_tokens(text) for text in ("a", "bb", "c", "d", "e")]
    assert [(one.annotator, one.places, one.ranks) for one in p.rankings] == [
        ("ann", [0, 1, 2], [0, 1, 2]), ("ben", [0, 1, 2], [2, 1, 0]), ("cem", [1, 3], [0, 1]), (None, [4, 0], [1, 0]),
    ]  # fmt: skip
    assert p.prompt == chat.prompt_tokens([{"role": "user", "content": "ab"}])
    assert p.tokens == 5 * (len(p.prompt) + 3)  # the longest of five responses has two characters and an end token
    assert Preference([p, q]).lengths.tolist() == [p.tokens, q.tokens]
    assert Compared.of([p, q]).counts.tolist() == [3 + 3 + 1 + 1, 1]


def test_a_ranking_that_comes_again_counts_once(chat):
    (found,) = elements([SEVERAL[0], SEVERAL[1], SEVERAL[0]], chat)
    assert [one.annotator for one in found.rankings] == ["ann", "ben"]


def test_its_responses_in_another_order_make_no_other_ranking(chat):
    again = {**SEVERAL[0], "responses": ["c", "a", "bb"], "ranks": [2, 0, 1]}
    (found,) = elements([SEVERAL[0], again], chat)
    assert len(found.rankings) == 1


def test_who_says_something_else_the_second_time_is_heard_twice(chat):
    (found,) = elements([SEVERAL[0], {**SEVERAL[0], "ranks": [2, 1, 0]}], chat)
    assert [one.ranks for one in found.rankings] == [[0, 1, 2], [2, 1, 0]]


def test_an_element_can_be_cut_down_to_some_of_its_rankings(chat):
    element = elements(SEVERAL, chat)[0]
    cut = element.only(element.rankings[2:])
    assert cut.responses == [chat.response_tokens(text) for text in ("a", "bb", "d", "e")]
    assert [one.places for one in cut.rankings] == [[1, 2], [3, 0]]
    assert element.only(element.rankings) == element


def test_the_loss_of_an_element_is_the_mean_over_all_its_pairs_by_hand():
    """K = 4 with a tie (5 pairs) and a pair row: 6 pairs, of leads 2, 1, 1, -1, -1 and 3."""
    element = Element("p", [1], [[2], [3], [4], [5]])
    element.rankings.append(Ranked("four", None, [0, 1, 2, 3], [0, 1, 1, 2], None))
    element.rankings.append(Ranked("two", None, [3, 1], [0, 1], None))
    compared = Compared.of([element])
    table = torch.tensor([2.0, 0.0, 1.0, 3.0])[compared.places]
    leads = [2 - 0, 2 - 1, 2 - 3, 0 - 3, 1 - 3]  # of the four: 0 before 1, 2, 3; 1 and 2 before 3
    leads += [3 - 0]
    assert compared.counts.tolist() == [6]
    assert compared.weights.tolist() == [5 / 6, 1 / 6]
    row, i, j = compared.pairs.nonzero(as_tuple=True)
    assert (table[row, i] - table[row, j]).tolist() == leads


def test_loss_and_accuracy_of_two_rankings_with_ties_by_hand(model, chat, scores):
    found = elements([row(["a", "bb", "c", "d"], [0, 1, 1, 2]), row(["d", "bb"], [0, 1])], chat)
    r = scores("a", "bb", "c", "d")
    assert np.std(list(r.values())) > 0.1
    pairs = ["a bb", "a c", "a d", "bb d", "c d", "d bb"]
    leads = [r[better] - r[worse] for better, worse in map(str.split, pairs)]
    expected = sum(math.log(1 + math.exp(-lead)) for lead in leads) / 6
    objective = Preference(found)
    parts = objective.losses(model, np.array([0]), 1).parts
    assert loss(objective, model, [0]) == pytest.approx(expected, rel=1e-5)
    assert parts["loss/ranking"] == pytest.approx(expected, rel=1e-5)
    assert parts["accuracy/pairs"] == pytest.approx(np.mean([lead > 0 for lead in leads]))
    judged = Judged.of(model, found, 10**6, 0.0)
    assert (judged.loss, judged.accuracy) == (
        pytest.approx(expected, rel=1e-5), pytest.approx(np.mean([lead > 0 for lead in leads])),
    )  # fmt: skip
    assert judged.comparisons.lead == pytest.approx(leads, abs=1e-5)


def test_a_prompts_weight_does_not_depend_on_how_many_pairs_it_has(model, chat):
    """The mean over two elements is the mean of their losses, eight pairs in the one and one in the other."""
    objective = Preference(elements(SEVERAL, chat))
    alone = [loss(objective, model, [number]) for number in (0, 1)]
    assert alone[0] != pytest.approx(alone[1], rel=0.01)
    assert loss(objective, model, [0, 1]) == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_micro_batches_change_neither_loss_nor_gradient(model, chat):
    more = [row(["ab", "cd", "ef", "f" * n], [n % 2, 1, 0, 2], prompt=f"more {n}", ratings=[1, 2, 3.5, n])
            for n in range(3, 8)]  # fmt: skip
    objective = Preference(elements(SEVERAL + more, chat), margin=0.3)

    def gradient(parts):
        model.zero_grad()
        total = 0.0
        for part in parts:
            losses = objective.losses(model, np.array(part), 7)
            losses.total.backward()
            total += float(losses.total.detach())
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, wanted = gradient([range(7)])
    for parts in ([[n] for n in range(7)], [[6, 0], [3, 1, 2], [5, 4]]):
        total, found = gradient(parts)
        assert total == pytest.approx(whole, abs=1e-6)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_each_different_text_is_read_once(model, chat, monkeypatch):
    read = []
    hook = model.base_model.register_forward_hook(
        lambda _, given, kwargs, out: read.append(kwargs["input_ids"].flatten()), with_kwargs=True
    )
    found = elements(SEVERAL, chat)
    Preference(found).losses(model, np.arange(2), 2)
    hook.remove()
    ends = torch.cat(read) == chat.tokenizer.eos_token_id
    texts = {(*one.prompt, *said) for one in found for said in one.responses}
    assert len(texts) < sum(len(one.responses) for one in found)
    assert int(ends.sum()) == len(texts)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_scores_come_in_the_order_of_the_responses_whatever_fits(model, chat, scores, budget):
    found = elements([*SEVERAL, row(["ffff", "a"], [0, 1], prompt="third")], chat)
    texts = ["a", "bb", "c", "d", "e", "x", "y", "ffff", "a"]
    wanted = scores(*texts)
    assert scored(model, found, budget) == pytest.approx([wanted[text] for text in texts], abs=1e-5)


RATED = [
    row(["a", "bb", "c"], [0, 1, 2], ratings=[5.0, 3.0, 2.5]), row(["c", "a"], [0, 1]),
    row(["d", "a"], [0, 1], prompt="q", ratings=[4.0, 3.0]),
]  # fmt: skip


def test_margins_by_hand(model, chat, scores):
    found = elements(RATED, chat)
    margins = Compared.of(found).margins(0.5)
    better = Compared.of(found).pairs
    assert margins[better].tolist() == [1.0, 1.25, 0.25, 0.0, 0.5]  # by ranking; the second has no ratings
    r = scores("a", "bb", "c", "d")
    led = [("a", "bb", 1.0), ("a", "c", 1.25), ("bb", "c", 0.25), ("c", "a", 0.0)]
    first = sum(math.log(1 + math.exp(-(r[i] - r[j] - margin))) for i, j, margin in led) / 4
    second = math.log(1 + math.exp(-(r["d"] - r["a"] - 0.5)))
    assert loss(Preference(found, 0.5), model, [0, 1]) == pytest.approx((first + second) / 2, rel=1e-5)
    assert Judged.of(model, found, 10**6, 0.5).loss == pytest.approx((first + second) / 2, rel=1e-5)
    assert loss(Preference(found), model, [0, 1]) != pytest.approx((first + second) / 2, rel=1e-3)


def test_without_ratings_or_factor_there_is_no_margin(model, chat):
    found = elements(SEVERAL, chat)
    compared = Compared.of(found)
    assert compared.margins(0.0) is None
    assert Compared.of(elements(RATED, chat)).margins(0.0) is None
    assert torch.count_nonzero(compared.margins(2.0)) == 0
    assert torch.isnan(compared.rating_gaps[compared.pairs]).all()
    assert loss(Preference(found, 2.0), model, [0, 1]) == loss(Preference(found), model, [0, 1])


def test_accuracy_does_not_depend_on_margins_and_equal_scores_are_half_right(model, chat):
    with torch.no_grad():
        model.score.weight.zero_()
    found = elements(RATED, chat)
    for factor in (0.0, 3.0):
        assert Judged.of(model, found, 10**6, factor).accuracy == 0.5
        assert Preference(found, factor).losses(model, np.arange(2), 2).parts["accuracy/pairs"] == 0.5


def test_comparisons_say_who_ranked_what_and_by_how_much(model, chat):
    found = elements([RATED[0], {**RATED[1], "annotator": "ben"}, RATED[2]], chat)
    made = Judged.of(model, found, 10**6, 0.0).comparisons
    assert made.rankings == [RATED[0]["ranking_id"]] * 3 + [RATED[1]["ranking_id"], RATED[2]["ranking_id"]]
    assert list(zip(made.better, made.worse, strict=True)) == [(0, 1), (0, 2), (1, 2), (0, 1), (0, 1)]
    assert made.prompts == ["p"] * 4 + ["q"]
    assert made.annotators == ["", "", "", "ben", ""]
    assert made.rank_gap.tolist() == [1, 2, 1, 1, 1]
    assert made.length_gap.tolist() == [-1, 0, 1, 0, 0]
    assert made.rating_gap.tolist() == pytest.approx([2.0, 2.5, 0.5, float("nan"), 1.0], nan_ok=True)


def test_rows_are_named_by_their_prompt(chat):
    assert Preference(elements(SEVERAL, chat)).names(np.array([1, 0])) == ["prompt q", "prompt p"]
