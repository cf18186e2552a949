"""What a stage measures: rows of the metrics contract, and a line on the console while it runs."""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts import METRICS
from pipeline.ranks import rank


@dataclass
class Metrics:
    """Collects numbers of one stage. Names are `area/what`; every number has a unit."""

    run: str
    iteration: int | None
    stage: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str = "", step: int = 0) -> None:
        """Record `name = value` at `step` (0: about the stage as a whole)."""
        self.rows.append({"step": step, "name": name, "value": float(value), "unit": unit})

    def last(self) -> dict[str, float]:
        """The latest value of every name."""
        return {row["name"]: row["value"] for row in self.rows}

    def table(self) -> pa.Table:
        """All rows, as the metrics contract has them."""
        place = {"run": self.run, "iteration": self.iteration, "stage": self.stage}
        return pa.Table.from_pylist([{**place, **row} for row in self.rows], schema=METRICS.schema())

    def write(self, path: Path) -> None:
        """Write the rows as a Parquet file."""
        pq.write_table(self.table(), path)


class Console:
    """Progress for a person: whole lines to stderr, and a fleeting one where stderr is a terminal.

    Fleeting lines (`step 40/400 ...`) replace each other on a terminal; in a file or a pipe one appears at most
    every ten seconds.
    """

    def __init__(self) -> None:
        self.subject = ""
        """What fleeting lines are about: the artifact in the making."""
        self._fleeting = False
        self._last = 0.0

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        _write(f"{text}\n")

    def progress(self, text: str) -> None:
        """Show a line that the next one replaces."""
        text = f"{self.subject} {text}".strip()
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self._last < (0.2 if terminal else 10.0):
            return
        self._last = now
        if not terminal:
            self.line(f"  {text}")
            return
        self._clear()
        _write(f"  {text}")
        self._fleeting = True

    def _clear(self) -> None:
        if self._fleeting:
            _write("\r\033[K")
            self._fleeting = False


def _write(text: str) -> None:
    """Show text; where nobody reads any more (the worker that started this is gone), the work goes on unseen."""
    if rank():
        return
    with suppress(BrokenPipeError):
        sys.stderr.write(text)
        sys.stderr.flush()


console = Console()
