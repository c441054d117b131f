"""What was killed, how often, and what was lost: tables from the entries of a campaign."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

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
ALONE = 60.0  # seconds in which a process is to end after the other died
HEADINGS = {1: "## One process", 2: "## Two processes"}

_OF = {(0,): "the first", (1,): "the second", (0, 1): "both"}


def of_runs(entries: Iterable[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """The entries of runs of so many processes."""
    return [one for one in entries if one.get("processes", 1) == processes]


def codes(entry: dict[str, Any]) -> list[int]:
    """The exit codes of the processes of an entry."""
    return entry["codes"] if "codes" in entry else [entry["code"]]


def ended(entries: Iterable[dict[str, Any]], signal: str) -> list[dict[str, Any]]:
    """The kills by a signal that ended a run; others came when it was over."""
    return [one for one in entries if one["event"] == "kill" and one["signal"] == signal and any(codes(one))]


def lost(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of runs that differ from those left alone, or of processes that ended in another way, or not at all."""
    return [
        one
        for one in entries
        if (one["event"] == "end" and (any(codes(one)) or one["differs"]))
        or (one["event"] == "kill" and not _is_as_expected(one))
    ]


def _is_as_expected(kill: dict[str, Any]) -> bool:
    """Whether all ended as the signal wants it: after SIGTERM all save, after SIGKILL of one the others give up."""
    found, expected = codes(kill), CODES[kill["signal"]]
    if not any(found) or len(found) == 1:
        return found[0] in (0, expected)
    in_time = kill["seconds"] < ALONE
    if kill["signal"] == "SIGTERM":
        return in_time and set(found) == {expected}
    # Of two that are to be killed at one moment, one may end by the death of the other before.
    return in_time and all(found) and expected in [found[number] for number in kill["of"]]


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: how often, by where it hit, and how many runs differ in the end.

    Args:
        entries: Of runs of as many processes.
    """
    lines = ["| killed in | SIGKILL | SIGTERM |", "|---|---:|---:|"]
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
        *_processes(killed),
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


def _processes(killed: list[dict[str, Any]]) -> list[str]:
    """Which of two processes was killed, and how long the other lived; nothing for runs of one."""
    of = {name: [one for one in killed if tuple(one.get("of", ())) == which] for which, name in _OF.items()}
    if not any(of.values()):
        return []
    lines = ["| SIGKILL of | times | seconds until all had ended, at most |", "|---|---:|---:|"]
    for name, some in of.items():
        seconds = max((one["seconds"] for one in some), default=0.0)
        lines.append(f"| {name} | {len(some)} | {seconds:.0f} |")
    return [*lines, ""]


def write_page(page: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    """Puts the tables in place of those at the end of a page."""
    text = page.read_text()
    parts = [f"{heading}\n\n{table(of_runs(entries, processes))}\n" for processes, heading in HEADINGS.items()]
    page.write_text(text[: text.index(HEADINGS[1])] + "\n".join(parts))
