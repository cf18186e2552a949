"""Preferences as they are in the wild to rows of the rankings contract, or the reason why they cannot be.

`SHAPES` lists what is understood, by our names of the columns, in the order in which it is tried; the first shape
whose columns all hold something is taken. Two texts that are compared may be answers to the prompt or whole dialogues.
A dialogue is a list of messages, or one text whose turns begin with "Human:" or "Assistant:" after a blank line. What
two dialogues share is the prompt, and exactly the last answer may differ. Higher ratings are better; ranks are made
dense from 0. A list may be written as JSON text, as CSV files have it.

Who won is told by a letter, by the name of the column or by a number. A number means the column that has it in its
name (`response_1`, `response_2`); where the names have none, 0 is the first and 1 the second. Data that count from 1
without saying so are not guessed at: `refuse_unclear_winners`.
"""

import json
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import permutations
from typing import Any

from pipeline.errors import InputError
from pipeline.sources.rows import Row, UnfitRowError, identity, messages_of, refuse_broken_text, short_hash, turn

Names = Mapping[str, str]
"""Our name of a column -> its name in the file."""

LARGEST = 3.4e38
"""Ratings are kept as float32."""


@dataclass(frozen=True)
class Comparison:
    """Responses to one conversation, how they rank, how they were rated, and out of which columns each was made."""

    messages: list[Row]
    responses: list[str]
    ranks: list[int]
    ratings: list[float] | None
    origin: dict[str, str] = field(default_factory=dict)
    """Column of the contract -> text with `{our name}` for the columns of the file."""


@dataclass(frozen=True)
class Shape:
    """A shape that preference data have: the columns it needs, and who reads it."""

    needs: tuple[str, ...]
    read: Callable[[Row, Names], Comparison]


def as_ranking(row: Mapping[str, Any], names: Names) -> tuple[Row, dict[str, str]]:
    """A row of the rankings contract, and which column was made of what. Raises `UnfitRowError`."""
    known = {name: _known(name, value) for name, value in row.items()}
    found = _shape_of(known).read(known, names)
    _refuse_useless(found)
    annotator, prompt_id = _annotator(known.get("annotator")), identity(found.messages)
    told = {name: f"{{{name}}}" for name in ("annotator", "source") if name in names and known.get(name) is not None}
    return {
        "ranking_id": short_hash(f"{prompt_id}{annotator}{found.responses}{found.ranks}"), "prompt_id": prompt_id,
        "messages": found.messages, "responses": found.responses, "ranks": found.ranks, "ratings": found.ratings,
        "annotator": annotator, "source": row["source"],
    }, {**found.origin, **told}  # fmt: skip


def without_empty_ratings(rows: list[Row]) -> list[Row]:
    """The rows, without the column `ratings` where none of them has any."""
    if any(row["ratings"] is not None for row in rows):
        return rows
    return [{name: value for name, value in row.items() if name != "ratings"} for row in rows]


def winner_number(row: Mapping[str, Any], names: Names) -> str:
    """The number by which a row tells who won, where only counting tells which response it means; else nothing."""
    if row.get("response_a") is None or row.get("chosen") is not None or _numbers_of(names) is not None:
        return ""
    return _number_in(str(row.get("winner")))


def refuse_unclear_winners(numbers: Container[str]) -> None:
    """Raise `InputError` when winners of a data set are called 2 but never 0.

    Then 1 means the first response, and every row with a 1 would be read the wrong way round.
    """
    if "2" in numbers and "0" not in numbers:
        raise InputError(
            "the winner is 2 in some rows and 0 in none: it seems to count from 1",
            do="write a and b, or count from 0; or number the columns: response_1 and response_2",
        )


def _known(name: str, value: Any) -> Any:
    """The value; None where a file says that there is none, the list where it is written as JSON."""
    if name in ("messages", "prompt", "chosen", "rejected", "response_a", "response_b"):
        turns = _unpacked(value)
        return turns if isinstance(turns, list) and all(isinstance(t, dict) and "role" in t for t in turns) else value
    if name == "source":
        return value
    blank = (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))
    return None if blank else _unpacked(value) if name in ("response", "ranks", "ratings") else value


def _unpacked(value: Any) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    refuse_broken_text(found)
    return found


