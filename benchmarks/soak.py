"""A long run in which layers freeze and train again all the time: what grows in it.

2,000 steps of a small network; every 20 steps its front freezes, or trains again, each time up to another
layer. Cases:

* ``programs``: a ``TrainStep`` that keeps the programs of all frozen sets;
* ``released``: one that keeps two, so that every change compiles, and releases a program;
* ``cached``: a ``CachedStep``, which makes a store and three programs with every freeze.

Every 200 steps, with everything active: resident memory, bytes and number of arrays on the device, threads of the
process, open files. The first 200 steps, in which every frozen set has been there once, are not counted. It stops with
an error if something grows by more than ``BOUNDS``. Each case is a process of its own.

Usage: python -m benchmarks.soak [--steps 2000] [--every 20] [--case NAME] [--out benchmarks/soak.jsonl]
       python -m benchmarks.soak --table benchmarks/soak.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from train.loop import make_step

CASES = ("programs", "released", "cached")
EXAMPLES, BATCH = 128, 16
MIB = 2**20


class Sample(NamedTuple):
    """What the process holds.

    Attributes:
        step: After so many steps.
        resident: Bytes of memory that are resident.
        on_device: Bytes of arrays on the device.
        arrays: Number of these.
        threads: Of the process.
        files: That are open.
    """

    step: int
    resident: int
    on_device: int
    arrays: int
    threads: int
    files: int

    @classmethod
    def now(cls, step: int) -> Sample:
        """Measures; Linux only."""
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        arrays = jax.live_arrays()
        return cls(
            step,
            int(status["VmRSS"].split()[0]) * 1024,
            sum(array.nbytes for array in arrays),
            len(arrays),
            int(status["Threads"]),
            len(os.listdir("/proc/self/fd")),
        )


# Most that may come to what there was when every frozen set had been there once. Memory is allocated in arenas that
# are not given back at once, and every program that is compiled leaves some entries in XLA's and JAX's tables.
BOUNDS = {"resident": 32 * MIB, "on_device": 0, "arrays": 0, "threads": 0, "files": 0}


class Net(nnx.Module):
    """Five layers and a head: small, as what is looked at is what programs and stores leave behind."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(5)])
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, of shape ``(examples, 4)``."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def loss_fn(model: Net, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def in_turns(every: int) -> sfj.Policy:
    """Freezes the front for ``every`` steps, then lets it train for as many; up to one, two, ... of five layers."""

    def update(state: Any, layers: sfj.Layers, *, step: int, **signals: Any) -> tuple[frozenset[str], Any]:
        turn, frozen = divmod(step // every, 2)
        return frozenset(layers.names[: 1 + turn % 5] if frozen else ()), state

    return sfj.Policy(lambda layers, params: (), update)


def step_of(case: str) -> sfj.TrainStep | sfj.nnx.CachedStep:
    """The step of a case."""
    if case == "cached":
        return sfj.nnx.CachedStep(make_step, loss_fn, examples=EXAMPLES)
    return sfj.TrainStep(make_step(loss_fn), max_programs=8 if case == "programs" else 2)


def samples(case: str, steps: int, every: int) -> Iterator[Sample]:
    """Trains, and measures after each cycle in which all frozen sets were there, half the way through, and so on."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((EXAMPLES, 16), np.float32)
    labels = rng.integers(0, 4, EXAMPLES).astype(np.int32)
    model = Net(nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, images[:BATCH])
    optimizer = sfj.nnx.Optimizer(model, optax.adamw(1e-3), layers=layers)
    step = step_of(case)
    freezer = sfj.nnx.Freezer(model, optimizer, in_turns(every), train_step=step, lead=2)
    for done in range(1, steps + every // 2 + 1):
        indices = rng.permutation(EXAMPLES)[:BATCH]
        numbers = (indices,) if isinstance(step, sfj.nnx.CachedStep) else ()
        loss = step(model, optimizer, *numbers, images[indices], labels[indices])
        freezer.step(loss=loss)
        if done % (10 * every) == every // 2:  # everything is active, and has been for a while
            jax.block_until_ready(loss)
            del loss
            yield Sample.now(done)


def growth(found: list[Sample]) -> dict[str, int]:
    """What was added at the end to what there was after the first cycle."""
    first, last = found[1], found[-1]
    return {name: getattr(last, name) - getattr(first, name) for name in BOUNDS}


def check(found: list[Sample], bounds: dict[str, int]) -> None:
    """Raises ``RuntimeError`` if something grew beyond its bound."""
    grown = growth(found)
    beyond = {name: grown[name] for name in bounds if grown[name] > bounds[name]}
    if beyond:
        raise RuntimeError(f"grew from step {found[1].step} to {found[-1].step}: {beyond}, allowed are {bounds}")


def table(lines: list[str]) -> str:
    """Start, middle and end of every case, from the lines that were written."""
    rows = [
        "| case | step | resident, MiB | on device, KiB | arrays | threads | files |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in CASES:
        found = [
            Sample(*(line[name] for name in Sample._fields)) for line in map(json.loads, lines) if line["case"] == case
        ]
        for sample in (found[1], found[len(found) // 2], found[-1]):
            memory = f"{sample.resident / MIB:.1f} | {sample.on_device / 1024:.1f}"
            rows.append(
                f"| `{case}` | {sample.step} | {memory} | {sample.arrays} | {sample.threads} | {sample.files} |"
            )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--case", choices=CASES, help="one of the cases, in this process")
    parser.add_argument("--out", type=Path, help="adds the samples to this file, a line of JSON each")
    parser.add_argument("--table", type=Path, help="prints the table of a file instead")
    options = parser.parse_args(argv)
    if options.table is not None:
        print(table(options.table.read_text().splitlines()))
        return 0
    if options.case is None:
        given = sys.argv[1:] if argv is None else argv
        commands = [[sys.executable, "-m", "benchmarks.soak", "--case", case, *given] for case in CASES]
        return max(subprocess.run(command, check=False).returncode for command in commands)
    warnings.simplefilter("ignore", sfj.SavingWarning)  # that programs take turns is the point
    versions = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    found = []
    for sample in samples(options.case, options.steps, options.every):
        found.append(sample)
        line = json.dumps({"case": options.case, **sample._asdict(), **versions})
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(line + "\n")
    check(found, BOUNDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
