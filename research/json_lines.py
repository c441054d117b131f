"""Files with a JSON object on each line, to which long comparisons add what they have found.

Every line has the commit that it was found at, but for those of old files.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from research.results import commit
from train.log import finite

T = TypeVar("T")
Row: TypeAlias = Mapping[str, Any]  # an object


def read(file: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """The objects of a file; none if it is not there.

    A last line without its end was being written when the script was killed, and is left out.

    Args:
        file: The file.
        parse: From an object, without its commit, to what is made of it.

    Raises:
        ValueError: If a line is damaged.
    """
    found = []
    for number, line in enumerate(_lines(file), 1):
        try:
            fields = json.loads(line)
            fields.pop("commit", None)
            found.append(parse(fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"out: line {number} of {file} is not a result ({error}); remove it, or choose another folder"
            ) from error
    return found


def read_with_commit(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with the commits that they were found at; see :func:`read`."""
    commits = [json.loads(line).get("commit", "unknown") for line in _lines(file)]
    return [{**row, "commit": commit} for row, commit in zip(read(file, dict), commits, strict=True)]


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Adds an object, and the commit unless it has one, to the end of a file.

    Args:
        file: The file.
        row: The object. NaN and infinite numbers, which JSON does not know, become ``null``.
    """
    with file.open("a+b") as opened:
        opened.seek(0)
        opened.truncate(opened.read().rfind(b"\n") + 1)  # what `read` leaves out would spoil the new line
        opened.write(
            (json.dumps(_strict({**row, "commit": row.get("commit") or commit()}), allow_nan=False) + "\n").encode()
        )


def with_nan(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An object with NaN for ``null``, which :func:`append` has made of it."""
    return {name: math.nan if value is None else value for name, value in fields.items()}


def commits(*files: Path) -> str:
    """In one sentence, at which commits the lines of files were found; ``unknown`` is that of old ones."""
    lines = [json.loads(line) for file in files for line in _lines(file)]
    counts = collections.Counter(line.get("commit", "unknown") for line in lines)
    at = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return f"Commits of its {len(lines)} results: {at}."


def _lines(file: Path) -> list[str]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _strict(value: Any) -> Any:
    match value:
        case float():
            return finite(value)
        case Mapping():
            return {name: _strict(part) for name, part in value.items()}
        case list() | tuple():
            return [_strict(part) for part in value]
    return value
