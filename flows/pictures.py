"""What Prefect's pages show of a run: links to its datasets, numbers by iteration, their curves, sample responses.

All of it is read from the run's directory. Outside a flow run nothing is made, and nothing here decides anything.

Prefect's server takes longer to answer than a short stage takes, so the next stage does not wait for it: one thread
makes what is shown, in order, and `wait` ends when all of it is there.
"""

import base64
import html
import json
import math
import re
import string
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from flows.run import Run
from pipeline.artifacts import METRICS_FILE, Artifact, read_part
from pipeline.catalog import artifacts_of
from pipeline.seeds import derive
from pipeline.storage import MANIFEST

CURVES = {
    "reward": "reward/mean", "accuracy": "accuracy/mean", "KL to reference [nat/token]": "kl/reference",
    "KL of the update [nat/token]": "kl/old", "entropy [nat/token]": "entropy/mean", "length [tokens]": "length/mean",
}  # fmt: skip
"""What is shown of an iteration -> its name among the metrics."""

SECONDS = "seconds"

SHOWN = 3
"""Best, worst and random responses of an iteration, so many of each."""

LONGEST = 400
"""Characters that are shown of a text."""

EVERY = 5.0
"""Seconds from one iteration that is shown to the next: an iteration of two seconds would spend a tenth of them on it,
and nobody looks that often."""


_making = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
_asked: list[Future[Any]] = []


def _later(make: Callable[..., Any], **given: Any) -> None:
    """Have it made meanwhile, for the task or flow run that this is."""
    _asked.append(_making.submit(copy_context().run, partial(make, **given)))


def wait() -> None:
    """Return when all that was asked for is there. Raises what went wrong with the first that is not."""
    asked = [*_asked]
    _asked.clear()
    for one in asked:
        one.result()


def link(artifact: Artifact, key: str) -> None:
    """Leave a link to a dataset, with its numbers."""
    numbers = [f"{name}: {value:g}" for name, value in artifact.stats.items()]
    _later(
        create_link_artifact,
        link=artifact.path.absolute().as_uri(),
        link_text=str(artifact.path),
        key=_key(key),
        description=", ".join(numbers),
    )


def show(run: Run, number: int) -> None:
    """Show what iteration `number` came to: a table and curves up to it, and sample rows of it.

    At most every `EVERY` seconds; `catch_up` shows the last one that was left out.
    """
    if FlowRunContext.get() is None:
        return
    _behind[run.folder] = number
    if time.monotonic() - _shown.get(run.folder, -math.inf) >= EVERY:
        catch_up(run)


def catch_up(run: Run) -> None:
    """Show the last iteration that is done, unless it is shown already."""
    if (number := _behind.pop(run.folder, None)) is not None:
        _shown[run.folder] = time.monotonic()
        _later(_show, run=run, number=number)


_behind: dict[Path, int] = {}
"""Folder of a run -> its last iteration, where that is not shown."""
_shown: dict[Path, float] = {}
"""Folder of a run -> when an iteration of it was last shown."""


def _show(run: Run, number: int) -> None:
    name = run.experiment.name
    rows = [_numbers(folder) for folder in _iterations(run.folder, number)]
    if not rows:
        return
    described = f"{name} up to iteration {number}"
    create_table_artifact([dict(row) for row in rows], key=_key(f"{name}-metrics"), description=described)
    create_markdown_artifact(picture(rows, described), key=_key(f"{name}-curves"), description=described)
    create_markdown_artifact(
        samples(run.iteration(number), derive(run.experiment.seed, "samples", number)),
        key=_key(f"{name}-samples"), description=f"{name}, iteration {number}: responses",
    )  # fmt: skip


