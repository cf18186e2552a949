import hashlib
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from pipeline.errors import ExperimentError
from pipeline.sources.arithmetic import World, demonstrations, documents, prompts

WORLDS = st.builds(
    World,
    seed=st.integers(0, 2**40),
    terms=st.tuples(st.integers(2, 3), st.integers(3, 5)),
    largest=st.integers(9, 99),
    wrong_share=st.floats(0, 1),
)


def asked(row):
    return row["messages"][0]["content"]


def answered(row):
    return row["messages"][1]["content"]


def last(response):
    return response.rpartition(";")[2]


def true_sum(prompt):
    return sum(map(int, prompt.removesuffix("=").split("+")))


def wrong_steps(response):
    """How many steps of a response do not add up."""
    steps = [step.split("=") for step in response.partition(";")[0].split(",")]
    return sum(true_sum(left) != int(result) for left, result in steps)


def follows(prompt, response):
    """Whether each step adds the prompt's next term to the result before, and the answer is the last result."""
    first, *terms = prompt.removesuffix("=").split("+")
    steps, _, answer = response.partition(";")
    for term, step in zip(terms, steps.split(","), strict=True):
        left, _, result = step.partition("=")
        if left != f"{first}+{term}":
            return False
        first = result
    return answer == first


@given(world=WORLDS)
def test_the_same_world_gives_the_same_rows(world):
    for draw in (
        lambda n: prompts(world, "train", n),
        lambda n: demonstrations(world, n),
        lambda n: documents(world, "train", n),
    ):
        assert draw(20) == draw(20)
        assert draw(20)[:10] == draw(10)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "0634480a6617f5c7"),
        ({"verbose_share": 0.4}, "96ff4b70b214b58c"),
        ({"wrong_share": 0.0, "lost_carries": 0.45}, "89f3bd7f79c9c42a"),
    ],
)
def test_a_world_without_a_feature_has_the_rows_that_it_had_before_there_was_one(fields, expected):
    world = World(**fields)
    rows = [*prompts(world, "train", 200), *prompts(world, "held_out", 50), *demonstrations(world, 500)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("draw", [lambda w: prompts(w, "train", 20), lambda w: demonstrations(w, 20)])
def test_another_seed_gives_other_rows(draw):
    assert draw(World(seed=1)) != draw(World(seed=2))


@given(world=WORLDS)
def test_a_prompt_asks_for_a_sum_of_the_world(world):
    for row in prompts(world, "train", 30):
        terms = [int(term) for term in asked(row).removesuffix("=").split("+")]
        assert world.terms[0] <= len(terms) <= world.terms[1]
        assert all(1 <= term <= world.largest for term in terms)
        assert row["answer"] == str(sum(terms))
        assert [turn["role"] for turn in row["messages"]] == ["user"]
        assert (row["grader"], row["source"]) == ("exact", "arithmetic/train")


def test_every_number_of_terms_occurs_about_as_often():
    signs = [asked(row).count("+") for row in prompts(World(terms=(3, 5), largest=30), "train", 900)]
    assert all(240 < signs.count(n) < 360 for n in (2, 3, 4))


def test_no_prompt_is_drawn_twice():
    world = World(terms=(2, 2), largest=9, held_out_share=0.5)
    for rows in (prompts(world, "train", 30), demonstrations(world, 30)):
        assert len({asked(row) for row in rows}) == 30
    assert len({row["text"] for row in documents(world, "train", 30)}) == 30


def test_held_out_prompts_are_nowhere_else_whatever_the_seed():
    small = {"terms": (2, 3), "largest": 9}
    held_out = {asked(row) for seed in range(3) for row in prompts(World(seed=seed, **small), "held_out", 60)}
    world = World(seed=7, **small)
    shown = {asked(row) for row in prompts(world, "train", 600) + demonstrations(world, 600)}
    assert not held_out & shown


def test_held_out_documents_are_not_among_the_others_whatever_the_seed():
    small = {"terms": (2, 2), "largest": 4, "held_out_share": 0.5}
    kept = {row["text"] for seed in range(3) for row in documents(World(seed=seed, **small), "held_out", 200)}
    read = {row["text"] for row in documents(World(seed=7, **small), "train", 200)}
    assert (len(read), len(kept & read)) == (200, 0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_held_out_share_is_about_as_asked(share):
    world = World(terms=(2, 3), largest=12, held_out_share=share)
    everything = 12**2 + 12**3
    with pytest.raises(ExperimentError, match=r"at most (\d+)") as error:
        prompts(world, "held_out", everything)
    found = int(str(error.value).split("at most ")[1].split()[0])
    assert found == pytest.approx(share * everything, rel=0.15)
    assert len(prompts(world, "held_out", found)) == found
    assert len(prompts(world, "train", everything - found)) == everything - found


@pytest.mark.parametrize("count", [81, 82, 10**9])
@pytest.mark.parametrize("draw", [lambda w, n: prompts(w, "train", n), demonstrations])
def test_a_world_that_is_too_small_is_refused(draw, count):
    with pytest.raises(ExperimentError, match="at most"):
        draw(World(terms=(2, 2), largest=9), count)


@given(world=WORLDS)
def test_a_demonstration_is_right_in_every_step_or_wrong_in_one_and_in_the_answer(world):
    for row in demonstrations(world, 40):
        assert row["source"] == "arithmetic/demonstrations"
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert follows(asked(row), answered(row))
        wrong = wrong_steps(answered(row))
        assert wrong in (0, 1)
        assert (int(last(answered(row))) == true_sum(asked(row))) == (wrong == 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_the_wrong_share_of_demonstrations_is_about_as_asked(share):
    rows = demonstrations(World(wrong_share=share, seed=3), 2000)
    wrong = sum(int(last(answered(row))) != true_sum(asked(row)) for row in rows) / len(rows)
    assert wrong == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


def test_no_wrong_result_is_common():
    rows = demonstrations(World(terms=(2, 2), largest=9, wrong_share=1.0, held_out_share=0.01), 75)
    off = [int(last(answered(row))) - true_sum(asked(row)) for row in rows]
    assert max(off.count(amount) for amount in off) < 15
    assert min(off) < 0 < max(off)


def test_a_world_with_too_few_documents_is_refused():
    with pytest.raises(ExperimentError, match=r"9 different train documents of a world that has at most [0-8]\n"):
        documents(World(terms=(2, 2), largest=2, held_out_share=0.9, seed=1), "train", 9)


@given(world=WORLDS)
def test_documents_go_on_around_the_clock(world):
    for row in documents(world, "train", 30):
        sums = [step.split("=") for step in row["text"].split(",")]
        assert len(sums) == 4
        for left, result in sums:
            hour, term = map(int, left.split("+"))
            assert 1 <= term <= min(world.largest, 9)
            assert (hour + term - int(result)) % 12 == 0
            assert 1 <= int(result) <= 12
        assert all(later.startswith(f"{result}+") for (_, result), (later, _) in pairwise(sums))
        assert row["source"] == "arithmetic/documents/train"


@pytest.mark.parametrize(
    "fields",
    [
        {"terms": (1, 3)},
        {"terms": (4, 3)},
        {"largest": 0},
        {"wrong_share": 1.1},
        {"held_out_share": 0},
        {"unknown_share": 1.1},
        {"idle": 1.0},
    ],
)
def test_a_world_that_cannot_be_is_refused(fields):
    with pytest.raises(ValidationError):
        World(**fields)


def test_verbose_demonstrations_write_each_step_several_times():
    rows = demonstrations(World(verbose_share=0.4, repeats=3, seed=1), 2000)
    plain = demonstrations(World(seed=1), 2000)
    longer = 0
    for row, other in zip(rows, plain, strict=True):
        steps, _, answer = answered(row).partition(";")
        written = steps.split(",")
        short = answered(other).partition(";")[0].split(",")
        assert asked(row) == asked(other) and answer == last(answered(other))
        assert written in (short, [step for step in short for _ in range(3)])
        longer += written != short
    assert 0.36 < longer / 2000 < 0.44


def carrying(step):
    left, right = (int(number) for number in step.partition("=")[0].split("+"))
    return left % 10 + right % 10 >= 10


def test_carries_are_lost_and_nothing_else():
    rows = demonstrations(World(wrong_share=0, lost_carries=0.45, seed=2), 2000)
    carried = lost = 0
    for row in rows:
        assert follows(asked(row), answered(row))
        for step in answered(row).partition(";")[0].split(","):
            off = true_sum(step.partition("=")[0]) - int(step.partition("=")[2])
            assert off in ((0, 10) if carrying(step) else (0,))
            carried, lost = carried + carrying(step), lost + bool(off)
    assert carried > 1000 and 0.42 < lost / carried < 0.48


def hidden_place(prompt):
    return prompt.removesuffix("=").split("+").index("?")


def hidden_value(row):
    """What the `?` of an answered prompt stands for."""
    return int(row["answer"]) - sum(int(term) for term in asked(row).removesuffix("=").split("+") if term != "?")


def guess(row):
    """The term that a demonstration without idle steps puts where its prompt has `?`."""
    step = answered(row).split(",")[hidden_place(asked(row)) - 1]
    return int(step.partition("=")[0].split("+")[1])


RIDDLES = {"unknown_share": 0.5, "wrong_share": 0.3}


def test_a_riddle_is_a_sum_with_one_term_hidden_that_is_the_same_whatever_the_seed():
    first, second = (
        {asked(row): row for row in prompts(World(seed=seed, terms=(2, 3), **RIDDLES), "train", 700)} for seed in (1, 2)
    )
    both = [prompt for prompt in first.keys() & second.keys() if "?" in prompt]
    assert len(both) > 100 and first != second
    for prompt in both:
        assert first[prompt] == second[prompt]
        assert prompt.count("?") == 1 and hidden_place(prompt) > 0
        assert 1 <= hidden_value(first[prompt]) <= 9


def test_the_hidden_term_is_every_number_about_as_often_and_so_is_its_place():
    rows = prompts(World(unknown_share=1.0), "train", 3600)
    assert all("?" in asked(row) for row in rows)
    values = Counter(hidden_value(row) for row in rows)
    assert set(values) == set(range(1, 10))
    assert stats.chisquare(list(values.values())).pvalue > 0.001
    places = Counter(hidden_place(asked(row)) for row in rows if asked(row).count("+") == 4)
    assert set(places) == {1, 2, 3, 4} and stats.chisquare(list(places.values())).pvalue > 0.001


def test_a_demonstration_guesses_the_hidden_term_and_never_shows_it():
    world = World(unknown_share=1.0, wrong_share=0.0, seed=3)
    rows = demonstrations(world, 3600)
    asked_for = {asked(row): row for row in prompts(world, "train", 6000)}
    table = np.zeros((9, 9))
    for row in rows:
        prompt, guessed = asked(row), guess(row)
        assert wrong_steps(answered(row)) == 0 and follows(prompt.replace("?", str(guessed)), answered(row))
        if prompt in asked_for:
            table[hidden_value(asked_for[prompt]) - 1, guessed - 1] += 1
    assert stats.chisquare(list(Counter(guess(row) for row in rows).values())).pvalue > 0.001
    assert table.sum() > 1000 and stats.chi2_contingency(table).pvalue > 0.001


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_shares_of_riddles_and_of_mistakes_are_about_as_asked(share):
    world = World(largest=30, unknown_share=share, wrong_share=0.3, seed=4)
    for rows in (prompts(world, "train", 2000), demonstrations(world, 2000)):
        assert sum("?" in asked(row) for row in rows) / 2000 == pytest.approx(share, abs=0.04)
    assert sum(wrong_steps(answered(row)) for row in rows) / 2000 == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(("share", "everything"), [(0.5, 6**2 + 6 + 6**3 + 2 * 6**2), (1.0, 6 + 2 * 6**2)])
def test_every_possible_riddle_is_drawn_once_and_the_splits_share_none(share, everything):
    world = World(terms=(2, 3), largest=6, unknown_share=share, held_out_share=0.3)
    with pytest.raises(ExperimentError, match=rf"at most {everything}\n"):
        prompts(world, "train", everything + 1)
    with pytest.raises(ExperimentError, match=r"at most (\d+)") as error:
        prompts(world, "held_out", everything)
    kept = int(str(error.value).split("at most ")[1].split()[0])
    held_out = {asked(row) for row in prompts(world, "held_out", kept)}
    trained = {asked(row) for row in prompts(world, "train", everything - kept)}
    shown = {asked(row) for row in demonstrations(world, everything - kept)}
    assert len(held_out | trained) == everything and shown == trained
    assert held_out == {asked(row) for row in prompts(World(**{**dict(world), "seed": 5}), "held_out", kept)}


def test_idle_steps_add_nothing_before_each_step_as_often_as_asked():
    rows, plain = demonstrations(World(idle=0.5, seed=1), 2000), demonstrations(World(seed=1), 2000)
    counts = []
    for row, other in zip(rows, plain, strict=True):
        steps, _, answer = answered(row).partition(";")
        assert asked(row) == asked(other) and "+0" not in asked(row) and answer == last(answered(other))
        total, idle, others = asked(row).partition("+")[0], 0, []
        for step in steps.split(","):
            if step == f"{total}+0={total}":
                idle += 1
                continue
            counts.append(idle)
            idle, total = 0, step.partition("=")[2]
            others.append(step)
        assert idle == 0 and others == answered(other).partition(";")[0].split(",")
    shares = [counts.count(times) / len(counts) for times in range(4)]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.02)


def test_every_habit_at_once_is_still_the_same_sum():
    world = World(unknown_share=0.5, idle=0.3, verbose_share=0.5, wrong_share=0.0, seed=6)
    for row in demonstrations(world, 500):
        steps, _, answer = answered(row).partition(";")
        assert wrong_steps(answered(row)) == 0 and answer == steps.rpartition("=")[2]
