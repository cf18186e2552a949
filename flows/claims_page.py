"""The results page of the claims: Markdown and pictures, from the stored numbers alone.

flows/experiments/claims/README.md          every claim: hypothesis, the paper's numbers, ours, the verdict
flows/experiments/claims/pictures/*.svg     what it draws
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import polars as pl

from flows.claiming import stored
from flows.claims import Claim, Finding, Interval, Picture, names, verdict
from flows.sheets import Sheet, out, print_sheet
from pipeline.errors import ExperimentError

COLOURS = ("#2f7ed8", "#e8743b", "#19a979", "#c65db7", "#a08a1f", "#7d6ee7", "#13a4b4", "#e5596f", "#777777")
"""Of arms, one after the other; each can be told from white and from black."""
_INSTALL = "`python3 .ci/install.py --dev` installs it"
MARKS = {"reproduced": "**reproduced**", "not reproduced": "**not reproduced**"}


def overview(folder: Path) -> Sheet:
    """A line for each claim: paper, seeds, verdict and why."""
    rows = []
    for name in names(folder):
        claim = Claim.load(name, folder)
        numbers = claim.numbers()
        findings = claim.findings(numbers)
        said = verdict(findings)
        deciding = [one for one in findings if one.verdict == said] or findings
        rows.append((name, claim.source, str(numbers["seed"].n_unique()), said + _outdated(claim, numbers),
                     f"{deciding[0].check.says}: {deciding[0].why}"))  # fmt: skip
    return Sheet("claims", ("claim", "source", "seeds", "verdict", "why"), tuple(rows))


def _outdated(claim: Claim, numbers: pl.DataFrame) -> str:
    """A remark where results are of files as they were before."""
    runs = {(arm, seed) for arm, seed in numbers.select("arm", "seed").unique().rows() if arm in claim.arms}
    return " (of older files)" if runs - stored(claim, numbers) else ""


def show(folder: Path) -> None:
    """`rlhf claims`."""
    print_sheet(overview(folder))


def write(folder: Path) -> Path:
    """`rlhf claims page`: write the page and its pictures; return its path."""
    page, drawn = folder / "README.md", set()
    for name in names(folder):
        claim = Claim.load(name, folder)
        for picture, path in _pictures(claim):
            _draw(claim, picture, path)
            drawn.add(path)
    page.write_text(text(folder), encoding="utf-8")
    for old in set((folder / "pictures").glob("*.svg")) - drawn:
        old.unlink()
    out.print(f"page: {page}")
    return page


def side_by_side() -> Sheet:
    """What the README quotes of the claim that has every recipe: mean and interval over seeds."""
    claim = Claim.load("recipes")
    return _arms(claim, claim.numbers(), ("accuracy", "gain", "extended"))


def text(folder: Path) -> str:
    """The page."""
    sheet = overview(folder)
    rows = tuple((f"[{row[0]}](#{row[0]})", *row[1:]) for row in sheet.rows)
    parts = [_INTRODUCTION, Sheet("", sheet.header, rows).markdown()]
    for name in names(folder):
        parts += _section(Claim.load(name, folder))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# The papers' claims, measured on a desk

Made by `rlhf claims page` from the numbers in `results/`; `rlhf claims run NAME --seeds 5` makes those again. Every
seed that was run is here. An interval is the mean over seeds, paired where two arms are compared, with Student's 95 %
interval. *Reproduced*: the whole interval lies on the side that the claim says; *not reproduced*: on the other;
*inconclusive*: on both. Lines of pictures are means over seeds, bands the range of all seeds. The models have 0.3
million parameters and learn sums: whether a claim holds there says that the method does here what its paper says it
does, and not that it does so at every size.

A commit is that of the code when a run began; until 2026-11-24 it was read when the run ended, and `-dirty` stood for
any changed file. 71d7ebb, 487cef1 and b0acd07, of 2026-11-23 and 24, were rewritten before they landed and cannot be
looked up."""


def _section(claim: Claim) -> list[str]:
    numbers = claim.numbers()
    findings = claim.findings(numbers)
    said = verdict(findings)
    parts = [
        f"## {claim.name}",
        f"**{claim.title}** ({claim.source})",
        f"*The paper:* {claim.paper}",
        f"*Hypothesis, {claim.written}:* {claim.hypothesis}",
        f"Verdict: {MARKS.get(said, said)}{_outdated(claim, numbers)}. {claim.remark}".strip(),
        *_cost(numbers),
        _checks(findings).markdown(),
        _arms(claim, numbers, tuple(claim.measures)).markdown(),
    ]
    return [*parts, *(f"![{picture.title}]({path.relative_to(claim.folder)})" for picture, path in _pictures(claim))]


def _pictures(claim: Claim) -> list[tuple[Picture, Path]]:
    """The pictures of what was measured, and where they lie."""
    folder, measured = claim.folder / "pictures", claim.numbers()
    return [
        (picture, folder / f"{claim.name}-{place}.svg")
        for place, picture in enumerate(claim.pictures)
        if picture.among(measured).height
    ]


def _cost(numbers: pl.DataFrame) -> list[str]:
    """How long the stages of a seed took, all arms together."""
    if not numbers.height:
        return []
    spent = numbers.filter(pl.col("name") == "time/seconds").group_by("seed").agg(pl.col("value").sum() / 60)["value"]
    commits = ", ".join(sorted(numbers["commit"].cast(pl.String).unique()))
    return [f"{len(spent)} seeds; the stages of a seed took {fmean(spent):.1f} minutes; commit {commits}."]


def _checks(findings: Sequence[Finding]) -> Sheet:
    rows = tuple((one.check.says, MARKS.get(one.verdict, one.verdict), one.why) for one in findings)
    return Sheet("", ("what must hold", "verdict", "what was found"), rows)


def _arms(claim: Claim, numbers: pl.DataFrame, measures: Sequence[str]) -> Sheet:
    """What was measured of each arm: mean and interval over seeds."""
    values, rows = claim.values(numbers), []
    for name, arm in claim.arms.items():
        cells = (values.get(f"{name}.{measure}", {}) for measure in measures)
        rows.append((name, arm.doc, *(str(Interval.of(list(cell.values()))) if cell else "" for cell in cells)))
    header = ("arm", "what it is", *(claim.measures[measure].doc for measure in measures))
    return Sheet("", header, tuple(rows))


def _draw(claim: Claim, picture: Picture, path: Path) -> None:
    """Draw a line for each arm, mean over seeds, with the range of all seeds behind it."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExperimentError("pictures are drawn with matplotlib, which is not installed", do=_INSTALL) from error
    numbers = claim.numbers()
    with mpl.rc_context({"svg.hashsalt": claim.name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for arm, colour in zip(picture.arms or claim.arms, COLOURS * 3, strict=False):
            drawn = (
                picture.among(numbers)
                .filter(pl.col("arm") == arm)
                .group_by("iteration")
                .agg(mean=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max())
                .sort("iteration")
            )
            if drawn.height:
                axes.plot(drawn["iteration"], drawn["mean"], color=colour, label=arm, marker=".", linewidth=1.5)
                axes.fill_between(drawn["iteration"], drawn["low"], drawn["high"], color=colour, alpha=0.12, lw=0)
        axes.set(xlabel="iteration", title=picture.title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
