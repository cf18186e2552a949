"""rlhf: the command line. Parsing it loads nothing heavy; exit code 0 done, 1 failed, 2 the request was wrong."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import lifeline, storage
from pipeline.errors import PipelineError

app = typer.Typer(
    help="Online RLHF of language models as batch stages that meet only through files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Root = Annotated[Path, typer.Option(help="Where runs lie: a directory, or a URL (s3://...).", parser=storage.place)]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or its URL.", parser=storage.at_hand)]
ArtifactPath = Annotated[Path, typer.Argument(help="An artifact.", parser=storage.at_hand)]
ExperimentFile = Annotated[str, typer.Argument(help="A name in flows/experiments, or a path to a .toml file.")]
OtherRecipe = Annotated[str | None, typer.Option(help="Another recipe than the experiment's.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value.")]
RunName = Annotated[str | None, typer.Option(help="Name of the run; the experiment's when absent.")]


@app.command()
def run(
    experiment: ExperimentFile,
    recipe: OtherRecipe = None,
    changes: Changes = None,
    name: RunName = None,
    root: Root = Path("runs"),
    dry_run: Annotated[bool, typer.Option(help="Print the resolved experiment and what is there already.")] = False,
    wait: Annotated[
        bool, typer.Option(help="Wait where another process is at this run, instead of saying so.")
    ] = False,
) -> None:
    """Run an experiment: foundations, loop, evaluation. Run it again to resume."""
    # Prefect's own lines would bury ours on the terminal; they still go to its server. It reads this on import.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from flows import temporary
    from flows.run import Outcome, Run, find_experiment, look_up, nothing
    from pipeline.experiment import Experiment
    from pipeline.metrics import console

    resolved = Experiment.load(find_experiment(experiment), changes or (), recipe, name)
    there = Run(resolved, root, look_up, console.line)
    last = there.iteration(resolved.scale.iterations - 1)
    server_answers = nothing if dry_run or (last / "policy").exists() else temporary.begin()
    from flows import execute, reports  # which takes seconds

    outcome = execute.finished(resolved, root)
    if dry_run:
        reports.plan(resolved, root, outcome)
        return
    if isinstance(outcome, Outcome):
        execute.settle_again(there)
    else:
        server_answers()
        execute.run_experiment(experiment, recipe, name, changes, str(root), wait=wait)
        outcome = execute.finished(resolved, root)
    reports.summary(experiment, resolved, root, outcome)


@app.command()
def plan(
    experiment: ExperimentFile,
    recipe: OtherRecipe = None,
    changes: Changes = None,
    name: RunName = None,
    root: Root = Path("runs"),
    device: Annotated[str, typer.Option(help="a100, h100, h200, or core: one of a CPU.")] = "h100",
    count: Annotated[int, typer.Option(help="How many of them.", min=1)] = 8,
    length: Annotated[float | None, typer.Option(help="Mean tokens of a response; the longest when absent.")] = None,
) -> None:
    """Reckon an iteration before it is run: bytes, seconds, memory, what breaks first; beside it what was measured."""
    from flows import reports

    reports.estimate(experiment, recipe, changes or [], name, root, (device, count, length))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def stage(context: typer.Context, name: Annotated[str, typer.Argument(help="One of `rlhf stages`.")]) -> None:
    """Run one stage alone, on any artifacts; `rlhf stage NAME --help` lists its inputs and settings."""
    from flows.tables import load_stage

    load_stage(name).main(context.args)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe in full.")] = None) -> None:
    """The recipes: paper, idea, models needed."""
    from flows import reports

    reports.recipes(name)


@app.command()
def contracts(name: Annotated[str | None, typer.Argument(help="Only this one.")] = None) -> None:
    """The columns of every dataset that passes between stages."""
    from flows import reports

    reports.contracts(name)


@app.command()
def stages() -> None:
    """The stages: what each reads and writes."""
    from flows import reports

    reports.stages()


@app.command()
def status(
    folder: Folder,
    every: Annotated[bool, typer.Option("--all", help="Every artifact of every iteration, however many.")] = False,
) -> None:
    """Every stage of every iteration: done, missing, stale or running; seconds, rows."""
    from flows import reports

    reports.status(folder, every=every)


@app.command()
def redo(
    folder: Folder,
    stage: Annotated[str, typer.Argument(help="A stage, or an artifact's own name: labels-0, sft, 0003/policy.")] = "",
    iteration: Annotated[int | None, typer.Option(help="Of the loop; none: the foundations.", min=0)] = None,
    changes: Changes = None,
    name: Annotated[str | None, typer.Option("--as", help="Beside the old one, under this name.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Everything that was made of other bytes.")] = False,
) -> None:
    """Do one stage of a run again: with changes beside the old artifact, without in its place."""
    from flows import reports

    reports.redo(folder, stage, iteration, changes or [], name, stale=stale)


@app.command()
def prune(
    folder: Folder,
    keep: Annotated[int, typer.Option(help="Last checkpoints of each kind whose weights stay.")] = 2,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be deleted.")] = False,
) -> None:
    """Delete old weights; manifests stay, and so do the promoted, the best, and what others started from."""
    from flows import reports

    reports.prune(folder, keep, dry_run=dry_run)


@app.command()
def lineage(
    path: ArtifactPath,
    depth: Annotated[int | None, typer.Option(help="How many steps back.", min=0)] = None,
) -> None:
    """Where an artifact came from, back to the files, and whether all of it is still what it was."""
    from flows import reports

    reports.lineage(path, depth)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="An artifact, a run, or a directory of runs.", parser=storage.at_hand)],
) -> None:
    """Whether everything has the bytes that it was made with; exit code 1 where anything has not."""
    from flows import reports

    if not reports.verify(path):
        raise typer.Exit(1)


@app.command()
def show(
    path: ArtifactPath,
    rows: Annotated[int, typer.Option(help="Sample rows to print.", min=0)] = 5,
    where: Annotated[str | None, typer.Option(help='SQL condition, e.g. "reward < 0".')] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Responses token by token, numbers as colour.")] = False,
    column: Annotated[str | None, typer.Option(help="Which number of each token; all that are there: absent.")] = None,
    html: Annotated[Path | None, typer.Option(help="With --tokens: write a page instead.")] = None,
) -> None:
    """An artifact: manifest, columns with their meaning, statistics, sample rows; or responses token by token."""
    if tokens:
        from flows import heat

        heat.show(path, rows, where, column, html)
    elif column is not None or html is not None:
        raise typer.BadParameter("--column and --html go with --tokens")
    else:
        from flows import looking

        looking.show(path, rows, where)


@app.command()
def sql(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN... [SQL]", help="Runs, directories of runs, patterns; the statement comes last."),
    ] = None,
    query: Annotated[str | None, typer.Option(help="A named query instead; `rlhf sql` alone lists them.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="A=B", help="A setting of the query.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to print.", min=1)] = 40,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="All rows into a .parquet, .csv or .jsonl.")] = None,
) -> None:
    """SQL over the datasets of runs (views: prompts, rollouts, labels, responses, metrics, ...), or a named query."""
    from flows import looking

    looking.sql(runs or [], query, changes or [], rows, out)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="An artifact or a run.", parser=storage.at_hand)],
    b: Annotated[Path, typer.Argument(help="Another one of the same kind.", parser=storage.at_hand)],
    rows: Annotated[int, typer.Option(help="Changed rows to print.", min=0)] = 5,
) -> None:
    """Two artifacts or two runs: settings, statistics, rows that differ."""
    from flows.differing import diff as differences

    differences(a, b, rows)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, directories of runs, patterns.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; RUN/report.html when absent.")] = None,
) -> None:
    """One HTML page that opens offline: curves, distributions, every chosen response, lineage, settings, cost."""
    from flows.reporting import report as write

    write(runs, out)


@app.command()
def watch(
    folder: Folder,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """A run in the terminal while it goes on: curves, the last iterations, who is at it, time left. Ctrl-C ends it."""
    from flows.watching import watch as look

    look(folder, every, once=once)


@app.command()
def relabel(
    folder: Folder,
    iteration: Annotated[int, typer.Option(help="Whose stored rollouts.", min=0)],
    name: Annotated[str, typer.Option("--as", help="Name of the new labels: they lie beside the old ones.")],
    label: Annotated[str | None, typer.Option(help="Another labeler, e.g. majority_vote.")] = None,
    grader: Annotated[str | None, typer.Option(help="Another grader of the answers, e.g. math.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Labeler and filters of another recipe.")] = None,
    changes: Changes = None,
) -> None:
    """Label stored rollouts again, beside the old labels, and show what it changes."""
    from flows.relabeling import relabel as again
    from pipeline.metrics import console

    again(folder, iteration, name, label, grader, recipe, changes or [], console.line)


@app.command()
def export(
    path: Annotated[
        Path,
        typer.Argument(
            help="Prompts, demonstrations, documents, rankings, rollouts or labels.", parser=storage.at_hand
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .jsonl or .parquet.")],
    to: Annotated[str, typer.Option(help="Whose rows: verl or trl.")],
) -> None:
    """A dataset as the rows that verl or TRL read."""
    from flows.exporting import export as write

    write(path, to, out)


@app.command()
def metrics() -> None:
    """What stages measure, and what TRL and verl call it."""
    from flows import reports

    reports.metrics()


@app.command()
def compare(
    folder: Folder,
    recipes: Annotated[str, typer.Option(help="Names, separated by commas; all when absent.")] = "",
    iteration: Annotated[int, typer.Option(help="Whose stored rollouts.", min=0)] = 0,
    rewards: Annotated[str, typer.Option(help="Each recipe's own, or the run's `stored` ones.")] = "recipe",
) -> None:
    """Credit the stored rollouts of an iteration under other recipes, beside the run's own; nothing is generated."""
    from flows import reports

    reports.compare(folder, iteration, [name.strip() for name in recipes.split(",") if name.strip()], rewards)


