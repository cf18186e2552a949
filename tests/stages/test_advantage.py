import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.algorithms.recipe import Recipe
from pipeline.contracts import LABELS, ROLLOUTS, SCORES
from pipeline.errors import ContractError, ExperimentError
from pipeline.joining import blocks, cuts, kept
from stages import advantage as module
from stages.advantage import READ, SAMPLER, Settings, advantage, columns_of
from stages.score import Settings as ScoreSettings
from stages.score import score


def settings(recipe, **changes):
    """The settings of a recipe, with changes to it."""
    chosen = Recipe.load(recipe).changed(changes)
    lines = ("shape", "advantage", "normalize", "importance")
    return Settings.of(None, {name: getattr(chosen, name) for name in lines})


GRPO = settings("grpo")
TO_GO = settings("grpo", advantage={"kind": "reward_to_go"}, normalize=False)
REMAX = settings("grpo", advantage={"kind": "greedy_baseline"}, normalize=False)
CRITIC = settings("grpo", advantage={"kind": "gae", "lam": 1.0}, normalize=False)
DAPO = settings("dapo", shape=[{"kind": "overlong_penalty", "limit": 6, "buffer": 4}])


def row(name, sample, reward, length=1, keep=True, sampler=None, finish="stop"):
    """A response with its label and its scores; `sampler` is the engine's log-probability of each token."""
    return {
        "name": name, "sample": sample, "reward": reward, "length": length, "keep": keep, "sampler": sampler,
        "finish": finish,
    }  # fmt: skip


@pytest.fixture
def written(by_hand):
    """Rollouts, labels and scores of parts of rows; scores of the kept ones only, where the critic says 0.25."""

    def write(*parts, scored=True):
        rollouts = [
            [
                {
                    "prompt_id": r["name"], "sample": r["sample"], "prompt_tokens": [1],
                    "response_tokens": list(range(2, 2 + r["length"])), "response": "",
                    "sampler_logprobs": None if r["sampler"] is None else [r["sampler"]] * r["length"],
                    "finish": r["finish"], "seed": 0,
                }
                for r in part
            ]
            for part in parts
        ]  # fmt: skip
        labels = [
            [
                {
                    "prompt_id": r["name"], "sample": r["sample"], "reward": r["reward"], "correct": r["reward"] > 0,
                    "gold": None, "extracted": None, "target": None, "verdict": None, "vote_share": None,
                    "keep": r["keep"],
                    "dropped": None if r["keep"] else "by hand",
                }
                for r in part
            ]
            for part in parts
        ]  # fmt: skip
        rows = [
            {
                "prompt_id": r["name"], "sample": r["sample"], "old_logprobs": [-float(r["sample"] + 2)] * r["length"],
                "ref_logprobs": [-float(r["sample"] + 3)] * r["length"],
                "values": [0.25] * r["length"],
            }
            for part in parts for r in part if r["keep"]
        ]  # fmt: skip
        return by_hand(ROLLOUTS, *rollouts), by_hand(LABELS, *labels), by_hand(SCORES, rows) if scored else None

    return write


def run(out, chosen, *rounds, scores):
    return advantage.run(
        out, chosen, rollouts=[r.path for r, *_ in rounds], labels=[made[1].path for made in rounds],
        scores=None if scores is None else scores.path,
    )  # fmt: skip


def per_response(artifact, name="advantages"):
    """The value of each response, the same on all its tokens."""
    values = artifact.table()[name].to_pylist()
    assert all(len(set(tokens)) == 1 for tokens in values)
    return [tokens[0] for tokens in values]


