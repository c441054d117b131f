"""Whole runs with everything in them: does the time saved come up to what the FLOPs say, and what does deciding cost?

For each network a run in which nothing freezes and one in which ``freezeout`` (FreezeOut) freezes layer by layer, on a
random batch, the same number of steps in turns of one after the other. Programs are compiled ahead (``--lead``), small
savings gathered (``--min-saving``); waiting for programs, moving the optimizer state and the policy count as time.

Below, what ``smartfrz`` costs: every decision of ten epochs of CIFAR-10 in batches of 32 is made, with the paper's
predictor on the network's real weights, and timed; the share is against as many steps of the time measured above.

Usage: python -m benchmarks.whole_run [--steps 200] [--batch 8] [--size 64] [--only resnet50 deit_tiny]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.networks import CLASSES, NETWORKS, loss_fn, train_step
from benchmarks.networks import batch as random_batch
from train.log import Log, Run
from train.loop import Loop

CIFAR10_STEPS = 10 * (50_000 // 32)


class Case:
    """A network, its account, and runs of it."""

    def __init__(self, name: str, batch: int, size: int):
        network = NETWORKS[name]
        options: dict[str, Any] = {"image_size": size} if name.startswith("deit") else {}
        self.batch = jax.tree.map(jnp.asarray, random_batch(network, batch, size))
        self.make = lambda: network.make(num_classes=CLASSES, rngs=nnx.Rngs(0), **options)
        self.tx = optax.sgd(1e-4, momentum=0.9)
        model = self.make()
        self.layers = sfj.nnx.find_layers(model, *self.batch[0])
        self.account = sfj.nnx.account(model, self.layers, loss_fn, *self.batch, tx=self.tx)

    def train(self, name: str, policy: sfj.Policy, steps: int, lead: int, min_saving: float) -> tuple[Run, float]:
        """A run, and its seconds by the wall."""
        model = self.make()
        optimizer = sfj.nnx.Optimizer(model, self.tx, layers=self.layers)
        step = sfj.TrainStep(train_step, account=self.account)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=step, lead=lead, min_saving=min_saving)
        step.program(model, optimizer, *self.batch)  # the first program is needed by both
        with (
            tempfile.TemporaryDirectory() as folder,
            Log(Path(folder) / "log.jsonl", Run(name, self.layers.names)) as log,
        ):
            start = time.perf_counter()
            for _ in Loop(log, freezer, step).run(self.batch for _ in range(steps)):
                pass
            return log.run, time.perf_counter() - start

    def deciding(self) -> float:
        """Seconds of all decisions of ``smartfrz`` in ten epochs of CIFAR-10."""
        params = nnx.as_pure(nnx.state(self.make(), nnx.Param))
        predictor = sfj.Predictor(paper=True, rngs=nnx.Rngs(0))
        policy = sfj.smartfrz(predictor, total_steps=CIFAR10_STEPS, caution=1.0)
        state = policy.init(self.layers, params)
        seconds = 0.0
        for step in range(1, CIFAR10_STEPS + 1):
            start = time.perf_counter()
            _, state = policy.update(state, self.layers, step=step, params=lambda: params)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
        return seconds


def main(argv: list[str] | None = None) -> None:
    """Measures the networks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_run", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of a run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="height and width of images (default: %(default)s)")
    parser.add_argument("--lead", type=int, default=20, help="steps from a decision to its effect")
    parser.add_argument("--min-saving", type=float, default=0.1, help="share of a step that a program must save")
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=["resnet50", "deit_tiny"])
    args = parser.parse_args(argv)
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}; "
          f"{args.steps} steps, lead {args.lead}, min_saving {args.min_saving}\n")  # fmt: skip
    print("| network | unfrozen step, ms | FLOPs saved | time saved, everything included | time / FLOPs | programs "
          "| waiting, s | of ten epochs of CIFAR-10 | deciding, of ten epochs |")  # fmt: skip
    print("|---" + "|--:" * 8 + "|")
    for name in args.only:
        case = Case(name, args.batch, args.size)
        freezeout = sfj.freezeout(total_steps=args.steps, t0=0.3)
        plain, plain_seconds = case.train("never", sfj.policies.never(), args.steps, args.lead, args.min_saving)
        frozen, seconds = case.train("freezeout", freezeout, args.steps, args.lead, args.min_saving)
        step = float(np.median([s.seconds for s in plain.steps]))
        flops_saved, time_saved = 1 - frozen.tflops / plain.tflops, 1 - seconds / plain_seconds
        waiting = frozen.wait_seconds - frozen.programs[0].waited
        ten_epochs = CIFAR10_STEPS * step
        cells = [
            name,
            f"{1e3 * step:.1f}",
            f"{flops_saved:.1%}",
            f"{time_saved:.1%}",
            f"{time_saved / flops_saved:.2f}",
            str(len(frozen.programs)),
            f"{waiting:.2f}",
            f"{waiting / ten_epochs:.2%}",
            f"{case.deciding() / ten_epochs:.3%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
