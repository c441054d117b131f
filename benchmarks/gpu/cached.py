"""Step time with the activations of the frozen front kept on the device, against the same step without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.gpu.cases import Case
from benchmarks.gpu.timing import in_turns
from benchmarks.networks import loss_fn, train_step
from train.loop import make_step

BATCHES = 4  # in the data set


def cached(case: Case) -> dict[str, Any]:
    """Times the step with 50, 75 and 100 % of the forward FLOPs frozen, from what is kept and from the inputs."""
    (inputs,), labels = case.batch
    examples, shares = BATCHES * case.sizes.batch, case.prefixes[len(case.prefixes) // 2 :]
    rng = np.random.default_rng(0)
    rows, steps, runs = [], [], dict[tuple[int, str], Callable[[], jax.Array]]()

    def loss_of(model: nnx.Module, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return loss_fn(model, (inputs,), labels)

    for _, frozen in shares:
        cached_step = sfj.nnx.CachedStep(make_step, loss_of, examples=examples, donate=True)
        plain = sfj.TrainStep(train_step, donate=True)
        pairs = case.make(frozen), case.make(frozen)
        for indices in np.split(np.arange(examples), BATCHES):  # as only times are measured, each batch is the same
            cached_step(*pairs[0], indices, inputs, labels)
        steps.append(cached_step)

        def kept(step: sfj.nnx.CachedStep = cached_step, pair: Any = pairs[0]) -> jax.Array:
            return step(*pair, rng.permutation(examples)[: case.sizes.batch], inputs, labels)

        def from_inputs(step: sfj.TrainStep = plain, pair: Any = pairs[1]) -> jax.Array:
            return step(*pair, *case.batch)

        runs |= {(len(frozen.names), "kept"): kept, (len(frozen.names), "inputs"): from_inputs}
    times = in_turns(runs, case.sizes, float)
    for (share, frozen), step in zip(shares, steps, strict=True):
        kept_ms, plain_ms = (times[len(frozen.names), way].median for way in ("kept", "inputs"))
        cache, total = step.cache, case.account.flops(frozen).total
        rows.append({
            "share": share,
            "layers": len(frozen.names),
            "kept_ms": kept_ms,
            "inputs_ms": plain_ms,
            "ratio": kept_ms / plain_ms,
            "flops_ratio": None if cache is None else 1 - cache.saved_flops * case.sizes.batch / total,
            "bytes_per_example": None if cache is None else cache.bytes_per_example,
        })  # fmt: skip
    return {"shares": rows}
