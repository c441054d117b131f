"""Step time, FLOPs and temporary memory of real networks against the share of the forward pass that is frozen.

For each network, prefixes of its layers that hold about 25, 50, 75 and 100 % of the forward FLOPs are frozen (the head
never is), and one training step (SGD with momentum, float32) is timed on a random batch. The ideal is (3 - 2f) / 3 for
the share f really frozen: a third of a step is the forward pass, which freezing does not save. With torch installed, so
is the original network with ``requires_grad = False`` and BatchNorm in evaluation mode for the same layers.

All programs of a network are timed in turns; figures are ratios of medians to the row's own unfrozen step.

Usage: python -m benchmarks.frozen_share [--batch 8] [--size 96] [--rounds 7] [--only resnet50 ...]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.networks import CLASSES, NETWORKS, TOKENS, loss_fn, train_step
from benchmarks.networks import batch as random_batch

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def prefixes(account: sfj.Account) -> list[tuple[float, sfj.Frozen]]:
    """For each share the prefix that comes nearest to it in forward FLOPs, with the share that it has."""
    layers = account.layers
    flops = np.array([account.flops().by_layer[name].forward for name in layers.names])
    reached = np.concatenate([[0.0], np.cumsum(flops[:-1]) / flops.sum()])
    counts = [int(np.argmin(np.abs(reached - share))) for share in SHARES]
    return [(float(reached[n]), sfj.Frozen(layers, frozenset(layers.names[:n]))) for n in counts]


def freeze_torch(network: Any, frozen: sfj.Frozen, tensor_name: Callable[[str], str]) -> Any:
    """Freezes parameters in PyTorch's usual way, and their BatchNorms; returns an optimizer for the others."""
    import torch  # pyright: ignore[reportMissingImports]

    theirs = {tensor_name(param) for param in frozen.params}
    parameters = dict(network.named_parameters())
    if not theirs <= parameters.keys():
        raise RuntimeError(f"torch has no parameters called {sorted(theirs - parameters.keys())[:3]}")
    for parameter in theirs:
        parameters[parameter].requires_grad_(False)
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and f"{path}.weight" in theirs:
            module.eval()
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)


def of_torch(
    name: str,
    size: int,
    inputs: np.ndarray,
    labels: np.ndarray,
    frozen: sfj.Frozen,
    tensor_name: Callable[[str], str],
) -> Callable[[], float]:
    """The step of the original network with the same parameters frozen in PyTorch's usual way."""
    import torch  # pyright: ignore[reportMissingImports]

    from tests.parity import originals

    network = originals.network(name, size=size)
    network.train()
    sgd = freeze_torch(network, frozen, tensor_name)
    x = torch.from_numpy(inputs)
    x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x.long()
    y = torch.from_numpy(labels).long()

    def step() -> float:
        sgd.zero_grad(set_to_none=True)
        result = network(x)
        loss = torch.nn.functional.cross_entropy(getattr(result, "logits", result), y)
        loss.backward()
        sgd.step()
        return float(loss.detach())

    return step


