"""Fine-tunes a small residual network on real images, with and without layer freezing, and shows what was saved.

The network is pre-trained on five of the ten classes of Fashion-MNIST, then fine-tuned on all ten: with nothing frozen,
by SmartFRZ with the predictor that comes with the library, by the two-scalar rule, and by FreezeOut.

    make demo                       # or: python -m train.demo --out runs/demo
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

import smartfrz_jax as sfj
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.predictor.probe import Probe
from train import fashion_mnist, report
from train.command_line import Interrupt, exit_code, local_path
from train.log import Evaluation, Log, Run
from train.loop import batches, training

BATCH_SIZE = 64
LEARNING_RATE = 0.05
WIDTHS, STAGE_SIZES = (8, 16, 32), (2, 2, 2)
MIN_SAVING = 0.1  # share of a step that a new program must save
PROBE_SIZE = 128  # images on which it is measured what the front of the network has learned


def new_model(seed: int) -> ResNet:
    """The demo's network: 15 convolutions and a head, 78,000 parameters."""
    return ResNet(STAGE_SIZES, WIDTHS, BasicBlock, num_classes=10, channels=1, stem="cifar", rngs=nnx.Rngs(seed))


def sgd(total_steps: int) -> optax.GradientTransformation:
    """The paper's optimizer. Each run has its own, or else some would find what others compiled."""
    return optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, total_steps), momentum=0.9)


