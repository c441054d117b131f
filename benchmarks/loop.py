"""What the loop of ``train.finetune`` costs over a bare loop that calls the same compiled program as often.

The bare loop hands arrays from call to call and waits at the end. The loop beside it has all that a run has: modules,
freezer, policy, log. Batches are ready for both. The policies are ``never``, and ``smartfrz`` at the pace of a run of
2,000 steps and with such caution that it freezes nothing: five records and a decision in 80 steps.

*Idle* is the share of time in which the device does nothing between the steps of a run, from a trace. The bare loop
has its share, too: between two programs XLA wakes up a thread.

Runs take turns, and a round has one of each. The figures are medians over the rounds of the quotient within a round:
of seconds by the wall, and of processor seconds, which other programs on the machine disturb less. On one core nothing
runs beside the step, so what the host does is never hidden. A JSON line for each case goes to ``--out``.

Usage: python -m benchmarks.loop [--steps 80] [--rounds 5] [--batch 8] [--size 64] [--only mobilenetv2 deit_tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.device_idle import executions, idle_share
from benchmarks.networks import CLASSES, NETWORKS, train_step
from benchmarks.networks import batch as random_batch
from smartfrz_jax.programs.nnx_call import Watch
from train.log import Log, Run
from train.loop import AHEAD, Loop

PACE = 2000  # steps of the run at whose pace smartfrz records and decides
TRACES = 3  # of each kind of run


class Seconds(NamedTuple):
    """Of a run, by the wall and of the processor."""

    wall: float
    processor: float


def timed(run: Callable[[], object]) -> Seconds:
    """Seconds of a function."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


class Case:
    """A network with one compiled step."""

    def __init__(self, name: str, batch: int, size: int):
        network = NETWORKS[name]
        options: dict[str, Any] = {"image_size": size} if name.startswith("deit") else {}
        self.batch = jax.tree.map(jnp.asarray, random_batch(network, batch, size))
        self.model = network.make(num_classes=CLASSES, rngs=nnx.Rngs(0), **options)
        self.layers = sfj.nnx.find_layers(self.model, *self.batch[0])
        self.optimizer = sfj.nnx.Optimizer(self.model, optax.sgd(1e-4, momentum=0.9), layers=self.layers)
        self.step = sfj.TrainStep(train_step)
        self.step(self.model, self.optimizer, *self.batch)

    def bare(self, steps: int) -> Callable[[], object]:
        """The bare loop, from where the model is now."""
        (compiled,) = self.step._compiled.values()
        call = compiled.call
        values = [variable.get_raw_value() for variable in Watch([self.model, self.optimizer]).variables]
        rest = jax.tree.leaves(self.batch)
        assert call.targets is not None
        targets: list[int] = call.targets

        def run() -> None:
            loss = None
            for _ in range(steps):
                new, loss = call.stage(*values, *rest)
                for place, value in zip(targets, new, strict=True):
                    values[place] = value
            jax.block_until_ready(loss)

        return run

    def policy(self, name: str) -> sfj.Policy:
        """One that freezes nothing."""
        if name == "never":
            return sfj.policies.never()
        return sfj.smartfrz(sfj.Predictor.pretrained(), total_steps=PACE, caution=1.0)

    def loop(self, name: str, steps: int, folder: Path) -> Callable[[], object]:
        """The loop with a policy; further calls go on with its state."""
        freezer = sfj.nnx.Freezer(self.model, self.optimizer, self.policy(name), train_step=self.step)
        freezer.delay = AHEAD

        def run() -> None:
            freezer.steps = 0  # so that every run is at the same pace
            with Log(folder / f"{name}.jsonl", Run(name, self.layers.names)) as log:
                for _ in Loop(log, freezer, self.step).run(self.batch for _ in range(steps)):
                    pass

        return run


def idle(runs: Iterable[Callable[[], object]]) -> float:
    """The median over some runs of the share of time in which the device does nothing."""
    return float(np.median([idle_share(executions(run)) for run in runs]))


def measure(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The figures of a network, one line for each policy."""
    case = Case(name, args.batch, args.size)
    loops = {policy: case.loop(policy, args.steps, folder) for policy in ("never", "smartfrz")}
    for run in loops.values():  # compiles what the policy needs
        run()
    bare: list[Seconds] = []
    of_loops: dict[str, list[Seconds]] = {policy: [] for policy in loops}
    for number in range(args.rounds):
        bare.append(timed(case.bare(args.steps)))
        for policy in list(loops)[:: -1 if number % 2 else 1]:
            of_loops[policy].append(timed(loops[policy]))
    about = {
        "network": name,
        "batch": args.batch,
        "size": args.size,
        "steps": args.steps,
        "rounds": args.rounds,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
    }
    idle_bare, lines = idle(case.bare(args.steps) for _ in range(TRACES)), []
    for policy, found in of_loops.items():
        over = [[(a - b) / b for a, b in zip(*pair, strict=True)] for pair in zip(found, bare, strict=True)]
        wall, processor = np.median(over, axis=0)
        milliseconds = 1e3 * float(np.median([one.processor for one in bare])) / args.steps
        figures = {"bare_processor_ms": milliseconds, "over_wall": float(wall), "over_processor": float(processor)}
        figures |= {"idle": idle([loops[policy]] * TRACES), "idle_bare": idle_bare}
        spread = [round(float(one[1]), 4) for one in over]
        lines.append(about | {"policy": policy} | figures | {"over_processor_of_rounds": spread})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    head = ("network", "policy", "idle", "idle, bare", "bare step, ms of the processor", "over it", "by the wall")
    rows = [f"| {' | '.join(head)} |", "|---|---|--:|--:|--:|--:|--:|"]
    rows += [
        f"| {line['network']} | {line['policy']} | {line['idle']:.1%} | {line['idle_bare']:.1%} "
        f"| {line['bare_processor_ms']:.1f} | {line['over_processor']:+.1%} | {line['over_wall']:+.1%} |"
        for line in lines
    ]
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Measures the networks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=80, help="steps of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="height and width of images (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=["mobilenetv2", "deit_tiny"])
    parser.add_argument("--out", type=Path, help="file that the JSON lines are added to")
    args = parser.parse_args(argv)
    lines: list[dict[str, Any]] = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            lines += measure(name, args, Path(folder))
        if args.out is not None:
            with args.out.open("a") as opened:
                opened.writelines(json.dumps(line) + "\n" for line in lines[-2:])
        jax.clear_caches()
    print(table(lines))


if __name__ == "__main__":
    main()