def measure(name: str, batch: int, size: int, rounds: int, *, with_torch: bool) -> None:
    """Measures a network and prints its table."""
    network = NETWORKS[name]
    options: dict[str, Any] = {"image_size": size} if name.startswith("deit") else {}
    (inputs,), labels = random_batch(network, batch, size)
    images, classes = (jnp.asarray(inputs),), jnp.asarray(labels)
    tx = optax.sgd(1e-3, momentum=0.9)
    step = sfj.TrainStep(train_step, max_programs=len(SHARES))
    rows: dict[tuple[str, int], Callable[[], Any]] = {}
    costs, shares, predicted = [], [], []

    def make(frozen: sfj.Frozen | None) -> tuple[nnx.Module, sfj.nnx.Optimizer]:
        model = network.make(num_classes=CLASSES, rngs=nnx.Rngs(0), **options)
        optimizer = sfj.nnx.Optimizer(model, tx, layers=layers)
        if frozen is not None:
            optimizer.freeze(model, frozen)
        return model, optimizer

    example = network.make(num_classes=CLASSES, rngs=nnx.Rngs(0), **options)
    layers = sfj.nnx.find_layers(example, *images)
    account = sfj.nnx.account(example, layers, loss_fn, images, classes, tx=tx)
    for i, (share, frozen) in enumerate(prefixes(account)):
        model, optimizer = make(frozen)
        costs.append(step.program(model, optimizer, images, classes).cost)
        shares.append((share, len(frozen.names)))
        predicted.append(account.flops(frozen).total)

        def run(model: nnx.Module = model, optimizer: sfj.nnx.Optimizer = optimizer) -> float:
            return float(step(model, optimizer, images, classes))

        rows["smartfrz_jax", i] = run
        if with_torch:
            rows["PyTorch", i] = of_torch(name, size, inputs, labels, frozen, model.tensor_name)  # pyright: ignore[reportAttributeAccessIssue]
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in rows}
    for warm_up in (True, *[False] * rounds):
        for key, run_once in rows.items():
            start = time.perf_counter()
            loss = run_once()
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}, {key}: the loss is {loss}")
            if not warm_up:
                seconds[key].append(time.perf_counter() - start)
    median = {key: float(np.median(values)) for key, values in seconds.items()}
    spread = max(np.subtract(*np.percentile(values, [75, 25])) / np.median(values) for values in seconds.values())
    ours = median["smartfrz_jax", 0]
    what = f"{TOKENS} tokens" if network.reads_text else f"{size} x {size}"
    print(
        f"\n### {name}, batch {batch}, {what}: {len(layers)} layers; unfrozen {1e3 * ours:.0f} ms, "
        f"{costs[0].flops / 1e9:.1f} GFLOP, {costs[0].temp_bytes / 2**20:.0f} MiB temporary "
        f"(interquartile range at most {spread:.0%} of the median)\n"
    )
    print("| | " + " | ".join(f"{share:.0%} frozen ({n} layers)" for share, n in shares[1:]) + " |")
    print("|---" + "|--:" * (len(shares) - 1) + "|")

    def line(label: str, values: list[float]) -> None:
        print(f"| {label} | " + " | ".join(f"{value:.2f}" for value in values[1:]) + " |")

    every = range(len(shares))
    line("ideal time, (3 - 2f) / 3", [(3 - 2 * share) / 3 for share, _ in shares])
    line("FLOPs by the account", [value / predicted[0] for value in predicted])
    line("FLOPs, compiled", [cost.flops / costs[0].flops for cost in costs])
    line("**step time**", [median["smartfrz_jax", i] / ours for i in every])
    line("temporary memory", [cost.temp_bytes / costs[0].temp_bytes for cost in costs])
    line("trace + compile", [(c.trace_seconds + c.compile_seconds) for c in costs])
    if with_torch:
        line("PyTorch, step time", [median["PyTorch", i] / median["PyTorch", 0] for i in every])
        line("PyTorch / smartfrz_jax, ms", [median["PyTorch", i] / median["smartfrz_jax", i] for i in every])


def main(argv: list[str] | None = None) -> None:
    """Measures the networks."""
    default = ["resnet50", "mobilenetv2", "deit_tiny", "minilm"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frozen_share", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--batch", type=int, default=8, help="examples of a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="height and width of images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=default, help="networks")
    args = parser.parse_args(argv)
    with_torch = importlib.util.find_spec("torch") is not None
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}"
    if with_torch:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(os.cpu_count() or 1)
        versions += f", torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"{versions}; medians of {args.rounds} steps")
    for name in args.only:
        measure(name, args.batch, args.size, args.rounds, with_torch=with_torch)
        gc.collect()
        jax.clear_caches()


if __name__ == "__main__":
    main()