def loss_fn(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of a batch."""
    logits = model(images)  # pyright: ignore[reportCallIssue]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(model: nnx.Module, optimizer: sfj.nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """One step; specialised on what the optimizer has frozen."""
    loss, grads = optimizer.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def correct(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Number of images classified right."""
    return (model(images).argmax(-1) == labels).sum()  # pyright: ignore[reportCallIssue]


def accuracy(model: nnx.Module, split: fashion_mnist.Split) -> float:
    """Share of a split that is classified right, every image once."""
    evaluated = nnx.view(model, use_running_average=True)
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    right = [
        int(correct(evaluated, images[start : start + 500], labels[start : start + 500]))
        for start in range(0, len(labels), 500)
    ]
    return sum(right) / len(split.labels)


class Tuning(NamedTuple):
    """A fine-tuning that can stop after every epoch, so that the others take turns with it.

    Attributes:
        log: Its log.
        model: The model.
        steps: Its steps, as :func:`train.loop.training` makes them.
    """

    log: Log
    model: nnx.Module
    steps: Iterator[int]


class Demo:
    """The data and the pre-trained weights, which all runs of the demo share."""

    def __init__(self, out: Path, epochs: int, pretrain_epochs: int, seed: int, interrupt: Interrupt, *, quiet: bool):
        self.out = out
        self.train_split, self.test_split = fashion_mnist.load()
        self.epochs, self.pretrain_epochs, self.seed = epochs, pretrain_epochs, seed
        self.interrupt, self.quiet = interrupt, quiet
        self.epoch_steps = len(self.train_split.labels) // BATCH_SIZE
        self.total_steps = epochs * self.epoch_steps
        self.example = tuple(part[:BATCH_SIZE] for part in self.train_split)
        self.layers = sfj.nnx.find_layers(new_model(seed), self.example[0])
        self.probe_batch = tuple(jnp.asarray(part[:PROBE_SIZE]) for part in self.train_split)
        self.pretrained = nnx.state(new_model(seed))

    def bar(self, total: int, label: str) -> tqdm:
        """A progress bar."""
        return tqdm(total=total, desc=f"{label:<28}", unit="step", disable=self.quiet, leave=True, ncols=100)

    def train_step(self, tx: optax.GradientTransformation) -> sfj.TrainStep:
        """A step of its own, which compiles its own programs."""
        return sfj.TrainStep(
            train_step, account=sfj.nnx.account(new_model(0), self.layers, loss_fn, *self.example, tx=tx)
        )

    def pretrain(self) -> None:
        """Trains on the first five classes, then gives the network a new head."""
        model = new_model(self.seed)
        images, labels = (part[self.train_split.labels < 5] for part in self.train_split)
        tx = sgd(self.pretrain_epochs * (len(labels) // BATCH_SIZE))
        optimizer = sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=self.layers)
        freezer, step = sfj.nnx.Freezer(model, optimizer, sfj.policies.never()), self.train_step(tx)
        indices = self.interrupt.checked(batches(len(labels), BATCH_SIZE, self.pretrain_epochs, self.seed))
        data = ((images[i], labels[i]) for i in indices)
        log = Log(self.out / "pretrain.jsonl", Run("pretrain", self.layers.names, {"seed": self.seed}))
        steps = self.pretrain_epochs * (len(labels) // BATCH_SIZE)
        with self.bar(steps, "pre-train on 5 classes") as bar, log:
            for _ in training(log, model, optimizer, freezer, step, data):
                bar.update()
        model.fc = new_model(self.seed + 1).fc
        self.pretrained = nnx.state(model)

    def tuning(
        self, name: str, make_policy: Callable[[nnx.Module], sfj.Policy], tx: optax.GradientTransformation
    ) -> Tuning:
        """A fine-tuning of the pre-trained network on all ten classes; the log is called as the run."""
        model = new_model(0)
        nnx.update(model, self.pretrained)
        optimizer = sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=self.layers)
        step = self.train_step(tx)
        freezer = sfj.nnx.Freezer(model, optimizer, make_policy(model), train_step=step, min_saving=MIN_SAVING)
        images, labels = self.train_split
        indices = self.interrupt.checked(batches(len(labels), BATCH_SIZE, self.epochs, self.seed + 30))
        data = ((images[i], labels[i]) for i in indices)
        settings = {"seed": self.seed, "epochs": self.epochs}
        log = Log(self.out / f"{name}.jsonl", Run(name, self.layers.names, settings))
        return Tuning(log, model, training(log, model, optimizer, freezer, step, data))

    def fine_tune(self, tunings: Sequence[Tuning]) -> list[Run]:
        """An epoch of each in turn, so that none has the machine in another state than the others have it."""
        with ExitStack() as stack, self.bar(len(tunings) * self.total_steps, "fine-tune") as bar:
            for tuning in tunings:
                stack.enter_context(tuning.log)
            for _ in range(self.epochs):
                for tuning in tunings:
                    bar.set_description_str(f"{f'fine-tune, {tuning.log.run.name}':<28}")
                    for _ in itertools.islice(tuning.steps, self.epoch_steps):
                        bar.update()
            for tuning in tunings:
                tuning.log.add(Evaluation(self.total_steps, {"accuracy": accuracy(tuning.model, self.test_split)}))
        return [tuning.log.run for tuning in tunings]

    def probe(self, model: nnx.Module) -> Probe:
        """The training loss on some images, which tells SmartFRZ what the front of the network has learned."""
        return sfj.nnx.probe(model, loss_fn, *self.probe_batch)


def demo(args: argparse.Namespace, say: Callable[[str], None], interrupt: Interrupt) -> None:
    """The whole demo; writes into ``args.out`` as it goes."""
    begin = time.perf_counter()
    out: Path = args.out
    device = f"{jax.devices()[0].platform}, {os.cpu_count()} cores"
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {device}"
    demo = Demo(out, args.epochs, args.pretrain_epochs, args.seed, interrupt, quiet=args.quiet)
    steps = demo.total_steps
    say(
        f"smartfrz_jax demo: {len(demo.layers)} layers, {len(demo.train_split.labels)} images, {steps} "
        f"steps of {BATCH_SIZE} ({versions})"
    )
    demo.pretrain()

    def guided(model: nnx.Module) -> sfj.Policy:
        return sfj.smartfrz(sfj.Predictor.pretrained(), total_steps=steps, probe=demo.probe(model), seed=args.seed)

    schedules = sfj.policies.freezeout_schedules(demo.layers, learning_rate=LEARNING_RATE, total_steps=steps)
    freezeout = optax.chain(optax.trace(0.9), sfj.policies.scale_by_layer_schedule(demo.layers, schedules))
    runs = demo.fine_tune(
        [
            demo.tuning("never", lambda model: sfj.policies.never(), sgd(steps)),
            demo.tuning("smartfrz", guided, sgd(steps)),
            demo.tuning("progress", lambda model: sfj.progress(total_steps=steps), sgd(steps)),
            demo.tuning("freezeout", lambda model: sfj.freezeout(total_steps=steps), freezeout),
        ]
    )

    picture = out / "demo.png"
    report.picture(runs, picture, f"Fine-tuning ResNet-{len(demo.layers)} on Fashion-MNIST ({versions})")
    text = report.table(runs)
    (out / "demo.md").write_text(f"{versions}, seed {args.seed}, one run each\n\n{text}\n")
    say(f"\n{text}\n")
    say("One run each, so differences in accuracy below about 2 points are noise. Seconds are without compilation.")
    say(f"picture      {picture}\ntable        {out / 'demo.md'}\nevery step   {out}/*.jsonl, a file for each run")
    say(f"({time.perf_counter() - begin:.0f} s in all)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=str(__doc__).split("\n\n")[0])
    parser.add_argument(
        "--out", type=local_path, default=Path("runs/demo"), help="folder for everything that is written"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each fine-tuning (default: %(default)s)")
    parser.add_argument("--pretrain-epochs", type=int, default=3, help="epochs of pre-training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    for name, least in (("epochs", 1), ("pretrain_epochs", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"argument --{name.replace('_', '-')}: got {getattr(args, name)}, expected at least {least}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code, as :func:`train.command_line.exit_code` gives it."""
    args = parse(argv)
    go_on = f"the steps so far are in {args.out}/*.jsonl"
    return exit_code(lambda interrupt: demo(args, print, interrupt), args.out, go_on=go_on)


if __name__ == "__main__":
    sys.exit(main())
