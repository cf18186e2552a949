"""When is an answer right?

    response --extract--> answer --same--> reference        judge() does it for a column of responses

A grader that may hang or eat memory says `risky = True` and works in processes that are killed when they are late
(`pool.py`). Whatever happens, every row gets one `Judgement`, in order. What cannot be judged is null, never wrong:

    status           correct   when
    correct, wrong   yes, no   the answer was compared with the reference
    no answer        no        the response holds nothing to compare
    bad reference    null      the reference is missing or cannot be read; `extracted` is still filled
    timeout          null      grading took longer than the limit
    error            null      the grader failed on this row, or its process died
"""

import importlib
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

from pipeline.errors import InputError

Status = Literal["correct", "wrong", "no answer", "bad reference", "timeout", "error"]

GRADERS = {
    "math": "pipeline.grading.math:MathGrader",
    "exact": "pipeline.grading.exact:ExactGrader",
    "none": "pipeline.grading.none:NoGrader",
}
"""Name in the `grader` column -> module and class; the module is imported when the grader is opened."""


class Grader(Protocol):
    """Finds the answer in a response and compares it with the reference."""

    risky: ClassVar[bool]
    """True: may hang, crash or eat memory on hostile text, so it must run in killable processes."""

    def extract(self, text: str) -> str | None:
        """Return the answer found in a response; None where there is none."""
        ...

    def readable(self, reference: str) -> bool:
        """Whether anything can be compared with this reference at all."""
        ...

    def same(self, answer: str, reference: str) -> bool:
        """Whether an extracted answer equals the reference. An unreadable reference equals nothing."""
        ...


class Judgement(NamedTuple):
    """The verdict on one response."""

    correct: bool | None
    extracted: str | None
    status: Status


def open_grader(name: str) -> Grader:
    """Return the grader of that name. Raises `InputError` that lists the names there are."""
    if name not in GRADERS:
        raise InputError(
            f"no grader is called {name!r}; there are: {', '.join(GRADERS)}",
            where="column grader",
            do="write one of these names",
        )
    module, _, attribute = GRADERS[name].partition(":")
    grader: Grader = getattr(importlib.import_module(module), attribute)()
    return grader


def judge(
    grader_name: str,
    responses: Sequence[str],
    references: Sequence[str | None],
    *,
    timeout: float = 5.0,
    workers: int,
) -> list[Judgement]:
    """Judge responses[i] against references[i]; one judgement per row, in order, whatever happens.

    `timeout` is in seconds per row; `workers` is the number of processes a risky grader may use (they are kept for
    the next call). Equal rows are judged once. Without a reference the answer is extracted all the same, so a column
    of None extracts. Raises `InputError` for an unknown grader, `ValueError` when the columns differ in length.
    """
    rows = list(zip(responses, references, strict=True))
    grader = open_grader(grader_name)
    different = list(dict.fromkeys(rows))
    if grader.risky:
        from pipeline.grading.pool import shared_pool

        judged = shared_pool(grader_name).judge(different, timeout=timeout, workers=workers)
    else:
        judged = [judge_row(grader, response, reference) for response, reference in different]
    verdicts = dict(zip(different, judged, strict=True))
    return [verdicts[row] for row in rows]


def judge_row(grader: Grader, response: str, reference: str | None) -> Judgement:
    """Judge one response here and now, without protection from a grader that hangs."""
    extracted = None
    try:
        extracted = grader.extract(response)
        if reference is None or not grader.readable(reference):
            return Judgement(None, extracted, "bad reference")
        if extracted is None:
            return Judgement(False, None, "no answer")
        correct = grader.same(extracted, reference)
    except MemoryError:
        raise  # the process is no longer fit for the next row: its owner decides
    except Exception:
        return Judgement(None, extracted, "error")
    return Judgement(correct, extracted, "correct" if correct else "wrong")
