"""One training run with a freezing policy, measured step by step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.step import TrainStep

Progress = Callable[..., Iterable[Any]]


@dataclasses.dataclass
class Run:
    """What one run did and cost.

    Attributes:
        name: Name of the policy.
        layers: Layer names, front to back.
        step_seconds: Seconds of each train step, compilation apart.
        step_flops: FLOPs of the compiled program of each step.
        frozen_layers: Number of layers frozen in each step.
        events: What froze when.
        policy_seconds: Time spent in the policy: records, predictor, moving the optimizer state.
        compile_seconds: Time that it took to trace and compile the programs of this run, in whichever run they were
            first needed.
        programs: Number of programs the run used.
        accuracy: Share of the test images that are classified right.
    """

    name: str
    layers: tuple[str, ...]
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    step_flops: list[float] = dataclasses.field(default_factory=list)
    frozen_layers: list[int] = dataclasses.field(default_factory=list)
    events: list[sfj.FreezeEvent] = dataclasses.field(default_factory=list)
    policy_seconds: float = 0.0
    compile_seconds: float = 0.0
    programs: int = 0
    accuracy: float = float("nan")

    @property
    def tflops(self) -> float:
        """TFLOPs of all steps."""
        return sum(self.step_flops) / 1e12

    @property
    def seconds(self) -> float:
        """Time of all steps and of the policy."""
        return sum(self.step_seconds) + self.policy_seconds

    @property
    def frozen_share(self) -> float:
        """Share of the layers that were frozen, over all steps."""
        return float(np.mean(self.frozen_layers)) / len(self.layers)

    def to_json(self) -> str:
        """All fields, on one line."""
        return json.dumps(dataclasses.asdict(self))


def batches(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of every batch: each epoch a new order, the last partial batch left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def run(
    name: str,
    model: nnx.Module,
    optimizer: sfj.nnx.Optimizer,
    freezer: sfj.nnx.Freezer,
    train_step: TrainStep,
    data: Iterable[tuple[Any, ...]],
    *,
    after_step: Callable[[int], object] | None = None,
) -> Run:
    """Trains on all of ``data``.

    Args:
        name: Name of the run.
        model: The model; changed in place.
        optimizer: Its optimizer.
        freezer: Decides what freezes.
        train_step: A step of ``(model, optimizer, *batch)`` that returns the loss.
        data: Batches.
        after_step: Called with the number of steps done, outside of what is timed.

    Returns:
        The measurements; without the accuracy.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    result = Run(name, freezer.layers.names)
    used: dict[sfj.Frozen, sfj.Program] = {}
    for step, batch in enumerate(data, start=1):
        program = train_step.program(model, optimizer, *batch)
        start = time.perf_counter()
        loss = jax.block_until_ready(train_step(model, optimizer, *batch))
        trained = time.perf_counter()
        freezer.step(loss=loss)
        jax.block_until_ready(freezer.policy_state)
        result.policy_seconds += time.perf_counter() - trained
        result.step_seconds.append(trained - start)
        result.step_flops.append(program.cost.flops)
        result.frozen_layers.append(len(program.frozen.names))
        used[program.frozen] = program
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after step {step} of the run {name!r}; lower its rate")
        if after_step is not None:
            after_step(step)
    result.events = freezer.events
    result.compile_seconds = sum(program.cost.trace_seconds + program.cost.compile_seconds for program in used.values())
    result.programs = len(used)
    return result
