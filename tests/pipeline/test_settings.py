"""Settings: what can be written after --set, and what faults say."""

import datetime
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from pipeline.errors import ExperimentError
from pipeline.settings import Settings, explain, override, read_toml


class Inner(Settings):
    """Inside."""

    width: int = Field(ge=1)
    """How wide."""


class Outer(Settings):
    """Outside."""

    inner: Inner
    """The inside."""
    many: tuple[Inner, ...] = ()
    name: str = ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-0.5", -0.5), ("1e-6", 1e-6), ("true", True), ('"3"', "3"), ("[1, 2]", [1, 2]),
        ('{kind = "kl", coef = 0.1}', {"kind": "kl", "coef": 0.1}), ("grpo", "grpo"), ("runs/a b", "runs/a b"),
        ("True", "True"), ("[1", "[1"), ("a=b", "a=b"), ("", None), ('""', ""),
        ("2024-01-02", datetime.date(2024, 1, 2)),
        ("1\nb = 2", "1\nb = 2"), ("nan?", "nan?"), ("  7  ", 7),
    ],
)  # fmt: skip
def test_a_value_is_toml_where_it_can_be_and_text_where_not(text, value):
    assert override({}, [f"a={text}"]) == {"a": value}


def test_a_dotted_name_goes_into_tables_and_makes_them():
    tables = {"a": {"b": 1, "c": 2}, "d": None}
    assert override(tables, ["a.b=5", "x.y.z=1", "d.e=2"]) == {
        "a": {"b": 5, "c": 2}, "x": {"y": {"z": 1}}, "d": {"e": 2},
    }  # fmt: skip
    assert tables == {"a": {"b": 1, "c": 2}, "d": None}


def test_the_last_assignment_stands():
    assert override({}, ["a={b = 1, c = 2}", "a.b=3", "a.d=4", "a.c="]) == {"a": {"b": 3, "c": None, "d": 4}}


@given(st.dictionaries(st.text("abc", min_size=1), st.integers() | st.lists(st.text())))
def test_no_assignment_changes_nothing_and_shares_nothing(tables):
    copy = override(tables, [])
    assert copy == tables
    assert all(copy[name] is not value for name, value in tables.items() if isinstance(value, list))


@pytest.mark.parametrize("assignment", ["a.b.c=1", "list.x=1", "a.b.c.d=1"])
def test_a_name_cannot_go_through_a_value(assignment):
    with pytest.raises(ExperimentError, match=r"is a value, not a table"):
        override({"a": {"b": 1}, "list": [1]}, [assignment])


@pytest.mark.parametrize("assignment", ["a", "=1", "  = 1", ""])
def test_an_assignment_without_name_or_equals_sign_is_refused(assignment):
    with pytest.raises(ExperimentError, match="cannot read --set"):
        override({}, [assignment])


def test_a_date_in_a_file_is_left_to_whoever_reads_it():
    tables = tomllib.loads("when = 2024-01-02")
    assert override(tables, []) == tables


def test_reading_toml_names_file_and_line(tmp_path):
    path = tmp_path / "x.toml"
    with pytest.raises(ExperimentError, match=r"no such file: .*x\.toml"):
        read_toml(path)
    path.write_text('a = 1\nb = "ü"\n', encoding="utf-8")
    assert read_toml(path) == {"a": 1, "b": "ü"}
    path.write_text("a = 1\nb = \n")
    with pytest.raises(ExperimentError, match="line 2") as caught:
        read_toml(path)
    assert caught.value.where == str(path)
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ExperimentError, match="not valid TOML"):
        read_toml(path)


def test_an_explanation_has_a_line_per_fault_with_place_and_value():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"width": 0}, "many": [{"width": 1}, {"width": "x" * 90}], "nmae": 1})
    lines = explain(caught.value, "stage: ").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("stage: inner.width: ") and lines[0].endswith("[input_value=0]")
    assert lines[1].startswith("stage: many.1.width: ") and lines[1].endswith("xxx...]")
    assert lines[2].startswith("stage: nmae: ")


def test_settings_are_frozen_and_documented_by_the_string_under_a_field():
    inner = Inner(width=1)
    with pytest.raises(ValidationError):
        inner.width = 2
    assert Inner.model_fields["width"].description == "How wide."
