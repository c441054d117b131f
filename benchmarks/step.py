"""Step time, FLOPs and temporary memory against the share of the network that is frozen, beside optax's recipes.

Two networks: a small residual CNN and a small vision transformer. A prefix of the layers is frozen that holds
0, 25, 50, 75 and 100 % (all but the head) of the forward FLOPs of convolutions and linear layers. Rows:

* ``smartfrz_jax``: this library's optimizer, with a clip by the global norm inside it.
* ``optax.selective_transform``, ``optax.multi_transform`` with ``set_to_zero`` for the frozen labels, and
  ``chain(tx, optax.freeze(mask))``: the recipes of optax's documentation, in the stock NNX loop, with the clip at its
  usual place, in front; and without a clip.

All steps of one network are timed in turns, several rounds; the figures are medians over the rounds, as ratios to the
unfrozen step of the same row. Usage: python -m benchmarks.step [--rounds 15] [--steps 3] [--batch 64]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from models.deit import DeiT
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.pytrees import paths

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Case(NamedTuple):
    """A step that is compiled and ready to run."""

    model: nnx.Module
    run: Callable[[], jax.Array]
    cost: sfj.cost.ProgramCost


def loss_fn(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    logits = model(images)  # pyright: ignore[reportCallIssue]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def tx() -> optax.GradientTransformation:
    """SGD with momentum and weight decay."""
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9))


def prefixes(model: nnx.Module, layers: sfj.Layers, images: jax.Array) -> dict[float, tuple[str, ...]]:
    """For each share, the shortest prefix that holds it of the forward FLOPs; the head is never in it."""
    outputs = sfj.nnx.features(model, layers, images[:1])(model, images[:1])
    kernels = paths.flatten(nnx.as_pure(nnx.state(model, nnx.Param)))
    flops = [
        2.0
        * sum(kernels[name].size for name in layer.kernels)
        * outputs[layer.name].size
        / outputs[layer.name].shape[-1]
        for layer in layers
    ]
    reached = np.cumsum(flops[:-1]) / sum(flops)
    last = len(layers) - 1
    count = {share: 0 if share == 0 else min(int(np.searchsorted(reached, share)) + 1, last) for share in SHARES}
    return {share: layers.names[: count[share]] for share in SHARES}


def ours(make: Callable[[], nnx.Module], layers: sfj.Layers, frozen: tuple[str, ...], batch: tuple[Any, ...]) -> Case:
    """The step with this library's front door."""
    model = make()
    optimizer = sfj.nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx()), layers=layers)
    optimizer.freeze(model, list(frozen))

    @nnx.jit
    def step(model: nnx.Module, optimizer: sfj.nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
        loss, grads = optimizer.value_and_grad(loss_fn)(model, images, labels)
        optimizer.update(model, grads)
        return loss

    return Case(model, lambda: step(model, optimizer, *batch), sfj.program_cost(step, model, optimizer, *batch))


def stock(make: Callable[[], nnx.Module], transformation: optax.GradientTransformation, batch: tuple[Any, ...]) -> Case:
    """The stock NNX step."""
    model = make()
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
        optimizer.update(model, grads)
        return loss

    return Case(model, lambda: step(model, optimizer, *batch), sfj.program_cost(step, model, optimizer, *batch))


def check(row: str, case: Case, frozen: sfj.Frozen) -> None:
    """Runs a step, and stops if it does not train exactly the layers that are not frozen."""
    before = jax.device_get(paths.flatten(nnx.as_pure(nnx.state(case.model, nnx.Param))))
    jax.block_until_ready(case.run())
    after = jax.device_get(paths.flatten(nnx.as_pure(nnx.state(case.model, nnx.Param))))
    for layer in frozen.layers:
        moved = any(not np.array_equal(before[name], after[name]) for name in layer.params)
        if moved == (layer.name in frozen.names):
            what = "moved although it is frozen" if moved else "did not move although it trains"
            raise RuntimeError(f"{row}: layer {layer.name} {what}")


def recipes(frozen: sfj.Frozen, params: Any) -> Mapping[str, optax.GradientTransformation]:
    """Optax's documented ways of freezing."""
    mask = paths.tree_map(lambda name, _: name in frozen.params, params)
    plain = {
        "optax.selective_transform": optax.transforms.selective_transform(tx(), freeze_mask=mask),
        "optax.multi_transform": optax.multi_transform({"train": tx(), "frozen": optax.set_to_zero()}, frozen.labels),
        "chain(tx, optax.freeze)": optax.chain(tx(), optax.transforms.freeze(mask)),
    }
    clipped = {f"{name}, clip in front": optax.chain(optax.clip_by_global_norm(1.0), t) for name, t in plain.items()}
    return plain | clipped


def measure(name: str, make: Callable[[], nnx.Module], batch: tuple[Any, ...], rounds: int, steps: int) -> None:
    """Measures one network and prints its table."""
    layers = sfj.nnx.find_layers(make(), batch[0])
    chosen = prefixes(make(), layers, batch[0])
    cases: dict[tuple[str, float], Case] = {}
    for share, names in chosen.items():
        frozen = sfj.Frozen(layers, frozenset(names))
        cases["smartfrz_jax (clip inside)", share] = ours(make, layers, names, batch)
        for recipe, transformation in recipes(frozen, nnx.as_pure(nnx.state(make(), nnx.Param))).items():
            cases[recipe, share] = stock(make, transformation, batch)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in cases}
    for (row, share), case in cases.items():
        check(row, case, sfj.Frozen(layers, frozenset(chosen[share])))
    for _ in range(rounds):
        for key, case in cases.items():
            start = time.perf_counter()
            jax.block_until_ready([case.run() for _ in range(steps)])
            seconds[key].append((time.perf_counter() - start) / steps)
    median = {key: float(np.median(values)) for key, values in seconds.items()}
    spread = max(np.subtract(*np.percentile(values, [75, 25])) / np.median(values) for values in seconds.values())
    first = ("smartfrz_jax (clip inside)", 0.0)
    print(
        f"\n### {name}: {len(layers)} layers, batch {len(batch[1])}; unfrozen {1e3 * median[first]:.1f} ms, "
        f"{cases[first].cost.flops / 1e9:.2f} GFLOP, {cases[first].cost.temp_bytes / 1e6:.1f} MB temporary\n"
    )
    print("Step time / FLOPs / temporary memory, relative to the row's own unfrozen step "
          f"(interquartile range of the times: at most {spread:.0%} of the median).\n")  # fmt: skip
    columns = " | ".join(f"{share:.0%} frozen ({len(chosen[share])} layers)" for share in SHARES[1:])
    print(f"| way of freezing | {columns} |\n{'|---' * len(SHARES)}|")
    print("| ideal, (3 - 2f) / 3 | " + " | ".join(f"{(3 - 2 * share) / 3:.2f}" for share in SHARES[1:]) + " |")
    for row in dict.fromkeys(row for row, _ in cases):
        base, base_time = cases[row, 0.0].cost, median[row, 0.0]
        entries = [
            f"{median[row, share] / base_time:.2f} / {cases[row, share].cost.flops / base.flops:.2f} / "
            f"{cases[row, share].cost.temp_bytes / base.temp_bytes:.2f}"
            for share in SHARES[1:]
        ]
        print(f"| {row} | {' | '.join(entries)} |", flush=True)


def main() -> None:
    """Measures both networks."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="times each step is timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps per timing (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: %(default)s)")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {device.platform} {device.device_kind}")
    labels = jnp.arange(args.batch, dtype=jnp.int32) % 10
    grey = jax.random.normal(jax.random.key(0), (args.batch, 28, 28, 1))
    colour = jax.random.normal(jax.random.key(0), (args.batch, 32, 32, 3))
    measure(
        "ResNet-16, 28x28",
        lambda: ResNet((2, 2, 2), (8, 16, 32), BasicBlock, num_classes=10, channels=1, stem="cifar", rngs=nnx.Rngs(0)),
        (grey, labels), args.rounds, args.steps,
    )  # fmt: skip
    measure(
        "ViT, 32x32, patch 4, width 96, 6 blocks",
        lambda: DeiT(image_size=32, patch_size=4, dim=96, depth=6, heads=3, num_classes=10, rngs=nnx.Rngs(0)),
        (colour, labels), args.rounds, args.steps,
    )  # fmt: skip


if __name__ == "__main__":
    main()
