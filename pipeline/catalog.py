"""What lies in a run: its artifacts, where in the run each belongs, and what they were made of. Manifests are read.

runs/NAME/                     a run: it has an experiment.toml
    0003/labels-0              loop, iteration 3
    0003/labels-0.lenient      the same, redone beside it as the variant `lenient`
    eval/0003/labels           evaluation of the policy that iteration 3 began with
    sft, pretraining/critic    foundations; what recipes share lies in a directory of its own: runs/base/prompts
    relabeled/NAME/0003/labels-0    the same, labelled again as the variant NAME: the run does not go by it
    compare/                   other recipes' credit for the same rollouts: nor by that
    .replaced/                 what was made again in its place
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipeline import storage
from pipeline.artifacts import METRICS_FILE, PRUNED, Artifact, InputRecord, read_part
from pipeline.contracts import METRICS
from pipeline.errors import ArtifactError
from pipeline.storage import MANIFEST, SCRATCH

EXPERIMENT_FILE = "experiment.toml"
REPLACED = ".replaced"
"""Directory of a run in which artifacts lie that were made again in their place."""
COMPARE = "compare"
"""Directory of a run with what `rlhf compare` made."""
RELABELED = "relabeled"
"""Directory of a run with what `rlhf relabel` made, a directory for each name."""

ROLES = {"candidates": "rollouts", "judgements": "scores"}
"""What is made for something else than the others of its contract: responses to be ranked; what a reward model says
before the labels are made. An iteration may have both beside its rollouts and scores."""

Phase = Literal["foundations", "loop", "evaluation"]


@dataclass(frozen=True)
class Entry:
    """An artifact and its place in a run."""

    artifact: Artifact
    run: str
    """Name of the directory: of the run, or of what recipes share."""
    phase: Phase
    iteration: int | None
    stage: str
    """Name of its directory, e.g. `labels-0`."""
    variant: str | None
    """The name under which it was redone or labelled again beside another; None: the run goes by it."""

    @property
    def kind(self) -> str:
        """Name of its contract, or what it is to the run where that says more: see `ROLES`."""
        role = self.stage.partition("-")[0]
        return role if ROLES.get(role) == self.artifact.manifest.kind else self.artifact.manifest.kind

    @classmethod
    def of(cls, artifact: Artifact) -> "Entry":
        """Tell the place from where the artifact lies."""
        path = artifact.path.absolute()
        above = path.parent
        stage, _, variant = path.name.partition(".")
        phase: Phase = "loop" if re.fullmatch(r"\d{4,}", above.name) else "foundations"
        iteration = int(above.name) if phase == "loop" else None
        run = above.parent if phase == "loop" else above
        if phase == "loop" and run.name == "eval":
            phase, run = "evaluation", run.parent
        if run.parent.name == RELABELED:
            variant, run = run.name, run.parent.parent
        if (run.parent / EXPERIMENT_FILE).is_file():
            run = run.parent
        return cls(artifact, run.name, phase, iteration, stage, variant or None)


def refuse_no_run(folder: Path) -> None:
    """Raise `ArtifactError` for a folder that is no run."""
    if not (folder / EXPERIMENT_FILE).is_file():
        raise ArtifactError(f"not a run: it has no {EXPERIMENT_FILE}", str(folder), "`rlhf run EXPERIMENT` makes one")


def find_runs(patterns: Iterable[str | Path]) -> list[Path]:
    """The runs that are meant: a run, a directory of runs, their URL, or a pattern such as `runs/*`, each run once.

    Raises `ArtifactError` for a path that is none of them, and for a pattern that no run answers to.
    """
    found: dict[Path, Path] = {}
    for pattern in map(str, patterns):
        path = storage.at_hand(pattern)
        places = [path] if path.exists() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        runs = [place for place in places if (place / EXPERIMENT_FILE).is_file()]
        if not runs and path.is_dir():
            runs = sorted(file.parent for file in path.glob(f"*/{EXPERIMENT_FILE}"))
        if not runs and path.exists():
            refuse_no_run(path)
        if not runs:
            raise ArtifactError("no run there", pattern, "`rlhf run EXPERIMENT` makes one")
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return list(found.values())


def name_of(path: Path, root: Path) -> str:
    """How people call an artifact of a run: `0003/labels-0`, `eval/0000/labels`, `sft`."""
    return "/".join(path.parts[len(root.parts) + 1 :])


def is_redone(path: Path, of: str | None = None) -> bool:
    """Whether the name is that of an artifact made again beside another: `labels-0.lenient`."""
    name, dot, _ = path.name.partition(".")
    return bool(dot) and (of is None or name == of)


@dataclass(frozen=True)
class Survey:
    """What lies below a directory, from one walk."""

    committed: dict[Path, int]
    """Every artifact that is in its place, and when it was made (nanoseconds)."""
    pruned: frozenset[Path]
    """Those of them whose weights were deleted."""
    scratches: list[Path]
    """Of stages that run now, or that were interrupted and go on when run again."""

    @classmethod
    def of(cls, root: Path) -> "Survey":
        """Walk through `root`; what was replaced is left out, and no artifact lies in another."""
        committed, pruned, scratches = {}, [], []
        waiting = [str(root)]
        while waiting:
            here = waiting.pop()
            with suppress(OSError):  # moved away meanwhile, by a run that goes on
                with os.scandir(here) as listed:
                    entries = {entry.name: entry for entry in listed}
                if (manifest := entries.get(MANIFEST)) is not None:
                    committed[Path(here)] = manifest.stat().st_mtime_ns
                    pruned += [Path(here)] if PRUNED in entries else []
                    continue
                for name, entry in entries.items():
                    if name.startswith(SCRATCH):
                        scratches.append(Path(entry.path))
                    elif name != REPLACED and entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        return cls(committed, frozenset(pruned), sorted(scratches))

    def in_order(self) -> list[Path]:
        """The artifacts in the order of their making."""
        return [path for path, _ in sorted(self.committed.items(), key=lambda item: item[::-1])]


def is_aside(parts: Sequence[str]) -> bool:
    """Whether a path inside a run leads to a place that no run goes by: what `rlhf compare` and `rlhf relabel` made."""
    return COMPARE in parts or RELABELED in parts


def artifacts_of(folder: Path) -> list[Artifact]:
    """Every artifact that a run goes by, in the order of its making."""
    found = (one for one in _committed(folder) if not is_redone(one.path))
    return [one for one in found if not is_aside(one.path.relative_to(folder).parts)]


def _committed(folder: Path) -> list[Artifact]:
    """What a run has made, in the order of its making; variants among it, other recipes' credit not."""
    ordered = Survey.of(folder).in_order()
    return [Artifact.open(path) for path in ordered if COMPARE not in path.relative_to(folder).parts]


