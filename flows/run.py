"""A run: where its artifacts lie, and how a stage is performed. All state is read back from manifests."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq

from pipeline.artifacts import METRICS_FILE, Artifact
from pipeline.catalog import EXPERIMENT_FILE, gather_metrics
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment
from pipeline.locks import held
from pipeline.settings import plain_name
from pipeline.stage import Stage, StageSettings

LOCK_FILE = ".lock"
EXPERIMENTS = Path(__file__).parent / "experiments"


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


def find_experiment(name_or_path: str) -> Path:
    """The file of an experiment: a path, or a name in `flows/experiments`. Raises `ExperimentError`."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return path
    named = EXPERIMENTS / f"{name_or_path}.toml"
    if not named.is_file():
        names = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("*.toml")))
        raise ExperimentError(
            f"no experiment is called {name_or_path!r}; there are: {names}", do="or give a path to a .toml"
        )
    return named


def name_given(name: str) -> str:
    """What a person typed after `--as`. Raises `ExperimentError` where it could lead out of its directory."""
    try:
        return plain_name(name)
    except ValueError as error:
        raise ExperimentError(str(error), "--as") from error


def path_of(artifact: Artifact | None) -> Path | None:
    """Where an artifact lies that a stage may do without."""
    return None if artifact is None else artifact.path


def write_metrics(folder: Path) -> None:
    """Derive `metrics.parquet` of a run from its artifacts."""
    temporary = folder / f"{METRICS_FILE}.tmp"
    pq.write_table(gather_metrics(folder), temporary)
    temporary.rename(folder / METRICS_FILE)
