"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> str:
    """A table in Markdown.

    Args:
        head: Names of the columns.
        rows: Their cells.
        text: How many of the first columns hold text; the others are numbers.
    """
    line = "|".join("---" if place < text else "--:" for place in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])
