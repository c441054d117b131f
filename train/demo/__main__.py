"""Fine-tunes a pre-trained network on real images, in full and with its front frozen, and shows what was saved.

EfficientNet-Lite0 has its ImageNet weights, the images are Fashion-MNIST's; both are in the repository. The first five
of its seven stages are frozen from the first step on, so each image passes through them once: what comes out is kept.

    make demo                       # or: python -m train.demo --out runs/demo
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from train import efficientnet_lite0, fashion_mnist
from train.command_line import Interrupt, exit_code, local_path
from train.demo import report
from train.demo.fine_tune import BATCH_SIZE, Images, fine_tune

FRONT = ("conv_stem", "blocks/[0-9]/*", "blocks/10/*")  # 65 % of the forward pass
WAYS = {"full training": (), "front frozen": FRONT}
SIZE = 48  # height and width of the images that the network reads; the originals have 28
TRAIN_IMAGES = 2000
EVALUATIONS = 4  # of a run
_AT_ONCE = 200  # images, in evaluation


def open_images() -> tuple[Images, Images]:
    """Training and test images, as many of each class."""

    def as_read(split: fashion_mnist.Split) -> Images:
        grey = 255 * (split.images * fashion_mnist.STD + fashion_mnist.MEAN)
        resized = jax.image.resize(grey, (len(grey), SIZE, SIZE, 1), "bilinear")
        return Images(efficientnet_lite0.normalised(np.asarray(resized)), split.labels)

    train, test = fashion_mnist.load()
    of_each_class = [np.flatnonzero(train.labels == label)[: TRAIN_IMAGES // 10] for label in range(10)]
    chosen = np.sort(np.concatenate(of_each_class))
    return as_read(fashion_mnist.Split(train.images[chosen], train.labels[chosen])), as_read(test)


@nnx.jit
def correct(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Number of images classified right."""
    return (model(images).argmax(-1) == labels).sum()  # pyright: ignore[reportCallIssue]


def accuracy(model: nnx.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share that is classified right, every image once."""
    evaluated = nnx.view(model, use_running_average=True)
    starts = range(0, len(labels), _AT_ONCE)
    parts = [
        correct(evaluated, *jax.device_put((images[at : at + _AT_ONCE], labels[at : at + _AT_ONCE]))) for at in starts
    ]
    return float(sum(map(int, parts))) / len(labels)


def run(way: str, seed: int, train: Images, test: Images, args: argparse.Namespace, interrupt: Interrupt) -> report.Run:
    """Fine-tunes the network once. Evaluations are not part of its time."""
    model = efficientnet_lite0.load(10, seed=seed)
    total_steps = args.epochs * (len(train.labels) // BATCH_SIZE)
    evaluate_at = {round(total_steps * number / EVALUATIONS) for number in range(1, EVALUATIONS + 1)}
    points, first = [], None
    bar = tqdm(
        total=total_steps,
        desc=f"{f'{way}, seed {seed}':<21}",
        postfix="compiling",
        bar_format="{desc}|{bar}| {n_fmt:>3}/{total_fmt} steps{postfix}",
        ncols=80,
        disable=True if args.quiet else None,
    )
    with bar:
        tuning = fine_tune(model, train, WAYS[way], epochs=args.epochs, learning_rate=args.learning_rate, seed=seed)
        for costs in interrupt.checked(tuning):
            first = first or costs
            if costs.step in evaluate_at:
                points.append(report.Point(costs, accuracy(model, *test)))
            reached = f", {points[-1].accuracy:.1%} right" if points else ""
            bar.set_postfix_str(f"{costs.seconds:.0f} s in all{reached}", refresh=False)
            bar.update()
        bar.refresh()
    assert first is not None
    return report.Run(way, seed, first, points)


def demo(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """The whole demo; writes into ``args.out``."""
    begin = time.perf_counter()
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {jax.default_backend()}"
    versions += f", {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    train, test = open_images()
    steps = args.epochs * (len(train.labels) // BATCH_SIZE)
    title = f"EfficientNet-Lite0 from ImageNet, {steps} steps on {len(train.labels):,} images of Fashion-MNIST"
    print(f"smartfrz_jax demo: {title} ({versions})")
    accuracy(efficientnet_lite0.load(10, seed=0), *test)  # compiles the evaluation
    runs = []
    for seed in range(args.seeds):  # in turns, so that no way has the machine in another state than the other has it
        order = list(WAYS)[:: -1 if seed % 2 else 1]
        runs += [run(way, seed, train, test, args, interrupt) for way in order]
    runs.sort(key=lambda one: (list(WAYS).index(one.way), one.seed))

    out: Path = args.out
    text = report.table(runs)
    (out / "table.md").write_text(f"{title}. {versions}.\n\n{text}\n")
    report.picture(runs, out / "accuracy.png", title)
    settings = {
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "size": SIZE,
        "train_images": len(train.labels),
        "versions": versions,
    }
    report.write_json(runs, out / "runs.json", settings)
    print(f"\n{text}\n\nTotal time has everything in it but the evaluations, which are the same for both.")
    print(f"table {out / 'table.md'}, picture {out / 'accuracy.png'}, all figures {out / 'runs.json'}")
    print(f"({time.perf_counter() - begin:.0f} s in all)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=local_path, default=Path("runs/demo"), help="folder for all that is written")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: %(default)s)")
    # Of 1e-3 and 3e-3 the better for full training, after an epoch.
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, of both ways (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if not 0 < args.learning_rate < float("inf"):
        parser.error(f"argument --learning-rate: got {args.learning_rate}, expected a number above 0")
    for name in ("epochs", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: got {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code, as :func:`train.command_line.exit_code` gives it."""
    args = parse(argv)
    return exit_code(lambda interrupt: demo(args, interrupt), args.out, go_on="call it again to start anew")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # every run compiles its programs, as a first one does
    sys.exit(main())
