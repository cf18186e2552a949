"""Promotion: `RUN/promoted` is a link to the best policy so far by held-out prompts, changed at once or not at all.

    d_p = mean of the candidate's responses to prompt p - mean of the present one's       (accuracy or reward)
    promoted when   mean_p d_p > 0   and   mean_p d_p - z se(d) >= 0   and   every gate of the evaluation passes

Both policies answered the same prompts, so the differences are paired (arXiv:2411.00640, section 4.2); z is that of the
two-sided interval. The first policy that is evaluated is promoted without comparison. Everything is read from
`RUN/eval`, so a run that was killed on the way comes to the same decisions.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np

from flows import gates
from flows.results import Evaluated
from flows.run import Run
from pipeline import storage
from pipeline.artifacts import Artifact, InputRecord
from pipeline.catalog import EXPERIMENT_FILE, refuse_no_run
from pipeline.contracts import POLICY
from pipeline.disk import flush
from pipeline.errors import ArtifactError
from pipeline.experiment import Experiment, Promotion
from pipeline.grading.measures import clustered

PROMOTED = "promoted"
"""The link, in the run's directory."""
REFUSED = "refused.json"
"""Digests of the policies that a person refused to promote, in the run's directory."""
GATES_ASKED = ("malformed", "truncation", "grader_failures", "divergence")
"""Of an evaluation; the others are about what training could learn from it."""

Word = Literal["yes", "no", "later"]


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the present policy, on the prompts that both answered."""

    candidate: Evaluated
    present: Evaluated | None
    """None: nothing is promoted yet."""
    gain: float
    """Mean over prompts of the difference; NaN without a present one."""
    low: float
    """Lower end of its confidence interval."""
    high: float
    """Upper end."""
    prompts: int
    failures: tuple[str, ...]
    """Gates of the candidate's evaluation that fail."""

    @property
    def better(self) -> bool:
        """Whether the candidate is to be promoted."""
        return not self.failures and (self.present is None or (self.gain > 0 and self.low >= 0))

    def __str__(self) -> str:
        name = f"the policy of iteration {self.candidate.iteration}"
        if self.failures:
            return f"{name} fails {'; '.join(self.failures)}"
        if self.present is None:
            return f"{name} is the first to be evaluated"
        by = f"{self.gain:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over {self.prompts} prompts"
        verdict = "better" if self.better else "not surely better"
        return f"{name} is {verdict} than that of iteration {self.present.iteration}: {by}"


def settle(run: Run) -> None:
    """Promote what is to be promoted by now, after a person's word where the experiment asks for it."""
    from flows.approval import asked

    decide(run.folder, run.experiment, run.say, asked(run) if run.experiment.promotion.approval else _yes)


def _yes(comparison: Comparison) -> Word:
    return "yes"


def decide(
    folder: Path, experiment: Experiment, say: Callable[[str], None], word: Callable[[Comparison], Word]
) -> None:
    """Compare each policy that was evaluated after the present one with it, in order, and promote those better.

    `word` is asked about each one that would be promoted, except the first: `no` is remembered.
    """
    if not experiment.promotion.enabled:
        return
    comparison = _latest(folder, experiment)
    while comparison is not None and comparison.better:
        candidate = comparison.candidate
        answer: Word = "yes" if comparison.present is None else word(comparison)
        if answer == "later":
            say(f"  {comparison}; it waits for a person's word: `rlhf promote {folder}`, or with --refuse")
            return
        if answer == "no":
            refuse(folder, candidate)
        else:
            point(folder, policy_of(candidate))
        say(f"  {'refused' if answer == 'no' else 'promoted'}: {comparison}")
        comparison = _latest(folder, experiment)
    if comparison is not None:
        say(f"  not promoted: {comparison}")


def _latest(folder: Path, experiment: Experiment) -> Comparison | None:
    """Of the policies evaluated after the present one, the first that is to take its place, or else the last.

    None where there is none, or where the last one was refused.
    """
    evaluated = [one for one in evaluations(folder) if one.labels is not None]
    now, refused = present(folder, evaluated), _refused(folder)
    later = evaluated if now is None else [one for one in evaluated if one.iteration > now.iteration]
    known = None if now is None else _policy(now).digest
    compared = [compare(one, now, experiment) for one in later if _policy(one).digest not in (known, *refused)]
    last = compared[-1] if compared and compared[-1].candidate == later[-1] else None
    return next((comparison for comparison in compared if comparison.better), last)


def evaluations(folder: Path) -> list[Evaluated]:
    """What was evaluated of a run, in order."""
    found = sorted((folder / "eval").glob("[0-9][0-9][0-9][0-9]"))
    return [one for path in found if (one := Evaluated.open(folder, int(path.name))).rollouts is not None]