@app.command()
def results(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of finished runs.", parser=storage.at_hand),
    ],
) -> None:
    """What runs came to, side by side: accuracy, win rate against SFT, score, KL, loss on documents; a picture."""
    from flows import reports

    reports.results(folders)


@app.command()
def fork(
    folder: Folder,
    at: Annotated[int, typer.Option(help="First iteration of the new run; what lies before is shared.", min=0)],
    name: Annotated[str, typer.Option("--as", help="Name of the new run.")],
    recipe: Annotated[str | None, typer.Option(help="Another recipe than the run's.")] = None,
    changes: Changes = None,
) -> None:
    """A new run that goes on from where another one stood; nothing is copied."""
    from flows.forking import fork as write

    file = write(folder, at, name, recipe, tuple(changes or ()))
    sys.stdout.write(
        f"{name} goes on from iteration {at} of {folder}\n\nnext:\n  rlhf run {file} --root {file.parents[1]}\n"
    )


@app.command()
def promote(
    folder: Folder,
    refuse: Annotated[bool, typer.Option(help="The policy that waits is not to be promoted.")] = False,
) -> None:
    """A person's word: promote the policy that waits for it (setting promotion.approval), or refuse it."""
    from flows import promotion
    from pipeline.metrics import console

    promotion.promote(folder, console.line, refused=refuse)


