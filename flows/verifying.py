"""Is everything still as it was made? Bytes against manifests, tables against contracts, tensors, inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from flows.lineage import Ledger
from pipeline.artifacts import Artifact, digest_of
from pipeline.catalog import EXPERIMENT_FILE, name_of
from pipeline.errors import ArtifactError, PipelineError
from pipeline.settings import read_toml
from pipeline.storage import MANIFEST

Kind = Literal["policy", "reward_model", "critic"]


@dataclass(frozen=True)
class Verified:
    """One artifact, and what is wrong with it."""

    artifact: Artifact
    faults: tuple[str, ...]
    remarks: tuple[str, ...]
    """What is no fault: other bytes of an input, weights that were pruned."""
    do: str
    """What makes it again."""


def verified(path: Path) -> Iterator[Verified]:
    """Look at an artifact, or at everything below a run or a root, one after the other.

    Raises `ArtifactError` where there is nothing to look at.
    """
    if (path / MANIFEST).exists():
        yield _look(Artifact.open(path), Ledger.around(path))
        return
    ledger = Ledger.of(path)
    if not ledger.manifests:
        raise ArtifactError("no artifacts here", str(path), "name an artifact, a run, or the directory of runs")
    around = Ledger.around(path)
    for place in ledger.manifests:
        yield _look(Artifact.open(place), around)


def _look(artifact: Artifact, ledger: Ledger) -> Verified:
    faults = artifact.faults()
    if digest_of(artifact.manifest.files) != artifact.manifest.digest:
        faults.append(f"{MANIFEST}: its digest is not that of the files it names")
    if not faults and not artifact.pruned:
        try:
            _read(artifact)
        except PipelineError as error:
            faults.append(str(error.what))
    standing = ledger.standing(artifact.path)
    remarks = (str(standing),) if str(standing) != "done" else ()
    return Verified(artifact, tuple(faults), remarks, _again(artifact))


def _read(artifact: Artifact) -> None:
    if artifact.contract.is_table:
        artifact.check()
    for kind in get_args(Kind):
        if artifact.manifest.kind == kind:
            from pipeline.models import checkpoint

            checkpoint.inspect(artifact.path, kind)


def _again(artifact: Artifact) -> str:
    """The command that makes an artifact again in its place."""
    here = artifact.path.resolve()
    for place in here.parents:
        if (place / EXPERIMENT_FILE).is_file():
            return f"rlhf redo {place} {name_of(here, place.parent)}"
    for file in sorted(here.parents[1].glob(f"*/{EXPERIMENT_FILE}")):
        if read_toml(file).get("base") == here.parent.name:
            return f"rlhf redo {file.parent} {here.name}"
    return "make it again with the command in its manifest (`rlhf show`)"
