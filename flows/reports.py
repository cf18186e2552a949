"""What the commands print for a person."""

import json
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import tomli_w
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.promotion import PROMOTED
from flows.run import MissingError, Outcome, name_of
from flows.tables import Sheet, contract_sheet, recipes_sheet, stages_sheet
from pipeline.algorithms.recipe import Recipe
from pipeline.artifacts import Artifact
from pipeline.contracts import CONTRACTS, Contract
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment
from pipeline.metrics import console
from pipeline.settings import without_none

out = Console(soft_wrap=False)

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
    rlhf, elsewhere = _command(), "" if root == Path("runs") else f" --root {root}"
    other = next(name for name in Recipe.names() if name != experiment.recipe.name)
    lines += [
        f"the run lies in {folder}",
        "",
        "next:",
        f"  {rlhf} status {folder}",
        f"  {rlhf} results {folder}",
        f'  {rlhf} show {folder}/0000/labels-0 --where "reward < 1"',
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


def _print(sheet: Sheet) -> None:
    table = Table(*sheet.header, title=sheet.title, title_justify="left")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    out.print(table)


def stages() -> None:
    """`rlhf stages`."""
    _print(stages_sheet())


def contracts(name: str | None) -> None:
    """`rlhf contracts [NAME]`."""
    if name is not None and name not in CONTRACTS:
        raise ExperimentError(f"no contract is called {name!r}; there are: {', '.join(CONTRACTS)}")
    for contract in CONTRACTS.values():
        if contract.is_table and name in (None, contract.name):
            out.print(contract.doc)
            _print(contract_sheet(contract))


def recipes(name: str | None) -> None:
    """`rlhf recipes [NAME]`: the table, or the recipe's file with the source of each number."""
    if name is None:
        _print(recipes_sheet())
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
        _print(sheet)
    sys.stdout.write(f"picture: {comparing.picture(made)}\n")


def results(folders: list[Path]) -> None:
    """`rlhf results`: the final table, and score against accuracy as a picture where a reward model judged."""
    from flows import hacking
    from flows import results as ending

    _print(ending.table(folders).transposed())
    if (picture := hacking.draw(folders)) is not None:
        sys.stdout.write(f"score against accuracy, as a picture: {picture}\n")


def status(folder: Path, *, every: bool) -> None:
    """`rlhf status RUN`: what is there, in the making, stale and missing."""
    from flows import status as state

    about, sheet = state.status(folder, every=every)
    for line in about:
        out.print(line, markup=False)
    _print(sheet)


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
    from flows.verifying import leftovers, verified

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
    for scratch in leftovers(path):
        out.print(f"{scratch}: unfinished; the next run goes on with it", markup=False)
    told = f"{bad} of them are not as they were made" if bad else "all as they were made"
    out.print(f"{count} artifacts, {size / 1e6:,.1f} MB: {told}")
    return not bad


def show(path: Path, rows: int, where: str | None) -> None:
    """`rlhf show PATH`: manifest, columns with their meaning, statistics, sample rows."""
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    out.print(
        f"[bold]{manifest.kind}[/bold] made by stage {manifest.stage} version {manifest.version}, "
        f"{manifest.made.get('time', 'elsewhere')}"
    )
    out.print(f"fingerprint {manifest.fingerprint[:16]}  digest {manifest.digest[:16]}")
    out.print("settings", tomli_w.dumps(without_none(manifest.settings)), markup=False)
    for name, records in manifest.inputs.items():
        for record in records:
            out.print(f"input {name}: {record.path} ({record.digest[:16]})", markup=False)
    if artifact.contract.is_table:
        _show_table(artifact, artifact.contract, rows, where)
    numbers = tuple((name, f"{value:,.6g}") for name, value in manifest.stats.items())
    _print(Sheet("statistics", ("name", "value"), numbers))


def _show_table(artifact: Artifact, contract: Contract, rows: int, where: str | None) -> None:
    _print(contract_sheet(contract))
    import duckdb

    condition = f" where ({where})" if where else ""
    connection = duckdb.connect()
    try:
        connection.register("data", artifact.table())
        # What a person types may look at the rows, and at nothing else on this machine.
        connection.execute("set enable_external_access = false; set lock_configuration = true")
        one = f"select * from data{condition} limit {int(rows)}"  # noqa: S608
        if len(duckdb.extract_statements(one)) != 1:
            raise ExperimentError("one condition is wanted", f"--where {where!r}", "leave out the `;`")
        found = connection.execute(one).to_arrow_table()
        [(total,)] = connection.execute(f"select count(*) from data{condition}").fetchall()  # noqa: S608
    except duckdb.Error as error:
        raise ExperimentError(
            f"cannot select: {error}", f"--where {where!r}", "name columns of the table above"
        ) from error
    out.print(f"{min(rows, total)} of {total} rows" + (f" where {where}" if where else ""), markup=False)
    for row in found.to_pylist():
        _show_row(row)


def _show_row(row: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in row.items():
        table.add_row(f"[dim]{name}[/dim]", _short(value))
    out.print(table)
    out.print()


def _short(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], float):
        return Text(
            f"{len(value)} numbers: " + " ".join(f"{x:.3g}" for x in value[:12]) + (" ..." if len(value) > 12 else "")
        )
    if isinstance(value, list):
        return Text(
            f"{len(value)}: " + json.dumps(value[:24], ensure_ascii=False) + (" ..." if len(value) > 24 else "")
        )
    return Text(str(value))
