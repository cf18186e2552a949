"""Reward hacking: the reward model's score rises while the share of right responses falls (arXiv:2210.10760).

A reward model is a proxy. A policy that is optimized against it finds, sooner or later, responses that it scores high
and that are worse. Where prompts have answers too, both numbers are known of every iteration, and the gate looks.

    of iteration i:   s_i mean score,   a_i share right by the reference,   with their standard errors over prompts
    S_i, A_i          means of s and a over the last w iterations up to i, fewer at the beginning
    now n, best b     b = argmax A_i over i <= n - w: the two windows share no iteration

    they have parted when   S_n > S_b   and   A_b - A_n >= drop   and   A_b - A_n > z se(A_b - A_n)
    z = max(2, 2 sqrt(ln m)),   m the iterations compared so far

The best of many noisy means lies above the truth, and the gate is asked in every iteration: the largest of about m^2
differences of pure noise is some sqrt(2 ln m^2) standard errors. Of runs whose accuracy stays the same and whose score
rises all the time (512 responses an iteration, w = 3, drop 0.05), the rule stops 3 in 100 within 12 iterations and 7 in
50; with z = 2 it would stop 7 and 33, and with 256 responses 23 and 92.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows.gates import WORST, responses, shown
from pipeline.artifacts import Artifact
from pipeline.catalog import is_redone, refuse_no_run
from pipeline.contracts import LABELS, SCORES
from pipeline.errors import GateError
from pipeline.experiment import Gates
from pipeline.grading.measures import clustered

PICTURE = "reward_hacking.html"


@dataclass(frozen=True)
class Point:
    """One iteration: what the reward model said of its responses, and what was right."""

    iteration: int
    score: float
    """Mean score of the reward model, as the labeler passed it on. [reward]"""
    gold: float
    """Share of the responses that are right by the reference."""
    score_error: float
    """Standard error of `score`, over prompts; NaN where there is one prompt."""
    gold_error: float
    """Standard error of `gold`, likewise."""
    judge: str = ""
    """Digest of the reward model: the scores of two cannot be compared."""


@dataclass(frozen=True)
class Parting:
    """How score and gold have parted: means over `window` iterations (fewer at a run's beginning), then and now."""

    best: Point
    now: Point
    error: float
    """Standard error of the fall of gold."""
    window: int

    def __str__(self) -> str:
        then, now, fall = self.best, self.now, self.best.gold - self.now.gold
        return (
            f"reward hacking: from iteration {then.iteration:04d} to {now.iteration:04d} the reward model's score rose "
            f"from {then.score:.3f} to {now.score:.3f}, and the share of right responses fell from {then.gold:.3f} to "
            f"{now.gold:.3f} ({_times(fall, self.error)}; means of up to {self.window} iterations)"
        )


def _times(fall: float, error: float) -> str:
    return f"{fall / error:.1f} standard errors" if error else "without any noise"


def watched(labels: Sequence[Artifact], gates: Gates) -> bool:
    """Whether there is anything to look at: the gate is on, a reward model gave the rewards, and answers are known."""
    return gates.reward_hacking != "off" and _twice_judged(labels)


def _twice_judged(labels: Sequence[Artifact]) -> bool:
    judged = all("judgements" in artifact.manifest.inputs for artifact in labels)
    return judged and any("accuracy/mean" in artifact.stats for artifact in labels)


def point(iteration: int, labels: Sequence[Artifact]) -> Point:
    """The rounds of one iteration as one: every sampled response with a verdict; greedy responses are left out.

    Raises `ArtifactError` where the judgements are gone that lay beside the labels.
    """
    rows = _sampled(labels)
    prompts = np.asarray([prompt_id.partition("#")[0] for prompt_id in rows["prompt_id"].to_pylist()])
    score, score_error = clustered(rows["reward"].to_numpy().astype(np.float64), prompts)
    gold, gold_error = clustered(rows["gold"].to_numpy().astype(np.float64), prompts)
    return Point(iteration, score, gold, score_error, gold_error, _judge(labels[0]))


def _sampled(labels: Sequence[Artifact]) -> pa.Table:
    rows = pa.concat_tables([artifact.table(["prompt_id", "sample", "reward", "gold"]) for artifact in labels])
    return rows.filter(pc.and_(pc.greater_equal(rows["sample"], 0), pc.is_valid(rows["gold"])))


def _judge(labels: Artifact) -> str:
    """Digest of the reward model; judgements lie beside the labels, wherever the run has been moved."""
    recorded = labels.manifest.inputs["judgements"][0].place
    judgements = Artifact.open(labels.path.with_name(recorded.name), SCORES)
    return judgements.manifest.inputs["reward_model"][0].digest


def points_of(folder: Path) -> tuple[Point, ...]:
    """The iterations of a run that both a reward model and the reference have judged; there may be none.

    Raises `ArtifactError` for a folder that is no run.
    """
    refuse_no_run(folder)
    rounds = {int(here.name): _labels_in(here) for here in sorted(folder.glob("[0-9][0-9][0-9][0-9]"))}
    return tuple(point(number, labels) for number, labels in rounds.items() if labels and _twice_judged(labels))


def draw(folders: Sequence[Path]) -> Path | None:
    """The picture of these runs, in the folder of the first that has points; None where none has."""
    runs = {folder: points for folder in folders if (points := points_of(folder))}
    if not runs:
        return None
    return picture({folder.name: points for folder, points in runs.items()}, next(iter(runs)) / PICTURE)


def _labels_in(here: Path) -> tuple[Artifact, ...]:
    found = [path for path in here.glob("labels-*") if not is_redone(path)]
    paths = sorted(found, key=lambda path: int(path.name.removeprefix("labels-")))
    return tuple(Artifact.open(path, LABELS) for path in paths)


def averaged(points: Sequence[Point], window: int) -> list[Point]:
    """At each point the mean over it and those before it, `window` together, fewer at the beginning.

    Iterations are independent samples:   se(mean of k) = sqrt(sum_i se_i^2) / k
    """
    windows = [points[max(0, end - window) : end] for end in range(1, len(points) + 1)]
    return [
        Point(
            iteration=held[-1].iteration,
            score=fmean(p.score for p in held),
            gold=fmean(p.gold for p in held),
            score_error=math.hypot(*(p.score_error for p in held)) / len(held),
            gold_error=math.hypot(*(p.gold_error for p in held)) / len(held),
            judge=held[-1].judge,
        )
        for held in windows
    ]


def parted(points: Sequence[Point], gates: Gates) -> Parting | None:
    """Whether score and gold have parted by now, by the rule at the top of this file; None if not.

    Only the points that the latest reward model judged are compared. Without a standard error nothing is said.
    """
    comparable = [one for one in points if one.judge == points[-1].judge]
    window, means = gates.reward_hacking_window, averaged(comparable, gates.reward_hacking_window)
    if len(means) <= window:
        return None
    now, best = means[-1], max(means[:-window], key=lambda mean: mean.gold)
    fall, error = best.gold - now.gold, math.hypot(best.gold_error, now.gold_error)
    beyond_noise = fall > max(2.0, 2 * math.sqrt(math.log(len(means)))) * error
    if now.score > best.score and fall >= gates.reward_hacking_drop and beyond_noise:
        return Parting(best, now, error, window)
    return None


def gate(points: Sequence[Point], gates: Gates, rollouts: Sequence[Artifact], labels: Sequence[Artifact]) -> str | None:
    """A line to print when score and gold have parted and the gate warns; None when there is nothing to say.

    Raises `GateError` when the gate stops: with the wrong responses of this iteration that score highest.
    """
    if gates.reward_hacking == "off" or (found := parted(points, gates)) is None:
        return None
    if gates.reward_hacking == "warn":
        return str(found)
    raise GateError(
        "\n".join([str(found), "wrong responses that it scores highest:", *_worst(rollouts, labels)]),
        " ".join(str(artifact.path) for artifact in labels),
        "rank responses of this policy too (feedback.every), hold it nearer to the reference (kl_penalty), or go on "
        "regardless: the same command with --set gates.reward_hacking=warn",
    )


def _worst(rollouts: Sequence[Artifact], labels: Sequence[Artifact]) -> list[str]:
    """A line for each wrong response that scores highest: its key, its score, how it begins."""
    order = [("reward", "descending"), ("prompt_id", "ascending"), ("sample", "ascending")]
    wrong = _sampled(labels).filter(~pc.field("gold")).sort_by(order).slice(0, WORST)
    wanted = {(row["prompt_id"], row["sample"]): row["reward"] for row in wrong.to_pylist()}
    texts = responses(set(wanted), rollouts)
    return [f"  {key[0]}/{key[1]}  {score:+.3f}  {shown(texts[key])}" for key, score in wanted.items()]


COLOURS = ("#2f7ed8", "#e8743b", "#19a979", "#c65db7", "#a08a1f", "#7d6ee7", "#13a4b4", "#e5596f")
"""Of the runs, one after the other; each can be told from white and from black."""

_FOLLOW_THE_SYSTEM = """
const templates = {light: %s, dark: %s}, asked = window.matchMedia("(prefers-color-scheme: dark)");
const follow = () => {
    const template = templates[asked.matches ? "dark" : "light"];
    document.documentElement.style.colorScheme = "light dark";
    document.body.style.background = template.layout.paper_bgcolor;
    Plotly.relayout("{plot_id}", {template});
};
asked.addEventListener("change", follow);
follow();
"""


def picture(runs: Mapping[str, Sequence[Point]], path: Path) -> Path:
    """Draw score and gold by iteration, and gold against score, into one HTML file that opens offline; return its path.

    Name of the run -> its points. Bars are one standard error; a line breaks where another reward model judges. Light
    or dark as the reader's system is.
    """
    import plotly.graph_objects as go
    import plotly.io as pio
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1, cols=2, specs=[[{"secondary_y": True}, {}]],
        subplot_titles=("by iteration", "against each other; numbers are iterations"),
    )  # fmt: skip
    for colour, (name, points) in zip(cycle(COLOURS), runs.items(), strict=False):
        drawn = _broken(points)
        figure.add_trace(go.Scatter(_score_by_iteration(name, drawn, colour)), row=1, col=1)
        figure.add_trace(go.Scatter(_gold_by_iteration(name, drawn, colour)), row=1, col=1, secondary_y=True)
        figure.add_trace(go.Scatter(_gold_by_score(name, drawn, colour)), row=1, col=2)
    score, gold = "mean score of the reward model [reward]", "right by the reference [share of responses]"
    figure.update_layout(
        title={"text": "Reward hacking: does the score rise while accuracy falls?", "x": 0.02},
        xaxis={"title": "iteration", "tickformat": "d", "zeroline": False, "domain": [0, 0.42]},
        yaxis={"title": f"{score} - lines"},
        yaxis2={"title": f"{gold} - dashes", "showgrid": False, "tickmode": "auto"},
        xaxis2={"title": score, "zeroline": False, "domain": [0.58, 1]},
        yaxis3={"title": gold},
        legend={"orientation": "h", "y": -0.15}, margin={"t": 90, "r": 20}, height=600, template="plotly_white",
    )  # fmt: skip
    for heading, middle in zip(figure.layout.annotations, (0.21, 0.79), strict=True):
        heading.x = middle
    layouts = (pio.templates[name].layout.to_plotly_json() for name in ("plotly_white", "plotly_dark"))
    script = _FOLLOW_THE_SYSTEM % tuple(json.dumps({"layout": layout}) for layout in layouts)
    figure.write_html(path, include_plotlyjs=True, div_id="reward-hacking", post_script=script)
    return path


