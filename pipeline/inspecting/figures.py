"""Curves and histograms over the iterations of runs, as plotly figures without colours of their own background.

A line has its run's colour; what an iteration measured on held-out prompts is a line with points, with a bar of 95 %
where it has one, and a second number of the same kind is dotted. Colours are legible on white and on black: the page
gives the rest of the theme when it draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from pipeline.inspecting.curves import by_iteration
from pipeline.inspecting.measured import CURVES, Curve, Source
from pipeline.inspecting.subject import Subject, interval

COLOURS = ("#2f7ed8", "#e8743b", "#19a979", "#c65db7", "#a08a1f", "#7d6ee7", "#13a4b4", "#e5596f")
"""Of the runs, one after the other; those of stages as well."""
BINS = 40
"""Of a histogram, at most."""
FEW = 12
"""So many different rewards are values, not a range."""


@dataclass(frozen=True)
class Chart:
    """A figure with what stands around it."""

    name: str
    unit: str
    doc: str
    figure: go.Figure
    told: str = ""
    """First and last value, in words."""

    def json(self) -> dict[str, Any]:
        """What the page draws."""
        plain = self.figure.to_plotly_json()
        return {
            "name": self.name, "unit": self.unit, "doc": self.doc, "told": self.told,
            "data": plain["data"], "layout": plain["layout"],
        }  # fmt: skip


def colour(index: int) -> str:
    """Of a run or a stage; they repeat after the last."""
    return COLOURS[index % len(COLOURS)]


def curves(several: Sequence[Subject]) -> tuple[list[Chart], dict[str, str]]:
    """A chart for every curve that any run has measured, and why the others that one may look for are not there."""
    measured = [_measured(one) for one in several]
    charts, missing = [], {}
    for curve in CURVES:
        traces = [
            trace
            for index, (subject, numbers) in enumerate(zip(several, measured, strict=True))
            for trace in _traces(curve, subject, numbers, index)
        ]
        if any(trace.line.dash != "dot" for trace in traces):
            charts.append(_chart(curve, traces, named=len(several) > 1))
        elif curve.lack:
            missing[curve.name] = curve.lack
    return charts, missing


Numbers = Mapping[Source, tuple[list[int], list[float]]]


def _measured(subject: Subject) -> Numbers:
    numbers = by_iteration(subject.own).drop_nulls("iteration").sort("iteration")
    return {
        (phase, kind, name): (rows["iteration"].to_list(), rows["value"].to_list())
        for (phase, kind, name), rows in numbers.group_by(["phase", "kind", "name"], maintain_order=True)
    }


def _traces(curve: Curve, subject: Subject, numbers: Numbers, index: int) -> Iterator[go.Scatter]:
    """Of one run: the line, the points of its evaluations, the dotted line."""
    main = curve.held_out if curve.held_out in numbers else next((one for one in curve.line if one in numbers), None)
    common: dict[str, Any] = {"name": subject.name, "legendgroup": subject.name}
    if main is not None:
        bars = _bars(subject) if curve.name == "held-out accuracy" else None
        points = curve.held_out == main or len(numbers[main][0]) < 2
        yield _line(numbers[main], index, mode="lines+markers" if points else "lines", error_y=bars, **common)
    if (second := next((one for one in curve.dotted if one in numbers), None)) is not None:
        yield _line(numbers[second], index, dash="dot", showlegend=False, **common)


def _bars(subject: Subject) -> dict[str, Any]:
    ends = [interval(one) for one in subject.held_out]
    up = [one.get("high", one["accuracy"]) - one["accuracy"] for one in ends]
    down = [one["accuracy"] - one.get("low", one["accuracy"]) for one in ends]
    return {"array": _rounded(up), "arrayminus": _rounded(down), "thickness": 1.5, "width": 4}


def _line(
    points: tuple[list[int], list[float]], index: int, dash: str = "solid", mode: str = "lines", **more: Any
) -> go.Scatter:
    at, values = points
    width = 1.3 if dash == "dot" else 2.2
    return go.Scatter(
        x=at, y=_rounded(values), mode="markers" if len(at) < 2 else mode, marker={"size": 7},
        line={"color": colour(index), "width": width, "dash": dash}, marker_color=colour(index), opacity=1,
        hovertemplate="iteration %{x}: %{y:.4~g}", **more,
    )  # fmt: skip


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _chart(curve: Curve, traces: list[go.Scatter], *, named: bool) -> Chart:
    figure = go.Figure(traces)
    axis = {"title": {"text": curve.unit}, "rangemode": "tozero" if curve.from_zero else "normal"}
    figure.update_layout(
        template=None, showlegend=named, xaxis={"title": {"text": "iteration"}, "tickformat": "d"}, yaxis=axis,
    )  # fmt: skip
    return Chart(curve.name, curve.unit, curve.doc, figure, _told(traces))


def _told(traces: Sequence[go.Scatter]) -> str:
    """The first and the last value of a single run."""
    solid = [trace for trace in traces if trace.line.dash != "dot"]
    if len(solid) != 1:
        return ""
    first, last = solid[0].y[0], solid[0].y[-1]
    return _number(first) if len(solid[0].y) == 1 else f"{_number(first)} → {_number(last)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def histograms(subject: Subject, responses: pl.DataFrame) -> list[Chart]:
    """How lengths and rewards of all responses of the loop are spread, iteration by iteration."""
    rows = responses.filter(pl.col("phase") == "loop")
    charts = []
    for name, unit, doc in (
        ("length", "tokens", "Share of an iteration's responses that are so long."),
        ("reward", "reward", "Share of an iteration's responses that have this reward, before shaping."),
    ):
        known = rows.select("iteration", pl.col(name).cast(pl.Float64)).drop_nulls()
        if not known.is_empty():
            charts.append(_histogram(known, name, unit, doc))
    return charts


def _histogram(rows: pl.DataFrame, name: str, unit: str, doc: str) -> Chart:
    iterations = rows["iteration"].unique().sort().to_list()
    values = rows[name].to_numpy()
    edges, centres, labels = _bins(values, whole=unit == "tokens")
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(centres) - 1)
    counts = np.zeros((len(centres), len(iterations)), dtype=int)
    np.add.at(counts, (places, np.searchsorted(iterations, rows["iteration"].to_numpy())), 1)
    shares = counts / counts.sum(axis=0, keepdims=True)
    evenly = len(centres) > FEW
    heat = go.Heatmap(
        x=iterations, y=centres if evenly else labels, z=[[float(f"{s:.3g}") for s in row] for row in shares],
        customdata=[[[label, int(c)] for c in row] for label, row in zip(labels, counts, strict=True)],
        hovertemplate="iteration %{x}, " + name + " %{customdata[0]}: %{customdata[1]} responses, %{z:.1%}"
        "<extra></extra>",
        zmin=0, zmax=float(shares.max()),
        colorbar={"title": {"text": "share"}, "tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
    )  # fmt: skip
    figure = go.Figure(heat)
    figure.update_layout(
        template=None, xaxis={"title": {"text": "iteration"}, "tickformat": "d"},
        yaxis={"title": {"text": unit}, **({} if evenly else {"type": "category"})},
    )  # fmt: skip
    if len(iterations) < 2:
        figure.update_layout(xaxis={"tickvals": iterations})
    return Chart(name, unit, doc, figure, f"{rows.height:,} responses")


def _bins(values: np.ndarray, *, whole: bool) -> tuple[np.ndarray, list[float], list[str]]:
    """Left edges of the bins, their centres, what they are called."""
    distinct = np.unique(values)
    if len(distinct) <= FEW:
        return distinct, [float(v) for v in distinct], [f"{v:.4g}" for v in distinct]
    low, high = float(distinct[0]), float(distinct[-1])
    if whole:
        width = float(-(-(high - low + 1) // BINS))
        edges = np.arange(low, high + 1, width)
        names = [f"{e:g}" if width == 1 else f"{e:g} to {e + width - 1:g}" for e in edges]
        return edges, [float(e + (width - 1) / 2) for e in edges], names
    edges = np.linspace(low, high, BINS + 1)[:-1]
    width = (high - low) / BINS
    return edges, [float(f"{e + width / 2:.5g}") for e in edges], [f"{e:.3g} to {e + width:.3g}" for e in edges]


def cost(subject: Subject) -> Chart | None:
    """Seconds of every iteration by stage, evaluations among them; None where no stage has run."""
    rows = [row for row in subject.costs() if row["iteration"] is not None]
    if not rows:
        return None
    stages = list(dict.fromkeys((row["phase"], row["stage"]) for row in rows))
    stages.sort(key=lambda one: (one[0] == "evaluation", one))
    bars = []
    for index, (phase, stage) in enumerate(stages):
        spent = sorted(
            (row["iteration"], row["seconds"]) for row in rows if (row["phase"], row["stage"]) == (phase, stage)
        )
        bars.append(
            go.Bar(
                name=stage if phase == "loop" else f"{stage} (evaluation)", x=[at for at, _ in spent],
                y=_rounded([s for _, s in spent]), marker_color=colour(index),
                marker_pattern_shape="" if phase == "loop" else "/", hovertemplate="iteration %{x}: %{y:.3~g} s",
            )
        )  # fmt: skip
    figure = go.Figure(bars)
    figure.update_layout(
        template=None, barmode="stack", showlegend=True, xaxis={"title": {"text": "iteration"}, "tickformat": "d"},
        yaxis={"title": {"text": "seconds"}},
    )  # fmt: skip
    total = sum(row["seconds"] for row in rows)
    return Chart(
        "seconds by stage", "s", "What an iteration and its evaluation took.", figure, f"{total:,.1f} s in all"
    )
