"""What runs came to: a row for each policy, from what lies in `eval/` of the runs and nothing else.

    SFT       the first policy, once for all runs that start from the same one and ask it the same;
              `start of NAME` where a run was forked from another: what it began with
    NAME      the last policy of each run

Held-out prompts and documents only; a cell without data is empty, a column without any is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows.sheets import Sheet
from pipeline import ragged
from pipeline.artifacts import Artifact, InputRecord
from pipeline.catalog import EXPERIMENT_FILE, refuse_no_run
from pipeline.contracts import LABELS, PERPLEXITIES, ROLLOUTS, SCORES, Contract
from pipeline.errors import ArtifactError
from pipeline.grading.measures import clustered, win_rate
from pipeline.settings import read_toml

ACCURACY, WIN_RATE, PAIRS, DECIDED = "accuracy", "win rate", "wins / ties / losses", "wins among decided"
SCORE, KL_RESPONSE, KL_TOKEN = "score", "KL [nat/response]", "KL [nat/token]"
LOSS, CHANGE, LENGTH = "loss on documents [nat/token]", "change of loss [%]", "length [tokens]"
COLUMNS = (ACCURACY, WIN_RATE, PAIRS, DECIDED, SCORE, KL_RESPONSE, KL_TOKEN, LOSS, CHANGE, LENGTH)
"""In the order of the table; there is a SCORE column for each reward model that judged."""

TITLE = (
    "held-out prompts and documents, ± one standard error over prompts; "
    "win rate, KL and change of loss are against the run's own first policy"
)


@dataclass(frozen=True)
class Evaluated:
    """One policy, as `RUN/eval/NNNN` has it; None for what was not made."""

    run: Path
    iteration: int
    rollouts: Artifact | None
    labels: Artifact | None
    scores: Artifact | None
    perplexity: Artifact | None

    @classmethod
    def open(cls, run: Path, iteration: int) -> Self:
        """Whatever is there. Raises `ArtifactError` for what is not what its name says."""
        here = run / "eval" / f"{iteration:04d}"
        return cls(
            run, iteration, _opened(here / "rollouts", ROLLOUTS), _opened(here / "labels", LABELS),
            _opened(here / "scores", SCORES), _opened(here / "perplexity", PERPLEXITIES),
        )  # fmt: skip

    @property
    def name(self) -> str | None:
        """Of the computation that asked the policy: equal names asked equal policies the same; None where none did."""
        asked = self.rollouts or self.perplexity
        return None if asked is None else asked.manifest.fingerprint

    @property
    def judge(self) -> InputRecord | None:
        """The reward model that judged the responses."""
        if self.scores is None or "reward_scores/mean" not in self.scores.stats:
            return None
        return self.scores.manifest.inputs["reward_model"][0]

    @property
    def loss(self) -> float | None:
        """On the documents. [nat/token]"""
        return None if self.perplexity is None else self.perplexity.stats["loss/documents"]

    def verdicts(self) -> dict[str, list[float]]:
        """Prompt -> what the reference says of its responses; empty where it says nothing."""
        verdicts: dict[str, list[float]] = {}
        for row in [] if self.labels is None else self.labels.table(["prompt_id", "gold"]).to_pylist():
            if row["gold"] is not None:
                verdicts.setdefault(row["prompt_id"], []).append(float(row["gold"]))
        return verdicts


def _opened(path: Path, contract: Contract) -> Artifact | None:
    return Artifact.open(path, contract) if path.exists() else None


Cells = Mapping[str, str]
"""Column -> what stands in it."""


def table(folders: Sequence[Path]) -> Sheet:
    """The final table of these runs. Raises `ArtifactError` for a folder that is no run, or is not evaluated yet."""
    ends = [_ends(folder) for folder in dict.fromkeys(folders)]
    columns = _score_columns([one for both in ends for one in both])
    firsts: dict[str | None, list[Evaluated]] = {}
    for first, _ in ends:
        firsts.setdefault(first.name, []).append(first)
    rows: list[tuple[str, Cells]] = []
    starts = {one[0].iteration == 0 for one in firsts.values()}
    for same in firsts.values():
        whose = ", ".join(_names(one.run for one in same))
        name = f"SFT of {whose}" if same[0].iteration == 0 else f"start of {whose}, iteration {same[0].iteration}"
        name = "SFT" if starts == {True} and len(firsts) == 1 else name
        rows.append((name, _joined(_cells(one, columns) for one in same)))
    for name, (first, last) in zip(_names(last.run for _, last in ends), ends, strict=True):
        rows.append((f"{name}, iteration {last.iteration}", {**_cells(last, columns), **_against(first, last)}))
    order = [c for column in COLUMNS for c in ([*columns.values()] if column == SCORE else [column])]
    header = [column for column in order if any(cells.get(column) for _, cells in rows)]
    return Sheet(TITLE, ("policy", *header), tuple((name, *(cells.get(c, "") for c in header)) for name, cells in rows))


def _ends(folder: Path) -> tuple[Evaluated, Evaluated]:
    """The first and the last policy of a run."""
    refuse_no_run(folder)
    found = (Evaluated.open(folder, int(path.name)) for path in sorted((folder / "eval").glob("[0-9][0-9][0-9][0-9]")))
    there = [one for one in found if one.name is not None]
    begins = read_toml(folder / EXPERIMENT_FILE).get("fork", {}).get("at", 0)
    if len(there) < 2 or there[0].iteration != begins:
        iterations = ", ".join(str(one.iteration) for one in there) or "none"
        raise ArtifactError(
            f"a first and a later policy have to be evaluated; evaluated iterations there: {iterations}",
            str(folder / "eval"),
            "`rlhf run` it to its end, with data.held_out or data.held_out_documents in the experiment",
        )
    return there[0], there[-1]


def _names(runs: Iterable[Path]) -> list[str]:
    """Names of directories; whole paths where two have the same."""
    paths = list(runs)
    names = [path.resolve().name for path in paths]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def _score_columns(policies: Sequence[Evaluated]) -> dict[str, str]:
    """Digest of each reward model -> its column; the scores of two cannot be compared."""
    judges = {one.judge.digest: one.judge.path for one in policies if one.judge is not None}
    return {digest: SCORE if len(judges) == 1 else f"{SCORE} by {path}" for digest, path in judges.items()}


def _joined(several: Iterable[Cells]) -> Cells:
    """What any of them has; the first counts."""
    cells: dict[str, str] = {}
    for one in several:
        cells = {**one, **cells}
    return cells


def _cells(one: Evaluated, score_columns: Mapping[str, str]) -> dict[str, str]:
    """What is known of a policy by itself."""
    cells: dict[str, str] = {}
    if one.labels is not None and "accuracy/mean" in one.labels.stats:
        rows = one.labels.table(["prompt_id", "gold"]).filter(pc.field("gold").is_valid())
        error = clustered(*_of_prompts(rows, "gold"))[1]
        cells[ACCURACY] = _with_error(one.labels.stats["accuracy/mean"], error)
    if one.scores is not None and one.judge is not None:
        rows = one.scores.table(["prompt_id", "reward_scores"])
        cells[score_columns[one.judge.digest]] = _with_error(*clustered(*_of_prompts(rows, "reward_scores")))
    if one.scores is not None and "kl/reference_sum" in one.scores.stats:
        cells[KL_RESPONSE] = f"{one.scores.stats['kl/reference_sum']:z.3f}"
        cells[KL_TOKEN] = f"{one.scores.stats['kl/reference']:z.4f}"
    if one.loss is not None:
        cells[LOSS] = f"{one.loss:.4f}"
    if one.rollouts is not None:
        lengths = ragged.lengths(one.rollouts.table(["response_tokens"])["response_tokens"])
        cells[LENGTH] = f"{lengths.mean():.1f}"
    return cells


def _of_prompts(rows: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's numbers, and the prompt of each."""
    return rows[column].to_numpy().astype(np.float64), np.asarray(rows["prompt_id"].to_pylist())


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.3f}" if np.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def _against(first: Evaluated, last: Evaluated) -> dict[str, str]:
    """What is known of a policy beside the one that its run began with."""
    cells: dict[str, str] = {}
    theirs, ours = first.verdicts(), last.verdicts()
    if ours.keys() & theirs.keys():
        duel = win_rate(ours, theirs)
        cells[WIN_RATE] = _with_error(duel.rate, duel.error)
        cells[PAIRS] = f"{duel.wins:.3f} / {duel.ties:.3f} / {duel.losses:.3f}"
        cells[DECIDED] = "" if duel.decided is None else f"{duel.decided:.3f}"
    if first.loss is not None and last.loss is not None:
        cells[CHANGE] = f"{100 * (last.loss / first.loss - 1):+z.2f}"
    return cells
