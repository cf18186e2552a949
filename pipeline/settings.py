"""Settings: frozen, nothing extra, every field documented; TOML in, `a.b=c` overrides on top."""

import copy
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ExperimentError


class Settings(BaseModel):
    """Base of every settings class: immutable, refuses unknown names, the string under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises `ExperimentError` with the line that does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExperimentError(f"no such file: {path}", do="check the path, or name one of `rlhf run --help`") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"not valid TOML: {error}", where=str(path)) from error


def override(tables: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return `tables` with each `a.b=c` applied; `c` is read as TOML, and as plain text where TOML does not allow it.

    Nothing after the `=` is None, which TOML cannot say. Raises `ExperimentError` when an assignment has no `=` or goes
    through something that is not a table.
    """
    result: dict[str, Any] = copy.deepcopy(dict(tables))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ExperimentError(f"cannot read --set {assignment!r}", do="write --set table.name=value")
        *tables_on_the_way, last = name.strip().split(".")
        place = result
        for key in tables_on_the_way:
            place[key] = {} if place.get(key) is None else place[key]
            place = place[key]
            if not isinstance(place, dict):
                raise ExperimentError(f"--set {assignment!r}: {key!r} is a value, not a table")
        place[last] = _value(text.strip())
    return result


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text  # several lines of text may look like more assignments


def plain_name(name: str) -> str:
    """`name`, if it names something inside a directory and cannot lead out of it. Raises `ValueError`."""
    if not re.fullmatch(r"\w[\w .+=@-]*", name):
        raise ValueError(
            f"{name!r} is no plain name: letters, digits, '_', and after the first '.', '-', '+', '=', ' '"
        )
    return name


def without_none(value: Any) -> Any:
    """`value` without the None fields of its tables, at any depth: TOML has no word for None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def explain(error: ValidationError, prefix: str = "") -> str:
    """One line per fault of a pydantic error: dotted place, what is wrong, the value found."""
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"])
        if not place:
            lines.append(prefix + fault["msg"].removeprefix("Value error, "))
            continue
        found = repr(fault.get("input"))
        found = found if len(found) <= 60 else found[:57] + "..."
        lines.append(f"{prefix}{place}: {fault['msg']} [input_value={found}]")
    return "\n".join(lines)
