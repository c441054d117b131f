"""What keeping the activations of frozen layers saves in whole runs, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import smartfrz_jax as sfj
from research import json_lines
from research.recordings.sets import Batches
from research.trials.classification import loss_fn, losses_on
from research.trials.result import mean_and_error
from research.trials.strategies import Situation, Strategy
from research.trials.trial import MIN_SAVING, Bench
from train.log import Log, Run
from train.loop import Loop, make_step


class KeptRun(NamedTuple):
    """A run, with or without the activations at the end of the frozen front kept.

    Attributes:
        case: Name of the case.
        strategy: Name of the strategy.
        seed: Seed of the head, the order of examples and the policy.
        kept: Whether activations were kept.
        accuracy: Share of the held-out examples classified right.
        loss: Mean cross entropy on them.
        flops: Of all steps, as compiled, and of computing activations.
        account: FLOPs by the account, as a share of those of the full run.
        seconds: Of all steps, computing, storing and looking up activations included, and of decisions.
        wait_seconds: That the run stood still for programs, and for making room.
        stored_bytes: Of the activations that were stored at the end.
    """

    case: str
    strategy: str
    seed: int
    kept: bool
    accuracy: float
    loss: float
    flops: float
    account: float
    seconds: float
    wait_seconds: float
    stored_bytes: int

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> KeptRun:
        """From a JSON object."""
        parsed: dict[str, Any] = json_lines.with_nan(fields)
        return cls(**parsed)

    @property
    def total_seconds(self) -> float:
        """Of all steps and decisions, and of standing still."""
        return self.seconds + self.wait_seconds


def measure(bench: Bench, name: str, strategy: Strategy, seed: int, *, kept: bool) -> KeptRun:
    """Runs a strategy, with programs of its own.

    Args:
        bench: The case.
        name: Name of the strategy.
        strategy: The strategy; one that needs no predictor.
        seed: Seed of the head, the order of examples and the policy.
        kept: Whether to keep activations.

    Raises:
        FloatingPointError: If the training diverges.
    """
    steps, examples = bench.steps(strategy), bench.data.train
    batches = Batches(examples, bench.setup.batch_size, seed, bench.setup.augment)
    model = bench.model(seed)
    optimizer = bench.optimizer(model, strategy)
    step = _step(bench, steps) if kept else sfj.TrainStep(make_step(loss_fn), account=bench.account)
    policy = strategy.policy(Situation(steps, bench.costs(), bench.reference, None, None, seed))
    freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=step, min_saving=MIN_SAVING)

    def data() -> Iterator[tuple[Any, ...]]:
        for number in range(steps):
            batch = batches(number)
            yield *((batches.indices(number),) if kept else ()), batch.inputs, batch.labels

    with tempfile.TemporaryDirectory() as folder, Log(Path(folder) / "log.jsonl", Run(name, bench.layers.names)) as log:
        for _ in Loop(log, freezer, step).run(data()):
            pass
    losses, right = losses_on(model, bench.data.held_out)
    frozen = [(event.step, list(event.names)) for event in log.run.freezes]
    store = step.cache.store if isinstance(step, sfj.nnx.CachedStep) and step.cache is not None else None
    return KeptRun(
        bench.name,
        name,
        seed,
        kept,
        float(right.mean()),
        float(losses.mean()),
        sum(one.flops for one in log.run.steps),
        bench.compute(frozen, steps)[int(kept)],
        log.run.seconds,
        step.wait_seconds,
        0 if store is None else store.nbytes,
    )


def _step(bench: Bench, steps: int) -> sfj.nnx.CachedStep:
    examples = len(bench.data.train)
    return sfj.nnx.CachedStep(make_step, loss_fn, examples=examples, account=bench.account, total_steps=steps)


def report(runs: Sequence[KeptRun]) -> str:
    """Markdown tables, one for each case: every strategy with and without activations kept, beside ``never``.

    Columns: seeds; FLOPs and total seconds relative to ``never`` with the same seed, the median over the seeds, and
    between them FLOPs by the account; these seconds of the first seed, which compiles what the others load; stored
    bytes; and accuracy in points and test loss, less those of ``never``, with the standard error over seeds.

    Args:
        runs: The runs; those without a run of ``never`` with their seed are left out.
    """
    never = {(run.case, run.seed): run for run in runs if run.strategy == "never" and not run.kept}
    tables = []
    for case in dict.fromkeys(case for case, _ in never):
        lines = [
            f"### {case}\n",
            "| strategy | activations | seeds | FLOPs | by account | time | first seed | stored, MB | points | loss |",
            f"|---|---|{'--:|' * 8}",
        ]
        found: dict[tuple[str, bool], list[tuple[KeptRun, KeptRun]]] = {}
        for run in runs:
            if run.case == case and (case, run.seed) in never:
                found.setdefault((run.strategy, run.kept), []).append((never[case, run.seed], run))
        for (strategy, kept), pairs in sorted(found.items(), key=lambda item: -_median(item[1], "flops")):
            points = mean_and_error([100 * (run.accuracy - base.accuracy) for base, run in pairs], 2)
            loss = mean_and_error([run.loss - base.loss for base, run in pairs], 3)
            stored = np.median([run.stored_bytes for _, run in pairs])
            first = min(pairs, key=lambda pair: pair[0].seed)
            shares = f"{_median(pairs, 'flops'):.2f} | {np.median([run.account for _, run in pairs]):.2f}"
            time, compiling = (f"{_median(some, 'total_seconds'):.2f}" for some in (pairs, [first]))
            times, how = f"{time} | {compiling} | {stored / 1e6:.1f}", "kept" if kept else "-"
            lines.append(f"| {strategy} | {how} | {len(pairs)} | {shares} | {times} | {points} | {loss} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _median(pairs: Sequence[tuple[KeptRun, KeptRun]], of: str) -> float:
    """Of the quotients with ``never``."""
    return float(np.median([getattr(run, of) / getattr(base, of) for base, run in pairs]))
