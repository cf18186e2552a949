"""The state of a run: every stage of every iteration, who is at it, what comes next. Read from manifests and locks.

done        committed, and what it was made of is what it was
stale       an input has other bytes by now, or was redone under another name
pruned      committed; its weights were deleted
redone      the same as another artifact with changes (`labels-0.lenient`); the run does not use it
running     a process is making it; what it has finished so far
unfinished  a process that is gone had begun it; the next run goes on from there
missing     the run will make it
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.lineage import Ledger, no_collecting
from flows.promotion import PROMOTED
from flows.run import LOCK_FILE
from flows.sheets import Sheet
from pipeline.artifacts import Manifest
from pipeline.catalog import EXPERIMENT_FILE, is_aside, is_redone, name_of, refuse_no_run
from pipeline.experiment import Experiment
from pipeline.locks import holder, is_held
from pipeline.storage import SCRATCH

KEY_NUMBERS = ("accuracy/mean", "reward/mean", "accuracy/held_out", "kl/sampler", "entropy/mean", "tokens", "steps")
"""The first that an artifact has stands beside it."""
SHOWN_IN_FULL = 3
"""Iterations of which every artifact has a line; of longer runs the last two have."""
LAST_WELL = 10
"""Iterations before them that have a line each where there are more than twice as many; earlier ones share one."""


@dataclass(frozen=True)
class Line:
    """One artifact, or what will be one."""

    name: str
    state: str
    seconds: float | None = None
    rows: float | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        return self.name, self.state, seconds, "" if self.rows is None else f"{self.rows:,.0f}", self.note


@no_collecting()
def status(folder: Path, *, every: bool = False) -> tuple[list[str], Sheet]:
    """Lines about the run as a whole, and the table of its artifacts; `every` artifact, or old iterations as one line.

    Raises `ArtifactError` for a folder that is neither a run nor holds artifacts.
    """
    if not folder.is_dir():
        refuse_no_run(folder)
    ledger = Ledger.around(folder)
    here = folder.resolve()
    deep = len(here.parts)
    below = {path: manifest for path, manifest in ledger.manifests.items() if path.parts[:deep] == here.parts}
    own = {path: manifest for path, manifest in below.items() if not is_aside(path.parts[deep:])}
    if not own and not (folder / EXPERIMENT_FILE).is_file():
        refuse_no_run(folder)
    lines = [_committed(ledger, path, manifest, here) for path, manifest in own.items()]
    lines += begun([path for path in ledger.survey.scratches if path.parts[:deep] == here.parts], here)
    if (folder / EXPERIMENT_FILE).is_file():
        experiment = Experiment.load(folder / EXPERIMENT_FILE)
        lines += _missing(experiment, {line.name for line in lines})
        told = list(about(folder, experiment))
    else:
        told = []
    ordered = sorted(lines, key=lambda line: _order(line.name))
    shown = ordered if every else list(_folded(ordered))
    return told, Sheet(str(folder), ("artifact", "state", "seconds", "rows", ""), tuple(x.cells() for x in shown))


def _committed(ledger: Ledger, path: Path, manifest: Manifest, run: Path) -> Line:
    standing = ledger.standing(path)
    state = "redone" if is_redone(path) and standing.state == "done" else str(standing)
    stats = manifest.stats
    number = next((f"{name} {stats[name]:.4g}" for name in KEY_NUMBERS if name in stats), "")
    return Line(name_of(path, run.parent), state, stats.get("seconds"), stats.get("rows"), number)


def begun(scratches: Sequence[Path], run: Path) -> Iterator[Line]:
    """What is in the making in a run, or was."""
    for scratch in scratches:
        name = scratch.name.removeprefix(SCRATCH).rpartition("-")[0]
        running = is_held(scratch / "log.txt")
        parts = len(list(scratch.glob("part-*.parquet")))
        saved = sorted(path.name for path in scratch.glob("working/progress/[0-9]*"))
        done = f"{parts} parts" if parts else f"saved at step {int(saved[-1].split('-')[0])}" if saved else "just begun"
        who = f"; {holder(scratch / 'working' / 'holder.json')}" if running else ""
        yield Line(name_of(scratch.parent / name, run.parent), "running" if running else "unfinished", note=done + who)


def _missing(experiment: Experiment, there: set[str]) -> Iterator[Line]:
    """What the run will make: of each iteration what the first one has, and the evaluations."""
    first = 0 if experiment.fork is None else experiment.fork.at
    total, every = experiment.scale.iterations, experiment.evaluation.every
    pattern = {name.partition("/")[2] for name in there if name.startswith(f"{first:04d}/")}
    usual = [name for name in pattern if re.fullmatch(r"[a-z]+(-0)?", name)] if "policy" in pattern else ["policy"]
    for number in range(first, total):
        if f"{number:04d}/policy" in there:
            continue
        yield from (Line(f"{number:04d}/{name}", "missing") for name in usual if f"{number:04d}/{name}" not in there)
    if experiment.data.held_out is not None:
        regular = range(every, total, every) if every else range(0)
        for number in dict.fromkeys((first, *(n for n in regular if n > first), total)):
            if f"eval/{number:04d}/labels" not in there:
                yield Line(f"eval/{number:04d}/labels", "missing")


def about(folder: Path, experiment: Experiment) -> Iterator[str]:
    """The run as a whole: recipe, how far it is, who is at it, what is promoted."""
    done = len([path for path in folder.glob("[0-9][0-9][0-9][0-9]/policy") if path.is_dir()])
    origin = "" if experiment.fork is None else f", forked from {experiment.fork.run} at {experiment.fork.at}"
    first = 0 if experiment.fork is None else experiment.fork.at
    yield (
        f"{experiment.name}: recipe {experiment.recipe.name}{origin}; policies of {done} of "
        f"{experiment.scale.iterations - first} iterations"
    )
    if is_held(folder / LOCK_FILE):
        yield f"running: {holder(folder / LOCK_FILE)}"
    if (folder / PROMOTED).is_symlink():
        yield f"promoted: {os.path.relpath((folder / PROMOTED).resolve(), folder.resolve())}"


AS_DATA_PASSES = (
    "candidates", "questions", "rankings", "reward", "rollouts", "judgements", "labels", "scores", "advantages",
    "critic", "policy", "perplexity",
)  # fmt: skip
"""Order of the artifacts of an iteration."""


def _order(name: str) -> tuple[int, str, int, str]:
    """Foundations, then iterations, then evaluations; inside an iteration as the data passes."""
    place, _, last = name.rpartition("/")
    kind = 2 if place.startswith("eval") else 1 if re.match(r"\d{4}", place) else 0
    stem = re.split("[-.]", last)[0]
    return kind, place, AS_DATA_PASSES.index(stem) if stem in AS_DATA_PASSES else len(AS_DATA_PASSES), last


def _folded(lines: Sequence[Line]) -> Iterator[Line]:
    """Old iterations in which all is well as one line each, those long ago as one line together."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.name.rpartition("/")[0], []).append(line)
    numbers = [name for name in groups if re.fullmatch(r"\d{4}", name)]
    with_work = [n for n in numbers if any(line.state != "missing" for line in groups[n])]
    full = set(numbers) if len(numbers) <= SHOWN_IN_FULL else set(with_work[-2:])
    waiting = [name for name in numbers if name not in with_work and name not in full]
    well = [
        name for name in numbers if name not in full and all(line.state in ("done", "pruned") for line in groups[name])
    ]
    long_ago = set(well[:-LAST_WELL]) if len(well) > 2 * LAST_WELL else set()
    block: list[str] = []
    for name, group in groups.items():
        if name in long_ago:
            block.append(name)
            continue
        yield from _block(block, groups)
        block = []
        if name in waiting:
            if name == waiting[0]:
                until = "" if len(waiting) == 1 else f" to {waiting[-1]}"
                yield Line(f"{name}{until}", "missing")
        elif name in well:
            yield _one_line(name, group)
        else:
            yield from group
    yield from _block(block, groups)


def _block(names: Sequence[str], groups: Mapping[str, Sequence[Line]]) -> Iterator[Line]:
    """Iterations after each other in which all is well, as one line."""
    if names:
        until = "" if len(names) == 1 else f" to {names[-1]}"
        yield _one_line(f"{names[0]}{until}", [line for name in names for line in groups[name]])


def _one_line(name: str, group: Sequence[Line]) -> Line:
    states: Mapping[str, int] = {state: sum(line.state == state for line in group) for state in ("done", "pruned")}
    state = ", ".join(f"{state} {count}" if count != len(group) else state for state, count in states.items() if count)
    rows = sum(line.rows or 0 for line in group if "/rollouts-" in line.name)
    note = next((line.note for line in reversed(group) if "/labels-" in line.name), "")
    return Line(f"{name}/ ({len(group):,} artifacts)", state, sum(line.seconds or 0 for line in group), rows, note)
