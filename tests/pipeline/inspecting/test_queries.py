"""Each named query against a plain polars computation on planted data, and against what was planted."""

from collections import Counter
from math import log

import numpy as np
import polars as pl
import pytest

from pipeline.errors import ExperimentError
from pipeline.inspecting import queries

c = pl.col


def ask(views, name, *changes):
    return pl.DataFrame(pl.from_arrow(queries.load(name).run(views, changes))).to_dicts()


def rates(frame, phase):
    """(iteration, prompt) -> share of right responses."""
    judged = frame.filter((c("phase") == phase) & c("gold").is_not_null())
    rows = judged.group_by("iteration", "prompt_id").agg(c("gold").mean()).rows()
    return {(iteration, prompt): rate for iteration, prompt, rate in rows}


def keys(rows):
    return [(row["iteration"], row["prompt_id"], row["sample"]) for row in rows]


def as_dicts(frame, *columns):
    return frame.select(columns).to_dicts()


def test_flipped(views, planted):
    found = ask(views, "flipped")
    known = rates(planted.responses, "evaluation")
    expected = {
        prompt: ("solved" if known[2, prompt] > known[0, prompt] else "lost", known[0, prompt], known[2, prompt])
        for _, prompt in known if (known[0, prompt] > 0.5) != (known[2, prompt] > 0.5)
    }  # fmt: skip
    assert {row["prompt_id"]: (row["flip"], row["before"], row["after"]) for row in found} == expected
    assert {"aaaa", "bbbb"} <= expected.keys() and "hhhh" not in expected
    assert all((row["since"], row["iteration"], row["answer"]) == (0, 2, "42") for row in found)
    jumps = [abs(row["after"] - row["before"]) for row in found]
    assert jumps == sorted(jumps, reverse=True)


def test_flipped_of_the_loop_compares_each_iteration_with_the_one_before(views, planted):
    known = rates(planted.responses, "loop")
    expected = {
        (iteration, prompt) for iteration, prompt in known
        if iteration and (known[iteration, prompt] > 0.5) != (known[iteration - 1, prompt] > 0.5)
    }  # fmt: skip
    found = {(row["iteration"], row["prompt_id"]) for row in ask(views, "flipped", "phase=loop")}
    assert found == expected and expected


def test_truncated_rewarded(views, planted):
    rows = planted.loop().filter((c("finish") == "length") & (c("reward") > 0))
    found = ask(views, "truncated_rewarded")
    assert sorted(keys(found)) == sorted(rows.select("iteration", "prompt_id", "sample").rows())
    assert {(row["prompt_id"], row["sample"]) for row in found} == {("dddd", 1)} and len(found) == 3


def test_longest_wrong(views, planted):
    wrong = planted.responses.filter(c("gold").eq(False)).with_columns(length=c("response_tokens").list.len())
    ordered = wrong.sort(
        ["length", "phase", "iteration", "prompt_id", "sample"], descending=[True, False, False, False, False]
    ).head(7)
    assert keys(ask(views, "longest_wrong", "k=7")) == ordered.select("iteration", "prompt_id", "sample").rows()


def test_silent_groups(views, planted):
    groups = planted.loop().group_by("iteration", "prompt_id").agg(low=c("reward").min(), high=c("reward").max())
    for row in ask(views, "silent_groups"):
        here = groups.filter(iteration=row["iteration"])
        silent = here.filter(c("low") == c("high"))
        assert (row["groups"], row["silent"], row["share"]) == (8, silent.height, silent.height / 8)
        assert row["all_high"] == silent.filter(c("low") > 0).height
        assert row["all_low"] == silent.filter(c("low") < 0).height
    assert [row["iteration"] for row in ask(views, "silent_groups")] == [0, 1, 2]


def test_never_solved(views, planted):
    judged = planted.responses.filter(c("gold").is_not_null())
    never = judged.group_by("prompt_id").agg(c("gold").any(), pl.len()).filter(~c("gold"))
    found = ask(views, "never_solved")
    assert {row["prompt_id"]: row["responses"] for row in found} == dict(never.select("prompt_id", "len").rows())
    (only,) = found
    assert (only["prompt_id"], only["responses"], only["times_asked"]) == ("hhhh", 20, 5)
    answers = Counter(judged.filter(prompt_id="hhhh")["extracted"].to_list())
    assert only["usual_answer"] == min(answers, key=lambda answer: (-answers[answer], answer))
    assert ask(views, "never_solved", "least=21") == []


