"""How long the device does nothing between the steps of a loop, from a trace of JAX's profiler. For CPUs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.profiler import ProfileData, ProfileOptions

_RUNS = "ThunkExecutor::Execute"  # what XLA on CPU calls the running of a program, and of parts of it

Interval = tuple[float, float]


def idle_share(intervals: Iterable[Interval]) -> float:
    """Share of the time from the first beginning to the last end that is in none of some intervals.

    Args:
        intervals: Beginnings and ends; they may overlap.

    Raises:
        ValueError: If there are none.
    """
    ordered = sorted(intervals)
    if not ordered:
        raise ValueError("intervals: got none, expected the times of programs; trace a loop that runs some")
    busy, end = 0.0, ordered[0][0]
    for begin, until in ordered:
        busy += max(0.0, until - max(begin, end))
        end = max(end, until)
    return 1 - busy / (end - ordered[0][0])


def executions(run: Callable[[], object]) -> list[Interval]:
    """When the device was at work during a function, in nanoseconds: programs, one after the other or side by side.

    Args:
        run: The function; it ends when the device has done all.
    """
    options = ProfileOptions()
    options.python_tracer_level = 0  # which would slow down what is looked at
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return [
            (event.start_ns, event.start_ns + event.duration_ns)
            for plane in ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
            if event.name.startswith(_RUNS)
        ]