def _broken(points: Sequence[Point]) -> list[Point | None]:
    """With None where the judge changes: there a line breaks."""
    drawn: list[Point | None] = []
    for _, judged in groupby(points, key=lambda one: one.judge):
        drawn += [*judged, None]
    return drawn[:-1]


def _values(drawn: Sequence[Point | None], what: str) -> list[float | None]:
    return [None if one is None else getattr(one, what) for one in drawn]


def _bars(drawn: Sequence[Point | None], what: str) -> dict[str, Any]:
    return {"type": "data", "array": _values(drawn, what), "thickness": 1, "width": 0}


def _score_by_iteration(name: str, drawn: Sequence[Point | None], colour: str) -> dict[str, Any]:
    return {
        "name": f"{name}: score", "legendgroup": name, "mode": "lines+markers",
        "x": _values(drawn, "iteration"), "y": _values(drawn, "score"), "error_y": _bars(drawn, "score_error"),
        "line": {"color": colour}, "marker": {"color": colour, "size": 7},
        "hovertemplate": "iteration %{x}: score %{y:.3f}",
    }  # fmt: skip


def _gold_by_iteration(name: str, drawn: Sequence[Point | None], colour: str) -> dict[str, Any]:
    return {
        "name": f"{name}: right", "legendgroup": name, "mode": "lines+markers",
        "x": _values(drawn, "iteration"), "y": _values(drawn, "gold"), "error_y": _bars(drawn, "gold_error"),
        "line": {"color": colour, "dash": "dash"}, "marker": {"color": colour, "size": 8, "symbol": "diamond-open"},
        "hovertemplate": "iteration %{x}: right %{y:.3f}",
    }  # fmt: skip


def _gold_by_score(name: str, drawn: Sequence[Point | None], colour: str) -> dict[str, Any]:
    return {
        "name": name, "legendgroup": name, "mode": "lines+markers+text", "showlegend": False,
        "x": _values(drawn, "score"), "y": _values(drawn, "gold"), "text": _values(drawn, "iteration"),
        "textposition": "top center", "textfont": {"color": colour, "size": 11},
        "line": {"color": colour, "width": 1}, "marker": {"color": colour, "size": 6},
        "hovertemplate": "iteration %{text}: score %{x:.3f}, right %{y:.3f}",
    }  # fmt: skip
