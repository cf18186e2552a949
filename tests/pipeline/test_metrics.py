"""Metrics keep their contract; the console keeps quiet in a pipe."""

import os
import pty
import sys

import pyarrow.parquet as pq
import pytest

from pipeline.contracts import METRICS
from pipeline.metrics import Console, Metrics


@pytest.mark.parametrize("iteration", [None, 3])
def test_rows_keep_the_contract_with_place_step_and_unit(iteration, tmp_path):
    metrics = Metrics("run", iteration, "labels-0")
    metrics.add("reward/mean", 1, "reward")
    metrics.add("loss/total", 0.5, step=7)
    metrics.write(tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "m.parquet")
    METRICS.check(table)
    place = {"run": "run", "iteration": iteration, "stage": "labels-0"}
    assert table.to_pylist() == [
        {**place, "step": 0, "name": "reward/mean", "value": 1.0, "unit": "reward"},
        {**place, "step": 7, "name": "loss/total", "value": 0.5, "unit": ""},
    ]


def test_no_rows_are_a_table_too():
    METRICS.check(Metrics("run", 0, "s").table())


def test_the_last_value_of_a_name_is_the_latest():
    metrics = Metrics("run", 0, "s")
    for step, value in enumerate([3.0, 2.0]):
        metrics.add("loss/total", value, step=step)
    metrics.add("other", 9.0)
    assert metrics.last() == {"loss/total": 2.0, "other": 9.0}


def test_progress_in_a_pipe_is_rare_and_lines_are_whole(capsys):
    console = Console()
    for step in range(100):
        console.progress(f"step {step}")
    console.line("done")
    assert capsys.readouterr().err == "  step 0\ndone\n"


def test_on_a_terminal_a_line_replaces_the_fleeting_one(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        console = Console()
        console.progress("step 1")
        console.line("done")
        console.line("more")
        shown = b""
        while not shown.endswith(b"more\r\n"):  # a terminal hands over what it has, not what was written together
            shown += os.read(ours, 1000)
    os.close(ours)
    assert shown.decode().replace("\r\n", "\n") == "  step 1\r\033[Kdone\nmore\n"
