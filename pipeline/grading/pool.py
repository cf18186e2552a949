"""Grading processes that can be killed.

The parent may hold threads, CUDA and an inference engine, so its workers are fresh interpreters (`worker.py`) behind
pipes: no fork, and no import of the parent's `__main__`. The parent watches the time since each worker's last
judgement; a worker that is late is killed (SIGKILL) and replaced, and only the row it was at is lost.

The pool works from any thread, one call at a time, and lives until its process ends. Workers end with their parent:
idle ones at the end of their input, busy ones by their own alarm.
"""

import atexit
import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

from pipeline.errors import GraderError
from pipeline.grading import Judgement, Row, Status
from pipeline.grading.worker import frame

MEMORY = 2 * 1024**3
"""Address space of one worker in bytes."""

BATCH = 16
"""Most rows sent to a worker at once: enough to hide the pipe, few enough to share the end of the work."""

START = 120.0
"""Seconds a worker may take to import its grader."""

MOST_FAILED_STARTS = 3
"""Processes in a row that may die without a word before they are ready."""

Learn = Callable[[Row, Judgement], None]


class Worker:
    """One process and the rows it holds; `rows[0]` is the one it is at."""

    def __init__(self, grader_name: str) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [sys.executable, "-P", "-m", "pipeline.grading.worker", grader_name, str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            self._complaints.close()
            raise GraderError(f"no grading process can be started: {error}", do="free memory, and run again") from error
        self._requests = cast("IO[bytes]", self._process.stdin)
        self.results = cast("IO[bytes]", self._process.stdout)
        self._unread = b""
        self.ready = False
        self.rows: deque[int] = deque()
        self.deadline = time.monotonic() + START

    def send(self, rows: Sequence[int], texts: Sequence[Row], seconds: float, *, extracted: bool) -> bool:
        """Hand over a batch. Return False when the process is dead."""
        try:
            self._requests.write(frame({"seconds": seconds, "extracted": extracted, "rows": texts}))
            self._requests.flush()
        except BrokenPipeError:
            return False
        self.rows.extend(rows)
        self.deadline = time.monotonic() + seconds
        return True

    def receive(self) -> list[Any] | None:
        """Return the messages that are there; None when the process has ended."""
        data = os.read(self.results.fileno(), 1 << 16)
        if not data:
            return None
        self._unread += data
        messages = []
        while len(self._unread) >= 4:
            (length,) = struct.unpack(">I", self._unread[:4])
            if len(self._unread) < 4 + length:
                break
            messages.append(json.loads(self._unread[4 : 4 + length]))
            self._unread = self._unread[4 + length :]
        return messages

    def ended_by_alarm(self) -> bool:
        """Whether a process whose results have ended was ended by its own alarm."""
        return self._process.wait() == -signal.SIGALRM

    def last_words(self) -> str:
        """Return the end of what the process wrote to its standard error before it was ready."""
        self._complaints.seek(0)
        return self._complaints.read().decode("utf-8", "replace").strip()[-2000:]

    def end(self) -> None:
        """Kill the process and close everything that belongs to it."""
        self._process.kill()
        self._process.wait()
        self.results.close()
        self._complaints.close()
        with contextlib.suppress(BrokenPipeError):  # the rest of a batch that the process did not live to read
            self._requests.close()


class Pool:
    """Workers of one grader, started when there are rows for them and kept."""

    def __init__(self, grader_name: str) -> None:
        self._grader_name = grader_name
        self._workers: list[Worker] = []
        self._one_at_a_time = threading.Lock()

    def judge(
        self, rows: Sequence[Row], *, timeout: float, workers: int, extracted: bool = False, learn: Learn | None = None
    ) -> list[Judgement]:
        """Judge (response, reference) rows with up to `workers` processes and `timeout` seconds for each row.

        `extracted` says that the rows hold answers in place of responses; `learn` is told each judgement as soon as it
        is there. Raises `GraderError` when a worker cannot start. An exception on the way, a keyboard interrupt
        included, ends the workers, so that none is left in the middle of a batch.
        """
        with self._one_at_a_time:
            try:
                work = _Work(
                    self._grader_name, self._workers, rows, timeout, max(1, workers), extracted=extracted, learn=learn
                )
                return work.done()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        while self._workers:
            self._workers.pop().end()


class _Work:
    """One call: which rows wait, which are judged."""

    def __init__(
        self, grader_name: str, workers: list[Worker], rows: Sequence[Row], seconds: float, most: int, *,
        extracted: bool, learn: Learn | None,
    ) -> None:  # fmt: skip
        self._grader_name, self._workers, self._rows, self._seconds = grader_name, workers, rows, seconds
        self._extracted, self._learn = extracted, learn
        self._most = min(most, len(rows))
        self._waiting = deque(range(len(rows)))
        self._judged: dict[int, Judgement] = {}
        self._failed_starts = 0

    def done(self) -> list[Judgement]:
        """Work until every row has its judgement; return them in order."""
        while len(self._judged) < len(self._rows):
            self._give()
            busy = [worker for worker in self._workers if worker.rows or not worker.ready]
            for worker in self._with_news(busy):
                self._take(worker)
            for worker in busy:
                late = time.monotonic() > worker.deadline and (worker.rows or not worker.ready)
                if worker in self._workers and late:
                    self._lose(worker, "timeout")
        return [self._judged[index] for index in range(len(self._rows))]

    def _give(self) -> None:
        """Start missing workers and give each idle one its next batch."""
        missing = min(self._most - len(self._workers), len(self._waiting))
        self._workers.extend(Worker(self._grader_name) for _ in range(missing))
        for worker in self._workers[: self._most]:
            if not self._waiting:
                return
            if worker.ready and not worker.rows:
                size = max(1, min(BATCH, len(self._waiting) // (2 * self._most)))
                batch = [self._waiting.popleft() for _ in range(size)]
                texts = [self._rows[index] for index in batch]
                if not worker.send(batch, texts, self._seconds, extracted=self._extracted):
                    self._waiting.extendleft(reversed(batch))
                    self._dismiss(worker)
                    return

    def _with_news(self, busy: Sequence[Worker]) -> list[Worker]:
        """Wait for a message or for the first deadline; return the workers with something to read."""
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.results, selectors.EVENT_READ, worker)
            first = min((worker.deadline for worker in busy), default=time.monotonic())
            return [key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))]

    def _take(self, worker: Worker) -> None:
        """Note the judgements that have come from a worker, or its death."""
        messages = worker.receive()
        if messages is None:
            self._lose(worker, "timeout" if worker.ended_by_alarm() else "error")
            return
        for message in messages:
            if message == "ready":
                worker.ready = True
                self._failed_starts = 0
            else:
                self._note(worker.rows.popleft(), Judgement(*message))
            worker.deadline = time.monotonic() + self._seconds

    def _lose(self, worker: Worker, status: Status) -> None:
        """Give up the row a worker is at, and put its other rows back in the queue."""
        if worker.ready:
            self._note(worker.rows.popleft(), Judgement(None, None, status))
            self._waiting.extendleft(reversed(worker.rows))
        else:
            self._note_failed_start(worker.last_words())
        self._dismiss(worker)

    def _note(self, index: int, judgement: Judgement) -> None:
        self._judged[index] = judgement
        if self._learn is not None:
            self._learn(self._rows[index], judgement)

    def _note_failed_start(self, last_words: str) -> None:
        """Let another process be started where this one was killed from outside; raise where it complained."""
        self._failed_starts += 1
        if last_words or self._failed_starts == MOST_FAILED_STARTS:
            raise GraderError(
                "a grading process does not start",
                where=last_words or f"killed, or silent for {START:.0f} s, {self._failed_starts} times in a row",
                do=f"{sys.executable} -m pipeline.grading.worker {self._grader_name} {MEMORY}",
            )

    def _dismiss(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.end()


_pools: dict[tuple[int, str], Pool] = {}
_pools_lock = threading.Lock()


def shared_pool(grader_name: str) -> Pool:
    """Return this process's pool for a grader. A forked child gets its own: the pipes are its parent's."""
    with _pools_lock:
        return _pools.setdefault((os.getpid(), grader_name), Pool(grader_name))


@atexit.register
def _close_pools() -> None:
    for (process, _), pool in _pools.items():
        if process == os.getpid():
            pool.close()
