"""Where an artifact came from, and whether what it came from is still what it was: read from manifests alone.

An artifact is stale when one of its inputs lies at its place with other bytes, was made again beside it under another
name (`labels-0.lenient`), or is stale itself. An input that is gone or pruned makes nothing stale.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from rich.markup import escape
from rich.tree import Tree

from pipeline.artifacts import PRUNED, InputRecord, Manifest
from pipeline.catalog import EXPERIMENT_FILE, Survey, is_redone, lies_at
from pipeline.errors import ArtifactError
from pipeline.stage import digest_of_file
from pipeline.storage import MANIFEST

FARTHEST = 4
"""Directories from the root to the farthest artifact: `RUN/eval/0000/labels`."""


@contextmanager
def no_collecting() -> Iterator[None]:
    """Keep the collector away: thousands of manifests are no garbage, and it would look through them over and over."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class Standing:
    """Whether an artifact is what its inputs would give today."""

    state: Literal["done", "stale", "pruned"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.why})" if self.why else self.state


@dataclass
class Ledger:
    """Every manifest below a directory, read once."""

    root: Path
    survey: Survey
    manifests: dict[Path, Manifest]
    """By the resolved path of the artifact, in the order of their making."""
    _standings: dict[Path, Standing] = field(default_factory=dict)
    _places: dict[str, Path | None] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> Self:
        """Read everything committed below `root`. Raises `ArtifactError` for a directory that is not there."""
        if not root.is_dir():
            raise ArtifactError("no such directory", str(root), "check the path")
        here = root.resolve()
        found = Survey.of(here)
        with no_collecting():
            return cls(here, found, {path: Manifest.read(path) for path in found.in_order()})

    @classmethod
    def around(cls, path: Path) -> Self:
        """Of the root that an artifact or a run belongs to: the directory above the run that holds it."""
        here = path.resolve()
        for place in (here, *here.parents[:FARTHEST]):
            if (place / EXPERIMENT_FILE).is_file():
                return cls.of(place.parent)
            if any(place.glob(f"*/{EXPERIMENT_FILE}")):
                return cls.of(place)
        return cls.of(_outermost(here))

    def place(self, record: InputRecord) -> Path | None:
        """Where an input lies today; None if gone."""
        if record.path not in self._places:
            recorded = record.place
            self._places[record.path] = recorded if recorded in self.manifests else lies_at(record, [self.root])
        return self._places[record.path]

    def standing(self, path: Path) -> Standing:
        """Whether the artifact at `path` is what its inputs would give today."""
        here = path if path in self.manifests else path.resolve()
        if here not in self._standings:
            self._standings[here] = self._standing(here)
        return self._standings[here]

    def _standing(self, path: Path) -> Standing:
        gone = ""
        for record in self.inputs(path):
            place = self.place(record)
            if place is None:
                gone = f"{record.path} is gone"
            elif why := self._changed(record, place):
                return Standing("stale", why)
        pruned = path in self.survey.pruned if path in self.manifests else (path / PRUNED).exists()
        return Standing("pruned" if pruned else "done", gone)

    def _changed(self, record: InputRecord, place: Path) -> str:
        if place not in self.manifests:
            return ""  # a file from outside, or a checkpoint: its bytes are read by `tree` and `verify` only
        if self.manifests[place].digest != record.digest:
            return f"{record.path} has other bytes"
        if redone := self.redone(place):
            return f"{place.name} was redone as {', '.join(one.name for one in redone)}"
        return f"{place.name} is stale" if self.standing(place).state == "stale" else ""

    def name(self, path: Path) -> str:
        """How people call what lies below the root."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def inputs(self, path: Path) -> list[InputRecord]:
        """What an artifact was made of."""
        manifest = self.manifests.get(path) or self.manifests.get(path.resolve()) or Manifest.read(path)
        return [record for records in manifest.inputs.values() for record in records]

    def redone(self, path: Path) -> list[Path]:
        """What lies beside an artifact as the same made again with changes."""
        others = self._redone.get(path.parent, ()) if self._redone else ()
        return [other for other in others if is_redone(other, path.name)]

    @cached_property
    def _redone(self) -> dict[Path, list[Path]]:
        """Directory -> the artifacts in it that were made again beside others."""
        found: dict[Path, list[Path]] = {}
        for path in self.manifests:
            if is_redone(path):
                found.setdefault(path.parent, []).append(path)
        return found

    def downstream(self, path: Path) -> list[Path]:
        """Everything that was made of an artifact, directly or not, in the order of making."""
        reached = {path.resolve()}
        for other in self.manifests:
            if any(self.place(record) in reached for record in self.inputs(other)):
                reached.add(other)
        return [other for other in self.manifests if other in reached and other != path.resolve()]


def _outermost(path: Path) -> Path:
    """The highest directory above an artifact that still looks like a part of its run or base."""
    place = path.parent if (path / MANIFEST).exists() else path
    return place.parent if place.parent != place else place


def tree(path: Path, depth: int | None = None) -> Tree:
    """An artifact and what it came from, down to the files. Raises `ArtifactError` where there is no artifact.

    What stands in the tree already is not told again.
    """
    Manifest.read(path)
    ledger = Ledger.around(path)
    told: set[Path] = set()
    whole = Tree(_line(ledger, path.resolve(), ""))
    _grow(ledger, path.resolve(), whole, told, depth)
    return whole


def _grow(ledger: Ledger, path: Path, node: Tree, told: set[Path], depth: int | None) -> None:
    told.add(path)
    if depth == 0:
        return
    manifest = ledger.manifests.get(path) or Manifest.read(path)
    for name, records in manifest.inputs.items():
        for record in records:
            place = ledger.place(record)
            if place is None:
                node.add(f"{name}: {escape(record.path)}  [red]gone[/red]")
            elif not (place / MANIFEST).exists():
                node.add(f"{name}: {escape(record.path)}  {_file_state(place, record)}")
            elif place in told:
                node.add(f"{name}: [bold]{escape(ledger.name(place))}[/bold]  [dim]see above[/dim]")
            else:
                branch = node.add(_line(ledger, place, f"{name}: ", record))
                _grow(ledger, place, branch, told, None if depth is None else depth - 1)


def _file_state(place: Path, record: InputRecord) -> str:
    same = digest_of_file(place) == record.digest
    return f"{record.digest[:12]}" if same else "[red]has other bytes[/red]"


def _line(ledger: Ledger, path: Path, prefix: str, record: InputRecord | None = None) -> str:
    manifest = ledger.manifests.get(path) or Manifest.read(path)
    state = str(ledger.standing(path))
    if record is not None and manifest.digest != record.digest:
        state = f"has other bytes than when it was read ({record.digest[:12]})"
    colour = "green" if state == "done" else "dim" if state.startswith("pruned") else "red"
    made = (
        f"{manifest.stage} v{manifest.version}  {manifest.digest[:12]}  {manifest.made.get('time', 'elsewhere')[:19]}"
    )
    return f"{prefix}[bold]{escape(ledger.name(path))}[/bold]  {made}  [{colour}]{escape(state)}[/{colour}]"
