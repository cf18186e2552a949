"""A run: where its artifacts lie, and how a stage is performed. All state is read back from manifests."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import MANIFEST, METRICS_FILE, SCRATCH, Artifact
from pipeline.contracts import METRICS
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.locks import held
from pipeline.settings import plain_name
from pipeline.stage import Stage, StageSettings

EXPERIMENT_FILE, LOCK_FILE = "experiment.toml", ".lock"
REPLACED = ".replaced"
"""Directory of a run in which artifacts lie that were made again in their place."""


class Perform(Protocol):
    """Gets a stage's artifact: by making it, or by looking whether it is there."""

    def __call__(
        self, run: "Run", stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None
    ) -> Artifact:
        """Return the artifact at `out` of this computation."""
        ...


class MissingError(Exception):
    """A run has a stage that is not done; `path` is where its artifact will lie."""

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path, stage)
        self.path, self.stage = path, stage


def look_up(
    run: "Run", stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None
) -> Artifact:
    """Return what is there. Raises `MissingError` where nothing is, `ArtifactError` where something else is."""
    done = stage.committed(out, settings, **paths)
    if done is None:
        raise MissingError(out, stage.name)
    return done


def silent(line: str) -> None:
    """Keep a line to yourself."""


def nothing(*what: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Run:
    """One experiment, executed in `root/NAME`; what recipes share lies in `root/BASE`."""

    experiment: Experiment
    root: Path
    perform: Perform
    say: Callable[[str], None] = silent
    """Told how the loop goes, a line per iteration; nobody is, unless somebody asks."""
    after_evaluation: Callable[["Run"], None] = nothing
    """Called when a policy has been evaluated on held-out prompts."""
    after_iteration: Callable[["Run", int], None] = nothing
    """Called with the number of an iteration that is done."""

    @property
    def folder(self) -> Path:
        """The run's own directory."""
        return self.root / self.experiment.name

    @property
    def base(self) -> Path:
        """Ingested data and the SFT policy."""
        return self.root / self.experiment.base

    @property
    def file(self) -> Path:
        """The resolved experiment."""
        return self.folder / EXPERIMENT_FILE

    def held(self, *, wait: bool = False) -> AbstractContextManager[None]:
        """Keep other processes from working on this run. Raises `BusyError` that names the one at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return held(self.folder / LOCK_FILE, f"the run {self.experiment.name}", wait=wait)

    def write_experiment(self) -> None:
        """Leave the resolved experiment in the run, whole."""
        temporary = self.folder / f"{EXPERIMENT_FILE}.tmp"
        temporary.write_text(self.experiment.dump(), encoding="utf-8")
        temporary.rename(self.file)

    def iteration(self, number: int) -> Path:
        """Directory of one walk of the loop."""
        return self.folder / f"{number:04d}"

    def do(self, stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None) -> Artifact:
        """Perform a stage."""
        return self.perform(self, stage, out, settings, **paths)


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to."""

    policy: Artifact
    before: Artifact | None
    """Labels of policy 0 on held-out prompts."""
    after: Artifact | None


def refuse_no_run(folder: Path) -> None:
    """Raise `ArtifactError` for a folder that is no run."""
    if not (folder / EXPERIMENT_FILE).is_file():
        raise ArtifactError(f"not a run: it has no {EXPERIMENT_FILE}", str(folder), "`rlhf run EXPERIMENT` makes one")


def name_given(name: str) -> str:
    """What a person typed after `--as`. Raises `ExperimentError` where it could lead out of its directory."""
    try:
        return plain_name(name)
    except ValueError as error:
        raise ExperimentError(str(error), "--as") from error


def path_of(artifact: Artifact | None) -> Path | None:
    """Where an artifact lies that a stage may do without."""
    return None if artifact is None else artifact.path


def name_of(path: Path, root: Path) -> str:
    """How people call an artifact of a run: `0003/labels-0`, `eval/0000/labels`, `sft`."""
    return "/".join(path.relative_to(root).parts[1:])


def is_redone(path: Path, of: str | None = None) -> bool:
    """Whether the name is that of an artifact made again beside another: `labels-0.lenient`."""
    name, dot, _ = path.name.partition(".")
    return bool(dot) and (of is None or name == of)


def manifests(root: Path) -> Iterator[Path]:
    """Of everything below `root` that is committed and in its place."""
    for path in root.rglob(MANIFEST):
        if not any(part.startswith(SCRATCH) or part == REPLACED for part in path.relative_to(root).parts):
            yield path


def artifacts_of(folder: Path) -> list[Artifact]:
    """Every artifact that a run goes by, in the order of its making; those redone beside them are left out."""
    found = [path.parent for path in manifests(folder) if not is_redone(path.parent)]
    opened = [Artifact.open(path) for path in sorted(found)]
    return sorted(opened, key=lambda artifact: (artifact.path / MANIFEST).stat().st_mtime_ns)


def gather_metrics(folder: Path) -> pa.Table:
    """The metrics of all artifacts of a run."""
    files = [artifact.path / METRICS_FILE for artifact in artifacts_of(folder)]
    return pa.concat_tables([METRICS.schema().empty_table(), *(pq.read_table(path) for path in files if path.exists())])


def write_metrics(folder: Path) -> None:
    """Derive `metrics.parquet` of a run from its artifacts."""
    temporary = folder / f"{METRICS_FILE}.tmp"
    pq.write_table(gather_metrics(folder), temporary)
    temporary.rename(folder / METRICS_FILE)
