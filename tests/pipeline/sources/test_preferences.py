"""Preferences in every shape they come in, and dialogues that are written as one text."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import RANKINGS
from pipeline.errors import InputError
from pipeline.sources.preferences import (
    SHAPES,
    as_ranking,
    is_dialogue,
    refuse_unclear_winners,
    shared,
    turns_of,
    winner_number,
)
from pipeline.sources.rows import UnfitRowError

COLUMNS = (
    "messages", "prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin", "response_a", "response_b",
    "winner", "response", "ranks", "ratings", "annotator",
)  # fmt: skip


def say(*contents, first="user"):
    """Turns that alternate between user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


SYSTEM = {"role": "system", "content": "Be brief."}
WHOLE = {"chosen": say("1+1?", "Hm.", "Well?", "2"), "rejected": say("1+1?", "Hm.", "Well?", "3")}
LONG = say("1+1?", "Hm.", "Well?")
TWO = {"prompt": "?", "response_a": "x", "response_b": "y"}
PAIR = {"prompt": "?", "chosen": "x", "rejected": "y"}
MANY = {"prompt": "?", "response": ["x", "y", "z"]}


def made(names=None, **row):
    return as_ranking({**row, "source": "s"}, {**{name: name for name in row}, **(names or {})})[0]


def reason(names=None, **row):
    with pytest.raises(UnfitRowError) as error:
        made(names, **row)
    return str(error.value)


def short(row):
    return row["responses"], row["ranks"], row["ratings"]


