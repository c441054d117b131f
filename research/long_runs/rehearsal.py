"""A rehearsal before a long run: whether the front half can be frozen from the start, and what finding out costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import smartfrz_jax as sfj
from research.json_lines import Row
from research.long_runs.bench import Bench
from research.long_runs.run import REHEARSAL, Job, Runner
from research.long_runs.strategies import CACHED, STRATEGIES, Strategy
from research.long_runs.tally import Clock
from research.trials.classification import losses_on
from research.trials.rehearsed import Plan

PLAN = Plan(rehearsed="static:half", ready="static:half,all:0.6", otherwise="progress")
COSTS = ("flops", "train_seconds", "train_cpu_seconds", "decide_seconds", "wait_seconds")
_SHARE = 0.05  # of the steps of the long run
_JUDGED_BY = 2000  # held-out training examples, at most


def rehearse(bench: Bench, job: Job, *, state: Path) -> dict[str, Any]:
    """Rehearses, and does not go on where it was interrupted: it is short.

    It trains on the examples on which learning rates are tried, in a schedule as short as it is, and is judged by the
    others. Both runs compile programs of their own. No test example has a part in it.

    Args:
        bench: The case.
        job: Its rehearsal.
        state: Folder of the queue.

    Returns:
        A row of results: what it told, and what all of it cost, evaluations included.
    """
    steps, epoch = bench.epochs_to_steps(_SHARE * bench.case.epochs, tuning=True)
    held_out = bench.held_out(tuning=True)[:_JUDGED_BY]
    spent = dict.fromkeys(COSTS, 0.0)

    def train(policy: sfj.Policy, steps: int) -> np.ndarray:
        model = bench.model(job.seed)
        if steps:
            strategy = Strategy(lambda situation: policy, length=_SHARE)
            runner = Runner(bench, job, strategy, state=state, save_every=math.inf, lead=0)
            runner.run()
            for cost in COSTS:
                spent[cost] += getattr(runner.tally, cost)
            model = runner.model
        with Clock() as clock:
            losses, _ = losses_on(model, held_out)
        spent["flops"] += sum(bench.costs.values()) * len(held_out) / bench.case.batch_size
        spent["train_seconds"] += clock.wall
        spent["train_cpu_seconds"] += clock.cpu
        return losses

    def rehearsed(steps: int) -> sfj.Policy:
        return STRATEGIES[PLAN.rehearsed].policy(bench.situation(job.seed, steps, epoch, None))

    found = sfj.rehearse(train, {PLAN.rehearsed: rehearsed}, steps=steps)
    return {
        "case": job.case,
        "strategy": REHEARSAL,
        "seed": job.seed,
        "rate": job.rate,
        "config": bench.config(),
        "epochs": steps / epoch,
        "steps": steps,
        "held_out": len(held_out),
        "rehearsal": found._asdict(),
        **spent,
    }


def going_by(rehearsals: Mapping[int, Row], runs: Mapping[str, Mapping[int, Row]]) -> dict[str, dict[int, Row]]:
    """The long runs that go by a rehearsal, its price added: with and without activations kept.

    Args:
        rehearsals: Rows of rehearsals of a case, by seed.
        runs: Rows of its strategies, by name and seed; those that a rehearsal leads to may be missing.

    Returns:
        Rows by name and seed.
    """
    found: dict[str, dict[int, Row]] = {}
    for seed, row in rehearsals.items():
        chosen = PLAN.ready if is_ready(row) else PLAN.otherwise
        for end in ("", CACHED):
            run = runs.get(chosen + end, {}).get(seed)
            if run is not None:
                found.setdefault(REHEARSAL + end, {})[seed] = {**run, **_sums(run, row)}
    return found


def _sums(run: Row, rehearsal: Row) -> dict[str, float]:
    return {cost: run[cost] + rehearsal[cost] for cost in COSTS}


def is_ready(row: Row) -> bool:
    """Whether a rehearsal found that freezing from the start is harmless."""
    return row["rehearsal"]["chosen"] is not None
