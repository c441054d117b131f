"""Step time against the frozen share, over the ideal; and the memory that the device really used."""

from __future__ import annotations

import time
from typing import Any

import jax

import smartfrz_jax as sfj
from benchmarks.gpu.cases import Case, Skipped
from benchmarks.gpu.timing import in_turns
from benchmarks.networks import train_step


def step_time(case: Case) -> dict[str, Any]:
    """Times the step with 0, 25, 50, 75 and 100 % of the forward FLOPs frozen.

    The ideal is (3 - 2f) / 3 for the share f, as in :mod:`benchmarks.frozen_share`. All programs are compiled at the
    same time, each in a thread of its own.
    """
    begin = time.perf_counter()
    pairs = [case.make(frozen) for _, frozen in case.prefixes]
    steps = [sfj.TrainStep(train_step, donate=True) for _ in pairs]
    for step, pair in zip(steps, pairs, strict=True):
        step.compile_ahead(*pair, *case.batch)
    programs = [step.program(*pair, *case.batch) for step, pair in zip(steps, pairs, strict=True)]
    compiled = time.perf_counter() - begin
    runs = {
        n: lambda step=step, pair=pair: step(*pair, *case.batch)
        for n, (step, pair) in enumerate(zip(steps, pairs, strict=True))
    }
    times = in_turns(runs, case.sizes, float)
    rows = []
    for n, ((share, frozen), program) in enumerate(zip(case.prefixes, programs, strict=True)):
        ideal, ratio = (3 - 2 * share) / 3, times[n].median / times[0].median
        rows.append({
            "share": share,
            "layers": len(frozen.names),
            "ms": times[n].median,
            "spread": times[n].spread,
            "ratio": ratio,
            "ideal": ideal,
            "over_ideal": ratio / ideal,
            "account_flops": case.account.flops(frozen).total,
            "compiled_flops": program.cost.flops,
            "temp_bytes": program.cost.temp_bytes,
            "trace_seconds": program.cost.trace_seconds,
            "compile_seconds": program.cost.compile_seconds,
        })  # fmt: skip
    return {"all_layers": len(case.layers), "ready_seconds": compiled, "shares": rows}


def memory(case: Case) -> dict[str, Any]:
    """The most memory that the device had in use, against what the compiled program says.

    It is a high-water mark of the process, so the cheapest step comes first. Programs come from the files that
    :func:`step_time` left: compiling tries kernels out, on the device.

    Raises:
        Skipped: If the device does not tell.
    """
    device = jax.devices()[0]
    if not device.memory_stats():
        raise Skipped(f"{device.device_kind} does not count its memory")
    rows, kept = [], []
    for share, frozen in reversed(case.prefixes):
        pair = case.make(frozen)
        step = sfj.TrainStep(train_step, donate=True)
        cost = step.program(*pair, *case.batch).cost
        before = device.memory_stats()["bytes_in_use"]
        for _ in range(2):
            float(step(*pair, *case.batch))
        rows.append({
            "share": share,
            "peak_bytes": device.memory_stats()["peak_bytes_in_use"],
            "predicted_bytes": before + cost.peak_bytes - cost.argument_bytes,
            "compile_seconds": cost.compile_seconds,
        })  # fmt: skip
        kept.append(pair)  # so that no memory that was given back hides what is new
    return {"shares": rows[::-1]}
