import ast
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from pipeline.algorithms.losses import LOSSES
from pipeline.contracts import CONTRACTS
from pipeline.inspecting.names import EVERY, alias, look_up, names, tag

ROOT = Path(__file__).parents[3]
SOURCES = [*(ROOT / "stages").glob("*.py"), *(ROOT / "pipeline").rglob("*.py")]


@dataclass(frozen=True)
class Module:
    """The texts in the code of a module."""

    constants: frozenset[str]
    templates: frozenset[str]
    """With a star for each value."""

    @classmethod
    def of(cls, path):
        constants, templates = set(), set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants |= {node.value, node.value.replace(" ", "_")}
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "*" for part in node.values]
                templates.add("".join(map(str, parts)))
        return cls(frozenset(constants), frozenset(templates))

    def writes(self, name):
        """Whether a name is in it: as a whole, or as a template that is filled with texts of the same module."""
        if name in self.constants or name in self.templates:
            return True
        fillings = (re.fullmatch(re.escape(template).replace(r"\*", "(.+)"), name) for template in self.templates)
        return any(found and found.groups() and all(map(self._is_text, found.groups())) for found in fillings)

    def _is_text(self, part):
        of_templates = part != "*" and any(fnmatchcase(template, part) for template in self.templates)
        return part in self.constants or part in PIECES or of_templates


PIECES = {card.name for card in LOSSES}
MODULES = [Module.of(path) for path in SOURCES if "inspecting" not in path.parts]


def is_written(name):
    return any(module.writes(name) for module in MODULES)


@pytest.mark.parametrize("row", names(), ids=lambda row: f"{row.name} of {row.kinds[0]}")
def test_every_name_of_the_table_is_written_by_some_stage(row):
    assert is_written(row.name)


@pytest.mark.parametrize("name", ["reward/median", "loss/nothing", "verdicts/*", "value/kurtosis", "nothing/mean"])
def test_a_name_that_no_stage_writes_is_found_out(name):
    assert not is_written(name)


def added():
    """Names in the code that are handed to `metrics.add` as they are."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add"
            if call and len(node.args) > 1 and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, path


def test_every_name_that_a_stage_adds_as_it_stands_is_in_the_table():
    found = dict(added())
    assert len(found) > 20
    assert [name for name in found if not any(fnmatchcase(name, row.name) for row in names())] == []


def test_kinds_are_those_of_contracts_and_no_row_hides_another():
    for row in names():
        assert set(row.kinds) <= {*CONTRACTS, EVERY}
        assert row.unit == "" or row.unit.strip() == row.unit
        for kind in row.kinds:
            if kind != EVERY:
                assert look_up(row.name, kind) is row, f"{row.name} of {kind} stands in the table twice"


def test_a_name_of_theirs_means_one_number():
    for whose in ("trl", "verl"):
        theirs = Counter(getattr(row, whose) for row in names() if getattr(row, whose))
        assert [name for name, times in theirs.items() if times > 1] == []
        ours = {tag(row.name, kind) for row in names() for kind in row.kinds}
        assert not ours & set(theirs)


def test_a_name_of_theirs_is_of_a_row_of_one_kind():
    """Or of two that no iteration has: updates of one step measure what scores of the policy would have."""
    several = {row.kinds for row in names() if (row.trl or row.verl) and len(row.kinds) > 1}
    assert several == {("scores", "policy")}


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("reward/mean", "labels", "reward/mean"),
        ("accuracy/mean", "labels", "accuracy/mean"),
        ("loss/total", "policy", "policy/loss/total"),
        ("loss/total", "critic", "critic/loss/total"),
        ("kl/reference", "scores", "scores/kl/reference"),
        ("time/seconds", "prompts", "prompts/time/seconds"),
        ("verdict/wrong", "labels", "verdict/wrong"),
        ("rejected/too_few", "questions", "questions/rejected/too_few"),
        ("brand/new", "labels", "labels/brand/new"),
        ("length/mean", "candidates", "candidates/length/mean"),
        ("reward_scores/mean", "judgements", "judgements/reward_scores/mean"),
    ],
)
def test_a_tag_has_its_kind_where_several_kinds_have_such_a_number(name, kind, expected):
    assert tag(name, kind) == expected


def test_theirs_is_taken_by_kind():
    assert alias("kl/reference", "policy", "trl") == "kl"
    assert alias("kl/reference", "scores", "trl") is None
    assert alias("grad/norm", "critic", "verl") == "critic/grad_norm"
    assert alias("grad/norm", "critic", "house") is None
    assert alias("brand/new", "labels", "trl") is None
    assert alias("reward_scores/mean", "judgements", "trl") == "objective/scores"
    assert alias("length/mean", "candidates", "trl") is None


def test_the_table_is_one_line_for_each_meaning():
    table = tomllib.loads((ROOT / "pipeline/inspecting/names.toml").read_text("utf-8"))
    for row in table["metric"]:
        assert row["meaning"] == row["meaning"].strip() and "\n" not in row["meaning"]
        assert len(row["meaning"]) <= 110
