"""Contracts: what every dataset must be, and how a broken one is refused."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import (
    ADVANTAGES,
    CONTRACTS,
    DEMONSTRATIONS,
    LABELS,
    METRICS,
    PERPLEXITIES,
    POLICY,
    PROMPTS,
    QUESTIONS,
    RANKINGS,
    ROLLOUTS,
    SCORES,
    Contract,
    Field,
)
from pipeline.errors import ContractError

USER, ASSISTANT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
KEYS = [{"prompt_id": prompt, "sample": sample} for prompt in ("p", "q", "r") for sample in (-1, 0, 1)]
TOKENS = {"prompt_tokens": [7, 8], "response_tokens": [1, 2]}

GOOD = {
    "prompts": [
        {"prompt_id": "p", "messages": [USER], "answer": None, "grader": "none", "source": "s"},
        {"prompt_id": "q", "messages": [USER, ASSISTANT, USER], "answer": "2", "grader": "exact", "source": "s"},
    ],
    "demonstrations": [{"prompt_id": "p", "messages": [USER, ASSISTANT], "source": "s"}] * 2,
    "documents": [{"document_id": "d", "text": "", "source": "s"}],
    "rankings": [
        {
            "ranking_id": "x", "prompt_id": "p", "messages": [USER], "responses": ["a", "b", "c"], "ranks": [0, 1, 1],
            "ratings": [4.0, 2.5, 2.5], "annotator": None, "source": None,
        }
    ],
    "questions": [
        {
            "question_id": "x", "prompt_id": "p", "messages": [USER], "responses": ["a", "b"],
            "response_ids": ["p/0", "p/3"], "annotators": [], "source": "s",
        }
    ],
    "perplexities": [{"document_id": "d", "tokens": 3, "nll": 4.5}],
    "rollouts": [
        {
            **key, **TOKENS, "response": "2", "sampler_logprobs": None if i == 0 else [-0.5, 0.0], "finish": "stop",
            "seed": i, "staleness": i % 2,
        }
        for i, key in enumerate(KEYS)
    ],
    "labels": [
        {
            **key, "reward": 1.0, "correct": True, "gold": None, "extracted": None, "target": "2", "verdict": "correct",
            "vote_share": None, "keep": i > 2, "dropped": "surplus group" if i <= 2 else None,
        }
        for i, key in enumerate(KEYS)
    ],
    "scores": [
        {**key, "old_logprobs": [-1.0, 0.0], "ref_logprobs": [-1.0], "values": [0.5], "reward_scores": 2.0}
        for key in KEYS
    ],
    "advantages": [
        {
            **key, **TOKENS, "advantages": [0.5, -0.5], "returns": None if i == 0 else [1.0, 1.0],
            "old_logprobs": [-1.0, 0.0], "ref_logprobs": [-1.0, -2.0], "values": [0.0, 1.0], "reward": 1.0,
            "sampler_logprobs": None if i == 0 else [-1.0, -0.5], "shaped_reward": 0.5, "correct": None,
            "finished": True,
        }
        for i, key in enumerate(KEYS)
    ],
    "metrics": [
        {"run": "r", "iteration": None, "stage": "s", "step": 0, "name": "a/b", "value": 1.0, "unit": ""}
    ],
}  # fmt: skip
TABLES = [contract for contract in CONTRACTS.values() if contract.is_table]


def table(contract, rows=None):
    return pa.Table.from_pylist(GOOD[contract.name] if rows is None else rows, schema=contract.schema())


def changed(contract, row, **values):
    """The good table with some values of one row replaced."""
    rows = [dict(good) for good in GOOD[contract.name]]
    rows[row] |= values
    return table(contract, rows)


def refusal(contract, broken, where="runs/x"):
    with pytest.raises(ContractError) as caught:
        contract.check(broken, where)
    assert caught.value.where == where
    return caught.value.what


@pytest.mark.parametrize("contract", TABLES, ids=lambda c: c.name)
class TestEveryContract:
    def test_fields_are_documented_and_measures_have_a_unit(self, contract):
        assert contract.doc
        for field in contract.fields:
            assert field.doc, field.name
            element = field.type.value_type if pa.types.is_list(field.type) else field.type
            measure = pa.types.is_floating(element) or field.name.endswith("_tokens")
            if measure and contract is not METRICS:  # there each row says its own unit
                assert field.unit, field.name

    def test_names_are_there_once_and_keys_and_groups_are_columns_that_are_never_absent(self, contract):
        required = [field.name for field in contract.fields if not field.optional and not field.null]
        assert len({field.name for field in contract.fields}) == len(contract.fields)
        assert set(contract.key) <= set(required)
        assert contract.group is None or contract.group in contract.key

    def test_a_good_table_passes_as_a_whole_in_slices_and_in_chunks(self, contract):
        whole = table(contract)
        contract.check(whole)
        for start in range(whole.num_rows + 1):
            contract.check(whole.slice(start))
            contract.check(pa.concat_tables([whole.slice(0, start), whole.slice(start)]))

    def test_an_empty_table_passes(self, contract):
        contract.check(contract.schema().empty_table())
        contract.check(pa.Table.from_batches([], schema=contract.schema()))

    def test_parquet_keeps_schema_docs_and_version(self, contract, tmp_path):
        pq.write_table(table(contract), tmp_path / "x.parquet")
        back = pq.read_table(tmp_path / "x.parquet")
        contract.check(back)
        assert back.equals(table(contract))
        assert back.schema.metadata[b"contract"].decode() == contract.name
        assert back.schema.metadata[b"contract_version"] == str(contract.version).encode()
        for field in contract.fields:
            written = back.schema.field(field.name)
            assert written.metadata[b"doc"].decode() == field.doc
            assert written.metadata[b"unit"].decode() == field.unit
            assert written.nullable == (field.null or field.optional)

    def test_conforming_restores_order_types_and_metadata_and_keeps_what_else_was_said(self, contract):
        whole = table(contract)
        shuffled = whole.select(whole.column_names[::-1]).replace_schema_metadata({"temperature": "1.0"})
        restored = contract.conform(shuffled)
        assert restored.schema.remove_metadata().equals(whole.schema.remove_metadata())
        assert restored.schema.metadata == {**whole.schema.metadata, b"temperature": b"1.0"}
        assert restored.equals(whole)

    def test_a_missing_column_is_named(self, contract):
        for field in contract.fields:
            without = table(contract).drop_columns([field.name])
            if field.optional:
                contract.check(without)
                assert field.name not in contract.conform(without).column_names
            else:
                assert f"missing column {field.name}" in refusal(contract, without)
                with pytest.raises(ContractError, match=f"missing column {field.name}"):
                    contract.conform(without)

    def test_an_unknown_column_is_named(self, contract):
        whole = table(contract)
        more = whole.append_column("surprise", pa.array([1] * whole.num_rows))
        assert "unknown column surprise" in refusal(contract, more)

    def test_a_wrong_type_is_named_even_without_rows(self, contract):
        for index, field in enumerate(contract.fields):
            other = pa.binary() if field.type != pa.binary() else pa.string()
            broken = table(contract)
            broken = broken.set_column(index, field.name, pa.array([None] * broken.num_rows, other))
            for rows in (broken, broken.slice(0, 0)):
                what = refusal(contract, rows)
                assert f"{contract.name}.{field.name}: type is {other}, not {field.type}" in what

    def test_a_null_is_named_with_its_key(self, contract):
        for field in contract.fields:
            broken = changed(contract, -1, **{field.name: None})
            if field.null:
                continue
            what = refusal(contract, broken)
            assert what.startswith(f"{contract.name}.{field.name}: null in 1 of {broken.num_rows} rows")
            if contract.key and field.name not in contract.key:
                assert str(tuple(broken.to_pylist()[-1][name] for name in contract.key)) in what
            assert refusal(contract, contract.conform(broken)) == what

    def test_a_null_inside_a_list_is_refused(self, contract):
        for field in contract.fields:
            if pa.types.is_list(field.type):
                value = GOOD[contract.name][-1][field.name]
                what = refusal(contract, changed(contract, -1, **{field.name: [None, *value[1:]]}))
                assert what.startswith(f"{contract.name}.{field.name}: null element in 1 of")

    def test_a_repeated_key_is_named(self, contract):
        if not contract.key:
            contract.check(pa.concat_tables([table(contract)] * 2))
            return
        twice = pa.concat_tables([table(contract), table(contract).slice(0, 1)])
        assert f"key ({', '.join(contract.key)}) is not unique in 2 of {twice.num_rows} rows" in refusal(
            contract, twice
        )

    def test_another_version_and_another_kind_are_refused(self, contract):
        for said in (
            {"contract": contract.name, "contract_version": "99"},
            {"contract": "else", "contract_version": "1"},
        ):
            other = table(contract).replace_schema_metadata(said)
            what = refusal(contract, other)
            assert f"expected {contract.name} version {contract.version}, found {said['contract']} version" in what
        contract.check(table(contract).replace_schema_metadata(None))


def test_a_contract_is_found_under_its_name():
    assert all(contract.name == name for name, contract in CONTRACTS.items())
    assert not POLICY.is_table


def test_at_most_five_keys_are_named_in_the_order_of_the_rows():
    rows = [{**row, "finish": "eos"} for row in GOOD["rollouts"]]
    what = refusal(ROLLOUTS, table(ROLLOUTS, rows))
    keys = [tuple(key.values()) for key in KEYS[:5]]
    assert what == f"rollouts.finish: not one of stop, length in 9 of 9 rows; first keys: {keys}"


@given(st.permutations(range(9)))
def test_groups_must_stand_together(order):
    runs = [KEYS[i]["prompt_id"] for i in order]
    switches = sum(a != b for a, b in pairwise(runs))
    shuffled = table(ROLLOUTS).take(list(order))
    if switches == 2:
        ROLLOUTS.check(shuffled)
    else:
        assert "prompt_id: the rows of a group do not stand together" in refusal(ROLLOUTS, shuffled)


def test_keys_over_all_parts():
    keys = table(ROLLOUTS).select(["prompt_id", "sample"])
    ROLLOUTS.check_keys(keys)
    with pytest.raises(ContractError, match="not unique"):
        ROLLOUTS.check_keys(pa.concat_tables([keys, keys.slice(8)]))
    with pytest.raises(ContractError, match="do not stand together"):
        ROLLOUTS.check_keys(pa.concat_tables([keys.slice(1), keys.slice(0, 1)]))


BAD_LOGPROBS = [0.1, 1e-6, float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", BAD_LOGPROBS)
@pytest.mark.parametrize(
    ("contract", "column"),
    [(ROLLOUTS, "sampler_logprobs"), (SCORES, "old_logprobs"), (SCORES, "ref_logprobs"),
     (ADVANTAGES, "old_logprobs"), (ADVANTAGES, "ref_logprobs")],
)  # fmt: skip
def test_an_impossible_log_probability_is_refused(contract, column, value):
    broken = changed(contract, 4, **{column: [-1.0, value]})
    for rows in (broken, broken.slice(2), pa.concat_tables([broken.slice(0, 2), broken.slice(2)])):
        what = refusal(contract, rows)
        assert what.startswith(f"{contract.name}.{column}: not a log-probability") and what.endswith("[('q', 0)]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("contract", "column"),
    [(ADVANTAGES, "advantages"), (ADVANTAGES, "returns"), (ADVANTAGES, "values"), (SCORES, "values"),
     (SCORES, "reward_scores"), (LABELS, "reward")],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused(contract, column, value):
    scalar = not isinstance(GOOD[contract.name][4][column], list)
    broken = changed(contract, 4, **{column: value if scalar else [0.0, value]})
    assert refusal(contract, broken) == f"{contract.name}.{column}: not finite in 1 of 9 rows; first keys: [('q', 0)]"


@pytest.mark.parametrize(
    ("contract", "column"),
    [(ROLLOUTS, "sampler_logprobs"), *((ADVANTAGES, name) for name in
     ("advantages", "returns", "old_logprobs", "ref_logprobs", "values"))],
)  # fmt: skip
@pytest.mark.parametrize("value", [[], [-1.0], [-1.0, -1.0, -1.0]])
def test_a_list_of_another_length_than_the_response_is_refused(contract, column, value):
    what = refusal(contract, changed(contract, 8, **{column: value}))
    assert (
        what == f"{contract.name}.{column}: length differs from response_tokens in 1 of 9 rows; first keys: [('r', 1)]"
    )


def test_a_response_has_tokens_and_so_has_a_prompt():
    empty = {"response_tokens": [], "sampler_logprobs": []}
    assert "rollouts.response_tokens: empty in 1 of 9" in refusal(ROLLOUTS, changed(ROLLOUTS, 3, **empty))
    assert "rollouts.prompt_tokens: empty in 1 of 9" in refusal(ROLLOUTS, changed(ROLLOUTS, 3, prompt_tokens=[]))


@pytest.mark.parametrize(("keep", "dropped"), [(True, "surplus group"), (False, None), (True, "")])
def test_a_kept_row_has_no_reason_and_a_dropped_row_has_one(keep, dropped):
    what = refusal(LABELS, changed(LABELS, 5, keep=keep, dropped=dropped))
    assert (
        what
        == "labels.dropped: a reason on a kept row, or none on a dropped one in 1 of 9 rows; first keys: [('q', 1)]"
    )


@pytest.mark.parametrize("turns", [[], [ASSISTANT], [USER, ASSISTANT], [{"role": "user", "content": None}]])
def test_a_prompt_ends_with_the_user(turns):
    assert "prompts.messages: does not end with a turn of the user" in refusal(
        PROMPTS, changed(PROMPTS, 1, messages=turns)
    )


@pytest.mark.parametrize("turns", [[], [USER], [ASSISTANT, USER]])
def test_a_demonstration_ends_with_the_assistant(turns):
    what = refusal(DEMONSTRATIONS, changed(DEMONSTRATIONS, 0, messages=turns))
    assert "demonstrations.messages: does not end with a turn of the assistant" in what


@pytest.mark.parametrize(("responses", "ranks"), [(["a"], [0]), (["a", "b"], [0]), ([], [])])
def test_a_ranking_has_two_responses_and_a_rank_for_each(responses, ranks):
    what = refusal(RANKINGS, changed(RANKINGS, 0, responses=responses, ranks=ranks))
    assert "rankings.r" in what


def test_ratings_are_finite_one_for_each_response_or_unknown():
    assert "rankings.ratings: length differs" in refusal(RANKINGS, changed(RANKINGS, 0, ratings=[1.0]))
    assert "rankings.ratings: not finite" in refusal(RANKINGS, changed(RANKINGS, 0, ratings=[1.0, 2.0, float("nan")]))
    RANKINGS.check(changed(RANKINGS, 0, ratings=None))
    RANKINGS.check(table(RANKINGS).drop_columns(["ratings"]))


@pytest.mark.parametrize("change", [{"responses": ["a"], "response_ids": ["p/0"]}, {"response_ids": ["p/0"]}])
def test_a_question_has_two_responses_and_a_name_for_each(change):
    assert "questions.response" in refusal(QUESTIONS, changed(QUESTIONS, 0, **change))


@pytest.mark.parametrize("change", [{"tokens": 0}, {"nll": -0.1}, {"nll": float("inf")}])
def test_a_perplexity_is_of_some_tokens_and_possible(change):
    assert f"perplexities.{next(iter(change))}" in refusal(PERPLEXITIES, changed(PERPLEXITIES, 0, **change))


def test_conforming_converts_what_fits_and_refuses_what_does_not():
    loose = table(ROLLOUTS).set_column(1, "sample", pa.array(range(9), pa.int64()))
    assert ROLLOUTS.conform(loose).schema.field("sample").type == pa.int32()
    for values in (pa.array([2**40] * 9), pa.array([0.5] * 9), pa.array(["x"] * 9)):
        with pytest.raises(ContractError) as caught:
            ROLLOUTS.conform(loose.set_column(1, "sample", values), "here")
        assert caught.value.where == "here"


def test_a_scalar_that_may_be_null_may_be_null():
    contract = Contract(
        "tiny", 1, "d", (Field("x", pa.float32(), "d", null=True), Field("y", pa.int32(), "d", optional=True))
    )
    contract.check(pa.table({"x": pa.array([None, 1.0], pa.float32())}))
    assert contract.schema([]).names == ["x"]
    assert contract.schema().names == contract.schema(["y"]).names == ["x", "y"]