def test_solved_then_lost(views, planted):
    known = rates(planted.responses, "evaluation")
    expected = {
        prompt: (max(known[0, prompt], known[2, prompt]), known[2, prompt])
        for _, prompt in known if max(known[0, prompt], known[2, prompt]) > 0.5 >= known[2, prompt]
    }  # fmt: skip
    found = ask(views, "solved_then_lost")
    assert {row["prompt_id"]: (row["best"], row["now"]) for row in found} == expected
    assert (found[0]["prompt_id"], found[0]["best"], found[0]["now"], found[0]["best_in"]) == ("aaaa", 1.0, 0.0, 0)


def test_newly_solved(views, planted):
    known = rates(planted.responses, "evaluation")
    expected = {prompt for _, prompt in known if known[0, prompt] <= 0.5 < known[2, prompt]}
    found = ask(views, "newly_solved")
    assert {row["prompt_id"] for row in found} == expected
    assert (found[0]["prompt_id"], found[0]["first"], found[0]["now"]) == ("bbbb", 0.0, 1.0)


def test_grader_failures(views, planted):
    lost = planted.responses.filter(verdict="timeout").group_by("phase", "iteration").agg(pl.len())
    found = ask(views, "grader_failures")
    assert {(row["phase"], row["iteration"]): row["responses"] for row in found} == {
        (phase, iteration): count for phase, iteration, count in lost.rows()
    }
    assert all((row["verdict"], row["for_example"], row["prompts"]) == ("timeout", "eeee", 1) for row in found)


def test_top_movers(views, planted):
    trained = planted.loop().filter(c("advantages").is_not_null()).with_columns(push=c("advantages").list.mean())
    order = ["push", "iteration", "prompt_id", "sample"]
    up = trained.sort(order, descending=[True, False, False, False]).head(3)
    down = trained.sort(order).head(3).reverse()
    expected = [*up.select(order[1:]).rows(), *down.select(order[1:]).rows()]
    found = ask(views, "top_movers", "k=3")
    assert keys(found) == expected
    assert [row["advantage"] for row in found[:3]] == pytest.approx(up["push"].to_list(), rel=1e-6)


def test_ngram_surges(views, planted):
    def grams(text):
        words = text.split()
        return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}

    shares = {}
    for iteration in (0, 2):
        texts = planted.loop().filter(iteration=iteration)["response"].to_list()
        counts = Counter(gram for text in texts for gram in grams(text))
        shares[iteration] = {gram: count / len(texts) for gram, count in counts.items()}
    rises = {gram: share - shares[0].get(gram, 0) for gram, share in shares[2].items()}
    expected = sorted(((rise, gram) for gram, rise in rises.items() if rise > 0), key=lambda one: (-one[0], one[1]))
    found = ask(views, "ngram_surges", "k=10")
    assert [row["n_gram"] for row in found] == [gram for _, gram in expected[:10]]
    assert [row["rise"] for row in found] == pytest.approx([rise for rise, _ in expected[:10]])
    top = next(row for row in found if row["n_gram"] == "hence and so")
    assert (top["share_first"], top["share_last"]) == (0, 1)


def test_length_reward(views, planted):
    for row in ask(views, "length_reward"):
        here = planted.loop().filter(iteration=row["iteration"]).with_columns(length=c("response_tokens").list.len())
        assert row["correlation"] == pytest.approx(np.corrcoef(here["length"], here["reward"])[0, 1])
        assert row["length"] == pytest.approx(here["length"].mean())
        assert row["length_right"] == pytest.approx(here.filter(c("gold").eq(True))["length"].mean())
        assert row["length_wrong"] == pytest.approx(here.filter(c("gold").eq(False))["length"].mean())


def test_duplicates(views, planted):
    for row in ask(views, "duplicates"):
        here = planted.loop().filter(iteration=row["iteration"])
        counts = Counter(here.select("prompt_id", "response").rows())
        assert (row["responses"], row["different"]) == (32, len(counts))
        assert row["share_repeated"] == pytest.approx(1 - len(counts) / 32)
        (prompt, text), times = min(counts.items(), key=lambda one: (-one[1], *one[0]))
        assert (row["for_prompt"], row["most_repeated"], row["most_times"]) == (prompt, text, times)


def test_grader_disagreement(views, planted):
    here = planted.loop().filter(iteration=1)
    differ = here.filter((c("verdict") != "wrong") | (c("reward") != -1.0)).sort("prompt_id", "sample")
    found = ask(views, "grader_disagreement")
    assert keys(found) == differ.select("iteration", "prompt_id", "sample").rows()
    assert {row["variant"] for row in found} == {"strict"}
    assert [row["verdict_before"] for row in found] == differ["verdict"].to_list()
    assert {(row["verdict_after"], row["reward_after"]) for row in found} == {("wrong", -1.0)}


def test_hacked(views, planted):
    wrong = planted.loop().filter(c("gold").eq(False))
    order = ["reward", "iteration", "prompt_id", "sample"]
    expected = wrong.sort(order, descending=[True, False, False, False]).head(5)
    found = ask(views, "hacked", "k=5")
    assert keys(found) == expected.select(order[1:]).rows()
    assert found[0]["score"] == 0.5 and found[0]["prompt_id"] == "dddd"  # cut, wrong, and rewarded