def hh(*contents, first="Human"):
    roles = ("Human", "Assistant") if first == "Human" else ("Assistant", "Human")
    return "".join(f"\n\n{roles[n % 2]}: {content}" for n, content in enumerate(contents))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (PAIR | {"chosen": "2", "rejected": "3"}, say("?")),
        ({"prompt": LONG, "chosen": "2", "rejected": "3"}, LONG),
        ({"messages": LONG, "chosen": "2", "rejected": "3"}, LONG),
        ({"prompt": [SYSTEM, *LONG], "chosen": "2", "rejected": "3"}, [SYSTEM, *LONG]),
        ({"prompt": LONG, "chosen": say("2", first="assistant"), "rejected": say("3", first="assistant")}, LONG),
        ({"prompt": LONG, "chosen": say("2", first="assistant")[0], "rejected": "3"}, LONG),
        ({"prompt": "1+1?", "chosen": say("Hm.", "Well?", "2", first="assistant"),
          "rejected": say("Hm.", "Well?", "3", first="assistant")}, LONG),
        (WHOLE, LONG),
        ({"prompt": LONG, **WHOLE}, LONG),
        ({"prompt": "1+1?", **WHOLE}, LONG),
        ({"prompt": " 1+1?\n", **WHOLE}, LONG),
        ({"messages": WHOLE["chosen"], "prompt": "else", **WHOLE}, LONG),
        ({"prompt": [SYSTEM, *LONG], **WHOLE}, [SYSTEM, *LONG]),
        ({side: [SYSTEM, *turns] for side, turns in WHOLE.items()}, [SYSTEM, *LONG]),
        ({"prompt": LONG, **{side: [SYSTEM, *turns] for side, turns in WHOLE.items()}}, [SYSTEM, *LONG]),
        ({"prompt": [SYSTEM, *LONG], **{side: [SYSTEM, *turns] for side, turns in WHOLE.items()}}, [SYSTEM, *LONG]),
        ({side: json.dumps(turns) for side, turns in WHOLE.items()}, LONG),
        ({"chosen": hh("1+1?", "Hm.", "Well?", "2"), "rejected": hh("1+1?", "Hm.", "Well?", "3")}, LONG),
        ({"chosen": hh("1+1?", "Hm.", "Well?", "2"), "rejected": WHOLE["rejected"]}, LONG),
        ({"prompt": hh("1+1?", "Hm.", "Well?"), "chosen": " 2", "rejected": "3\n"}, LONG),
        ({"prompt": hh("1+1?", "Hm.", "Well?", ""), "chosen": " 2", "rejected": " 3"}, LONG),
        ({"prompt": hh("1+1?"), "chosen": hh("1+1?", "2"), "rejected": hh("1+1?", "3")}, say("1+1?")),
    ],
)  # fmt: skip
def test_where_the_prompt_of_a_pair_is(row, messages):
    found = made(**row)
    assert (found["messages"], found["responses"], found["ranks"]) == (messages, ["2", "3"], [0, 1])
    assert found["ratings"] is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "x", "rejected": "y"}, "no prompt, and chosen and rejected are no dialogues"),
        ({"chosen": say("x", first="assistant"), "rejected": say("y", first="assistant")}, "no prompt"),
        ({"chosen": WHOLE["chosen"], "rejected": "3", "prompt": LONG}, "one is a whole dialogue"),
        ({"chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]}, "the same answer on both sides"),
        ({"chosen": say("a", "b", "c", "d"), "rejected": say("a", "B", "c", "D")},
         "part before the last answer: turn 2"),
        ({"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b")}, "part before the last answer"),
        ({"chosen": say("a", "b"), "rejected": say("A", "B")}, "no common beginning"),
        ({"chosen": say("a", "b", "c"), "rejected": say("a", "b")}, "ends with a turn of the user"),
        ({"chosen": hh("a", "b"), "rejected": hh("a", "")}, "an empty turn of the assistant"),
        ({"chosen": hh("a", "b", "c"), "rejected": hh("a", "b")}, "ends with a turn of the user"),
        ({"chosen": "Hi" + hh("a", "b"), "rejected": "Hi" + hh("a", "c")}, "no prompt"),
        ({"chosen": hh("a", "b") + hh("c", first="Assistant"), "rejected": hh("a", "b") + hh("d", first="Assistant")},
         "does not end with a turn of the user"),
        ({"prompt": "else", **WHOLE}, "do not begin with the prompt"),
        ({"prompt": LONG[1:], **WHOLE}, "do not begin with the prompt"),
        (PAIR | {"rejected": " "}, "an empty turn of the assistant"),
        (PAIR | {"rejected": "x "}, "the same answer on both sides"),
        (PAIR | {"rejected": 7}, "rejected is neither text nor a list of messages: 7"),
        (PAIR | {"rejected": []}, "neither text nor a list of messages"),
        (PAIR | {"rejected": None}, "chosen without rejected"),
        (PAIR | {"prompt": say("a", "b")}, "does not end with a turn of the user"),
        ({"prompt": "?"}, "no preference: neither chosen and rejected, nor response_a and response_b and winner, nor"),
        (TWO, "response_a and response_b without winner"),
        (TWO | {"response_b": None, "winner": 0}, "response_a and winner without response_b"),
    ],
)  # fmt: skip
def test_why_a_pair_is_none(row, why):
    assert why in reason(**row)


def test_turns_of_one_role_that_follow_each_other_stay():
    text = hh("a", "b") + hh("c", "d", first="Assistant")
    found = made(chosen=text + hh("e", first="Assistant"), rejected=text + hh("f", first="Assistant"))
    assert [turn["role"] for turn in found["messages"]] == ["user", "assistant", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("\n\nHuman: a\n\nAssistant: b", ["a", "b"]),
        ("Human: a\n\nAssistant: b\n", ["a", "b"]),
        ("\r\n\r\nHuman: a\r\n\r\nAssistant:b\r\n\r\nAssistant:\r\nc", ["a\r\n\r\nAssistant:b", "c"]),
        ("\n\nHuman: a\nHuman: no\nAssistant: no\n\n Human: no\n\nAssistant: b",
         ["a\nHuman: no\nAssistant: no\n\n Human: no", "b"]),
        ("\n\nHuman: a\n\n\n\nb\n\n\nAssistant:", ["a\n\n\n\nb", ""]),
        ("\n\nHuman: a Human: b\n\nHumans: c", ["a Human: b\n\nHumans: c"]),
    ],
)  # fmt: skip
def test_where_a_turn_begins(text, contents):
    assert is_dialogue(text)
    assert [turn["content"] for turn in turns_of(text)] == contents


