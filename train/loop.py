"""The training loop with a freezing policy, measured step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.programs.train_step import TrainStep
from train.log import Compiled, Log, Step, finite


def batches(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of every batch: each epoch a new order, the last partial batch left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def make_step(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A plain step of ``(model, optimizer, *inputs)`` for a loss of ``(model, *inputs)``."""

    def train_step(model: nnx.Module, optimizer: sfj.nnx.Optimizer, *inputs: Any) -> jax.Array:
        loss, grads = optimizer.value_and_grad(loss_fn)(model, *inputs)
        optimizer.update(model, grads)
        return loss

    return train_step


def training(
    log: Log,
    model: nnx.Module,
    optimizer: sfj.nnx.Optimizer,
    freezer: sfj.nnx.Freezer,
    train_step: TrainStep | sfj.nnx.CachedStep,
    data: Iterable[tuple[Any, ...]],
    *,
    flops: Callable[[sfj.Frozen], float] | None = None,
) -> Iterator[int]:
    """Trains on all of ``data``, a step each time that the next item is asked for, and logs every step.

    Args:
        log: Log of the run; where the run goes on from a checkpoint, it has the steps until there.
        model: The model; changed in place.
        optimizer: Its optimizer.
        freezer: Decides what freezes.
        train_step: A step of ``(model, optimizer, *batch)`` that returns the loss.
        data: Batches.
        flops: From a frozen set to the FLOPs of the step just done, where they are not those of the compiled program:
            for networks with scanned blocks, of which XLA counts one, an account's.

    Yields:
        The number of steps done. What is done with it is not part of what is timed.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    used: set[sfj.Frozen] = set()
    for batch in data:
        step, programs = freezer.steps + 1, len(train_step.programs)
        program = train_step.program(model, optimizer, *batch)
        start = time.perf_counter()
        loss = jax.block_until_ready(train_step(model, optimizer, *batch))
        trained = time.perf_counter()
        if program.frozen not in used:
            used.add(program.frozen)
            compile_seconds = program.cost.trace_seconds + program.cost.compile_seconds
            stood_still = program.waited if len(train_step.programs) > programs else 0.0
            cache = train_step.cache if isinstance(train_step, sfj.nnx.CachedStep) else None
            stored = () if cache is None or cache.store is None else cache.store.values
            held = nnx.state(model), nnx.state(optimizer), freezer.policy_state, batch, stored
            held_bytes = sum({id(array): array.nbytes for array in jax.tree.leaves(held)}.values())
            log.add(Compiled(step, len(program.frozen.names), compile_seconds, program.ahead, stood_still, held_bytes))
        before_policy, waited = time.perf_counter(), train_step.wait_seconds
        freezer.step(loss=loss)
        jax.block_until_ready(freezer.policy_state)
        decided = time.perf_counter()
        cached = train_step.flops if isinstance(train_step, sfj.nnx.CachedStep) else None
        log.add(
            Step(
                step,
                finite(float(loss)),
                trained - start,
                decided - before_policy - (train_step.wait_seconds - waited),
                len(program.frozen.names),
                cached or (program.cost.flops if flops is None else flops(program.frozen)),
                program.cost.peak_bytes,
            )
        )
        if freezer.events and freezer.events[-1].step == step:
            log.add(freezer.events[-1])
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} after step {step} of the run {log.run.name!r}; lower its rate"
            )
        yield step
