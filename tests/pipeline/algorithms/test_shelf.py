"""The signature is the schema."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from pipeline.algorithms.shelf import FROM_MODELS, OFFERED, Line, Shelf
from pipeline.errors import RecipeError


def outcome(rewards):
    """The reward itself."""
    return rewards


def gae(
    rewards,
    values,
    *,
    lam: float,
    gamma: Annotated[float, Field(ge=0)] = 1.0,
    form: Literal["long", "short"] = "long",
    horizon: int | None = None,
):
    """Rewards and
    values.
    """
    return rewards, values, lam, gamma, form, horizon


SHELF = Shelf("advantage", [outcome, gae])


def test_positional_parameters_are_columns_and_the_rest_settings():
    piece = SHELF.take(Line(kind="gae", lam=0.9))
    assert piece.name == "gae"
    assert piece.needs == ("rewards", "values")
    assert piece.settings == {"lam": 0.9, "gamma": 1.0, "form": "long", "horizon": None}
    assert piece.doc == "Rewards and\nvalues."


def test_a_piece_picks_its_columns_by_name():
    piece = SHELF.take(Line(kind="gae", lam=1))
    assert piece({"mask": 0, "values": 2, "rewards": 1}) == (1, 2, 1.0, 1.0, "long", None)


def test_a_missing_column_is_named():
    with pytest.raises(RecipeError) as error:
        SHELF.take(Line(kind="gae", lam=0.5))({"rewards": 1, "mask": 0})
    assert error.value.what == "advantage 'gae' needs the column values"
    assert error.value.where == "columns present: rewards, mask"


def test_an_unknown_piece_is_answered_with_the_shelf():
    with pytest.raises(RecipeError) as error:
        SHELF.take(Line(kind="gaee"), "recipe x")
    assert error.value.what == "no advantage is called 'gaee'; the shelf holds: outcome, gae"
    assert (error.value.where, error.value.do) == ("recipe x", "did you mean 'gae'?")
    with pytest.raises(RecipeError) as error:
        SHELF.take(Line(kind="zzz"))
    assert error.value.do == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"lamda": 0.9, "lam": 1.0}, "advantage 'gae': lamda: Extra inputs are not permitted [input_value=0.9]"),
        ({"lam": "x"}, "advantage 'gae': lam: Input should be a valid number [input_value='x']"),
        ({"lam": True}, "advantage 'gae': lam: Input should be a valid number [input_value=True]"),
        ({"lam": 1.0, "horizon": 2.5}, "advantage 'gae': horizon: Input should be a valid integer [input_value=2.5]"),
        ({}, "advantage 'gae': lam: Field required [input_value={}]"),
        (
            {"lam": 1.0, "gamma": -1.0},
            "advantage 'gae': gamma: Input should be greater than or equal to 0 [input_value=-1.0]",
        ),
        (
            {"lam": 1.0, "form": "wide"},
            "advantage 'gae': form: Input should be 'long' or 'short' [input_value='wide']",
        ),
    ],
)
def test_a_bad_setting_names_piece_setting_and_value(line, message):
    with pytest.raises(RecipeError) as error:
        SHELF.take(Line(kind="gae", **line), "recipe x")
    assert error.value.what == message
    assert error.value.where == "recipe x"
    assert error.value.do == "settings of 'gae': lam, gamma, form, horizon"


def test_a_piece_without_settings_says_so():
    with pytest.raises(RecipeError) as error:
        SHELF.take(Line(kind="outcome", n=2))
    assert error.value.do == "settings of 'outcome': none"


def test_a_shelf_is_its_own_table_of_contents():
    assert SHELF.names == ("outcome", "gae")
    assert [(card.name, card.needs, card.doc.split("\n")[0]) for card in SHELF] == [
        ("outcome", ("rewards",), "The reward itself."),
        ("gae", ("rewards", "values"), "Rewards and"),
    ]
    assert list(SHELF.take(Line(kind="gae", lam=1.0)).card.schema.model_fields) == ["lam", "gamma", "form", "horizon"]


def test_a_line_is_a_value():
    line = Line(kind="gae", lam=0.9, form="long")
    assert line == Line.model_validate_json(line.model_dump_json())
    assert line.settings == {"lam": 0.9, "form": "long"}
    assert len({line, Line(kind="gae", form="long", lam=0.9), Line(kind="gae", lam=0.8)}) == 2
    with pytest.raises(ValidationError):
        line.lam = 1.0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1.0], None])
def test_a_setting_is_a_finite_number_a_word_or_a_flag(value):
    with pytest.raises(ValidationError):
        Line(kind="gae", lam=value)


def test_columns_of_models_are_offered_somewhere():
    assert set(FROM_MODELS) <= {column for columns in OFFERED.values() for column in columns}