def catalog(runs: Sequence[Path]) -> list[Entry]:
    """Every artifact of these runs, redone ones among them, and all that they were made of where that still lies."""
    found = {one.path.resolve(): one for run in runs for one in _committed(run)}
    waiting = list(found.values())
    roots = {run.resolve().parent for run in runs}
    while waiting:
        for records in waiting.pop().manifest.inputs.values():
            for record in records:
                place = lies_at(record, roots)
                if place is not None and place not in found and (place / MANIFEST).exists():
                    found[place] = Artifact.open(place)
                    waiting.append(found[place])
    return [Entry.of(one) for one in found.values()]


def lies_at(record: InputRecord, roots: Iterable[Path]) -> Path | None:
    """Where an input lies today: at its path, or in the same place below a root that was moved; None if gone.

    What lies in object storage is fetched.
    """
    recorded = record.place
    storage.there(recorded)
    moved = (root / Path(*recorded.parts[start:]) for root in roots for start in range(1, len(recorded.parts)))
    return next((path.resolve() for path in (recorded, *moved) if path.exists()), None)


def gather_metrics(folder: Path) -> pa.Table:
    """The metrics of all artifacts of a run."""
    files = [artifact.path / METRICS_FILE for artifact in artifacts_of(folder)]
    return pa.concat_tables([METRICS.schema().empty_table(), *(read_part(path) for path in files if path.exists())])
