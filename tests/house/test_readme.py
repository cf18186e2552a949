"""The README says what the code does: its tables, its tree and its commands are held to the code."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from flows import claims_page, tables
from flows.cli import app
from pipeline import storage

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)
    assert found, name
    return found[1]


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("stages", lambda: tables.stages_sheet().markdown()),
        ("recipes", lambda: tables.recipes_sheet().markdown()),
        ("measured", lambda: claims_page.side_by_side().markdown()),
        ("contracts", tables.contracts_markdown),
        ("aliases", lambda: tables.aliases_sheet().markdown()),
    ],
)
def test_tables_equal_what_the_code_prints(name, printed):
    assert between(name) == printed()


def test_the_tree_names_what_is_there():
    tree = re.search(r"## The house in five minutes\n\n```\n(.*?)```", README, re.DOTALL)[1]
    folder, named = ROOT, []
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else ROOT / name
        named.append(ROOT / name if folder == ROOT / name else folder / name)
    assert [str(path) for path in named if not path.exists()] == []
    rooms = {path.name for path in (ROOT / "pipeline").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {path.name for path in named}


def test_the_files_to_read_first_exist():
    files = re.findall(r"`([\w/]+\.(?:py|toml))`", README)
    assert len(files) >= 6
    assert [name for name in files if not list(ROOT.glob(f"**/{name}"))] == []


def commands() -> list[list[str]]:
    inline = re.findall(r"`(rlhf [^`]+)`", README)
    blocks = re.findall(r"^(rlhf .*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in [*inline, *blocks]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words, monkeypatch):
    monkeypatch.setattr(storage, "bring", lambda _: None)  # there is no such bucket
    command = get_command(app)
    name, rest = words[1], words[2:]
    assert name in command.commands
    if name == "stage":
        parser = tables.load_stage(rest[0]).parser()
        if "--help" not in rest and len(rest) > 1:
            parser.parse_args(rest[1:])
        return
    command.commands[name].make_context(name, rest, resilient_parsing=False)


def test_ci_runs_the_tests_command():
    tests = next(line for line in README.splitlines() if line.startswith("python3 .ci/install.py --dev"))
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_root_holds_what_was_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.split("/")[0] for line in listed.splitlines()}
    assert {top for top in tops if not top.startswith(".")} <= {
        "pyproject.toml", "pipeline", "stages", "flows", "tests", "README.md", "LICENSE",
    }  # fmt: skip