def _key(name: str) -> str:
    """A name as Prefect wants keys: lower case, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _iterations(folder: Path, last: int) -> list[Path]:
    """Directories of the iterations that the run made itself, in order."""
    found = sorted(path for path in folder.glob("[0-9][0-9][0-9][0-9]") if int(path.name) <= last)
    return [path for path in found if any(path.glob(f"*/{MANIFEST}"))]


@cache
def _numbers(folder: Path) -> Mapping[str, float | None]:
    """A row for one iteration: means over its artifacts by their rows, and the seconds that its stages took."""
    artifacts = artifacts_of(folder)
    tables = [(one, read_part(path)) for one in artifacts if (path := one.path / METRICS_FILE).exists()]
    row: dict[str, float | None] = {"iteration": int(folder.name)}
    for shown, name in CURVES.items():
        row[shown] = _mean((one, value) for one, table in tables for value in _values(table, name))
    row[SECONDS] = round(sum(one.stats.get("seconds", 0.0) for one in artifacts), 3)
    return row


def _values(table: pa.Table, name: str) -> list[float]:
    names, values = table["name"].to_pylist(), table["value"].to_pylist()
    return [value for found, value in zip(names, values, strict=True) if found == name]


def _mean(weighed: Iterable[tuple[Artifact, float]]) -> float | None:
    pairs = [(one.stats.get("rows", 1.0), value) for one, value in weighed]
    total = sum(weight for weight, _ in pairs)
    return None if total == 0 else round(sum(weight * value for weight, value in pairs) / total, 6)


def picture(rows: Sequence[Mapping[str, float | None]], title: str) -> str:
    """Curves as Markdown that holds an SVG: Prefect's pages draw it, and need nothing else for it."""
    there = [name for name in CURVES if any(row[name] is not None for row in rows)]
    width, height, across = 320, 180, 2
    down = -(-len(there) // across)
    panels = [
        f'<g transform="translate({index % across * width},{index // across * height})">{_panel(rows, name)}</g>'
        for index, name in enumerate(there)
    ]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * across}" height="{height * down}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(panels)}</svg>"
    )
    return f"![{text(title)}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _panel(rows: Sequence[Mapping[str, float | None]], name: str) -> str:
    """One curve in a field of 320 x 180, with its least and greatest value."""
    points = [(row["iteration"] or 0.0, value) for row in rows if (value := row[name]) is not None]
    first, last = points[0][0], points[-1][0]
    low, high = min(value for _, value in points), max(value for _, value in points)
    left, right, top, bottom = 55, 305, 35, 145
    spots = [
        (
            left + (right - left) * ((at - first) / (last - first) if last > first else 0.5),
            bottom - (bottom - top) * ((value - low) / (high - low) if high > low else 0.5),
        )
        for at, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#1f77b4"/>' for x, y in spots)
    return (
        f'<text x="{left}" y="20" font-weight="bold">{html.escape(name)}</text>'
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#999"/>'
        f'<text x="{left - 5}" y="{top + 4}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{left - 5}" y="{bottom + 4}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{left}" y="{bottom + 15}">{first:g}</text>'
        f'<text x="{right}" y="{bottom + 15}" text-anchor="end">iteration {last:g}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>{dots}'
    )


def samples(folder: Path, seed: int) -> str:
    """The best, the worst and some random responses of an iteration, as Markdown in which texts stay texts."""
    labels = [one for one in artifacts_of(folder) if one.manifest.kind == "labels"]
    order = [("reward", "descending"), ("prompt_id", "ascending"), ("sample", "ascending")]
    judged = pa.concat_tables(map(_judged, labels)).sort_by(order)
    places = range(len(judged))
    drawn = Random(seed).sample(places, min(SHOWN, len(places)))  # noqa: S311  # they keep no secret
    taken = {"best": places[:SHOWN], "worst": places[-SHOWN:], "random": drawn}
    named = [(which, place) for which, some in taken.items() for place in some]
    shown = judged.take([place for _, place in named]).to_pylist()
    prompt_ids = [row["prompt_id"].partition("#")[0] for row in shown]
    asked = _asked_by(labels, prompt_ids)
    lines = ["|  | reward | verdict | prompt | response |", "| --- | --- | --- | --- | --- |"]
    for (which, _), row, prompt_id in zip(named, shown, prompt_ids, strict=True):
        cells = (which, f"{row['reward']:g}", row["verdict"] or "", text(asked[prompt_id]), text(row["response"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _judged(labels: Artifact) -> pa.Table:
    """What was said of responses, beside them: both tables have the same rows."""
    rollouts = _input(labels, "rollouts").table(["response"])
    return labels.table(["prompt_id", "sample", "reward", "verdict"]).append_column("response", rollouts["response"])


def _asked_by(labels: Sequence[Artifact], prompt_ids: Sequence[str]) -> dict[str, str]:
    """What was asked last in these prompts."""
    found = {(prompts := _input(one, "prompts")).path: prompts for one in labels}
    tables = [prompts.table(["prompt_id", "messages"]) for prompts in found.values()]
    wanted = pa.array(prompt_ids)
    rows = chain(*(table.filter(pc.is_in(table["prompt_id"], value_set=wanted)).to_pylist() for table in tables))
    return {row["prompt_id"]: row["messages"][-1]["content"] for row in rows}


def _input(artifact: Artifact, name: str) -> Artifact:
    return Artifact.open(artifact.manifest.inputs[name][0].place)


def text(given: str) -> str:
    """What a model wrote, for Markdown on one line: nothing in it is markup, a link or the end of a cell.

    All punctuation is escaped, which Markdown shows and never reads; line ends and what cannot be printed are shown as
    JSON has them.
    """
    shown = given[:LONGEST] + "..." * (len(given) > LONGEST)
    printable = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in shown)
    return "".join(f"\\{one}" if one in string.punctuation else one for one in printable)
