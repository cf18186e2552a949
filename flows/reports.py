"""What the commands print for a person."""

import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import get_args

from flows.promotion import PROMOTED
from flows.reporting import REPORT
from flows.run import MissingError, Outcome, find_experiment
from flows.sheets import out, print_sheet
from flows.tables import contract_sheet, metrics_sheet, recipes_sheet, stages_sheet
from pipeline.algorithms.recipe import Recipe
from pipeline.artifacts import Artifact
from pipeline.catalog import Survey, name_of
from pipeline.contracts import CONTRACTS
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment
from pipeline.metrics import console

WIDE = 160
"""Characters of a terminal from which on `rlhf metrics` is a table."""

REMARKS = 5
"""Artifacts that `rlhf verify` names one by one where they are stale or pruned."""


def plan(experiment: Experiment, root: Path, outcome: Outcome | MissingError) -> None:
    """`run --dry-run`: the resolved experiment, and where work would begin."""
    sys.stdout.write(experiment.dump())
    begins = "everything is done" if isinstance(outcome, Outcome) else f"next: {name_of(outcome.path, root)}"
    sys.stdout.write(f"\n# in {root / experiment.name}: {begins}\n")


def summary(asked: str, experiment: Experiment, root: Path, outcome: Outcome | MissingError) -> None:
    """The last lines of a run: held-out accuracy before and after, where it lies, what to type next."""
    folder = root / experiment.name
    lines = []
    if isinstance(outcome, Outcome) and outcome.before is not None and outcome.after is not None:
        before, after = (_accuracy(labels) for labels in (outcome.before, outcome.after))
        lines += [f"held-out accuracy before: {before}", f"held-out accuracy after:  {after}"]
    if (promoted := folder / PROMOTED).is_symlink():
        lines.append(f"promoted: {promoted} -> {promoted.readlink()}")
    if (page := folder / REPORT).exists():
        lines.append(f"report: {page}")
    rlhf, elsewhere = _command(), "" if root == Path("runs") else f" --root {root}"
    other = next(name for name in Recipe.names() if name != experiment.recipe.name)
    lines += [
        f"the run lies in {folder}",
        "",
        "next:",
        f"  {rlhf} status {folder}",
        f"  {rlhf} results {folder}",
        f"  {rlhf} sql {folder} --query flipped",
        f'  {rlhf} show {folder}/0000/labels-0 --tokens --where "reward < 1"',
        f"  {rlhf} run {asked} --recipe {other} --name {experiment.name}-{other}{elsewhere}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _command() -> str:
    """How `rlhf` is called here: by its name, or by its path as typed where the shell does not find it."""
    typed = sys.argv[0]
    return typed if Path(typed).name == "rlhf" and shutil.which("rlhf") is None else "rlhf"


def _accuracy(labels: Artifact) -> str:
    stats = labels.stats
    if "accuracy/mean" not in stats:
        return f"none (mean reward {stats['reward/mean']:.3f})"
    groups = stats["groups/seen"]
    return (
        f"{stats['accuracy/mean']:.3f}  (mean of {stats['rows'] / groups:.0f} samples on {groups:.0f} prompts; "
        f"pass@k {stats['accuracy/pass_at_k']:.3f}, maj@k {stats['accuracy/majority_at_k']:.3f})"
    )


def estimate(
    asked: str, recipe: str | None, changes: list[str], name: str | None, root: Path,
    where: tuple[str, int, float | None],
) -> None:  # fmt: skip
    """`rlhf plan EXPERIMENT`: what an iteration takes on so many devices, with responses of that length."""
    from flows import planning

    experiment = Experiment.load(find_experiment(asked), changes, recipe, name)
    made = planning.plan(experiment, root / experiment.name, *where)
    for sheet in planning.sheets(made, experiment):
        print_sheet(sheet)


def stages() -> None:
    """`rlhf stages`."""
    print_sheet(stages_sheet())


def contracts(name: str | None) -> None:
    """`rlhf contracts [NAME]`."""
    if name is not None and name not in CONTRACTS:
        raise ExperimentError(f"no contract is called {name!r}; there are: {', '.join(CONTRACTS)}")
    for contract in CONTRACTS.values():
        if contract.is_table and name in (None, contract.name):
            out.print(contract.doc)
            print_sheet(contract_sheet(contract))


def recipes(name: str | None) -> None:
    """`rlhf recipes [NAME]`: the table, or the recipe's file with the source of each number."""
    if name is None:
        print_sheet(recipes_sheet())
        return
    Recipe.load(name)
    sys.stdout.write(resources.files("pipeline.algorithms").joinpath("recipes", f"{name}.toml").read_text("utf-8"))


def compare(folder: Path, iteration: int, names: list[str], rewards: str) -> None:
    """`rlhf compare`: how recipes credit the same stored rollouts, as tables and as a picture."""
    from flows import compare as comparing

    if rewards not in get_args(comparing.Rewards):
        raise ExperimentError(f"--rewards is {rewards!r}", do=f"one of {', '.join(get_args(comparing.Rewards))}")
    whose: comparing.Rewards = "stored" if rewards == "stored" else "recipe"
    made = comparing.compare(comparing.stored(folder, iteration), names or Recipe.names(), whose)
    for sheet in comparing.sheets(made):
        print_sheet(sheet)
    sys.stdout.write(f"picture: {comparing.picture(made)}\n")


def results(folders: list[Path]) -> None:
    """`rlhf results`: the final table, and score against accuracy as a picture where a reward model judged."""
    from flows import hacking
    from flows import results as ending

    print_sheet(ending.table(folders).transposed())
    if (picture := hacking.draw(folders)) is not None:
        sys.stdout.write(f"score against accuracy, as a picture: {picture}\n")


def status(folder: Path, *, every: bool) -> None:
    """`rlhf status RUN`: what is there, in the making, stale and missing."""
    from flows import status as state

    about, sheet = state.status(folder, every=every)
    for line in about:
        out.print(line, markup=False)
    print_sheet(sheet)


def redo(folder: Path, stage: str, iteration: int | None, changes: list[str], name: str | None, *, stale: bool) -> None:
    """`rlhf redo RUN STAGE`, or `rlhf redo RUN --stale`."""
    from flows import redo as again

    if stale == bool(stage):
        raise ExperimentError(
            "name a stage, or say --stale" if not stale else f"--stale takes everything: leave out {stage!r}",
            do="rlhf redo RUN label --iteration 3, or rlhf redo RUN --stale",
        )
    if not stale:
        again.redo(folder, stage, iteration, changes, name, console.line)
    elif not again.refresh(folder, console.line):
        console.line("nothing is stale")


def prune(folder: Path, keep: int, *, dry_run: bool) -> None:
    """`rlhf prune RUN`: a line for each checkpoint whose weights go."""
    from flows.prune import prune as pruned

    freed = pruned(folder, keep, dry_run=dry_run)
    for one in freed:
        name = str(one.artifact.path) if one.artifact is not None else "artifacts that `rlhf redo` replaced"
        out.print(f"{name}: {one.bytes / 1e6:,.1f} MB", markup=False)
    would = "would be freed" if dry_run else "freed"
    out.print(f"{sum(one.bytes for one in freed) / 1e6:,.1f} MB {would}")


def lineage(path: Path, depth: int | None) -> None:
    """`rlhf lineage PATH`: what an artifact came from, as a tree."""
    from flows.lineage import tree

    out.print(tree(path, depth))


def verify(path: Path) -> bool:
    """`rlhf verify PATH`: a line for every fault; whether there is none."""
    from flows.verifying import verified

    count = bad = size = 0
    remarks: list[str] = []
    for one in verified(path):
        count, size = count + 1, size + sum(record.bytes for record in one.artifact.manifest.files.values())
        bad += bool(one.faults)
        for fault in one.faults:
            out.print(f"{one.artifact.path}: {fault}", markup=False)
        if one.faults:
            out.print(f"  next:  {one.do}", markup=False)
        remarks += [f"{one.artifact.path}: {remark}" for remark in one.remarks]
    for remark in remarks[:REMARKS]:
        out.print(remark, markup=False)
    if len(remarks) > REMARKS:
        out.print(f"and {len(remarks) - REMARKS} more that are stale or pruned: `rlhf status` lists them")
    for scratch in Survey.of(path).scratches:
        out.print(f"{scratch}: unfinished; the next run goes on with it", markup=False)
    told = f"{bad} of them are not as they were made" if bad else "all as they were made"
    out.print(f"{count} artifacts, {size / 1e6:,.1f} MB: {told}")
    return not bad


def metrics() -> None:
    """`rlhf metrics`: what stages measure, and what TRL and verl call it."""
    sheet = metrics_sheet()
    if out.width >= WIDE:
        print_sheet(sheet)
        return
    for name, kinds, unit, meaning, trl, verl, almost in sheet.rows:
        elsewhere = [
            f"{whose} {theirs}" for whose, theirs in (("TRL", trl), ("verl", verl), ("almost:", almost)) if theirs
        ]
        told = (f"{name} [{unit}]" if unit else name, f"of {kinds}: {meaning}", *elsewhere)
        out.print("\n  ".join(told), markup=False, highlight=False)
