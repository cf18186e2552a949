"""`pytest -m bench -s` runs every benchmark one after the other; each fails where it misses a goal of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BY_HAND = {"gpu", "reward_model"}
"""They need a GPU; pairs of people, which do not lie in the repository."""


def benchmarks():
    scripts = (path for path in HERE.glob("*.py") if "def main()" in path.read_text(encoding="utf-8"))
    return sorted(path.stem for path in scripts if path.stem not in BY_HAND | {Path(__file__).stem})


@pytest.mark.bench
@pytest.mark.parametrize("name", benchmarks())
def test_its_goals_are_met(name):
    assert subprocess.run([sys.executable, HERE / f"{name}.py"], check=False).returncode == 0