@pytest.mark.parametrize("text", ["", "a", "Assistant: a", "Hi!\n\nHuman: a", "human: a", "Human:a", None, 7])
def test_what_is_no_dialogue(text):
    assert not is_dialogue(text)


PIECES = st.sampled_from(["Human:", "Assistant:", " ", "\n", "\n\n", "\r\n", "a", "Human", ":", "\t"])


@given(st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join))
def test_the_turns_of_a_dialogue_joined_are_the_dialogue_up_to_whitespace(rest):
    text = f"\n\nHuman: {rest}"
    turns = turns_of(text)
    names = {"user": "Human", "assistant": "Assistant"}
    joined = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
    assert "".join(joined.split()) == "".join(text.split())
    assert all(turn["content"] == turn["content"].strip() for turn in turns)


@given(st.lists(st.tuples(st.booleans(), st.text().filter(lambda t: "Human:" not in t and "Assistant:" not in t))))
def test_a_dialogue_that_is_written_out_is_read_again(turns):
    turns = [("Human", "a"), *(("Human" if human else "Assistant", said.strip()) for human, said in turns)]
    text = "".join(f"\n\n{who}: {said}" for who, said in turns)
    roles = {"user": "Human", "assistant": "Assistant"}
    assert [(roles[turn["role"]], turn["content"]) for turn in turns_of(text)] == turns


TURN = st.builds(
    lambda role, n: {"role": role, "content": str(n)}, st.sampled_from(["user", "assistant"]), st.integers(0, 1)
)


@given(st.lists(TURN, min_size=1, max_size=4), st.lists(TURN, min_size=1, max_size=4))
def test_two_dialogues_share_all_but_the_last_answer_or_there_is_a_reason(one, other):
    try:
        messages, (a, b) = shared(one, other)
    except UnfitRowError:
        last = [one[-1]["role"], other[-1]["role"]] == ["assistant"] * 2
        assert not (last and len(one) > 1 and one[:-1] == other[:-1] and one != other)
    else:
        assert [[*messages, {"role": "assistant", "content": text}] for text in (a, b)] == [one, other]
        assert a != b and messages


@pytest.mark.parametrize(
    ("winner", "ranks"),
    [(0, [0, 1]), (1, [1, 0]), ("0", [0, 1]), (1.0, [1, 0]), ("1.0", [1, 0]), ("a", [0, 1]), (" B ", [1, 0]),
     ("model_a", [0, 1]), ("model_b", [1, 0]), ("Model A", [0, 1]), ("response_b", [1, 0]), ("answer_1", [1, 0]),
     ("tie", [0, 0]), ("Tie (bothbad)", [0, 0]), ("both_bad", [0, 0]), ("equal", [0, 0])],
)  # fmt: skip
def test_who_won(winner, ranks):
    assert short(made(**TWO, winner=winner)) == (["x", "y"], ranks, None)


@pytest.mark.parametrize("winner", [2, -1, 0.5, True, "c", "x", "ab", [0], {"a": 1}, "10"])
def test_a_winner_that_is_not_clear_is_not_guessed(winner):
    assert "a winner that is none of a, b, 0, 1, tie" in reason(**TWO, winner=winner)


def test_a_number_means_the_column_that_has_it_in_its_name():
    names = {"response_a": "response_1", "response_b": "response_2"}
    assert made(names, **TWO, winner=1)["ranks"] == [0, 1]
    assert made(names, **TWO, winner="response_2")["ranks"] == [1, 0]
    assert "none of a, b, 1, 2, tie" in reason(names, **TWO, winner=0)
    assert winner_number({**TWO, "winner": 2}, names) == ""
    assert winner_number({**PAIR, "winner": 2}, {}) == ""


