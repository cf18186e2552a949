"""The tables that the README prints and the command line shows: from the code, never written by hand."""

from collections.abc import Sequence
from importlib import import_module

from flows.sheets import Sheet
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shelf import FROM_MODELS
from pipeline.contracts import CONTRACTS, Contract
from pipeline.errors import ExperimentError
from pipeline.inspecting.names import EVERY, names
from pipeline.stage import Stage

STAGES = (
    "ingest", "sft", "rollout", "ask", "rank", "reward", "label", "score", "advantage", "value", "update", "perplexity",
)  # fmt: skip
"""In the order in which data passes them."""


def load_stage(name: str) -> Stage:
    """Import a stage by its name. Raises `ExperimentError` that lists the names."""
    if name not in STAGES:
        raise ExperimentError(f"no stage is called {name!r}; there are: {', '.join(STAGES)}", do="`rlhf stages`")
    found: Stage = getattr(import_module(f"stages.{name}"), name)
    return found


def stages_sheet() -> Sheet:
    """Every stage: what it reads and writes, where it runs."""
    loaded: Sequence[Stage] = [load_stage(name) for name in STAGES]
    rows = tuple(
        (s.name, ", ".join(s.reads), " or ".join(c.name for c in s.writes), s.hardware, s.summary) for s in loaded
    )
    return Sheet("stages", ("stage", "reads", "writes", "hardware", "does"), rows)


def recipes_sheet() -> Sheet:
    """Every recipe: its paper, its idea, the models that read its responses (derived from its pieces)."""
    from pipeline.algorithms.bind import bind

    rows = []
    for name in Recipe.names():
        recipe = Recipe.load(name)
        needs = bind(recipe).needs
        models = [model for column, model in FROM_MODELS.items() if column in needs]
        elsewhere = "; ".join(f"{system}: {difference.rstrip('.')}" for system, difference in recipe.differs.items())
        rows.append((name, recipe.paper, recipe.idea, ", ".join(models) or "none", recipe.reference, elsewhere))
    return Sheet("recipes", ("recipe", "paper", "idea", "models needed", "reference", "elsewhere"), tuple(rows))


def contract_sheet(contract: Contract) -> Sheet:
    """The columns of one contract."""
    rows = tuple(
        (f.name, str(f.type), "absent or full" if f.optional else "yes" if f.null else "no", f.unit, f.doc)
        for f in contract.fields
    )
    return Sheet(f"{contract.name} (version {contract.version})", ("column", "type", "null", "unit", "meaning"), rows)


def metrics_sheet() -> Sheet:
    """What stages measure, and what TRL and verl call the same number."""
    rows = tuple(
        (
            row.name, "all" if EVERY in row.kinds else ", ".join(row.kinds), row.unit, row.meaning, row.trl or "",
            row.verl or "", row.differs or "",
        )
        for row in names()
    )  # fmt: skip
    return Sheet("metrics", ("name", "measured for", "unit", "meaning", "TRL", "verl", "almost the same"), rows)


def aliases_sheet() -> Sheet:
    """The metrics of which TRL or verl have the same number under another name."""
    sheet = metrics_sheet()
    return Sheet("aliases", sheet.header, tuple(row for row in sheet.rows if row[4] or row[5]))


def contracts_markdown() -> str:
    """All contracts as the README shows them."""
    parts = [
        f"**{contract_sheet(contract).title}.** {contract.doc}\n\n{contract_sheet(contract).markdown()}"
        for contract in CONTRACTS.values()
        if contract.is_table
    ]
    return "\n\n".join(parts)