def _shape_of(row: Row) -> Shape:
    """The first shape whose columns all hold something; the one that is nearest tells what is missing."""
    missing = {shape: [name for name in shape.needs if row.get(name) is None] for shape in SHAPES}
    for shape, names in missing.items():
        if not names:
            return shape
    begun = next((shape for shape in SHAPES if len(missing[shape]) < len(shape.needs)), None)
    if begun is None:
        raise UnfitRowError(f"no preference: neither {', nor '.join(' and '.join(shape.needs) for shape in SHAPES)}")
    there = [name for name in begun.needs if name not in missing[begun]]
    raise UnfitRowError(f"{' and '.join(there)} without {' and '.join(missing[begun])}")


def _refuse_useless(found: Comparison) -> None:
    if found.messages[-1]["role"] != "user":
        raise UnfitRowError("the conversation before the answers does not end with a turn of the user")
    if not all(text.strip() for text in found.responses):
        raise UnfitRowError("an empty answer")
    if len({text.strip() for text in found.responses}) == 1:
        raise UnfitRowError("the same answer on both sides")
    if len(found.responses) > 128:  # ranks are int8
        raise UnfitRowError("more than 128 responses")
    judged = zip(found.responses, found.ranks, found.ratings or [0.0] * len(found.ranks), strict=True)
    for (text, rank, rating), (other, worse, less) in permutations(judged, 2):
        if rank < worse and text.strip() == other.strip():
            raise UnfitRowError("the same answer at two ranks")
        if rank < worse and rating < less:
            raise UnfitRowError("ratings that contradict the order", f"{rating} for the better, {less} for the worse")


# Two texts ------------------------------------------------------------------------------------------------------------


def chosen_and_rejected(row: Row, names: Names) -> Comparison:
    """The better and the worse of two, with their scores or a margin where there are any."""
    messages, responses, origin = _two(row, "chosen", "rejected")
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if all(score is not None for score in scores):
        ratings = [_number(score) for score in scores]
        return Comparison(
            messages, responses, [0, 1], ratings, {**origin, "ratings": "{score_chosen}, {score_rejected}"}
        )
    margin = _margin(row)
    return _with_margin(Comparison(messages, responses, [0, 1], None, origin), margin)


def a_or_b(row: Row, names: Names) -> Comparison:
    """Two responses, and who won; a tie is two equal ranks."""
    messages, responses, origin = _two(row, "response_a", "response_b")
    winner, margin = _winner(row["winner"], names), _margin(row)
    if winner is None and margin:
        raise UnfitRowError("a tie with a margin", str(margin))
    ranks = {0: [0, 1], 1: [1, 0], None: [0, 0]}[winner]
    return _with_margin(Comparison(messages, responses, ranks, None, {**origin, "ranks": "{winner}"}), margin)


def _with_margin(found: Comparison, margin: float | None) -> Comparison:
    """The better is `margin` above the worse, which is at 0."""
    if margin is None:
        return found
    ratings = [margin if rank == 0 else 0.0 for rank in found.ranks]
    return Comparison(
        found.messages, found.responses, found.ranks, ratings, {**found.origin, "ratings": "{margin}, 0"}
    )  # fmt: skip


def _margin(row: Row) -> float | None:
    if row.get("margin") is None:
        return None
    if (margin := _number(row["margin"])) < 0:
        raise UnfitRowError("a negative margin: it is the better's rating minus the worse's", str(margin))
    return margin


def _two(row: Row, one: str, other: str) -> tuple[list[Row], list[str], dict[str, str]]:
    """The conversation, the two answers to it, and where they are from."""
    asked = "messages" if row.get("messages") is not None else "prompt"
    prompt = None if row.get(asked) is None else _prompt(row, asked)
    sides = [_turns(row[name], name, is_dialogue(row.get(asked))) for name in (one, other)]
    whole = [_first_role(side) != "assistant" for side in sides]
    if whole[0] != whole[1]:
        raise UnfitRowError(f"of {one} and {other} one is a whole dialogue, the other only an answer")
    origin = f"{{{asked}}}"
    if whole[0]:
        origin = f"the dialogue that {{{one}}} and {{{other}}} share" + (f", begun by {origin}" if prompt else "")
        sides = _begun_by(prompt or [], sides)
    elif prompt is None:
        raise UnfitRowError(f"no prompt, and {one} and {other} are no dialogues (messages, or Human: and Assistant:)")
    else:
        sides = [prompt + side for side in sides]
    messages, answers = shared(*sides)
    return messages, answers, {"messages": origin, "responses": f"{{{one}}}, {{{other}}}"}


def _prompt(row: Row, asked: str) -> list[Row]:
    if not is_dialogue(row[asked]):
        return messages_of({asked: row[asked]})
    turns = turns_of(row[asked])
    if turns[-1] == {"role": "assistant", "content": ""}:  # "... Assistant:", where the answer is to follow
        turns.pop()
    return [turn(part) for part in turns]