def test_a_column_s_own_name_may_tell_who_won():
    names = {"response_a": "ours", "response_b": "theirs"}
    assert made(names, **TWO, winner="Theirs")["ranks"] == [1, 0]


@pytest.mark.parametrize(("winners", "clear"), [([0, 1], True), ([1, 1], True), ([0, 1, 2], True), ([1, "2"], False)])
def test_winners_that_count_from_one_are_refused(winners, clear):
    numbers = {winner_number({**TWO, "winner": winner}, {}) for winner in winners}
    if clear:
        refuse_unclear_winners(numbers)
    else:
        with pytest.raises(InputError, match="count from 1"):
            refuse_unclear_winners(numbers)


def test_two_conversations_and_who_won():
    found = made(response_a=WHOLE["chosen"], response_b=WHOLE["rejected"], winner="model_b")
    assert (found["messages"], found["responses"], found["ranks"]) == (LONG, ["2", "3"], [1, 0])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR | {"margin": 1.5}, (["x", "y"], [0, 1], [1.5, 0])),
        (PAIR | {"margin": "2"}, (["x", "y"], [0, 1], [2, 0])),
        (PAIR | {"margin": ""}, (["x", "y"], [0, 1], None)),
        (PAIR | {"margin": float("nan")}, (["x", "y"], [0, 1], None)),
        (PAIR | {"score_chosen": 3, "score_rejected": "-1e0"}, (["x", "y"], [0, 1], [3, -1])),
        (PAIR | {"score_chosen": 3, "score_rejected": 3}, (["x", "y"], [0, 1], [3, 3])),
        (PAIR | {"score_chosen": 3}, (["x", "y"], [0, 1], None)),
        (PAIR | {"score_chosen": 3, "score_rejected": 1, "margin": 9}, (["x", "y"], [0, 1], [3, 1])),
        (TWO | {"winner": 1, "margin": 2}, (["x", "y"], [1, 0], [0, 2])),
        (TWO | {"winner": "tie", "margin": 0}, (["x", "y"], [0, 0], [0, 0])),
        (MANY | {"ranks": [7, -2, 7]}, (["x", "y", "z"], [1, 0, 1], None)),
        (MANY | {"ranks": ["3", 1.0, "1"]}, (["x", "y", "z"], [1, 0, 0], None)),
        (MANY | {"ranks": [1, 2, 3], "ratings": [3, 2, 1]}, (["x", "y", "z"], [0, 1, 2], [3, 2, 1])),
        (MANY | {"ratings": [0.5, 2, 0.5]}, (["x", "y", "z"], [1, 0, 1], [0.5, 2, 0.5])),
        ({"prompt": "?", "response": '["x", "y"]', "ranks": "[2, 1]"}, (["x", "y"], [1, 0], None)),
        ({"prompt": "?", "response": [{"text": "x", "rank": 1}, {"text": "y", "rank": 2}]}, (["x", "y"], [0, 1], None)),
        ({"prompt": "?",
          "response": [{"content": "x", "rank": 1, "score": 2}, {"content": "y", "rank": 2, "score": 1}]},
         (["x", "y"], [0, 1], [2, 1])),
        ({"prompt": "?", "response": ["x", "x", "y"], "ranks": [0, 0, 1]}, (["x", "x", "y"], [0, 0, 1], None)),
    ],
)  # fmt: skip
def test_ranks_and_ratings(row, expected):
    assert short(made(**row)) == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (PAIR | {"margin": -0.5}, "a negative margin"),
        (PAIR | {"margin": True}, "not a number: True"),
        (PAIR | {"margin": "1e39"}, "not a number"),
        (PAIR | {"score_chosen": 1, "score_rejected": 2}, "contradict the order: 1.0 for the better, 2.0"),
        (TWO | {"winner": "tie", "margin": 1}, "a tie with a margin"),
        (MANY | {"ranks": [0, 1]}, "not as many ranks as responses"),
        (MANY | {"ranks": [0, 1, None]}, "whole numbers: None"),
        (MANY | {"ranks": [0, 1, True]}, "whole numbers: True"),
        (MANY | {"ranks": [0, 1, 1.5]}, "whole numbers: 1.5"),
        (MANY | {"ranks": [0, 1, 2], "ratings": [0, 1, 2]}, "contradict the order"),
        (MANY | {"ratings": [0, None, 2]}, "not a number: None"),
        (MANY | {"ratings": 3}, "not as many ratings as responses: 3"),
        (MANY, "response without ranks or ratings"),
        (MANY | {"response": "x"}, "response without ranks or ratings"),
        ({"prompt": "?", "response": ["x", "x", "y"], "ranks": [0, 1, 1]}, "the same answer at two ranks"),
        ({"prompt": "?", "response": ["x", " "], "ranks": [0, 1]}, "an empty answer"),
        ({"prompt": "?", "response": [str(n) for n in range(129)], "ranks": [*range(129)]}, "more than 128"),
        ({"prompt": "?", "response": ["x", 1], "ranks": [0, 1]}, "fewer than two responses of text"),
        ({"response": ["x", "y"], "ranks": [0, 1]}, "no messages and no prompt"),
        ({"prompt": "?", "response": [{"text": "x", "rank": 1}, {"text": "y"}]}, "do not all have"),
        ({"prompt": "?", "response": []}, "do not all have"),
        (PAIR | {"annotator": ["ann"]}, "neither a name nor a number"),
    ],
)  # fmt: skip
def test_why_ranks_and_ratings_do_not_fit(row, why):
    assert why in reason(**row)


