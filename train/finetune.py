"""Fine-tunes a network on a TFDS data set while a policy freezes its layers; see ``--help``."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import smartfrz_jax as sfj
from models import weights
from train import report
from train.command_line import Interrupt, exit_code
from train.data import Data, metrics
from train.data.open import open_data
from train.log import Evaluation, Log, Run
from train.loop import make_step, training
from train.networks import make_network
from train.optimizers import make_optimizer
from train.options import KeepActivations, Options, parse
from train.policies import make_policy
from train.resume import check_agree, read_baseline, read_started, save_checkpoint


def loss_fn(model: nnx.Module, inputs: tuple[jax.Array, ...], labels: jax.Array) -> jax.Array:
    """Mean cross entropy; labels are classes, or probabilities where examples are mixed."""
    logits = model(*inputs)  # pyright: ignore[reportCallIssue]
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, labels).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fix_statistics(model: nnx.Module) -> None:
    """Lets the BatchNorms use, and keep, the statistics they have."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = True


def make_train_step(
    data: Data, account: sfj.Account, total_steps: int, keep_activations: KeepActivations
) -> sfj.TrainStep | sfj.nnx.CachedStep:
    """The step; augmentation is part of it.

    Args:
        data: The training set.
        account: The account of the step.
        total_steps: Length of the run.
        keep_activations: Where those of frozen layers are kept; ``no`` to compute them in every step.

    Returns:
        A step of ``(model, optimizer, key, inputs, labels)``; before the key, numbers of examples if it keeps anything.
    """

    def loss_of_batch(model: nnx.Module, key: jax.Array, inputs: tuple[Any, ...], labels: jax.Array) -> jax.Array:
        return loss_fn(model, *data.augment(key, inputs, labels))

    if keep_activations == "no":
        return sfj.TrainStep(make_step(loss_of_batch), account=account)
    return sfj.nnx.CachedStep(
        make_step,
        loss_of_batch,
        examples=data.examples,
        place=keep_activations,
        account=account,
        total_steps=total_steps,
    )


def make_evaluation(data: Data, figures: dict[str, metrics.Metric]) -> Callable[[nnx.Module], dict[str, float]]:
    """A function of the model to its figures on a split, every example once."""

    @nnx.jit
    def counts_of(model: nnx.Module, inputs: tuple[Any, ...], labels: jax.Array, weights: jax.Array) -> jax.Array:
        logits = model(*data.prepare(inputs))  # pyright: ignore[reportCallIssue]
        return metrics.confusion(logits, labels, weights)

    def evaluate(model: nnx.Module) -> dict[str, float]:
        evaluated = nnx.merge(*nnx.split(model))  # shares the arrays, not the mode
        evaluated.eval()
        counts = np.zeros((data.num_classes, data.num_classes), np.int64)
        for batch in data.evaluation_batches():
            counts += np.asarray(counts_of(evaluated, *batch))
        return {name: figure(counts) for name, figure in figures.items()}

    return evaluate


