"""What Prefect starts by itself: the flows that flows/prefect.yaml names, beside the whole run (flows/execute.py).

Their parameters are the forms on Prefect's pages, which take their words from `Args`. Paths start at the folder in
which `rlhf deploy` was typed.
"""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from flows import pictures
from flows.evaluate import evaluate
from flows.execute import finished, run_experiment
from flows.forking import branch, stood
from flows.foundations import foundations
from flows.run import Outcome, Run, find_experiment, look_up
from flows.tables import STAGES, load_stage
from flows.tasks import as_task, perform
from pipeline.catalog import EXPERIMENT_FILE, refuse_no_run
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment, Fork, Resources
from pipeline.launch import launch
from pipeline.metrics import console
from pipeline.stage import Stage


@flow(name="iteration", flow_run_name="{run}")
def iteration(run: str) -> str:
    """Make one more iteration of a run; the last one is followed by its evaluation.

    Returns the directory of the policy. Raises `ExperimentError` where all iterations are there.

    Args:
        run: Directory of a run, such as runs/arithmetic.
    """
    folder = Path(run)
    experiment = _experiment_of(folder)
    if isinstance(finished(experiment, folder.parent), Outcome):
        total = experiment.scale.iterations
        raise ExperimentError(
            f"the run has all its {total} iterations", run,
            f"`rlhf run {folder / EXPERIMENT_FILE} --root {folder.parent} --set scale.iterations={total + 1}`",
        )  # fmt: skip
    return run_experiment.fn(str(folder / EXPERIMENT_FILE), name=folder.name, root=str(folder.parent), at_most=1)


@flow(name="stage", flow_run_name="{name}: {out}")
def stage(
    name: Annotated[str, Field(json_schema_extra={"enum": [*STAGES]})],
    inputs: dict[str, str | list[str]],
    out: str,
    settings: dict[str, Any] | None = None,
    experiment: str | None = None,
) -> str:
    """Run one stage alone, on any artifacts. Returns the directory that it made.

    Args:
        name: Which stage.
        inputs: Input to path, or to a list of paths: {"policy": "runs/small/0000/policy"}. `rlhf stages` lists them.
        out: Directory to make.
        settings: Setting to value, on top of the experiment's: {"room": 64}. `rlhf stage NAME --help` lists them.
        experiment: Name or file of the experiment that settings and resources are taken from.
    """
    asked, target = load_stage(name), Path(out)
    paths = _paths(asked, inputs)
    file = None if experiment is None else find_experiment(experiment)
    resolved = None if file is None else Experiment.load(file)
    wanted = asked.settings_type.of(resolved, settings)
    if (done := asked.committed(target, wanted, **paths)) is not None:
        return str(done.path)

    def work() -> Any:
        if resolved is None or file is None:
            return asked.run(target, wanted, **paths)
        return launch(asked, target, wanted, (resolved, file), **paths)

    resources = Resources() if resolved is None else resolved.resources
    made = perform(work, asked, target, resources, out, out)
    pictures.wait()
    return str(made.path)


@flow(name="evaluate", flow_run_name="{run}, iteration {iteration}")
def evaluation(run: str, iteration: Annotated[int, Field(ge=0)]) -> str | None:
    """Evaluate the policy that an iteration starts from on the run's held-out prompts and documents.

    Returns the directory of the labels; None where no prompts are held out.

    Args:
        run: Directory of a run, such as runs/arithmetic.
        iteration: Whose first policy; one past the last iteration: the final one.
    """
    folder = Path(run)
    experiment = _experiment_of(folder)
    looking = Run(experiment, folder.parent, look_up)
    base, _, _ = branch(looking, foundations(looking))
    _, now = stood(folder.parent, Fork(run=folder.name, at=iteration))
    labels = evaluate(Run(experiment, folder.parent, as_task, console.line), base, now.policy, iteration)
    pictures.wait()
    return None if labels is None else str(labels.path)


def _experiment_of(folder: Path) -> Experiment:
    refuse_no_run(folder)
    return Experiment.load(folder / EXPERIMENT_FILE, name=folder.name)


def _paths(asked: Stage, inputs: dict[str, str | list[str]]) -> dict[str, Path | list[Path]]:
    """Paths as a stage takes them. Raises `ExperimentError` for an input that it has not, or not several of."""
    specs = {spec.name: spec for spec in asked.inputs}
    for name, given in inputs.items():
        if name not in specs:
            raise ExperimentError(
                f"stage {asked.name} has no input {name!r}; there are: {', '.join(specs)}", "inputs", "`rlhf stages`"
            )
        if not isinstance(given, str) and not specs[name].many:
            raise ExperimentError(f"stage {asked.name} takes one {name}, not {len(given)}", "inputs", "give one path")
    return {name: Path(given) if isinstance(given, str) else [*map(Path, given)] for name, given in inputs.items()}
