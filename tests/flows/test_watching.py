"""A run in the terminal: curves, numbers, who is at it, time left; from its directory alone."""

import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.sheets import out
from flows.watching import BARS, bars, view, watch
from pipeline.artifacts import Artifact
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.errors import ArtifactError


@pytest.fixture
def folder(walked, tmp_path):
    run = walked("vapo")
    shutil.copytree(run.root, tmp_path / "runs")
    for number in range(3):  # copies have new times: as if an iteration had taken 100 s
        os.utime(tmp_path / "runs/vapo" / f"{number:04d}/policy/manifest.json", (0, 1000 + 100 * number))
    return tmp_path / "runs/vapo"


def seen(folder, width=200):
    with out.capture() as shown:
        before, out.width = out.width, width
        try:
            out.print(view(folder))
        finally:
            out.width = before
    return shown.get()


def longer(folder, iterations):
    file = folder / EXPERIMENT_FILE
    file.write_text(file.read_text().replace("iterations = 3", f"iterations = {iterations}"))


def test_every_iteration_has_its_numbers(folder):
    shown = seen(folder)
    for number in range(3):
        rewards = [Artifact.open(path).stats["reward/mean"] for path in folder.glob(f"{number:04d}/labels-*")]
        assert f"{rewards[0]:.3g}" in shown and len(rewards) == 1
        assert f"{number:04d}" in shown
    assert "explained variance" in shown and "KL to reference" not in shown  # a critic, and no reference
    assert "the loop is done" in shown


def test_time_left_is_that_of_the_iterations_to_go_at_the_present_pace(folder):
    longer(folder, 10)
    assert "7 iterations to go, 100.0 s each: about 11:40 left" in seen(folder)


def test_what_is_being_made_is_told(folder):
    (folder / "0003" / ".part-rollouts-0-12345678" / "working").mkdir(parents=True)
    longer(folder, 10)
    assert "0003/rollouts-0: unfinished, just begun" in seen(folder)


def test_a_narrow_terminal_shows_fewer_iterations_and_whole_lines(folder):
    shown = seen(folder, width=70)
    assert "0002" in shown and "0000" not in shown
    assert all(len(line.rstrip()) <= 70 for line in shown.splitlines())


def test_a_run_that_has_not_begun_has_no_numbers_yet(folder):
    for path in folder.glob("[0-9]*"):
        shutil.rmtree(path)
    assert "3 iterations to go" in seen(folder)


def test_watching_a_finished_run_ends_by_itself(folder):
    words = [sys.executable, "-m", "flows.cli", "watch", str(folder), "--every", "0.1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the loop is done" in done.stdout


def test_what_is_no_run_is_refused(folder):
    with pytest.raises(ArtifactError, match="not a run"):
        watch(folder / "0000", 1.0, once=True)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_bars_fit_and_reach_from_the_least_to_the_greatest(values):
    drawn = bars(values, 20)
    assert len(drawn) <= 20
    assert set(drawn) <= set(BARS)
    if len(values) <= 20 and max(values) - min(values) > 1e-6:
        assert drawn[values.index(max(values))] == BARS[-1]
        assert drawn[values.index(min(values))] == BARS[0]
