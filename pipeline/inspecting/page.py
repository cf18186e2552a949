"""The page of one run or of several: curves, distributions, chosen responses, lineage, cost, experiment; one file.

plotly.js lies in the page packed, and the page unpacks it when the first chart comes into view. Its own policy lets
nothing run but its own scripts and plotly's, known by their hashes, and nothing go out.
"""

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from pipeline.inspecting import figures, samples
from pipeline.inspecting.book import Book
from pipeline.inspecting.subject import Subject, differences, subjects
from pipeline.pages import page


def build(runs: Sequence[Path], promoted: Mapping[Path, str]) -> str:
    """The page as text. `promoted`: where the link of a run leads."""
    several = subjects(runs)
    charts, missing = figures.curves(several)
    book = Book()
    histograms = []
    for index, subject in enumerate(several):
        found = samples.responses(subject)
        histograms.append([chart.json() for chart in figures.histograms(subject, found)])
        book.add(subject, index, found, 1 / len(several))
    about = {
        "runs": [_run(subject, index, promoted.get(subject.folder)) for index, subject in enumerate(several)],
        "curves": [chart.json() for chart in charts], "missing": missing, "histograms": histograms,
        "samples": {**book.json(), "how": list(samples.kinds())}, "differences": differences(several),
    }  # fmt: skip
    plotly = get_plotlyjs()
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()
    digest = base64.b64encode(hashlib.sha256(plotly.encode()).digest()).decode()
    title = ", ".join(subject.name for subject in several)
    return page(
        __package__, "page.html", {"title": title, **about},
        **{"plotly.packed": packed, "plotly.hash": f"'sha256-{digest}'"},
    )  # fmt: skip


def _run(subject: Subject, index: int, promoted: str | None) -> dict[str, Any]:
    cost = figures.cost(subject)
    return {
        **subject.about(promoted), "colour": figures.colour(index), "flows": subject.flows(), "text": subject.text,
        "costs": subject.costs(), "cost": None if cost is None else cost.json(),
    }  # fmt: skip