def test_mismatch_by_position(views, planted):
    tokens = []
    for sampler, old in planted.loop().select("sampler_logprobs", "old_logprobs").rows():
        tokens += [(place // 4 * 4, s - o) for place, (s, o) in enumerate(zip(sampler, old, strict=True))]
    found = ask(views, "mismatch_by_position", "width=4")
    assert [row["from_token"] for row in found] == sorted({place for place, _ in tokens})
    for row in found:
        gaps = np.array([gap for place, gap in tokens if place == row["from_token"]])
        assert row["tokens"] == len(gaps)
        assert [row["mean"], row["mean_absolute"], row["largest"]] == pytest.approx(
            [gaps.mean(), np.abs(gaps).mean(), np.abs(gaps).max()], rel=1e-4, abs=1e-7
        )
    absolute = [row["mean_absolute"] for row in found]
    assert absolute == sorted(absolute)  # it was planted to grow by 0.01 a token


def test_value_calibration(views, planted):
    tokens = []
    for row in planted.loop().filter(c("returns").is_not_null()).to_dicts():
        place = (row["iteration"], row["prompt_id"], row["sample"])
        pairs = zip(row["values"], row["returns"], strict=True)
        tokens += [(np.float32(value), *place, at, back) for at, (value, back) in enumerate(pairs)]
    tokens.sort(key=lambda one: one[:5])
    sizes = [len(tokens) // 5 + (number < len(tokens) % 5) for number in range(5)]
    found = ask(views, "value_calibration", "bins=5")
    start = 0
    for row, size in zip(found, sizes, strict=True):
        part = tokens[start : start + size]
        start += size
        value, back = np.mean([one[0] for one in part]), np.mean([one[5] for one in part])
        assert row["tokens"] == size
        assert [row["value"], row["came_back"], row["bias"]] == pytest.approx([value, back, value - back], rel=1e-5)
    assert found[0]["came_back"] < found[-1]["came_back"]  # right responses were given higher values


def test_vote_changes(views, planted):
    def ballot(phase, iteration, prompt):
        here = planted.responses.filter(phase=phase, iteration=iteration, prompt_id=prompt)
        votes = Counter(answer for answer in here["extracted"].to_list() if answer is not None)
        winner = min(votes, key=lambda answer: (-votes[answer], answer))
        total = sum(votes.values())
        return winner, votes[winner], total, -sum(n / total * log(n / total) for n in votes.values())

    expected = {}
    for phase, steps in (("loop", ((0, 1), (1, 2))), ("evaluation", ((0, 2),))):
        for since, now in steps:
            for prompt in planted.prompts["prompt_id"]:
                before, after = ballot(phase, since, prompt), ballot(phase, now, prompt)
                if before[0] != after[0]:
                    expected[phase, now, prompt] = (since, before[0], *after)
    found = ask(views, "vote_changes")
    assert {(row["phase"], row["iteration"], row["prompt_id"]) for row in found} == expected.keys()
    assert ("loop", 2, "aaaa") in expected
    for row in found:
        since, before, after, votes, total, entropy = expected[row["phase"], row["iteration"], row["prompt_id"]]
        assert (row["since"], row["before"], row["after"], row["votes"], row["votes_cast"]) == (
            since, before, after, votes, total
        )  # fmt: skip
        assert row["entropy"] == pytest.approx(entropy)
        assert row["winner_right"] == (after == "42")


def test_confidence(views, planted):
    rows = [
        (float(np.exp(np.mean(np.float64(row["sampler_logprobs"])))), row["iteration"], row["prompt_id"], row["sample"],
         row["gold"], row["reward"])
        for row in planted.loop().filter(c("gold").is_not_null()).to_dicts()
    ]  # fmt: skip
    rows.sort()
    sizes = [len(rows) // 4 + (number < len(rows) % 4) for number in range(4)]
    start = 0
    found = ask(views, "confidence", "bins=4")
    for row, size in zip(found, sizes, strict=True):
        part = rows[start : start + size]
        start += size
        assert row["responses"] == size
        means = [np.mean([one[place] for one in part]) for place in (0, 4, 5)]
        assert [row["confidence"], row["right"], row["reward"]] == pytest.approx(means, rel=1e-6)
    assert found[0]["right"] < found[-1]["right"]  # right responses were planted as the surer ones


def test_dropped(views, planted):
    reasons = planted.loop().filter(c("dropped").is_not_null()).group_by("iteration", "dropped").agg(
        pl.len(), c("reward").mean(), c("prompt_id").n_unique()
    )  # fmt: skip
    expected = {(i, why): (count, prompts, reward) for i, why, count, reward, prompts in reasons.rows()}
    found = ask(views, "dropped")
    assert {(r["iteration"], r["why"]): (r["responses"], r["prompts"], r["reward"]) for r in found} == expected
    assert expected[0, "constant outcomes"][:2] == (4, 1) and expected[0, "no verdict"][:2] == (1, 1)
    assert found[0]["share"] == 4 / 32


def test_lengths(views, planted):
    found = ask(views, "lengths")
    assert [(row["phase"], row["iteration"]) for row in found] == [
        ("loop", 0), ("loop", 1), ("loop", 2), ("evaluation", 0), ("evaluation", 2)
    ]  # fmt: skip
    for row in found:
        here = planted.responses.filter(phase=row["phase"], iteration=row["iteration"])
        lengths = here["response_tokens"].list.len().to_numpy()
        assert (row["responses"], row["longest"], row["cut"]) == (32, lengths.max(), 1 / 32)
        assert [row["mean"], row["median"], row["p95"]] == pytest.approx(
            [lengths.mean(), np.quantile(lengths, 0.5), np.quantile(lengths, 0.95)]
        )


def test_pass_rates(views, planted):
    for row in ask(views, "pass_rates"):
        known = [
            rate for (i, _), rate in rates(planted.responses, row["phase"]).items() if i == row["iteration"]
        ]  # fmt: skip
        assert (row["prompts"], row["mean"]) == (8, pytest.approx(np.mean(known)))
        assert (row["never"], row["always"]) == (known.count(0.0), known.count(1.0))
        between = [sum(low <= rate < high for rate in known) for low, high in ((1e-9, 0.25), (0.25, 0.5), (0.5, 0.75))]
        assert [row["below_quarter"], row["below_half"], row["below_three_quarters"]] == between
        assert row["nearly_always"] == sum(0.75 <= rate < 1 for rate in known)


def test_far_from_reference(views, planted):
    gap = c("old_logprobs").list.sum() - c("ref_logprobs").list.sum()
    rows = planted.loop().with_columns(gap=gap).sort("gap", descending=True)
    found = ask(views, "far_from_reference", "k=6")
    assert [row["kl_reference"] for row in found] == pytest.approx(rows["gap"].head(6).to_list(), rel=1e-5)
    assert {row["iteration"] for row in found} == {2}  # it was planted to grow with the iterations
    assert found[0]["per_token"] == pytest.approx(0.3, rel=1e-4)


def test_frequent_answers(views, planted):
    given = planted.loop().filter(c("extracted").is_not_null())
    counts = Counter(given["extracted"].to_list())
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    found = ask(views, "frequent_answers")
    assert [row["given"] for row in found] == ordered
    for row in found:
        right = given.filter(extracted=row["given"])["gold"].mean()
        assert (row["responses"], row["right"]) == (counts[row["given"]], pytest.approx(right))
        assert row["share"] == counts[row["given"]] / 96


# all of them


def test_there_are_twenty_and_each_has_a_test_here():
    assert len(queries.names()) >= 20
    assert {f"test_{name}" for name in queries.names()} <= globals().keys()


@pytest.mark.parametrize("name", queries.names())
def test_every_query_asks_one_question_and_uses_its_settings(views, name):
    query = queries.load(name)
    assert query.question.rstrip(".").count("\n") == 0 and query.needs
    assert all(f"${setting}" in query.sql for setting in query.settings)
    assert all(view in views.columns("places") or views.columns(view) for view, _ in query.needs)
    assert all(column in views.columns(view) for view, column in query.needs)


def test_a_wrong_name_and_a_wrong_setting_are_told_with_what_there_is(views):
    with pytest.raises(ExperimentError, match="did you mean 'flipped'"):
        queries.load("fliped")
    with pytest.raises(ExperimentError, match="it has: k"):
        ask(views, "hacked", "n=3")
    with pytest.raises(ExperimentError, match="'many'"):
        ask(views, "hacked", "k=many")


def test_a_setting_is_a_value_and_never_a_part_of_the_statement(views):
    assert ask(views, "flipped", "phase=loop' or 'a' = 'a") == []


def test_what_was_not_stored_is_told_instead_of_an_empty_table(planted, tmp_path):
    import shutil

    from pipeline.catalog import catalog
    from pipeline.inspecting.views import Views

    shutil.copytree(planted.folder.parent, tmp_path / "runs")
    for iteration in (0, 1, 2):
        shutil.rmtree(tmp_path / f"runs/run/{iteration:04d}/scores")
    with (
        Views(catalog([tmp_path / "runs/run"])) as views,
        pytest.raises(ExperimentError, match=r"needs scores\.ref_logprobs, which these runs have not stored"),
    ):
        ask(views, "far_from_reference")