def test_grpo_by_hand(written, tmp_path, sound):
    made = written([row("a", 0, 1.0, 3), row("a", 1, 0.0), row("a", 2, 0.0, 2), row("b", 0, 1.0), row("b", 1, 1.0)])
    table = run(tmp_path / "out", GRPO, made, scores=made[2])
    sound(table)
    std = math.sqrt(1 / 3)  # of 1, 0, 0 with n - 1
    expected = [2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0, 0]
    assert per_response(table) == pytest.approx(expected, rel=1e-5)
    rows = table.table().to_pylist()
    assert [len(r["advantages"]) for r in rows] == [3, 1, 2, 1, 1]
    assert [r["reward"] for r in rows] == [r["shaped_reward"] for r in rows] == [1, 0, 0, 1, 1]
    assert [r["correct"] for r in rows] == [True, False, False, True, True]
    assert [r["returns"] for r in rows] == [None] * 5
    assert rows[2]["response_tokens"] == [2, 3]
    assert (rows[2]["old_logprobs"], rows[2]["ref_logprobs"]) == ([-4.0, -4.0], [-5.0, -5.0])


def test_dapo_by_hand_over_two_rounds(written, tmp_path):
    """Of a limit of 6 with a buffer of 4: 2 tokens cost nothing, 3 a quarter, 4 a half, 6 and more 1."""
    one = [row("a", 0, 1.0, 2), row("a", 1, 1.0, 4), row("a", 2, -1.0, 8)]
    two = [row("c", 0, 1.0, 6), row("c", 1, -1.0, 3)]
    first, second = written([*one, row("b", 0, 1.0, keep=False)]), written(two)
    scores = written(two, one)[2]
    table = run(tmp_path / "out", DAPO, first, second, scores=scores)
    rows = table.table().to_pylist()
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [("a", 0), ("a", 1), ("a", 2), ("c", 0), ("c", 1)]
    assert [r["reward"] for r in rows] == [1, 1, -1, 1, -1]
    shaped = [1.0, 0.5, -2.0, 0.0, -1.25]
    assert [r["shaped_reward"] for r in rows] == pytest.approx(shaped)
    a, c = np.array(shaped[:3]), np.array(shaped[3:])
    expected = [*(a - a.mean()) / a.std(ddof=1), *(c - c.mean()) / c.std(ddof=1)]
    assert per_response(table) == pytest.approx(expected, rel=1e-5)
    other = run(tmp_path / "other", DAPO, second, first, scores=scores).table().to_pylist()
    assert [(r["prompt_id"], r["advantages"]) for r in other] == [
        (r["prompt_id"], r["advantages"]) for r in (*rows[3:], *rows[:3])
    ]


def test_the_numbers(written, tmp_path, numbers):
    made = written([row("a", 0, 1.0, 4), row("a", 1, -1.0, 2), row("b", 0, 1.0), row("b", 1, 1.0)])
    table = run(tmp_path / "out", DAPO, made, scores=made[2])
    measured = numbers(table)
    assert table.stats["groups"] == 2
    assert measured["reward/kept_mean", 0] == 0.5
    assert measured["reward/shaped_mean", 0] == pytest.approx((0.5 - 1 + 1 + 1) / 4)
    high = 0.75 / math.sqrt(2 * 0.75**2)
    tokens = np.array([high] * 4 + [-high] * 2 + [0, 0])
    assert measured["advantage/mean", 0] == pytest.approx(tokens.mean(), rel=1e-5)
    assert measured["advantage/std", 0] == pytest.approx(tokens.std(), rel=1e-5)
    assert measured["advantage/zero_tokens", 0] == 0.25
    assert measured["reward/zero_signal_groups", 0] == 0.5
    assert not [name for name, _ in measured if name.startswith(("value/", "returns/", "importance/"))]


ROWS = [row(name, s, float((s + ord(name)) % 3 == 0), 1 + (s * ord(name)) % 5) for name in "dacb" for s in range(3)]


def test_neither_parts_nor_the_order_of_scores_change_anything(written, tmp_path):
    parts = [[r for r in ROWS if r["name"] == name] for name in "dacb"]
    whole, cut = written(ROWS), written(*parts)
    backwards = written(*reversed(parts))[2]
    chosen = settings("dapo", normalize={"kind": "whiten"})  # its statistics are of the whole batch
    tables = [
        run(tmp_path / str(n), chosen, made, scores=scores).table().to_pylist()
        for n, (made, scores) in enumerate([(whole, whole[2]), (cut, cut[2]), (cut, backwards), (whole, backwards)])
    ]
    assert all(table == tables[0] for table in tables)
    assert [r["prompt_id"] for r in tables[0]] == [r["name"] for r in ROWS]


