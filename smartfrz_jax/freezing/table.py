"""A table for people, as plain text or, printed by ``rich``, in colour."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table below a sentence; ``print`` shows it as text, ``rich.print`` as a table of that package's.

    Attributes:
        title: What it says, in a sentence or two.
        columns: Heads of the columns; the first is aligned left, the others right.
        rows: The cells of each row.
        total: A last row, set apart; ``()`` for none.
    """

    title: str
    columns: Row
    rows: tuple[Row, ...]
    total: Row = ()

    def __str__(self) -> str:
        totals = (self.total,) if self.total else ()
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, *totals, strict=True)]

        def line(row: Row) -> str:
            first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            return "  ".join((row[0].ljust(len(first)), *rest)).rstrip()

        return "\n".join((self.title, "", *map(line, (self.columns, *self.rows, *totals))))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich import table  # not needed for training

        shown = table.Table(show_footer=bool(self.total))
        for i, head in enumerate(self.columns):
            footer = self.total[i] if self.total else ""
            shown.add_column(head, footer, justify="right" if i else "left", overflow="fold" if i == 0 else "ellipsis")
        for row in self.rows:
            shown.add_row(*row, style="cyan" if row[-1] else None)
        yield self.title
        yield shown
