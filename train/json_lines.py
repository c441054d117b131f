"""Files with a JSON object on each line, to which long comparisons add what they have found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read(file: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """The objects of a file; none if it is not there.

    Args:
        file: The file.
        parse: From an object to what is made of it.

    Raises:
        ValueError: If a line is damaged.
    """
    found = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"out: line {number} of {file} is not a result ({error}); remove it") from error
    return found


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Adds an object to the end of a file."""
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")