def _turns(value: Any, name: str, spoken: bool) -> list[Row]:
    """The turns of one side; `spoken`: it continues a prompt of "Human:" and "Assistant:"."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        if is_dialogue(value) or spoken:
            value = turns_of(value if is_dialogue(value) else f"Assistant: {value}")
        else:
            value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise UnfitRowError(f"{name} is neither text nor a list of messages", str(value)[:60])
    return [turn(part) for part in value]


def _first_role(turns: Sequence[Row]) -> str:
    return next((part["role"] for part in turns if part["role"] != "system"), "system")


def _begun_by(prompt: list[Row], sides: list[list[Row]]) -> list[list[Row]]:
    """Both dialogues, after the prompt's system turn where they have none; one of them must begin with the prompt."""
    system = [part for part in prompt[:1] if part["role"] == "system" and sides[0][0]["role"] != "system"]
    sides = [system + side for side in sides]
    wanted = _stripped(prompt)
    for side in map(_stripped, sides):
        start = 1 if side[0][0] == "system" and wanted[:1] != side[:1] else 0
        if side[start : start + len(wanted)] == wanted:
            return sides
    raise UnfitRowError("the dialogues do not begin with the prompt beside them")


def _stripped(turns: Sequence[Row]) -> list[tuple[str, str]]:
    return [(part["role"], part["content"].strip()) for part in turns]


