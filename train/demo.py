"""Fine-tunes a small residual network on real images, with and without layer freezing, and shows what was saved.

The network is pre-trained on five of the ten classes of Fashion-MNIST, then fine-tuned on all ten. One fine-tuning
gives the reference; a second, beside it, the predictor's training set; a third, with nothing frozen, is both the
baseline and the predictor's held-out run. Then the predictor, and FreezeOut for comparison, freeze a fine-tuning each.

    make demo                       # or: python -m train.demo --out runs/demo
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import smartfrz_jax as sfj
from models.resnet import BasicBlock, ResNet
from smartfrz_jax import recording
from train import fashion_mnist, report
from train.interrupt import Interrupt
from train.log import Evaluation, Log, Run
from train.run import batches, run

BATCH_SIZE = 64
LEARNING_RATE = 0.05
WIDTHS, STAGE_SIZES = (8, 16, 32), (2, 2, 2)
MIN_SAVING = 0.1  # share of a step that a new program must save
# Means of 16 neighbours after sorting: the sorted records are short, and the predictor learns quickly.
PREDICTOR = sfj.PredictorConfig(encoding=sfj.Encoding(quantiles=64))
PROBE_SIZE = 128  # images on which layer outputs are compared


def new_model(seed: int) -> ResNet:
    """The demo's network: 15 convolutions and a head, 78,000 parameters."""
    return ResNet(STAGE_SIZES, WIDTHS, BasicBlock, num_classes=10, channels=1, stem="cifar", rngs=nnx.Rngs(seed))