claims_app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False)
app.add_typer(claims_app, name="claims")


@claims_app.callback()
def claims(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Option(help="Other claims: a directory with worlds and results.")] = None,
) -> None:
    """The papers' claims, re-created in small: what was found, from stored results."""
    from flows.claims import CLAIMS

    context.obj = folder or CLAIMS
    if context.invoked_subcommand is None:
        from flows import claims_page

        claims_page.show(context.obj)


@claims_app.command("run")
def run_claim(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="One of `rlhf claims`.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0 to one less than this.", min=1)] = 5,
    root: Root = Path("runs/claims"),
    jobs: Annotated[int, typer.Option(help="Arms at a time, each with its share of the cores.", min=1)] = 1,
) -> None:
    """Run the arms of a claim that are not stored yet; run it again to resume."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from flows import claiming
    from flows.claims import Claim
    from pipeline.metrics import console

    claiming.run(Claim.load(name, context.obj), seeds, root, jobs, console.line)


@claims_app.command("page")
def write_claims(context: typer.Context) -> None:
    """Write the claims' README.md and its pictures from stored results (needs matplotlib)."""
    from flows import claims_page

    claims_page.write(context.obj)


@app.command()
def deploy() -> None:
    """Register the deployments of flows/prefect.yaml with the Prefect server at PREFECT_API_URL; runs start here."""
    from flows import serving

    serving.deploy(Path.cwd())


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="Of the server; PREFECT_API_URL's, or 4200, when absent.")] = None,
    database: Annotated[str | None, typer.Option(help="postgresql+asyncpg://...; SQLite when absent.")] = None,
) -> None:
    """Run a Prefect server on this machine (where none answers), the deployments and a worker, until Ctrl-C."""
    from flows import serving

    serving.serve(Path.cwd(), port, database)


def command() -> None:
    """`rlhf` as a process of its own."""
    with lifeline.left_at_once():
        main()


def main() -> None:
    """The command line; errors of ours are told without a traceback."""
    try:
        app()
    except PipelineError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    command()