def shared(one: Sequence[Row], other: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """What two dialogues share, and their last answers. Raises `UnfitRowError` unless exactly these differ."""
    for dialogue in (one, other):
        if dialogue[-1]["role"] != "assistant":
            raise UnfitRowError(f"a dialogue that ends with a turn of the {dialogue[-1]['role']}")
    if one == other:
        raise UnfitRowError("the same answer on both sides")
    common = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if common == 0:
        raise UnfitRowError("the two dialogues have no common beginning")
    if common != len(one) - 1 or len(one) != len(other):
        raise UnfitRowError(
            "the two dialogues part before the last answer",
            f"turn {common + 1} differs; they have {len(one)} and {len(other)}",
        )
    return list(one[:-1]), [one[-1]["content"], other[-1]["content"]]


_MARK = re.compile(r"(?:\A\s*|\n[ \t\r]*\n)(Human|Assistant):(?=\s|\Z)")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(value: Any) -> bool:
    """Whether it is a text that begins with a turn of the human, as `turns_of` reads it."""
    return isinstance(value, str) and (mark := _MARK.match(value)) is not None and mark[1] == "Human"


def turns_of(text: str) -> list[Row]:
    r"""The turns of a text like "\n\nHuman: Hi.\n\nAssistant: Hello!", the whitespace around each removed.

    A turn begins after a blank line only; a "Human:" at the beginning of any other line is text. Turns may be empty,
    and turns of the same role may follow each other. The text must begin with a mark.
    """
    pieces = _MARK.split(text)[1:]
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


_TIES = {"tie", "tied", "draw", "equal", "same", "both", "bothbad", "both bad", "both good", "neither"}
_SIDE = re.compile(r"(?:(?:model|response|answer|completion|output|conversation|assistant)[ _-]?)?([ab]|\d+)")


def _winner(value: Any, names: Names) -> int | None:
    """0 or 1, which of the two won; None for a tie."""
    text = " ".join(re.split(r"[\s_]+", str(value).strip().lower()))
    if text in _TIES or re.fullmatch(r"tie\s*\(.*\)", text):
        return None
    columns = [names.get(name, name).lower() for name in ("response_a", "response_b")]
    if isinstance(value, str) and value.strip().lower() in columns:
        return columns.index(value.strip().lower())
    numbers = _numbers_of(names) or ("0", "1")
    called = _number_in(str(value)) or (side[1] if (side := _SIDE.fullmatch(text)) else "")
    for which, known in enumerate(zip("ab", numbers, strict=True)):
        if called in known:
            return which
    raise UnfitRowError(f"a winner that is none of a, b, {', '.join(numbers)}, tie", f"{value!r:.60}")


def _number_in(text: str) -> str:
    """The digits of a whole number, which files may write as 1.0; of anything else nothing."""
    found = re.fullmatch(r"\s*(\d+)(?:\.0*)?\s*", text)
    return found[1] if found else ""


def _numbers_of(names: Names) -> tuple[str, str] | None:
    """The numbers with which the names of the two columns end."""
    one, other = (re.search(r"\d+$", names.get(name, "")) for name in ("response_a", "response_b"))
    return (one[0], other[0]) if one and other else None


# Many texts -----------------------------------------------------------------------------------------------------------


def ranked(row: Row, names: Names) -> Comparison:
    """Responses with their ranks, lower is better, and with ratings where there are any."""
    responses = _texts(row["response"])
    ranks = _dense([_whole(rank) for rank in _as_many(row["ranks"], responses, "ranks")])
    messages, origin = _asked(row)
    origin = {**origin, "responses": "{response}", "ranks": "{ranks}"}
    if row.get("ratings") is None:
        return Comparison(messages, responses, ranks, None, origin)
    ratings = [_number(rating) for rating in _as_many(row["ratings"], responses, "ratings")]
    return Comparison(messages, responses, ranks, ratings, {**origin, "ratings": "{ratings}"})


def rated(row: Row, names: Names) -> Comparison:
    """Responses with their ratings, higher is better."""
    responses = _texts(row["response"])
    ratings = [_number(rating) for rating in _as_many(row["ratings"], responses, "ratings")]
    messages, origin = _asked(row)
    return Comparison(
        messages, responses, _dense([-rating for rating in ratings]), ratings,
        {**origin, "responses": "{response}", "ranks": "{ratings}", "ratings": "{ratings}"},
    )  # fmt: skip


def described(row: Row, names: Names) -> Comparison:
    """Responses that are objects of a text with a rank, a rating or both: {"text": "Hi.", "rating": 4.5}."""
    things = row["response"]
    if not isinstance(things, list) or not all(isinstance(thing, dict) for thing in things):
        raise UnfitRowError("response without ranks or ratings")
    messages, origin = _asked(row)
    texts = _field(things, ("text", "response", "content"))
    ranks, ratings = _field(things, ("rank",)), _field(things, ("rating", "score", "overall_score"))
    if texts is None or (ranks is None and ratings is None):
        raise UnfitRowError("responses that do not all have a text (text, response, content) and a rank or rating")
    plain = {"response": texts[1], "ranks": ranks and ranks[1], "ratings": ratings and ratings[1]}
    found = (ranked if ranks else rated)({**row, **plain}, names)
    keys = {"responses": texts, "ranks": ranks or ratings, "ratings": ratings}
    told = {ours: f"{{response}}.{key[0]}" for ours, key in keys.items() if key is not None}
    return Comparison(messages, found.responses, found.ranks, found.ratings, {**origin, **told})


def _field(things: Sequence[Row], names: Sequence[str]) -> tuple[str, list[Any]] | None:
    """The first of the names that all things have, with its values."""
    for name in names:
        values = [thing.get(name) for thing in things]
        if values and all(value is not None for value in values):
            return name, values
    return None


def _asked(row: Row) -> tuple[list[Row], dict[str, str]]:
    asked = "messages" if row.get("messages") is not None else "prompt"
    if row.get(asked) is None:
        raise UnfitRowError("no messages and no prompt")
    return _prompt(row, asked), {"messages": f"{{{asked}}}"}


def _texts(responses: Any) -> list[str]:
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses) or len(responses) < 2:
        raise UnfitRowError("fewer than two responses of text")
    return responses


def _as_many(values: Any, responses: Sequence[str], name: str) -> list[Any]:
    if not isinstance(values, list) or len(values) != len(responses):
        raise UnfitRowError(f"not as many {name} as responses", str(values)[:60])
    return values


def _dense(values: Sequence[float]) -> list[int]:
    """Ranks from 0 without gaps, the lowest value first."""
    place = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return [place[value] for value in values]


def _whole(value: Any) -> float:
    try:
        number = _number(value)
    except UnfitRowError:
        number = 0.5
    if not number.is_integer():
        raise UnfitRowError("ranks that are not whole numbers", f"{value!r:.60}")
    return number


def _number(value: Any) -> float:
    if isinstance(value, int | float | Decimal | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if abs(number) <= LARGEST:
            return number
    raise UnfitRowError("a rating or margin that is not a number", f"{value!r:.60}")


def _annotator(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise UnfitRowError("an annotator that is neither a name nor a number", f"{value!r:.60}")
    return str(value)


SHAPES = (
    Shape(("chosen", "rejected"), chosen_and_rejected),
    Shape(("response_a", "response_b", "winner"), a_or_b),
    Shape(("response", "ranks"), ranked),
    Shape(("response", "ratings"), rated),
    Shape(("response",), described),
)
"""What preference data look like, in the order in which it is tried."""