def loss_fn(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of a batch."""
    logits = model(images)  # pyright: ignore[reportCallIssue]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
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


class Demo:
    """The data, the pre-trained weights and the compiled steps that all runs of the demo share."""

    def __init__(self, out: Path, epochs: int, pretrain_epochs: int, seed: int, interrupt: Interrupt, *, quiet: bool):
        self.out = out
        self.train_split, self.test_split = fashion_mnist.load()
        self.epochs, self.pretrain_epochs, self.seed = epochs, pretrain_epochs, seed
        self.interrupt, self.quiet = interrupt, quiet
        self.total_steps = epochs * (len(self.train_split.labels) // BATCH_SIZE)
        # The paper's optimizer. One object for all runs: another one would be another program.
        self.sgd = optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, self.total_steps), momentum=0.9)
        model = new_model(seed)
        self.probe = jnp.asarray(self.train_split.images[:PROBE_SIZE])
        self.layers = sfj.nnx.find_layers(model, self.probe)
        batch = self.train_split.images[:BATCH_SIZE], self.train_split.labels[:BATCH_SIZE]
        account = sfj.nnx.account(model, self.layers, loss_fn, *batch, tx=self.sgd)
        self.step = sfj.TrainStep(train_step, account=account)
        self.features = sfj.nnx.features(model, self.layers, self.probe)
        self.pretrained = nnx.state(model)

    def bar(self, total: int, label: str) -> tqdm:
        """A progress bar."""
        return tqdm(total=total, desc=f"{label:<28}", unit="step", disable=self.quiet, leave=True, ncols=100)

    def fine_tune(
        self,
        name: str,
        policy: sfj.Policy,
        *,
        seed: int,
        tx: optax.GradientTransformation | None = None,
        recorder: sfj.Recorder | None = None,
    ) -> tuple[Run, nnx.Module]:
        """Fine-tunes the pre-trained network on all ten classes; the log is called as the run."""
        model = new_model(0)
        nnx.update(model, self.pretrained)
        optimizer = sfj.nnx.Optimizer(model, tx or self.sgd, wrt=nnx.Param, layers=self.layers)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=self.step, min_saving=MIN_SAVING)
        images, labels = self.train_split
        indices = self.interrupt.checked(batches(len(labels), BATCH_SIZE, self.epochs, seed))
        data = ((images[i], labels[i]) for i in indices)
        log = Log(self.out / f"{name}.jsonl", Run(name, self.layers.names, {"seed": seed, "epochs": self.epochs}))
        with self.bar(self.total_steps, f"fine-tune, {name}") as bar, log:

            def after_step(step: int) -> None:
                bar.update()
                bar.set_postfix(frozen=f"{len(freezer.frozen.names)}/{len(self.layers)}", refresh=False)
                every = record_every(self.total_steps)
                if recorder is not None and step % every == 0:
                    losses = [taken.loss for taken in log.run.steps[-every:] if taken.loss is not None]
                    loss = float(np.mean(losses))
                    recorder.record(step, nnx.state(model, nnx.Param), self.features(model, self.probe), loss)

            run(log, model, optimizer, freezer, self.step, data, after_step=after_step)
            log.add(Evaluation(self.total_steps, {"accuracy": accuracy(model, self.test_split)}))
        return log.run, model

    def pretrain(self) -> None:
        """Trains on the first five classes, then gives the network a new head."""
        model = new_model(self.seed)
        images, labels = (part[self.train_split.labels < 5] for part in self.train_split)
        steps = self.pretrain_epochs * (len(labels) // BATCH_SIZE)
        optimizer = sfj.nnx.Optimizer(model, self.sgd, wrt=nnx.Param, layers=self.layers)
        freezer = sfj.nnx.Freezer(model, optimizer, sfj.never())
        indices = self.interrupt.checked(batches(len(labels), BATCH_SIZE, self.pretrain_epochs, self.seed))
        data = ((images[i], labels[i]) for i in indices)
        log = Log(self.out / "pretrain.jsonl", Run("pretrain", self.layers.names, {"seed": self.seed}))
        with self.bar(steps, "pre-train on 5 classes") as bar, log:
            run(log, model, optimizer, freezer, self.step, data, after_step=lambda _: bar.update())
        model.fc = new_model(self.seed + 1).fc
        self.pretrained = nnx.state(model)

    def recorder(self, reference: nnx.Module) -> sfj.Recorder:
        """Records a run beside the reference; its weights are tailored as the policy will tailor them."""
        model = new_model(0)
        nnx.update(model, self.pretrained)
        start = nnx.state(model, nnx.Param)
        return sfj.Recorder(
            self.layers,
            sfj.Tailoring.create(self.layers, start),
            start,
            record_every=record_every(self.total_steps),
            reference_features=self.features(reference, self.probe),
        )


def record_every(total_steps: int) -> int:
    """Steps between records: the default of the policy, so that the predictor sees the same spacing."""
    return max(1, total_steps // 120)


def demo(args: argparse.Namespace, say: Callable[[str], None], interrupt: Interrupt) -> None:
    """The whole demo; writes into ``args.out`` as it goes."""
    begin = time.perf_counter()
    out: Path = args.out
    device = f"{jax.devices()[0].platform}, {os.cpu_count()} cores"
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {device}"
    demo = Demo(out, args.epochs, args.pretrain_epochs, args.seed, interrupt, quiet=args.quiet)
    say(
        f"smartfrz_jax demo: {len(demo.layers)} layers, {len(demo.train_split.labels)} images, {demo.total_steps} "
        f"steps of {BATCH_SIZE} ({versions})"
    )
    demo.pretrain()
    _, reference = demo.fine_tune("reference", sfj.never(), seed=args.seed + 10)

    recorder = demo.recorder(reference)
    demo.fine_tune("recorded", sfj.never(), seed=args.seed + 20, recorder=recorder)
    training = recorder.finish(demo.total_steps, data="fashion_mnist", seed=args.seed + 20)
    held_out_recorder = demo.recorder(reference)
    full, _ = demo.fine_tune("never", sfj.never(), seed=args.seed + 30, recorder=held_out_recorder)
    held_out = held_out_recorder.finish(demo.total_steps, data="fashion_mnist", seed=args.seed + 30)
    data_set = out / "recordings"
    for name, recorded in (("recorded", training), ("never", held_out)):
        (data_set / f"{name}.npz").unlink(missing_ok=True)  # of an earlier demo
        recording.save(recorded, data_set, name)

    examples = sfj.make_examples(recording.load(data_set), criterion=sfj.Settled(tolerance=args.tolerance))

    def progress(epochs: Iterable[int]) -> Iterable[int]:
        return interrupt.checked(tqdm(epochs, f"{'predictor':<28}", unit="epoch", disable=args.quiet, ncols=100))

    held_out_examples = sfj.by_run(examples, [0])  # recordings come by name: "never", "recorded"
    fitted = sfj.fit(
        sfj.Predictor(PREDICTOR, rngs=nnx.Rngs(args.seed)),
        examples,
        held_out=held_out_examples,
        epochs=args.predictor_epochs,
        learning_rate=0.01,
        seed=args.seed,
        progress=progress,
    )
    fitted.predictor.save(out / "predictor", overwrite=True)
    score = fitted.evaluations[-1]
    control = sfj.evaluate(examples.progress[held_out_examples], examples.target[held_out_examples])
    say(
        f"predictor on the held-out run: AUC {score.auc:.3f} (the share of training done, alone: {control.auc:.3f}), "
        f"balanced accuracy {score.balanced_accuracy:.3f}, {score.positives} of {score.n} moments to freeze"
    )

    policy = sfj.smartfrz(fitted.predictor, total_steps=demo.total_steps)
    guided, _ = demo.fine_tune("smartfrz", policy, seed=args.seed + 30)
    schedules = sfj.freezeout_schedules(demo.layers, learning_rate=LEARNING_RATE, total_steps=demo.total_steps)
    freezeout = optax.chain(optax.trace(0.9), sfj.scale_by_layer_schedule(demo.layers, schedules))
    linear, _ = demo.fine_tune("linear", sfj.linear(demo.total_steps), seed=args.seed + 30, tx=freezeout)

    runs = [full, guided, linear]
    picture = out / "demo.png"
    report.picture(runs, picture, f"Fine-tuning ResNet-{len(demo.layers)} on Fashion-MNIST ({versions})")
    text = report.table(runs)
    (out / "demo.md").write_text(f"{versions}, seed {args.seed}, one run each\n\n{text}\n")
    say(f"\n{text}\n")
    say("One run each, so differences in accuracy below about 2 points are noise. Seconds are without compilation.")
    say(f"picture      {picture}\ntable        {out / 'demo.md'}\nevery step   {out}/*.jsonl, a file for each run")
    say(f"recordings   {data_set}\npredictor    {out / 'predictor'}\n({time.perf_counter() - begin:.0f} s in all)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything that is written")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each fine-tuning (default: %(default)s)")
    parser.add_argument("--pretrain-epochs", type=int, default=3, help="epochs of pre-training (default: %(default)s)")
    parser.add_argument(
        "--predictor-epochs", type=int, default=10, help="epochs of the predictor (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="change in CKA that counts as none (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    for name in ("epochs", "pretrain_epochs", "predictor_epochs"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code: 0, 2 if the output folder cannot be written, 130 if interrupted."""
    args = parse(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "pretrain.jsonl").write_text("")
    except OSError as error:
        print(
            f"--out: cannot write to {args.out} ({error.strerror}); choose another folder with --out", file=sys.stderr
        )
        return 2
    try:
        with Interrupt() as interrupt:
            demo(args, print, interrupt)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the steps so far are in {args.out}/*.jsonl", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
