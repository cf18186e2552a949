"""A person's word before a policy is promoted: asked in Prefect where its server stays, left for later elsewhere."""

import os
from collections.abc import Callable

from prefect import pause_flow_run
from prefect.context import FlowRunContext
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from pydantic import Field

from flows.promotion import Comparison, Word
from flows.run import Run


class Approval(RunInput):
    """The form that resumes a paused run."""

    promote: bool = Field(True, description="Off: this policy is never promoted.")


def asked(run: Run) -> Callable[[Comparison], Word]:
    """How a person is asked on this run.

    In a flow run of a server that stays, the run pauses and shows a form in its UI: until somebody answers, or
    `promotion.approval_seconds` have passed. A server that Prefect started for this run only would end with it, so
    there the answer is `later`, and `rlhf promote RUN` gives it.
    """

    def word(comparison: Comparison) -> Word:
        if FlowRunContext.get() is None or not os.environ.get("PREFECT_API_URL"):
            return "later"
        run.say(f"  {comparison}; the run pauses for a person's word: resume it in Prefect's UI")
        form = Approval.with_initial_data(description=f"Promote? {comparison}", promote=True)
        try:
            given = pause_flow_run(
                wait_for_input=form, timeout=int(run.experiment.promotion.approval_seconds), poll_interval=2
            )
        except FlowPauseTimeout:
            return "later"
        return "yes" if given.promote else "no"

    return word
