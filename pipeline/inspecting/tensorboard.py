"""The metrics of a run as TensorBoard event files: `tensorboard --logdir RUN/tensorboard`.

    RUN/tensorboard/loop/events.out.tfevents.0000000003.HASH         iteration 3
    RUN/tensorboard/evaluation/events.out.tfevents.0000000003.HASH   of the policy that iteration 3 began with
    RUN/tensorboard/foundations/events.out.tfevents.0000000000.HASH  before the loop; tags begin with the artifact

One file for each iteration, in the order in which TensorBoard reads them. HASH names what the file was made from, so a
file that is there is right and stays, and one of an iteration that was made again is replaced. Steps are iterations;
what was measured at every optimizer step stands under `steps/` as well, by optimizer step. Times are those at which the
artifacts were made. `pipeline.inspecting.names` has the tags.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import get_args

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.catalog import Entry, Phase, catalog, refuse_no_run
from pipeline.disk import flush
from pipeline.errors import ExperimentError
from pipeline.inspecting.curves import by_iteration, by_step
from pipeline.inspecting.names import Names, alias, tag

FOLDER = "tensorboard"
_FILE = "events.out.tfevents."
_FORMAT = 1
"""Raised when files are to be written anew."""


@dataclass(frozen=True)
class Point:
    """A number of a curve."""

    tag: str
    step: int
    value: float
    time: float
    """Seconds since 1970."""


def write(folder: Path, names: Names = "house") -> list[Path]:
    """Write the files that are not there yet, and remove those that are no longer right; return the new ones."""
    refuse_no_run(folder)
    if names not in get_args(Names):
        raise ExperimentError(f"nobody's names are called {names!r}", do=f"one of {', '.join(get_args(Names))}")
    written, right = [], set()
    for (phase, iteration), entries in sorted(_groups(folder).items()):
        target = folder / FOLDER / phase / f"{_FILE}{iteration:010d}.{_source(entries, names)}"
        right.add(target)
        if not target.exists():
            _write(target, list(_points(entries, iteration, names)))
            written.append(target)
    for path in (folder / FOLDER).glob(f"*/{_FILE}*"):
        if path not in right and path.parent.name in get_args(Phase):
            path.unlink(missing_ok=True)
    return written


def _groups(folder: Path) -> dict[tuple[Phase, int], list[Entry]]:
    """Phase and iteration -> what this run goes by. Foundations may be shared with others."""
    groups: dict[tuple[Phase, int], list[Entry]] = {}
    for entry in catalog([folder]):
        ours = entry.phase == "foundations" or entry.artifact.path.resolve().is_relative_to(folder.resolve())
        if ours and entry.variant is None:
            groups.setdefault((entry.phase, entry.iteration or 0), []).append(entry)
    return groups


def _source(entries: Sequence[Entry], names: Names) -> str:
    """The name of what a file is made from."""
    made = [[one.stage, one.artifact.manifest.fingerprint, one.artifact.manifest.made.get("time")] for one in entries]
    return hashlib.sha256(json.dumps([_FORMAT, names, sorted(made, key=str)]).encode()).hexdigest()[:16]


def _points(entries: Sequence[Entry], iteration: int, names: Names) -> Iterator[Point]:
    if entries[0].phase == "foundations":
        for entry in entries:
            yield from _curves([entry], iteration, names, f"{entry.stage}/")
    else:
        yield from _curves(entries, iteration, names, "")


def _curves(entries: Sequence[Entry], iteration: int, names: Names, begin: str) -> Iterator[Point]:
    """One number for each metric, and those of the optimizer steps."""
    times = {one.kind: _made_at(one) for one in sorted(entries, key=_made_at)}  # the latest of each kind

    def point(kind: str, name: str, step: int, value: float, below: str = "") -> Point:
        called = alias(name, kind, names) or (name if begin else tag(name, kind))
        return Point(f"{below}{begin}{called}", step, value, times[kind])

    for kind, name, value in by_iteration(entries).select("kind", "name", "value").iter_rows():
        yield point(kind, name, iteration, value)
    steps = by_step(entries).select("kind", "name", "step", "value").sort("step", maintain_order=True)
    for kind, name, step, value in steps.iter_rows():
        if step:
            yield point(kind, name, step, value, "steps/")


def _made_at(entry: Entry) -> float:
    made = entry.artifact.manifest.made.get("time")
    return 0.0 if made is None else datetime.strptime(made, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def _write(target: Path, points: Sequence[Point]) -> None:
    """Write a file under another name, and rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            writer = RecordWriter(stream)
            # The version keeps readers from taking a smaller step for a restart that undoes what came before.
            began = min((point.time for point in points), default=0.0)
            writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
            for point in points:
                writer.write(_event(point).SerializeToString())
        flush(temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _event(point: Point) -> Event:
    value = Summary.Value(tag=point.tag, simple_value=point.value)
    return Event(wall_time=point.time, step=point.step, summary=Summary(value=[value]))
