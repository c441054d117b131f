"""Step time with the activations of the frozen prefix kept, against the same frozen step without.

A prefix of the layers is frozen that holds 50, 75 and 100 % (all but the head) of the forward FLOPs of convolutions and
linear layers. The activations are on the device; the cached step includes looking them up. All steps are timed in
turns, several rounds; ratios are of medians over the rounds. Before, one step of each is compared with the other:
losses and gradients must agree. Usage: python -m benchmarks.cache [--rounds 15] [--steps 3] [--batch 64]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.step import loss_fn, prefixes, tx
from models.resnet import Bottleneck, ResNet
from smartfrz_jax.nnx.prefix_cache import PrefixCache

SHARES = (0.5, 0.75, 1.0)
BATCHES = 4  # in the data set


class Step:
    """A jitted train step of a model of its own; pure and donating, for ``nnx.jit`` takes 8 ms to go through the model.

    Args:
        frozen: The frozen set.
        cache: The cache, whose activations come before the labels in the batch; none for the plain frozen step.
    """

    def __init__(self, frozen: sfj.Frozen, cache: PrefixCache | None):
        model = make()
        optimizer = sfj.nnx.Optimizer(model, tx(), layers=frozen.layers)
        optimizer.freeze(model, frozen)
        graphdef, self.state = nnx.split((model, optimizer))
        loss = loss_fn if cache is None else cache.loss

        def step(state: nnx.State, *batch: Any) -> tuple[jax.Array, nnx.State]:
            model, optimizer = nnx.merge(graphdef, state)
            loss_and_grads = optimizer.value_and_grad(loss)(model, *batch)
            optimizer.update(model, loss_and_grads[1])
            return loss_and_grads[0], nnx.state((model, optimizer))

        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, *batch: Any) -> jax.Array:
        """Trains on a batch."""
        loss, self.state = self.step(self.state, *batch)
        return loss


def make() -> ResNet:
    """ResNet-26 for small images."""
    return ResNet((2, 2, 2, 2), (16, 32, 64, 128), Bottleneck, num_classes=10, stem="cifar", rngs=nnx.Rngs(0))


def measure(batch: int, rounds: int, steps: int) -> None:
    """Measures all shares and prints the table."""
    images = jax.random.normal(jax.random.key(0), (BATCHES * batch, 32, 32, 3))
    labels = jnp.arange(BATCHES * batch, dtype=jnp.int32) % 10
    layers = sfj.nnx.find_layers(make(), images[:batch])
    chosen = prefixes(make(), layers, images[:batch])
    rows = np.random.default_rng(0).permutation(len(images))[:batch]
    x, y = images[rows], labels[rows]
    runs: dict[tuple[float, str], Callable[[], Any]] = {}
    flops: dict[tuple[float, str], float] = {}
    caches = {}
    for share in SHARES:
        frozen = sfj.Frozen(layers, frozenset(chosen[share]))
        model = make()
        cache = caches[share] = PrefixCache(model, frozen, loss_fn, x, y)
        cache.keep(len(images))
        for part in np.split(np.arange(len(images)), BATCHES):
            cache.fetch(model, part, images[part], labels[part])
        cached, uncached = Step(frozen, cache), Step(frozen, None)

        def with_cache(cache: PrefixCache = cache, model: Any = model, step: Step = cached) -> jax.Array:
            return step(cache.fetch(model, rows, None, y), None, y)

        def without(step: Step = uncached) -> jax.Array:
            return step(x, y)

        runs |= {(share, "cached"): with_cache, (share, "uncached"): without}
        kept = cache.fetch(model, rows, None, y)
        flops[share, "cached"] = sfj.program_cost(cached.step, cached.state, kept, None, y).flops
        flops[share, "uncached"] = sfj.program_cost(uncached.step, uncached.state, x, y).flops
        losses = [float(with_cache()), float(without())]
        params = [jax.tree.leaves(nnx.as_pure(step.state[0])) for step in (cached, uncached)]
        apart = max(float(jnp.abs(a - b).max()) for a, b in zip(*params, strict=True))
        if abs(losses[0] - losses[1]) > 1e-5 or apart > 1e-5:
            raise RuntimeError(f"{share:.0%}: losses {losses}; variables after a step differ by {apart}")
    seconds: dict[tuple[float, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            jax.block_until_ready(run())  # after the other cases the caches of the processor are cold
            start = time.perf_counter()
            jax.block_until_ready([run() for _ in range(steps)])
            seconds[key].append((time.perf_counter() - start) / steps)
    median = {key: float(np.median(values)) for key, values in seconds.items()}
    print(f"\n### ResNet-26, 32x32: {len(layers)} layers, batch {batch}\n")
    columns = ("frozen", "layers", "uncached, ms", "cached, ms", "step time", "FLOPs", "bytes an example")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for share in SHARES:
        a, b = (share, "cached"), (share, "uncached")
        print(
            f"| {share:.0%} | {len(chosen[share])} | {1e3 * median[b]:.1f} | {1e3 * median[a]:.2f} | "
            f"{median[a] / median[b]:.3f} | {flops[a] / flops[b]:.3f} | {caches[share].bytes_per_example:,} |"
        )


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="times each step is timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps per timing (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: %(default)s)")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {device.platform} {device.device_kind}")
    measure(args.batch, args.rounds, args.steps)


if __name__ == "__main__":
    main()
