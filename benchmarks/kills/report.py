"""What was killed, how often, and what was lost: a table from the entries of a campaign."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks.kills.victim import Case

WHERE = {
    "step": "a train step",
    "save": "writing a checkpoint",
    "compile": "compiling the next program",
    "freeze": "freezing",
    "evaluation": "an evaluation",
    "start": "setting up, or restoring",
    "end": "writing weights and report",
}
# What a process ends with: SIGKILL, or SIGTERM after which it is saved.
CODES = {"SIGKILL": -9, "SIGTERM": 75}


_FIRST = "| killed in | SIGKILL | SIGTERM |"


def case_of(entry: dict[str, Any]) -> Case:
    """The case that an entry is of."""
    return Case(**{name: entry[name] for name in Case._fields})


def ended(entries: Iterable[dict[str, Any]], signal: str) -> list[dict[str, Any]]:
    """The kills by a signal that ended a process; others came when it was over."""
    return [one for one in entries if one["event"] == "kill" and one["signal"] == signal and one["code"]]


def lost(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of runs that differ from those left alone, or of processes that ended in another way."""
    return [
        one
        for one in entries
        if (one["event"] == "end" and (one["code"] or one["differs"]))
        or (one["event"] == "kill" and one["code"] not in (0, CODES[one["signal"]]))
    ]


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: how often, by where it hit, and how many runs differ in the end."""
    lines = [_FIRST, "|---|---:|---:|"]
    killed, told = ended(entries, "SIGKILL"), ended(entries, "SIGTERM")
    for kind, where in WHERE.items():
        counts = [sum(one["kind"] == kind for one in some) for some in (killed, told)]
        lines.append(f"| {where} | {counts[0]} | {counts[1]} |")
    lines.append(f"| **all** | **{len(killed)}** | **{len(told)}** |")
    ends = [one for one in entries if one["event"] == "end"]
    frozen = sum(one["freezes"] > 0 for one in ends)
    lines += [
        "",
        "| runs | of these freeze layers | differ in a bit from the run left alone |",
        "|---:|---:|---:|",
        f"| {len(ends)} | {frozen} | {len(lost(entries))} |",
        "",
        "| policy | keep modes | kept activations | killed |",
        "|---|---|---|---:|",
    ]
    for policy in dict.fromkeys(one["policy"] for one in ends):
        of_policy = [one for one in ends if one["policy"] == policy]
        modes, kept = (
            ", ".join(dict.fromkeys(one[name] for one in of_policy)) for name in ("returning", "keep_activations")
        )
        count = sum(one["policy"] == policy for one in (*killed, *told))
        lines.append(f"| `{policy}` | {modes} | {kept} | {count} |")
    return "\n".join(lines)


def write_page(page: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    """Puts the tables in place of those at the end of a page."""
    text = page.read_text()
    page.write_text(f"{text[: text.index(_FIRST)]}{table(entries)}\n")