def test_groups_stay_whole_when_the_table_is_cut():
    assert cuts(np.array([4, 4, 4, 1, 1, 0, 0, 0, 0]), 4) == [(0, 5), (5, 9)]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20), rows=st.integers(1, 30))
def test_cuts_cover_all_rows_and_split_no_group(sizes, rows):
    group = np.repeat(np.random.default_rng(len(sizes)).permutation(len(sizes)), sizes)
    ranges = cuts(group, rows)
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == len(group)
    pieces = [set(group[start:end].tolist()) for start, end in ranges]
    assert sum(map(len, pieces)) == len(sizes)
    assert all(end - start < rows + max(sizes) for start, end in ranges)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20), rows=st.integers(1, 30), seed=st.integers(0, 9))
def test_blocks_are_the_cuts_of_the_whole_however_the_rows_come(sizes, rows, seed):
    group = np.repeat(np.arange(len(sizes)), sizes)
    table = pa.table({"prompt_id": group.astype(str), "row": np.arange(len(group))})
    ends = np.sort(np.random.default_rng(seed).integers(0, len(group) + 1, 5))
    parts = [table.slice(start, end - start) for start, end in zip([0, *ends], [*ends, len(group)], strict=True)]
    wanted = [list(range(start, end)) for start, end in cuts(group, rows)]
    assert [block["row"].to_pylist() for block in blocks(parts, rows)] == wanted


WHITE = settings("dapo", normalize={"kind": "whiten"}, importance={"kind": "token_truncated"})
SPREAD = [{**r, "sampler": -2.5} for r in ROWS]


@pytest.mark.parametrize("chosen", [GRPO, CRITIC, WHITE], ids=["group_std", "gae", "whiten"])
def test_a_block_at_a_time_comes_to_what_all_at_once_comes_to(written, tmp_path, monkeypatch, numbers, chosen):
    made = written(SPREAD)
    whole = run(tmp_path / "whole", chosen, made, scores=made[2])
    monkeypatch.setattr(module, "PART_ROWS", 4)
    monkeypatch.setattr(module, "ELEMENTS", 12)
    cut = run(tmp_path / "cut", chosen, made, scores=made[2])
    assert (len(whole.part_paths()), len(cut.part_paths())) == (1, 2)
    for one, other in zip(whole.table().to_pylist(), cut.table().to_pylist(), strict=True):
        assert one.pop("advantages") == pytest.approx(other.pop("advantages"), rel=1e-6)
        assert one == other
    assert cut.stats["groups"] == whole.stats["groups"]
    told = [{key: value for key, value in numbers(one).items() if key[0] != "time/seconds"} for one in (whole, cut)]
    assert told[0] == pytest.approx(told[1], rel=1e-12, abs=1e-12)


def test_labels_in_other_parts_than_the_rollouts(written, by_hand, tmp_path):
    parts = [[r for r in ROWS if r["name"] == name] for name in "dacb"]
    whole, cut = written(ROWS), written(*parts)
    one = run(tmp_path / "one", GRPO, whole, scores=whole[2])
    for number, mixed in enumerate([(whole[0], cut[1]), (cut[0], whole[1])]):
        assert run(tmp_path / str(number), GRPO, mixed, scores=whole[2]).manifest.digest == one.manifest.digest
    more = written([*ROWS, row("e", 0, 1.0)])
    with pytest.raises(ContractError, match="labels are of other rollouts"):
        run(tmp_path / "more", GRPO, (whole[0], more[1]), scores=whole[2])


def test_a_group_whose_rounds_follow_one_another_is_one_group(written, tmp_path):
    first, second = written([row("a", 0, 1.0), row("a", 1, 0.0)]), written([row("a", 2, 0.0), row("b", 0, 1.0)])
    scores = written([row("a", 0, 1.0), row("a", 1, 0.0), row("a", 2, 0.0), row("b", 0, 1.0)])[2]
    chosen = settings("grpo", normalize=False)
    made = run(tmp_path / "out", chosen, first, second, scores=scores)
    assert per_response(made) == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])
    assert made.stats["groups"] == 2