def _policy(one: Evaluated) -> InputRecord:
    assert one.rollouts is not None  # noqa: S101  evaluations() gives no others
    return one.rollouts.manifest.inputs["policy"][0]


def policy_of(one: Evaluated) -> Path:
    """Where the policy lies that was evaluated, as it was. Raises `ArtifactError` where it is not there any more."""
    recorded = _policy(one)
    path = recorded.place
    there = Artifact.open(path, POLICY) if storage.there(path) else None
    if there is None or there.pruned or there.manifest.digest != recorded.digest:
        raise ArtifactError(
            f"the policy evaluated in {one.run / 'eval'}/{one.iteration:04d} is not there as it was", str(path),
            "run the command from the directory that the run was made from, or `rlhf verify` the run",
        )  # fmt: skip
    return path


def present(folder: Path, evaluated: Sequence[Evaluated]) -> Evaluated | None:
    """The evaluation of the policy that is promoted; None where none is.

    Raises `ArtifactError` where the link points to something that the run did not evaluate.
    """
    link = folder / PROMOTED
    if not link.is_symlink():
        return None
    digest = Artifact.open(link.resolve(), POLICY).manifest.digest
    if (found := next((one for one in evaluated if _policy(one).digest == digest), None)) is not None:
        return found
    raise ArtifactError(
        f"{PROMOTED} points to what this run did not evaluate: {link.readlink()}", str(link),
        "delete the link; the next run sets it again",
    )  # fmt: skip


def compare(candidate: Evaluated, now: Evaluated | None, experiment: Experiment) -> Comparison:
    """A candidate beside the present policy."""
    looked_at = [one for one in (candidate.rollouts, candidate.labels, candidate.scores) if one is not None]
    failures = tuple(gates.failures(looked_at, experiment.gates, GATES_ASKED))
    if now is None:
        return Comparison(candidate, None, *(float("nan"),) * 3, 0, failures)
    ours, theirs = (means(one, experiment.promotion) for one in (candidate, now))
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        other = "it answered other prompts than the present one"
        nothing = "no held-out prompt has an answer to judge by: promotion.metric = 'reward' compares rewards"
        failures = (*failures, other if ours and theirs else nothing)
        return Comparison(candidate, now, *(float("nan"),) * 3, 0, failures)
    gain, error = clustered(np.array([ours[p] - theirs[p] for p in shared]), np.arange(len(shared)))
    reach = NormalDist().inv_cdf(0.5 + experiment.promotion.confidence / 2) * error
    return Comparison(candidate, now, gain, gain - reach, gain + reach, len(shared), failures)


def means(one: Evaluated, plan: Promotion) -> dict[str, float]:
    """Prompt -> mean over its responses of what policies are compared by: right by the reference, or the reward."""
    column = "gold" if plan.metric == "accuracy" else "reward"
    values: dict[str, list[float]] = {}
    for row in [] if one.labels is None else one.labels.table(["prompt_id", "sample", column]).to_pylist():
        if row[column] is not None and row["sample"] >= 0:
            values.setdefault(row["prompt_id"], []).append(float(row[column]))
    return {prompt: float(np.mean(of)) for prompt, of in values.items()}


def point(folder: Path, policy: Path) -> None:
    """Have the link point to `policy`: a new link takes the place of the old one in one step."""
    temporary = folder / f".{PROMOTED}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(policy.resolve(), folder.resolve()))
    temporary.replace(folder / PROMOTED)
    flush(folder)


def refuse(folder: Path, one: Evaluated) -> None:
    """Remember that a person does not want this policy promoted."""
    temporary = folder / f"{REFUSED}.tmp"
    temporary.write_text(json.dumps(sorted({*_refused(folder), _policy(one).digest})) + "\n", encoding="utf-8")
    temporary.replace(folder / REFUSED)


def _refused(folder: Path) -> list[str]:
    path = folder / REFUSED
    if not path.exists():
        return []
    found: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def promote(folder: Path, say: Callable[[str], None], *, refused: bool = False) -> None:
    """A person's word on what waits: promote it, or refuse it for good."""
    refuse_no_run(folder)
    before = (folder / PROMOTED).readlink() if (folder / PROMOTED).is_symlink() else None
    decide(folder, Experiment.load(folder / EXPERIMENT_FILE), say, lambda _: "no" if refused else "yes")
    storage.carry(folder)
    after = (folder / PROMOTED).readlink() if (folder / PROMOTED).is_symlink() else None
    if before == after and not refused:
        say(f"nothing waits to be promoted; {PROMOTED} -> {after}")