def finetune(options: Options, say: Callable[[str], None], interrupt: Interrupt) -> None:
    """The whole run; writes into ``options.out`` as it goes.

    Args:
        options: The command line.
        say: Prints.
        interrupt: Where Ctrl-C is noticed.

    Raises:
        KeyboardInterrupt: After Ctrl-C; a checkpoint has been written, unless it was pressed twice.
        FileNotFoundError: If data, weights, or a run to resume are not there.
        ValueError: If options do not fit each other, the network or the data.
        FloatingPointError: If the loss is not finite.
    """
    begin = time.perf_counter()
    started = read_started(options) if options.resume else None
    if options.resume and started is None:
        say(f"{options.out} holds no checkpoint yet: the run starts again from its first step")
    if options.keep_programs is not None:
        sfj.enable_compilation_cache(options.keep_programs)
    train_data, evaluation_data = open_data(options)
    steps_per_epoch = train_data.steps_per_epoch
    total_steps = options.epochs * steps_per_epoch
    baseline = [] if options.baseline is None else [read_baseline(options, options.baseline, total_steps)]
    model = make_network(options, num_classes=train_data.num_classes, seed=options.seed)
    if options.weights is not None:
        prefix = options.weights_prefix or ""
        weights.load(model, options.weights, prefix=prefix, new_head=options.head == "new", resample=True)
    model.train()
    if options.batch_norm == "fixed":
        fix_statistics(model)

    first = train_data.batch(0)
    example = train_data.prepare(first.inputs)
    layers = sfj.nnx.find_layers(model, *example)
    tx = make_optimizer(options, layers, total_steps)
    account = sfj.nnx.account(model, layers, loss_fn, example, first.labels, tx=tx)
    features, reference = None, None
    if options.reference is not None:
        outputs_of = sfj.nnx.features(model, layers, *example)
        known = make_network(options, num_classes=train_data.num_classes, seed=options.seed)
        weights.load(known, options.reference)
        features, reference = (lambda model: outputs_of(model, *example)), outputs_of(known, *example)
    policy = make_policy(
        options,
        steps_per_epoch=steps_per_epoch,
        costs={name: parts.forward for name, parts in account.flops().by_layer.items() if name},
        reference=reference,
        probe=sfj.nnx.probe(model, loss_fn, example, first.labels),
    )
    optimizer = sfj.nnx.Optimizer(model, tx, layers=layers)
    train_step = make_train_step(train_data, account, total_steps, options.keep_activations)
    freezer = sfj.nnx.Freezer(
        model,
        optimizer,
        policy,
        features=features,
        train_step=train_step,
        lead=options.lead,
        min_saving=options.min_saving,
    )

    history = Run(options.policy, layers.names, options.settings())
    if started is not None:
        checkpoint, history = started
        freezer.restore(checkpoint)
        done = {"optimizer": int(optimizer.step[...]), "policy": freezer.steps, "log.jsonl": len(history.steps)}
        check_agree(checkpoint, done)
        say(f"resumed from {checkpoint}, {freezer.steps} of {total_steps} steps done")
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}"
    say(
        f"{options.model}: {len(layers)} layers, {account.flops().total / 1e9:.2f} GFLOP a step of {options.batch_size}"
    )
    say(f"{options.data}: {steps_per_epoch} steps an epoch, {total_steps} in all ({versions})")

    evaluate = make_evaluation(evaluation_data, metrics.metrics_of(options.data))
    bar = tqdm(total=total_steps, initial=freezer.steps, unit="step", disable=options.quiet, ncols=100)

    def batches() -> Iterator[tuple[Any, ...]]:
        steps = range(freezer.steps, total_steps)
        for step, batch in zip(steps, train_data.batches(freezer.steps, total_steps), strict=True):
            indices = () if options.keep_activations == "no" else (train_data.indices(step),)
            yield *indices, train_data.key(step), batch.inputs, batch.labels

    with bar, Log(options.out / "log.jsonl", history) as log:
        data = interrupt.checked(batches(), on_interrupt=lambda: save_checkpoint(freezer, options.out))
        flops = (lambda frozen: account.flops(frozen).total) if options.scan else None
        for step in training(log, model, optimizer, freezer, train_step, data, flops=flops):
            bar.update()
            bar.set_postfix(loss=f"{log.run.steps[-1].loss:.3f}", frozen=f"{len(freezer.frozen.names)}/{len(layers)}")
            if step % steps_per_epoch == 0:
                log.add(Evaluation(step, evaluate(model)))
                figures = ", ".join(f"{name} {value:.4f}" for name, value in log.run.metrics.items())
                bar.write(f"epoch {step // steps_per_epoch}: {figures}", file=sys.stdout)
                save_checkpoint(freezer, options.out)

    weights.save(model, options.out / "model.safetensors", overwrite=True)
    runs = [*baseline, log.run]
    table, phases = report.table(runs), report.phases(log.run)
    (options.out / "report.md").write_text(f"{' '.join(sys.argv)}\n\n{versions}\n\n{table}\n\n{phases}\n")
    report.picture(runs, options.out / "report.png", f"{options.model} on {options.data} ({versions})")
    say(f"\n{table}\n\neverything is in {options.out} ({time.perf_counter() - begin:.0f} s in all)")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    options = parse(argv)

    def work(interrupt: Interrupt) -> None:
        if (options.out / "log.jsonl").exists() and not options.resume:
            raise FileExistsError(
                f"out: {options.out} holds a run; go on with it with --resume, or choose another folder"
            )
        finetune(options, print, interrupt)

    return exit_code(work, options.out, go_on=f"go on with --resume --out {options.out}")


if __name__ == "__main__":
    sys.exit(main())
