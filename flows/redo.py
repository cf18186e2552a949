"""Do one stage of a run again: with changes beside the old artifact, without any in its place.

What is replaced is not thrown away: it lies in `.replaced` of its run. What was made of the old artifact is stale then,
and is told so; `refresh` walks the run and makes all of that again.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from flows.execute import walk
from flows.lineage import Ledger
from flows.run import Run, name_given, write_metrics
from flows.tables import STAGES, load_stage
from pipeline import storage
from pipeline.artifacts import Artifact, Manifest, place_of
from pipeline.catalog import EXPERIMENT_FILE, REPLACED, artifacts_of, is_redone, name_of, refuse_no_run
from pipeline.errors import ArtifactError, ExperimentError, InputError
from pipeline.experiment import Experiment
from pipeline.launch import launch
from pipeline.settings import explain, override
from pipeline.stage import Paths, Stage, StageSettings

Say = Callable[[str], None]


def redo(
    folder: Path, what: str, iteration: int | None, changes: Sequence[str], name: str | None, say: Say
) -> list[Artifact]:
    """Make the artifacts of a stage again, and tell what is stale by it.

    `what` is a stage (`label`) or an artifact's own name (`0003/labels-0`, `labels-0` with an iteration, `sft`). With
    `changes` to the stage's settings, or a `name`, the new artifact lies beside the old one as `labels-0.NAME`; without
    it takes the old one's place. Raises `ExperimentError` for what cannot be meant, and what the stage raises: the old
    artifact is then where it was.
    """
    refuse_no_run(folder)
    run = Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, _never, say)
    with run.held():
        ledger = Ledger.around(folder)
        found = _meant(run, ledger, what, iteration)
        if not changes and name is None:
            return [_in_place(run, ledger, path, say) for path in found]
        label = _label(name, found)
        return [_beside(run, ledger, path, changes, label, say) for path in found]


def refresh(folder: Path, say: Say) -> list[Artifact]:
    """Make everything again that the run would make differently today, because something before it was replaced."""
    refuse_no_run(folder)
    made: list[Artifact] = []
    visited: set[Path] = set()

    def replacing(
        run: Run, stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None
    ) -> Artifact:
        visited.add(out)
        try:
            if (done := stage.committed(out, settings, **paths)) is not None:
                return done
            old = None
        except ArtifactError:
            if not out.exists():
                raise
            old = _set_aside(out)
        made.append(_made(run, stage, out, settings, old, paths))
        say(f"made again: {name_of(out, run.root)}")
        return made[-1]

    run = Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, replacing, say)
    with run.held():
        walk(run)
        ledger = Ledger.around(folder)
        for artifact in artifacts_of(folder):
            if artifact.path not in visited and ledger.standing(artifact.path).state == "stale":
                _set_aside(artifact.path)
                say(f"not needed any more: {name_of(artifact.path, run.root)}, now in {REPLACED}")
        write_metrics(folder)
    return made


def _never(
    run: Run, stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None
) -> Artifact:
    raise ArtifactError("redo makes what it is asked for, and nothing else", str(out))


def _meant(run: Run, ledger: Ledger, what: str, iteration: int | None) -> list[Path]:
    """The artifacts that are asked for."""
    places = (run.folder.resolve(), run.base.resolve())
    own = [path for path in ledger.manifests if any(path.is_relative_to(place) for place in places)]
    own = [path for path in own if not is_redone(path)]
    named = {name_of(path, ledger.root): path for path in own}
    wanted = what if iteration is None else f"{iteration:04d}/{what}"
    if wanted in named:
        return [named[wanted]]
    if what not in STAGES:
        raise ExperimentError(
            f"{run.experiment.name} has no artifact {wanted!r}, and no stage is called so", str(run.folder),
            f"`rlhf status` lists its artifacts; the stages are {', '.join(STAGES)}",
        )  # fmt: skip
    of_stage = [path for path in own if ledger.manifests[path].stage == what and path.parent.parent.name != "eval"]
    found = [path for path in of_stage if place_of(path)[1] == iteration]
    if not found:
        where = sorted({n for path in of_stage if (n := place_of(path)[1]) is not None})
        there = f"it did in iterations {where[0]} to {where[-1]}" if where else "it did nowhere"
        raise ExperimentError(
            f"stage {what} made nothing in {'the foundations' if iteration is None else f'iteration {iteration}'}",
            str(run.folder), f"{there}: give --iteration, or the artifact's own name",
        )  # fmt: skip
    return found


def _label(name: str | None, found: Sequence[Path]) -> str:
    if name is not None:
        return name_given(name)
    number = 1
    while any(path.with_name(f"{path.name}.redo-{number}").exists() for path in found):
        number += 1
    return f"redo-{number}"


def _beside(run: Run, ledger: Ledger, path: Path, changes: Sequence[str], label: str, say: Say) -> Artifact:
    manifest = ledger.manifests[path]
    stage, settings = _computation(manifest, changes)
    out = path.with_name(f"{path.name}.{label}")
    artifact = launch(stage, out, settings, (run.experiment, run.file), **_inputs(ledger, path))
    say(f"{name_of(out, ledger.root)}: {_numbers(artifact)}  (before: {_numbers(Artifact.open(path))})")
    if _tell_stale(ledger, path, say):
        at = "" if (iteration := place_of(path)[1]) is None else f" --at {iteration}"
        say("next:")
        say(f"  rlhf fork {run.folder}{at} --as NAME --set ...   (a run of its own from there on, with the change)")
        say(f"  rm -r {out}   (to forget it: the run itself goes by the old one)")
    return artifact


def _in_place(run: Run, ledger: Ledger, path: Path, say: Say) -> Artifact:
    manifest = ledger.manifests[path]
    stage, settings = _computation(manifest, ())
    inputs = _inputs(ledger, path)
    artifact = _made(run, stage, path, settings, _set_aside(path), inputs)
    name = name_of(path, ledger.root)
    if artifact.manifest.digest == manifest.digest:
        say(f"{name} is made again, with the same bytes: what was made of it is as it was")
    else:
        say(f"{name} is made again, with other bytes; the old one lies in {REPLACED}")
        if _tell_stale(ledger, path, say):
            say(f"next:\n  rlhf redo {run.folder} --stale   (makes all of them again)")
    return artifact


def _made(run: Run, stage: Stage, out: Path, settings: StageSettings, old: Path | None, paths: Paths) -> Artifact:
    """Make an artifact in a place that was cleared; whatever goes wrong, the old one comes back."""
    try:
        return launch(stage, out, settings, (run.experiment, run.file), **paths)
    except BaseException:
        if old is not None and not out.exists():
            old.rename(out)
            storage.moved(old, out)
        raise


def _computation(manifest: Manifest, changes: Sequence[str]) -> tuple[Stage, StageSettings]:
    stage = load_stage(manifest.stage)
    try:
        return stage, stage.settings_type.model_validate(override(manifest.settings, changes))
    except ValidationError as error:
        raise ExperimentError(
            explain(error), f"settings of stage {stage.name}", f"`rlhf stage {stage.name} --help` lists them"
        ) from error


def _inputs(ledger: Ledger, path: Path) -> Paths:
    """Where the inputs lie today. Raises `InputError` for one that is gone."""
    stage = load_stage(ledger.manifests[path].stage)
    many = {spec.name for spec in stage.inputs if spec.many}
    found: dict[str, Path | Sequence[Path] | None] = {}
    for name, records in ledger.manifests[path].inputs.items():
        places = [ledger.place(record) for record in records]
        for record, place in zip(records, places, strict=True):
            if place is None:
                raise InputError(
                    f"input {name} is gone", record.path, "put it back where it was, or name it: `rlhf stage`"
                )
        there = [place for place in places if place is not None]
        found[name] = there if name in many else there[0]
    return found


def _set_aside(path: Path) -> Path:
    """Move an artifact into `.replaced` of its run, where it keeps its place and gets its fingerprint as a suffix."""
    manifest = Manifest.read(path)
    run = next((place for place in path.parents if (place / EXPERIMENT_FILE).is_file()), path.parent)
    target = run / REPLACED / path.relative_to(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = (target.with_name(f"{target.name}-{manifest.fingerprint[:8]}{end}") for end in _endings())
    place = next(candidate for candidate in free if not candidate.exists())
    storage.complete(path, manifest.files)
    path.rename(place)
    storage.moved(path, place)
    return place


def _endings() -> Iterator[str]:
    yield ""
    number = 2
    while True:
        yield f"-{number}"
        number += 1


def _tell_stale(ledger: Ledger, path: Path, say: Say) -> bool:
    """Name what was made of an artifact; whether there is any."""
    stale = [other for other in ledger.downstream(path) if not is_redone(other)]
    if stale:
        say(f"stale now, {len(stale)} artifacts that were made of the old one:")
    for other in stale[:10]:
        say(f"  {ledger.name(other)}")
    if len(stale) > 10:
        say(f"  and {len(stale) - 10} more: `rlhf status` lists them")
    return bool(stale)


def _numbers(artifact: Artifact) -> str:
    named = ("reward/mean", "accuracy/mean", "groups/kept", "kl/sampler", "tokens", "rows", "steps")
    told = [f"{name} {artifact.stats[name]:.4g}" for name in named if name in artifact.stats]
    return ", ".join(told[:3]) or f"digest {artifact.manifest.digest[:12]}"