def test_text_that_is_a_json_list_stays_text():
    assert made(prompt="[1]", chosen='["a"]', rejected="[{}]")["responses"] == ['["a"]', "[{}]"]


def test_half_a_surrogate_pair_inside_a_list_that_is_text_is_refused():
    assert "surrogate" in reason(prompt="?", response='["\\ud800", "y"]', ranks=[0, 1])


def test_what_each_column_was_made_of():
    names = {"chosen": "good", "rejected": "bad", "prompt": "ask", "margin": "m", "annotator": "worker", "source": "s"}
    _, origin = as_ranking({**PAIR, "margin": 1, "annotator": "w", "source": "s"}, names)
    assert {ours: text.format_map(names) for ours, text in origin.items()} == {
        "messages": "ask", "responses": "good, bad", "ratings": "m, 0", "annotator": "worker", "source": "s",
    }  # fmt: skip


def test_the_shapes_are_tried_in_their_order():
    assert [shape.needs[0] for shape in SHAPES] == ["chosen", "response_a", "response", "response", "response"]
    assert made(**PAIR, response=["p", "q"], ranks=[0, 1])["responses"] == ["x", "y"]
    assert made(prompt="?", chosen="x", response=["p", "q"], ranks=[0, 1])["responses"] == ["p", "q"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a", "tie", "[1]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "rank", "score", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
SOUND = [
    *(PAIR, TWO | {"winner": "a"}, MANY | {"ranks": [0, 1, 2]}, MANY | {"ratings": [0, 1, 2]}, WHOLE),
    {"chosen": hh("a", "b"), "rejected": hh("a", "c")},
    {"prompt": "?", "response": [{"text": "x", "score": 1}, {"text": "y", "score": 2}]},
]


@given(st.sampled_from(SOUND), st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=4))
def test_any_value_in_any_column_gives_a_row_of_the_contract_or_a_reason(sound, changes):
    try:
        row = made(**{**sound, **changes})
    except UnfitRowError as error:
        assert error.why
    else:
        RANKINGS.check(pa.Table.from_pylist([row], schema=RANKINGS.schema()))
