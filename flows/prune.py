"""Delete the weights of old checkpoints, and nothing else: the only command that takes anything away.

Manifests, configs and tokenizers stay, so lineage survives and a run is still complete; an empty file `PRUNED` comes
first, so that a prune that is killed leaves a checkpoint that says so.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.lineage import Ledger
from flows.promotion import PROMOTED, evaluations
from flows.run import Run, look_up
from pipeline import storage
from pipeline.artifacts import PRUNED, Artifact, place_of
from pipeline.catalog import EXPERIMENT_FILE, REPLACED, artifacts_of, refuse_no_run
from pipeline.disk import flush
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment

KINDS = ("policy", "critic")
"""Whose weights are deleted: those of iterations, of which there are many."""


@dataclass(frozen=True)
class Pruned:
    """What was deleted, or would be."""

    artifact: Artifact | None
    """None: what was replaced by `rlhf redo`."""
    bytes: int


def prune(folder: Path, keep: int = 2, *, dry_run: bool = False) -> list[Pruned]:
    """Delete the weights of all policies and critics of a run but those that are kept; return what that frees.

    Kept are the last `keep` of each kind, what `promoted` points to, the best evaluated policy, what a fork or any
    other run started from, and everything before the first iteration. Raises `BusyError` while the run is at work.
    """
    refuse_no_run(folder)
    if keep < 1:
        raise ExperimentError(f"--keep {keep}: the run goes on from its last checkpoint", do="keep 1 or more")
    run = Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, look_up)
    with run.held():
        needed = _needed(folder)
        found = []
        for kind in KINDS:
            made = [one for one in artifacts_of(folder) if one.manifest.kind == kind and _of_iteration(one)]
            made.sort(key=lambda one: place_of(one.path)[1] or 0)
            found += [one for one in made[:-keep] if one.path.resolve() not in needed]
        freed = [Pruned(one, size) for one in found if (size := _weigh(one, dry_run=dry_run))]
        replaced = sum(path.stat().st_size for path in (folder / REPLACED).rglob("*") if path.is_file())
        if replaced and not dry_run:
            shutil.rmtree(folder / REPLACED)
            storage.removed(folder / REPLACED)
        return [*freed, *([Pruned(None, replaced)] if replaced else [])]


def _of_iteration(artifact: Artifact) -> bool:
    return place_of(artifact.path)[1] is not None and artifact.path.parent.parent.name != "eval"


def _needed(folder: Path) -> set[Path]:
    """Checkpoints that somebody still goes by, resolved."""
    needed = {(folder / PROMOTED).resolve()}
    scored = [
        (one.labels.stats["accuracy/mean"], one.rollouts.manifest.inputs["policy"][0].digest)
        for one in evaluations(folder)
        if one.labels is not None and one.rollouts is not None and "accuracy/mean" in one.labels.stats
    ]
    best = max(scored)[1] if scored else None
    ledger, here = Ledger.around(folder), folder.resolve()
    needed |= {path for path, manifest in ledger.manifests.items() if manifest.digest == best}
    for path in ledger.manifests:
        if not path.is_relative_to(here):
            needed |= {place for record in ledger.inputs(path) if (place := ledger.place(record)) is not None}
    return needed | set(_of_forks(folder))


def _of_forks(folder: Path) -> Iterator[Path]:
    """The last policy and critic before each place where another run branches off."""
    for file in folder.resolve().parent.glob(f"*/{EXPERIMENT_FILE}"):
        plan = Experiment.load(file).fork
        if plan is None or plan.run != folder.resolve().name:
            continue
        for kind in KINDS:
            before = [one for one in artifacts_of(folder) if one.manifest.kind == kind and _of_iteration(one)]
            before = [one for one in before if (place_of(one.path)[1] or 0) < plan.at]
            yield from (one.path.resolve() for one in sorted(before, key=lambda one: one.path)[-1:])


def _weigh(artifact: Artifact, *, dry_run: bool) -> int:
    """Bytes of the weights, which are deleted unless this is a dry run."""
    files = artifact.manifest.files
    mirrored = storage.url_of(artifact.path) is not None and not artifact.pruned
    weights = [
        name for name in files if name.endswith(storage.WEIGHTS) and (mirrored or (artifact.path / name).exists())
    ]
    if weights and not dry_run:
        mark = artifact.path / PRUNED
        mark.touch()
        flush(artifact.path)
        storage.put(mark)
        for name in weights:
            (artifact.path / name).unlink(missing_ok=True)
            storage.removed(artifact.path / name)
    return sum(files[name].bytes for name in weights)
