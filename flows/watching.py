"""A run in the terminal while it goes on: read from its directory, so it may run anywhere that shares the disk."""

import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.sheets import out
from flows.status import about, begun
from pipeline.catalog import EXPERIMENT_FILE, Entry, Survey, artifacts_of, refuse_no_run
from pipeline.experiment import Experiment
from pipeline.inspecting.curves import by_iteration
from pipeline.storage import MANIFEST

CURVES = {
    "reward": ("reward/mean", "labels"), "accuracy": ("accuracy/mean", "labels"),
    "pass@k": ("accuracy/pass_at_k", "labels"), "maj@k": ("accuracy/majority_at_k", "labels"),
    "length [tokens]": ("length/mean", "rollouts"), "cut": ("length/cut", "rollouts"),
    "no signal": ("reward/zero_signal_groups", "advantages"),
    "KL to reference [nat]": ("kl/reference", "scores", "policy"),
    "|sampler - trainer| [nat]": ("kl/sampler_abs", "scores", "policy"), "entropy [nat]": ("entropy/mean", "policy"),
    "clip low": ("clip/low", "policy"), "clip high": ("clip/high", "policy"), "gradient": ("grad/norm", "policy"),
    "explained variance": ("value/explained_variance", "critic"),
}  # fmt: skip
"""What is shown -> its name, and the kinds that measure it: the first that did."""

AT_THE_END = ("accuracy", "reward", "pass@k", "maj@k", "length [tokens]", "cut", "KL to reference [nat]")
"""Those that are shown of held-out prompts."""

LAST = 6
"""Iterations that have a column, where the terminal is wide enough; the pace is theirs."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 20
"""Characters of a curve."""
NARROW, BESIDE = 9, 50
"""Characters of a column of numbers, and of all that stands beside them."""


def watch(folder: Path, every: float, *, once: bool) -> None:
    """Show the run every so many seconds until it is done or Ctrl-C; `once`: print it and end.

    Raises `ArtifactError` for a folder that is no run.
    """
    refuse_no_run(folder)
    if once:
        out.print(view(folder))
        return
    try:
        with Live(view(folder), console=out, auto_refresh=False) as live:
            while not _is_done(folder):
                time.sleep(every)
                live.update(view(folder), refresh=True)
    except KeyboardInterrupt:
        return


def view(folder: Path) -> RenderableType:
    """The run as it stands: who is at it, what is being made, curves, the last iterations, the evaluations."""
    experiment = Experiment.load(folder / EXPERIMENT_FILE)
    entries = [Entry.of(artifact) for artifact in artifacts_of(folder)]
    numbers = by_iteration(entries)
    lines = [Text(line) for line in about(folder, experiment)]
    here = folder.resolve()
    lines += [Text(f"{line.name}: {line.state}, {line.note}") for line in begun(Survey.of(here).scratches, here)]
    lines.append(Text(_time_left(folder, experiment)))
    parts: list[RenderableType] = [*lines]
    loop = numbers.filter(phase="loop")
    if loop.height:
        parts.append(_table("iterations", loop, CURVES))
    evaluated = numbers.filter(phase="evaluation")
    if evaluated.height:
        parts.append(_table("held-out prompts", evaluated, {name: CURVES[name] for name in AT_THE_END}))
    return Group(*parts)


def _table(title: str, numbers: pl.DataFrame, curves: dict[str, tuple[str, ...]]) -> Table:
    """A line for each curve that was measured: all iterations as bars, the last ones as numbers."""
    iterations = sorted(numbers["iteration"].unique())
    last = iterations[-min(LAST, max(1, (out.width - BESIDE) // NARROW)) :]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for header in ("", "all", *(f"{number:04d}" for number in last)):
        table.add_column(header, no_wrap=True)
    for shown, (name, *kinds) in curves.items():
        measured = (numbers.filter(kind=kind, name=name) for kind in kinds)
        rows = next((rows for rows in measured if rows.height), numbers.clear())
        values = dict(zip(rows["iteration"], rows["value"], strict=True))
        if values:
            cells = (f"{values[number]:.3g}" if number in values else "" for number in last)
            table.add_row(Text(shown), bars([values[number] for number in iterations if number in values]), *cells)
    return table


def bars(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve as characters, the least value lowest; of many values means of neighbours."""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for start in range(0, len(values), size) if (part := values[start : start + size])]
    low, high = min(means), max(means)
    if not low < high:
        return BARS[3] * len(means)
    return "".join(BARS[min(7, int(8 * (value - low) / (high - low)))] for value in means)


def _ends(folder: Path) -> list[float]:
    """When each policy of the loop was committed, in order. [s since 1970]"""
    return sorted(path.stat().st_mtime for path in folder.glob(f"[0-9][0-9][0-9][0-9]/policy/{MANIFEST}"))


def _time_left(folder: Path, experiment: Experiment) -> str:
    """Of the loop, as the last iterations went."""
    ends = _ends(folder)
    left = _iterations(experiment) - len(ends)
    if left <= 0:
        return "the loop is done"
    if len(ends) < 2:
        return f"{left} iterations to go"
    last = ends[-LAST:]
    pace = (last[-1] - last[0]) / (len(last) - 1)
    minutes, seconds = divmod(round(pace * left), 60)
    return f"{left} iterations to go, {pace:.1f} s each: about {minutes}:{seconds:02d} left"


def _iterations(experiment: Experiment) -> int:
    return experiment.scale.iterations - (0 if experiment.fork is None else experiment.fork.at)


def _is_done(folder: Path) -> bool:
    """Whether the loop has reached its end and, where the run is evaluated, so has the evaluation."""
    experiment = Experiment.load(folder / EXPERIMENT_FILE)
    evaluated = folder / "eval" / f"{experiment.scale.iterations:04d}" / "labels" / MANIFEST
    wanted = experiment.data.held_out is not None
    return len(_ends(folder)) >= _iterations(experiment) and (evaluated.exists() or not wanted)
