import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import GraderError
from pipeline.grading import Judgement, judge
from pipeline.grading.pool import BATCH, MEMORY, Pool

HANGS = r"\boxed{9^{9^{9^{9}}}}"
LOST = Judgement(None, None, "timeout")


def right(number):
    return Judgement(True, str(number), "correct")


def test_order_is_kept_and_equal_rows_agree():
    numbers = list(range(5 * BATCH)) * 2
    judged = judge("math", [f"A: {n}" for n in numbers], [str(n) for n in numbers], workers=2)
    assert judged == [right(n) for n in numbers]


def test_a_row_that_hangs_is_killed_and_the_others_go_on(grading_processes):
    responses = [f"A: {n}" for n in range(20)]
    responses[3] = responses[11] = HANGS
    responses[12] = HANGS + " "
    began = time.monotonic()
    judged = judge("math", responses, [str(n) for n in range(20)], timeout=0.5, workers=2)
    assert judged == [LOST if n in (3, 11, 12) else right(n) for n in range(20)]
    assert time.monotonic() - began < 10
    assert len(grading_processes()) <= 2


def test_a_limit_that_is_over_before_the_first_row_is_sent_costs_the_rows_alone():
    pool = Pool("math")
    assert pool.judge([("A: 1", "1"), ("A: 2", "2")], timeout=0.0, workers=1) == [LOST, LOST]
    assert pool.judge([("A: 1", "1")], timeout=5.0, workers=1) == [right(1)]
    pool.close()


def test_a_reference_that_hangs_is_killed_too():
    reference = r"\gcd(10^{10^9},3)"
    assert judge("math", ["A: 5", "A: 5"], [reference, "5"], timeout=0.5, workers=1) == [LOST, right(5)]


def test_a_dead_process_costs_one_row(grading_processes, until):
    judge("math", ["A: 1"], ["1"], workers=1)
    results = []

    def call():
        results.extend(judge("math", [HANGS, "A: 2", "A: 3"], ["1", "2", "3"], timeout=60.0, workers=1))

    thread = threading.Thread(target=call)
    thread.start()
    busy = until(lambda: [worker for worker in grading_processes() if worker.cpu_percent(0.2) > 20])
    busy[0].kill()
    thread.join(20)
    assert results == [Judgement(None, None, "error"), right(2), right(3)]


def test_processes_that_died_between_calls_cost_nothing(grading_processes, until):
    judge("math", ["A: 1", "A: 2"], ["1", "2"], workers=2)
    workers = grading_processes()
    for worker in workers:
        worker.kill()
    until(lambda: all(worker.status() == psutil.STATUS_ZOMBIE for worker in workers))
    assert judge("math", ["A: 5", "A: 6"], ["5", "6"], workers=2) == [right(5), right(6)]


def test_processes_are_kept_between_calls_and_have_a_memory_limit(grading_processes, until):
    judge("math", ["A: 1"], ["1"], workers=1)
    before = {worker.pid for worker in grading_processes()}
    judge("math", ["A: 2"], ["2"], workers=1)
    assert {worker.pid for worker in grading_processes()} == before
    # One that an earlier call has started and not waited for may still be on its way to its limit.
    until(lambda: all(worker.rlimit(psutil.RLIMIT_AS) == (MEMORY, MEMORY) for worker in grading_processes()), 60)


def test_many_threads_may_judge_at_once():
    results = {}

    def call(number):
        results[number] = judge("math", [f"A: {number}"] * 3, [str(number)] * 3, workers=2)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {number: [right(number)] * 3 for number in range(8)}


def test_a_process_that_cannot_start_says_why():
    pool = Pool("no such grader")
    with pytest.raises(GraderError, match="does not start") as caught:
        pool.judge([("A: 1", "1")], timeout=5.0, workers=1)
    assert "no grader is called 'no such grader'" in str(caught.value)


def test_a_process_that_the_system_does_not_start_is_an_error_of_the_graders_as_a_whole(monkeypatch):
    pool = Pool("math")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(GraderError, match=r"no grading process can be started: .*No such file"):
        pool.judge([("A: 1", "1")], timeout=5.0, workers=1)
    monkeypatch.undo()
    assert pool.judge([("A: 1", "1")], timeout=5.0, workers=1) == [right(1)]
    pool.close()


def test_each_judgement_is_told_as_soon_as_it_is_there():
    pool, told, rows = Pool("math"), {}, [("A: 1", "1"), (HANGS, "1"), ("A: 3", "3")]

    def stop(row, judgement):
        told[row] = judgement
        if row == rows[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.judge(rows, timeout=0.5, workers=1, learn=stop)
    assert told == {rows[0]: right(1), rows[1]: LOST}
    told.clear()
    judged = pool.judge(rows, timeout=0.5, workers=2, learn=told.__setitem__)
    assert judged == [told[row] for row in rows] == [right(1), LOST, right(3)]
    pool.close()


SCRIPT = r"""
import sys
from pipeline.grading import judge
print(judge("math", ["A: 1"], ["1"], workers=2)[0].status, flush=True)
if sys.argv[1] == "hang":
    judge("math", [r"\boxed{9^{9^{9^{9}}}}"], ["1"], timeout=1.0, workers=1)
"""


@pytest.mark.parametrize("end", ["exit", "kill while idle", "hang"])
def test_no_process_outlives_its_parent_whose_main_module_has_no_guard(tmp_path, grading_processes, until, end):
    root = Path(sys.modules["pipeline"].__file__).parents[1]
    script = tmp_path / "script.py"
    text = SCRIPT + ("import time; time.sleep(60)" if end == "kill while idle" else "")
    script.write_text(text)
    with subprocess.Popen(
        [sys.executable, str(script), end],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        text=True,
    ) as parent:
        workers = until(lambda: grading_processes(parent.pid))
        assert parent.stdout.readline() == "correct\n"
        if end == "hang":
            until(lambda: workers[0].cpu_percent(0.2) > 20)
        if end != "exit":
            parent.kill()
        parent.wait(20)
    until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))


@pytest.mark.parametrize(
    "response", ["\x00\ud800😀 A: 5", "A: 5\x00", r"\boxed{" * 2000, "(" * 9000, "$" * 9000, "\\" * 9000]
)
def test_hostile_text_is_judged(response):
    (judged,) = judge("math", [response], ["5"], workers=1)
    assert judged.status in ("correct", "wrong", "no answer")


MARKS = r"\frac{ } { \boxed{ \sqrt{ ^{ _ 9 10 x + - \left( \int $ \[ ! \text{ % = #### A: | \pi"
SCRAPS = st.lists(
    st.one_of(st.sampled_from(MARKS.split()), st.text(st.characters(exclude_categories=[]), max_size=20)),
    max_size=12,
).map("".join)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(SCRAPS, st.none() | SCRAPS), max_size=10))
def test_any_text_gives_a_judgement(rows):
    judged = judge("math", [response for response, _ in rows], [reference for _, reference in rows], workers=2)
    assert len(judged) == len(rows)
    for judgement, (_, reference) in zip(judged, rows, strict=True):
        assert (judgement.correct is None) == (judgement.status in ("timeout", "error", "bad reference"))
        assert judgement.correct == {"correct": True, "wrong": False, "no answer": False}.get(judgement.status)
        assert reference is not None or judgement.correct is None
