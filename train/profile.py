"""A trace of a few steps of a run, which XProf and TensorBoard open."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from smartfrz_jax.pytrees.file_paths import Path
from train.loop import Loop

WARM_UP = 10  # steps in which programs and policies are compiled, buffers allocated


def profiled(loop: Loop, steps: Iterator[int], folder: Path, number: int) -> Iterator[int]:
    """The steps of a loop, with a trace of some.

    Args:
        loop: The loop.
        steps: What its ``run`` gave.
        folder: Where the trace is written.
        number: Steps of the trace, after the first ten; none if 0.

    Yields:
        What ``steps`` does.
    """
    is_tracing = False
    try:
        for count, done in enumerate(steps, start=1):
            if number and count == WARM_UP:
                loop.drain()  # so that the trace begins and ends with whole steps
                jax.profiler.start_trace(str(folder))
                is_tracing = True
            elif is_tracing and count == WARM_UP + number:
                loop.drain()
                jax.profiler.stop_trace()
                is_tracing = False
            yield done
    finally:
        if is_tracing:
            jax.profiler.stop_trace()
