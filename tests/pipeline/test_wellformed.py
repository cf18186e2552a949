import pyarrow as pa
import pytest

from pipeline.wellformed import malformed

END = 2


def part(*rows, ends="1,2"):
    """Rows of tokens, finish and log-probabilities (as many as tokens, unless told)."""
    tokens, finish, logprobs = zip(*((*row, [-1.0] * len(row[0]))[:3] for row in rows), strict=True)
    columns = {
        "response_tokens": pa.array(tokens, pa.list_(pa.int32())), "finish": list(finish),
        "sampler_logprobs": pa.array(logprobs, pa.list_(pa.float32())),
    }  # fmt: skip
    return pa.table(columns).replace_schema_metadata(None if ends is None else {"end_tokens": ends})


GOOD = ([5, END], "stop")


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        (GOOD, False),
        (([1], "stop"), False),
        (([5, 6], "length"), False),
        (([5, END], "stop", None), False),
        (([], "length"), True),
        (([], "stop"), True),
        (([5, 6], "stop"), True),
        (([5, END], "length"), True),
        (([END, 5, 6], "length"), True),
        (([1, END], "stop"), True),
        (([END, 5], "stop"), True),
        (([5, END], "stop", [-1.0]), True),
        (([5, END], "stop", []), True),
    ],
)
def test_what_is_malformed_wherever_it_stands(row, bad):
    assert malformed(part(row)).tolist() == [bad]
    assert malformed(part(GOOD, row, GOOD)).tolist() == [False, bad, False]
    assert malformed(pa.concat_tables([part(GOOD), part(row, GOOD)])).tolist() == [False, bad, False]
    assert malformed(part(GOOD, row, GOOD).slice(1, 1)).tolist() == [bad]


def test_where_nobody_says_which_tokens_end_a_response_ends_are_not_looked_at():
    rows = [([END, 5], "stop"), ([], "stop"), ([5], "length", [-1.0, -1.0])]
    assert malformed(part(*rows, ends=None)).tolist() == [False, True, True]


def test_no_rows():
    assert malformed(part(GOOD).slice(0, 0)).tolist() == []


def test_log_probabilities_need_not_be_there():
    assert malformed(part(GOOD, ([], "stop")).drop_columns("sampler_logprobs")).tolist() == [False, True]
