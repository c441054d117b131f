"""The networks of ``models/``: size, FLOPs against the account and the published figures, compile and step time.

For each network one training step (SGD with momentum, float32) on a random batch: 224 x 224 images, or 128 tokens. With
torch, torchvision, timm and transformers installed the same step of the original network is timed in turns with ours,
with the same batch, number of threads and precision. Times are medians over the rounds.

Below it, what the paper's full training costs by the account, a line for each kind of operation.

Usage: python -m benchmarks.networks [--batch 8] [--rounds 5] [--only resnet50 ...]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from models.bert import bert_base, minilm
from models.deit import deit_tiny
from models.efficientnet_lite import efficientnet_lite0
from models.mobilenetv2 import mobilenetv2
from models.resnet import resnet50
from models.vgg import vgg11

TOKENS, VOCABULARY, CLASSES = 128, 30522, 10


class Network(NamedTuple):
    """A network to measure.

    Attributes:
        make: Makes it.
        reads_text: Whether its input is text.
        published: Multiply-adds of convolutions and linear layers of an image at 224 x 224 with 1,000 classes, in units
            of 10^9, as published.
        paper: Number of images that the paper's full training sees, if it is in the paper.
    """

    make: Callable[..., nnx.Module]
    reads_text: bool = False
    published: float | None = None
    paper: int | None = None


# Without dropout and stochastic depth, here and in torch.
NETWORKS = {
    "resnet50": Network(resnet50, published=4.09, paper=500_000),
    "vgg11": Network(partial(vgg11, dropout=0.0), published=7.61),
    "vgg11_bn": Network(partial(vgg11, batch_norm=True, dropout=0.0), published=7.61, paper=500_000),
    "mobilenetv2": Network(partial(mobilenetv2, dropout=0.0), published=0.30, paper=500_000),
    "deit_tiny": Network(partial(deit_tiny, drop_path=0.0), published=1.08, paper=5_000_000),
    "deit_tiny_distilled": Network(partial(deit_tiny, distilled=True, drop_path=0.0)),
    "efficientnet_lite0": Network(partial(efficientnet_lite0, dropout=0.0, drop_connect=0.0), published=0.39),
    "bert_base": Network(partial(bert_base, dropout=0.0, attention_dropout=0.0), reads_text=True),
    "minilm": Network(partial(minilm, dropout=0.0, attention_dropout=0.0), reads_text=True),
}


def loss_fn(model: nnx.Module, inputs: tuple[jax.Array, ...], labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    logits = model(*inputs)  # pyright: ignore[reportCallIssue]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(
    model: nnx.Module, optimizer: sfj.nnx.Optimizer, inputs: tuple[Any, ...], labels: jax.Array
) -> jax.Array:
    """One step."""
    loss, grads = optimizer.value_and_grad(loss_fn)(model, inputs, labels)
    optimizer.update(model, grads)
    return loss


def batch(network: Network, size: int, pixels: int = 224) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Random inputs and labels of ``size`` examples: texts of 128 tokens, or square images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, size, np.int32)
    if network.reads_text:
        return (rng.integers(0, VOCABULARY, (size, TOKENS), np.int32),), labels
    return (rng.standard_normal((size, pixels, pixels, 3), np.float32),), labels


def of_torch(name: str, inputs: tuple[np.ndarray, ...], labels: np.ndarray) -> Callable[[], float]:
    """The step of the original network, as a function to the loss."""
    import torch  # pyright: ignore[reportMissingImports]

    from tests.parity import originals

    network = originals.network(name, size=224)
    network.train()
    sgd = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    tensors = [torch.from_numpy(array) for array in inputs]
    x = tensors[0].permute(0, 3, 1, 2) if tensors[0].ndim == 4 else tensors[0].long()
    y = torch.from_numpy(labels).long()

    def step() -> float:
        sgd.zero_grad()
        result = network(x)
        loss = torch.nn.functional.cross_entropy(getattr(result, "logits", result), y)
        loss.backward()
        sgd.step()
        return float(loss.detach())

    return step


def measure(name: str, network: Network, size: int, rounds: int, *, with_torch: bool) -> str:
    """A row of the table."""
    inputs, labels = batch(network, size)
    one_thousand = nnx.eval_shape(lambda: network.make(rngs=nnx.Rngs(0)))
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(one_thousand, nnx.Param)))
    model = network.make(num_classes=CLASSES, rngs=nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, *inputs)
    tx = optax.sgd(1e-3, momentum=0.9)
    optimizer = sfj.nnx.Optimizer(model, tx, layers=layers)
    account = sfj.nnx.account(model, layers, loss_fn, inputs, labels, tx=tx)
    step = sfj.TrainStep(train_step)
    cost = step.program(model, optimizer, inputs, labels).cost
    device_inputs = tuple(jnp.asarray(array) for array in inputs)
    device_labels = jnp.asarray(labels)
    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(step(model, optimizer, device_inputs, device_labels))
    }
    if with_torch:
        steps["torch"] = of_torch(name, inputs, labels)
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for warm_up in (True, *[False] * rounds):
        for key, run in steps.items():
            start = time.perf_counter()
            loss = float(run())
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}, {key}: the loss is {loss}")
            if not warm_up:
                seconds[key].append(time.perf_counter() - start)
    median = {key: float(np.median(values)) for key, values in seconds.items()}
    macs = (account.macs["convolution"] + account.macs["linear"]) / size / 1e9
    cells = [
        name,
        f"{parameters:,}",
        str(len(layers)),
        f"{macs:.3f}",
        "-" if network.published is None else f"{network.published:.2f}",
        f"{cost.flops / 1e9:.1f}",
        f"{account.flops().total / cost.flops:.3f}",
        f"{cost.trace_seconds:.1f} + {cost.compile_seconds:.1f}",
        f"{cost.temp_bytes / 2**20:.0f}",
        f"{1e3 * median['ours']:.0f}",
        f"{median['torch'] / median['ours']:.2f}" if with_torch else "-",
    ]
    return f"| {' | '.join(cells)} |"


def paper_account(network: Network, images: int) -> str:
    """What full training costs as the paper counts it."""
    model = nnx.eval_shape(lambda: network.make(rngs=nnx.Rngs(0)))
    x, y = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    layers = sfj.nnx.find_layers(model, x)
    return sfj.nnx.account(model, layers, loss_fn, (x,), y).table(images)


def main(argv: list[str] | None = None) -> None:
    """Measures the networks and prints the table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="examples of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=list(NETWORKS), help="networks")
    args = parser.parse_args(argv)
    with_torch = importlib.util.find_spec("torch") is not None
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}"
    if with_torch:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(os.cpu_count() or 1)
        versions += f", torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"{versions}; batch {args.batch}, medians of {args.rounds} steps\n")
    print(
        "| network | parameters | layers | GMAC an example (conv, linear) | published | GFLOP a step, compiled "
        "| account / compiled | trace + compile, s | temporary MiB | step, ms | throughput, torch = 1 |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in args.only:
        print(measure(name, NETWORKS[name], args.batch, args.rounds, with_torch=with_torch), flush=True)
        gc.collect()
        jax.clear_caches()
    for name in args.only:
        images = NETWORKS[name].paper
        if images is not None:
            print(f"\n{name}, {images:,} images:\n{paper_account(NETWORKS[name], images)}")


if __name__ == "__main__":
    main()
