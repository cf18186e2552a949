"""One grading process: `python -P -m pipeline.grading.worker GRADER MEMORY_LIMIT_IN_BYTES`.

Frames in both directions are a 4-byte length and JSON (ASCII, so lone surrogates survive). In: a batch, which is
{"seconds": limit per row, "extracted": whether the rows hold answers in place of responses, "rows": [[response,
reference], ...]}. Out: "ready" once, then one judgement per row as soon as it is there. The end of the input ends the
process.
"""

import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from pipeline.grading import compare_row, judge_row, open_grader

GRACE = 2.0
"""Seconds after the limit at which a worker that nobody killed (its parent is gone) ends itself."""


def frame(message: Any) -> bytes:
    """Return the bytes of a message: its length, then JSON."""
    body = json.dumps(message).encode("ascii")
    return struct.pack(">I", len(body)) + body


def read_frame(stream: BinaryIO) -> Any:
    """Return the next message of a stream, None at its end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    body = stream.read(length)
    return json.loads(body) if len(body) == length else None


def main(grader_name: str, memory: int) -> None:
    """Judge batches from standard input until it ends.

    Each row runs under an alarm with the default action: the kernel ends the process even inside a C function that
    holds the interpreter lock, where no Python code could. Lack of memory ends the process too, because what is left
    of the heap is of no use for the next row; the parent starts another and counts the row as an error.
    """
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grader = open_grader(grader_name)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever a library prints must not reach the frames
    os.dup2(silence, 2)
    answers.write(frame("ready"))
    while (batch := read_frame(sys.stdin.buffer)) is not None:
        row_judge = compare_row if batch["extracted"] else judge_row
        for text, reference in batch["rows"]:
            signal.setitimer(signal.ITIMER_REAL, batch["seconds"] + GRACE)
            try:
                judgement = row_judge(grader, text, reference)
            except MemoryError:
                os._exit(1)
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(frame(judgement))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
