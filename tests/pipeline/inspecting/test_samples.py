"""Which responses the page holds: the budget kept, every kind taken in turn, the same ones every time."""

from pathlib import Path

import polars as pl
import pytest

from pipeline.inspecting.samples import EACH, KEY, PROMPTS, REPEATS, choose, responses
from pipeline.inspecting.subject import Subject

PLENTY = 10**9


def subject(seed=0):
    return Subject("run", Path("run"), (), {"seed": seed}, "")


def rows(iterations=3, prompts=40, samples=4, phase="loop", first=0):
    """Responses of prompts p0, p1, ...; every iteration of the loop asks others."""
    found = []
    for iteration in range(iterations):
        for prompt in range(prompts):
            for sample in range(samples):
                number = prompt if phase == "evaluation" else prompt + (first + iteration) * prompts
                found.append(
                    {"phase": phase, "iteration": iteration, "round": "", "prompt_id": f"p{number:04d}",
                     "sample": sample, "finish": "stop", "length": 10 + prompt, "reward": float(prompt % 2),
                     "gold": prompt % 2 == 1,
                     "correct": None, "verdict": None, "extracted": None, "target": None, "vote_share": None,
                     "keep": True, "dropped": None}
                )  # fmt: skip
    types = {"iteration": pl.Int32, "sample": pl.Int32, "correct": pl.Boolean, "vote_share": pl.Float32}
    types |= dict.fromkeys(("verdict", "extracted", "target", "dropped"), pl.String)
    frame = pl.DataFrame(found, schema_overrides=types)
    return frame.with_columns(base=pl.col("prompt_id").str.split("#").list.first())


def of_kind(choice, why):
    return choice.rows.filter(pl.col("why").list.contains(why))


def test_the_same_rows_give_the_same_choice_whatever_their_order():
    found = rows()
    again = choose(subject(), found.sort(KEY), PLENTY).rows
    assert choose(subject(), found, PLENTY).rows.equals(again)
    assert not choose(subject(seed=1), found, PLENTY).rows.equals(again)


def test_no_response_is_taken_twice_and_every_one_says_why():
    chosen = choose(subject(), rows(), PLENTY).rows
    assert chosen.select(KEY).is_duplicated().sum() == 0
    assert (chosen["why"].list.len() >= 1).all()


def test_best_and_worst_are_those_by_reward():
    found = rows(iterations=2, prompts=100, samples=1).with_columns(reward=pl.int_range(pl.len()).cast(pl.Float32))
    chosen = choose(subject(), found, PLENTY)
    for iteration in range(2):
        rewards = found.filter(pl.col("iteration") == iteration)["reward"].sort()
        taken = of_kind(chosen, "best").filter(pl.col("iteration") == iteration)
        assert taken["reward"].sort().to_list() == rewards[-EACH:].to_list()
        taken = of_kind(chosen, "worst").filter(pl.col("iteration") == iteration)
        assert taken["reward"].sort().to_list() == rewards[:EACH].to_list()


def test_a_kind_takes_one_response_of_a_prompt():
    best = of_kind(choose(subject(), rows(), PLENTY), "best")
    assert best.height == 3 * EACH
    assert best.select("iteration", "prompt_id").is_duplicated().sum() == 0


def test_the_longest_the_truncated_and_the_dropped_are_there():
    found = rows().with_columns(
        finish=pl.when(pl.col("prompt_id") == "p0007").then(pl.lit("length")).otherwise("finish"),
        dropped=pl.when(pl.col("prompt_id") == "p0050").then(pl.lit("constant outcomes")).otherwise("dropped"),
    )
    chosen = choose(subject(), found, PLENTY)
    assert of_kind(chosen, "truncated")["prompt_id"].to_list() == ["p0007"]
    assert of_kind(chosen, "dropped")["prompt_id"].to_list() == ["p0050"]
    longest = of_kind(chosen, "longest").filter(pl.col("iteration") == 0)
    assert longest["length"].min() == 10 + 40 - EACH


def test_a_small_budget_takes_the_first_of_every_kind_of_every_iteration():
    chosen = choose(subject(), rows(iterations=10), 10 * 3 * 2300)
    taken = chosen.rows.explode("why").group_by("iteration", "why").len()
    assert set(taken["iteration"]) == set(range(10))
    for why in ("best", "worst", "random"):
        assert taken.filter(pl.col("why") == why)["len"].min() >= 1
    assert chosen.rows.height < 60
    assert chosen.of == {"loop": 10 * 40 * 4}


def test_evaluations_are_followed_by_the_same_prompts():
    found = pl.concat([rows(), rows(4, 100, phase="evaluation")])
    chosen = of_kind(choose(subject(), found, PLENTY), "evaluation prompt")
    by_iteration = chosen.group_by("iteration").agg(pl.col("prompt_id").sort())
    assert by_iteration.height == 4
    assert by_iteration["prompt_id"].n_unique() == 1
    assert chosen.height == 4 * PROMPTS * REPEATS


def test_prompts_whose_verdicts_changed_most_are_followed():
    found = rows(2, 1000, phase="evaluation")
    one = (pl.col("prompt_id") == "p0123") & (pl.col("iteration") == 1)
    flipped = found.with_columns(gold=pl.when(one).then(~pl.col("gold")).otherwise("gold"))
    assert "p0123" in of_kind(choose(subject(), flipped, PLENTY), "evaluation prompt")["prompt_id"]


def test_prompts_that_several_iterations_asked_are_followed():
    again = rows(1, first=0).with_columns(iteration=pl.lit(5, pl.Int32), prompt_id=pl.col("prompt_id") + "#1")
    again = again.with_columns(base=pl.col("prompt_id").str.split("#").list.first())
    chosen = of_kind(choose(subject(), pl.concat([rows(1), rows(1, first=7), again]), PLENTY), "recurring prompt")
    times = chosen.group_by("base").agg(pl.col("iteration").sort())
    assert times["iteration"].to_list() == [[0, 5]] * 40


def test_later_iterations_leave_the_choice_of_earlier_ones_alone():
    short, long = (choose(subject(), rows(number), PLENTY).rows for number in (2, 6))
    assert short.sort(KEY).equals(long.filter(pl.col("iteration") < 2).sort(KEY))


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_no_responses_give_an_empty_choice(budget):
    assert choose(subject(), responses(subject()), budget).rows.is_empty()
    assert responses(subject()).columns == rows().columns


def test_responses_without_labels_can_be_chosen():
    unlabelled = rows().with_columns(pl.lit(None, pl.Float32).alias("reward"), pl.lit(None, pl.Boolean).alias("gold"))
    chosen = choose(subject(), unlabelled, PLENTY)
    assert of_kind(chosen, "best").is_empty()
    assert of_kind(chosen, "random").height == 3 * EACH
