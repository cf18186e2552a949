"""Tables for people: on the terminal, and as Markdown."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(soft_wrap=False)
"""Where the commands that look at data print."""


@dataclass(frozen=True)
class Sheet:
    """A table for people."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def transposed(self) -> "Sheet":
        """Rows as columns: for tables of a few rows with many numbers."""
        header, *rows = zip(self.header, *self.rows, strict=True)
        return Sheet(self.title, header, tuple(rows))

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def print_sheet(sheet: Sheet) -> None:
    """Print a table."""
    table = Table(*sheet.header, title=sheet.title, title_justify="left")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    out.print(table)