@pytest.mark.parametrize("rows", [4096, 1])
def test_a_group_whose_rounds_do_not_follow_one_another_is_refused(written, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(module, "PART_ROWS", rows)
    first, second = written([row("a", 0, 1.0), row("b", 0, 0.0)]), written([row("a", 1, 0.0)])
    with pytest.raises(ContractError, match="rows of a group do not stand together"):
        run(tmp_path / "out", GRPO, first, second, scores=None)


def test_the_same_twice(written, tmp_path):
    made = written(ROWS)
    one, two = (run(tmp_path / name, GRPO, made, scores=made[2]) for name in ("one", "two"))
    assert one.manifest.digest == two.manifest.digest


def test_kept_rows_without_scores(written, tmp_path):
    made = written(ROWS)
    fewer = written([r for r in ROWS if (r["name"], r["sample"]) not in {("a", 1), ("b", 0)}])[2]
    with pytest.raises(ContractError, match=r"2 kept rows have no scores; first: \[\('a', 1\), \('b', 0\)\]"):
        run(tmp_path / "out", GRPO, made, scores=fewer)


def test_dropped_rows_need_no_scores_and_scores_of_them_are_not_used(written, tmp_path):
    some = [{**r, "keep": r["name"] != "c"} for r in ROWS]
    made, all_scores = written(some), written(ROWS)[2]
    tables = [
        run(tmp_path / str(n), GRPO, made, scores=scores).table().to_pylist()
        for n, scores in enumerate([made[2], all_scores])
    ]
    assert tables[0] == tables[1]
    assert [r["prompt_id"] for r in tables[0]] == [*"ddd", *"aaa", *"bbb"]


def test_without_scores_where_the_recipe_reads_with_no_model(written, tmp_path, sound, numbers):
    made = written(ROWS, scored=False)
    table = run(tmp_path / "out", GRPO, made, scores=None)
    sound(table)
    assert not {"old_logprobs", "ref_logprobs", "values"} & set(table.table().column_names)
    assert ("value/explained_variance", 0) not in numbers(run(tmp_path / "to-go", TO_GO, made, scores=None))


def test_a_shape_that_needs_scores_and_gets_none(written, tmp_path):
    made = written(ROWS, scored=False)
    chosen = settings("grpo", shape=[{"kind": "kl_penalty", "coef": 0.1}])
    with pytest.raises(ExperimentError, match="needs the column old_logprobs, ref_logprobs"):
        run(tmp_path / "out", chosen, made, scores=None)


def test_the_divergence_comes_off_every_token(written, tmp_path):
    """log pi_old - log pi_ref is 1 on every token by hand, so a response of n tokens loses n times the coefficient."""
    made = written([row("a", 0, 1.0, 3), row("a", 1, 0.0, 2)])
    chosen = settings("grpo", shape=[{"kind": "kl_penalty", "coef": 0.1}], normalize=False)
    table = run(tmp_path / "out", chosen, made, scores=made[2])
    assert table.table()["shaped_reward"].to_pylist() == pytest.approx([0.7, -0.2])
    assert per_response(table) == pytest.approx([0.45, -0.45])


def test_no_kept_rows(written, tmp_path):
    made = written([{**r, "keep": False} for r in ROWS], scored=False)
    with pytest.raises(ContractError, match="no rows are kept"):
        run(tmp_path / "out", GRPO, made, scores=None)
    assert not (tmp_path / "out").exists()


def test_labels_of_other_rollouts(written, tmp_path):
    made, other = written(ROWS), written([{**r, "sample": r["sample"] + 1} for r in ROWS])
    with pytest.raises(ContractError, match="labels are of other rollouts"):
        run(tmp_path / "out", GRPO, (made[0], other[1]), scores=made[2])
    with pytest.raises(ContractError, match="1 rollouts but 2 labels"):
        list(kept([made[0]], [made[1], made[1]], READ))


def test_parts_in_another_order_change_no_row(written, tmp_path, numbers):
    shuffled = [[r for r in ROWS if r["name"] == name] for name in "bcad"]
    made = [written(ROWS), written(*shuffled)]
    chosen = settings("dapo", normalize={"kind": "whiten"})
    tables = [run(tmp_path / str(n), chosen, one, scores=one[2]) for n, one in enumerate(made)]
    keyed = [{(r["prompt_id"], r["sample"]): r for r in table.table().to_pylist()} for table in tables]
    assert keyed[0].keys() == keyed[1].keys() and list(keyed[0]) != list(keyed[1])
    for key, one in keyed[0].items():
        assert one.pop("advantages") == pytest.approx(keyed[1][key].pop("advantages"), rel=1e-6), key
        assert one == keyed[1][key]
    measured = [
        {name: value for (name, _), value in numbers(table).items() if name != "time/seconds"} for table in tables
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6, abs=1e-9)


def test_the_greedy_reward_is_taken_off_those_of_its_group(written, tmp_path):
    one = [row("a", -1, 0.5, keep=False), row("a", 0, 1.0, 2), row("a", 1, 0.0), row("b", 0, 0.0, keep=False)]
    two = [row("b#1", 0, 1.0), row("b#1", 1, 0.0, 3), row("b#1", -1, -1.0, keep=False)]
    made = written(one, two)
    columns = columns_of(pa.concat_tables(kept([made[0]], [made[1]], (*READ, SAMPLER))))
    np.testing.assert_array_equal(columns["greedy"], np.array([0.5, 0.5, -1, -1], np.float32))
    np.testing.assert_array_equal(columns["rewards"], [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    table = run(tmp_path / "out", REMAX, made, scores=made[2])
    assert per_response(table) == pytest.approx([0.5, -0.5, 2.0, 1.0])
    assert table.table()["sample"].to_pylist() == [0, 1, 0, 1]


def test_the_greedy_reward_is_the_label_and_nothing_that_shaping_added(written, tmp_path):
    made = written([row("a", -1, 0.5, keep=False), row("a", 0, 1.0, 3)])
    chosen = Settings.of(None, {**REMAX.model_dump(), "shape": [{"kind": "kl_penalty", "coef": 0.1}]})
    assert per_response(run(tmp_path / "out", chosen, made, scores=made[2])) == pytest.approx([1 - 0.3 - 0.5])


def test_a_group_without_its_greedy_response(written, tmp_path):
    made = written([row("a", -1, 0.5, keep=False), row("a", 0, 1.0), row("b", 0, 1.0), row("b", 1, 0.0)])
    with pytest.raises(ContractError, match="'greedy_baseline' needs greedy, and 2 kept rows have none") as error:
        run(tmp_path / "out", REMAX, made, scores=made[2])
    assert (error.value.where, "rollout.greedy = true" in error.value.do) == ("prompts b", True)
    assert "greedy" not in columns_of(pa.concat_tables(kept([made[0]], [made[1]], (*READ, SAMPLER))))
    run(tmp_path / "others", GRPO, made, scores=made[2])


def test_cut_responses_are_told_from_finished_ones(written, tmp_path):
    made = written([row("a", 0, 1.0), row("a", 1, 0.0, finish="length")])
    assert run(tmp_path / "out", GRPO, made, scores=made[2]).table()["finished"].to_pylist() == [True, False]


SAMPLED = [row("a", 0, 1.0, 2, sampler=-2.5), row("a", 1, 0.0, 1, sampler=-2.0), row("a", 2, -1.0, 3, sampler=-4.5)]
"""The trainer says -2, -3 and -4: ratios e^0.5, e^-1 and e^0.5."""


@pytest.mark.parametrize(
    ("kind", "weights", "capped"),
    [
        ("token_truncated", [math.exp(0.5), math.exp(-1), math.exp(0.5)], 0.0),
        ("sequence_truncated", [2.0, math.exp(-1), 2.0], 5 / 6),
    ],
)
def test_the_sampler_mismatch_weighs_the_credit_after_normalization(written, tmp_path, numbers, kind, weights, capped):
    made = written(SAMPLED)
    plain = run(tmp_path / "plain", GRPO, made, scores=made[2])
    weighed = run(tmp_path / "out", settings("grpo", importance={"kind": kind}), made, scores=made[2])
    assert per_response(weighed) == pytest.approx([a * w for a, w in zip(per_response(plain), weights, strict=True)])
    measured = numbers(weighed)
    assert measured["importance/mean", 0] == pytest.approx(np.repeat(weights, [2, 1, 3]).mean())
    assert measured["importance/capped", 0] == pytest.approx(capped)
    for name in ("reward", "shaped_reward", "returns", "old_logprobs"):
        assert weighed.table()[name].equals(plain.table()[name])


def test_importance_weights_do_not_reach_the_critic(written, tmp_path):
    made = written(SAMPLED)
    chosen = Settings.of(None, {**CRITIC.model_dump(), "importance": {"kind": "token_truncated"}})
    plain, weighed = (
        run(tmp_path / name, with_it, made, scores=made[2]).table() for name, with_it in (("p", CRITIC), ("w", chosen))
    )
    assert weighed["returns"].equals(plain["returns"]) and not weighed["advantages"].equals(plain["advantages"])


def test_importance_where_the_sampler_said_nothing(written, tmp_path):
    made = written([*SAMPLED, row("b", 0, 1.0)])
    chosen = settings("grpo", importance={"kind": "token_truncated"})
    with pytest.raises(ContractError, match="'token_truncated' needs sampler_logprobs, and 1 kept rows have none"):
        run(tmp_path / "out", chosen, made, scores=made[2])


def test_what_the_critic_foresaw(written, tmp_path, numbers):
    made = written([row("a", 0, 1.0, 3), row("a", 1, 0.0)])
    table = run(tmp_path / "out", CRITIC, made, scores=made[2])
    assert per_response(table, "returns") == pytest.approx([1.0, 0.0])
    assert per_response(table) == pytest.approx([0.75, -0.25])
    measured = numbers(table)
    assert measured["returns/mean", 0] == pytest.approx(0.75)
    assert measured["value/explained_variance", 0] == pytest.approx(0)  # a constant foresees nothing
    same = written([row("a", 0, 1.0), row("a", 1, 1.0)])
    assert ("value/explained_variance", 0) not in numbers(run(tmp_path / "same", CRITIC, same, scores=same[2]))


def test_the_real_iteration(advantages, labels, sound):
    sound(advantages)
    kept = labels.table().filter(labels.table()["keep"])
    assert advantages.table(["prompt_id", "sample"]).equals(kept.select(["prompt_id", "sample"]))
    for name in set(kept["prompt_id"].to_pylist()):
        group = advantages.table().filter(np.array(advantages.table()["prompt_id"].to_pylist()) == name)
        credit = [tokens[0] for tokens in group["advantages"].to_pylist()]
        assert sum(credit) == pytest.approx(0, abs=1e-5)
        assert [a > 0 for a in credit] == group["correct"].to_pylist()


@pytest.mark.parametrize("read", [True, False])
def test_the_samplers_log_probabilities_go_along_where_no_model_has_read_them_again(
    rollouts, labels, scores, other_policy, tmp_path, read
):
    if not read:
        alone = ScoreSettings.of(None, {"needs": ["ref_logprobs"]})
        scores = score.run(
            tmp_path / "scores", alone, rollouts=[rollouts.path], labels=[labels.path], reference=other_policy
        )
    chosen = Settings.of(None, {"advantage": {"kind": "group_mean"}})
    made = advantage.run(
        tmp_path / "out", chosen, rollouts=[rollouts.path], labels=[labels.path], scores=scores.path
    ).table()  # fmt: skip
    assert ("old_logprobs" in made.column_names) == read
    assert ("sampler_logprobs" in made.column_names) != read
    if not read:
        sampled = {(r["prompt_id"], r["sample"]): r["sampler_logprobs"] for r in rollouts.table().to_pylist()}
        for row in made.to_pylist():
            assert row["sampler_logprobs"] == sampled[row["prompt_id"], row["sample"]]
