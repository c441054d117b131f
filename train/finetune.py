"""Fine-tunes a network on a TFDS data set while a policy freezes its layers; see ``--help``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

import smartfrz_jax as sfj
from models import weights
from smartfrz_jax.pytrees import hosts
from smartfrz_jax.pytrees.file_paths import Path, is_remote
from train import report
from train.command_line import Interrupt, exit_code, leave
from train.data import Data, metrics
from train.data.batch import in_views
from train.data.open import open_data
from train.devices import processes
from train.devices.agreement import check_decisions
from train.devices.mesh import make_mesh, place_module
from train.log import Evaluation, Log, Run
from train.loop import AHEAD, Loop
from train.networks import NetworkConfig, make_network
from train.optimizers import make_optimizer
from train.options import KeepActivations, Options, RunConfig, parse
from train.policies import layer_rates, make_policy
from train.prefetch import Prefetch
from train.profile import profiled
from train.recovery.checkpoints import make_checkpoints
from train.recovery.lock import only_run_in
from train.recovery.regression import react
from train.recovery.resume import check_begun, read_baseline, read_started, restore_newest
from train.train_step import loss_fn, make_train_step


def fix_statistics(model: nnx.Module) -> None:
    """Lets the BatchNorms use, and keep, the statistics they have."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = True


def make_evaluation(data: Data, figures: dict[str, metrics.Metric]) -> Callable[[nnx.Module], dict[str, float]]:
    """A function of the model to its figures on a split and, last, to its loss there; every example once."""

    @nnx.jit
    def sums_of(model: nnx.Module, inputs: tuple[Any, ...], labels: jax.Array, weights: jax.Array) -> Any:
        logits = model(*data.prepare(inputs))  # pyright: ignore[reportCallIssue]
        return metrics.counts(logits, labels, weights), metrics.loss_sums(logits, labels, weights)

    def evaluate(model: nnx.Module) -> dict[str, float]:
        evaluated = nnx.merge(*nnx.split(model))  # shares the arrays, not the mode
        evaluated.eval()
        counts, sums = metrics.total(hosts.fetch(sums_of(evaluated, *batch)) for batch in data.evaluation_batches())
        loss = metrics.mean_loss(sums)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss on the evaluation split is {loss}; lower the learning rate")
        return {name: figure(counts) for name, figure in figures.items()} | {"loss": loss}

    return evaluate


class Training(NamedTuple):
    """What a run trains with.

    Attributes:
        model: The network.
        optimizer: Its optimizer.
        freezer: Decides what freezes.
        step: The train step.
        account: What the step costs.
    """

    model: nnx.Module
    optimizer: sfj.nnx.Optimizer
    freezer: sfj.nnx.Freezer
    step: sfj.TrainStep | sfj.nnx.CachedStep
    account: sfj.Account


def make_model(config: NetworkConfig, *, image_size: int, num_classes: int, seed: int) -> nnx.Module:
    """The network with the weights that it starts from, in training mode; see :func:`train.networks.make_network`."""
    model = make_network(config, image_size=image_size, num_classes=num_classes, seed=seed)
    if config.weights is not None and not config.is_gguf:
        prefix, new_head = config.weights_prefix or "", config.head == "new" and not config.is_decoder
        weights.load(model, config.weights, prefix=prefix, new_head=new_head, resample=True)
    model.train()
    if config.batch_norm == "fixed":
        fix_statistics(model)
    return model


def make_reference(options: Options, model: nnx.Module, mesh: Mesh | None, **sizes: int) -> nnx.Module | None:
    """The network with whose outputs a policy compares those of the one that trains; None if it compares none.

    Args:
        options: The command line.
        model: The network with the weights that it starts from, of a run that is resumed, too: ``simfreeze`` takes it.
        mesh: The devices; None for one.
        **sizes: Of the network; see :func:`train.networks.make_network`.
    """
    policy = options.policy
    if policy.policy == "simfreeze":
        return model
    if policy.reference is None:
        return None
    known = make_network(options.network, **sizes)
    weights.load(known, policy.reference)
    if mesh is not None:
        place_module(known, mesh)
    return known


def make_training(options: Options, data: Data, mesh: Mesh | None = None) -> Training:
    """All that a run trains with, from its options, its training set and the devices.

    Raises:
        FileNotFoundError: If weights or a predictor are not there.
        ValueError: If options do not fit each other, the network or the data.
    """
    run, policy_config = options.run, options.policy
    total_steps = run.epochs * data.steps_per_epoch
    sizes = {"image_size": options.data.image_size, "num_classes": data.num_classes, "seed": run.seed}
    model = make_model(options.network, **sizes)
    if mesh is not None:
        place_module(model, mesh)
    first = data.batch(0)
    example = data.prepare(first.inputs)
    layers = sfj.nnx.find_layers(model, *example, lookups=options.network.is_decoder)
    learning_rate = options.optimizer.learning_rate
    rates = layer_rates(policy_config, layers, learning_rate=learning_rate, total_steps=total_steps)
    tx = make_optimizer(options.optimizer, epochs=run.epochs, total_steps=total_steps, rates=rates)
    account = sfj.nnx.account(model, layers, loss_fn, example, first.labels, tx=tx)
    features, reference = None, None
    if (known := make_reference(options, model, mesh, **sizes)) is not None:
        outputs_of = sfj.nnx.features(model, layers, *example)
        features, reference = (lambda model: outputs_of(model, *example)), outputs_of(known, *example)
    policy = make_policy(
        policy_config,
        epochs=run.epochs,
        steps_per_epoch=data.steps_per_epoch,
        seed=run.seed,
        costs=account.flops().forward_by_layer,
        reference=reference,
        pretrained=options.network.weights is not None,
        probe=sfj.nnx.probe(model, loss_fn, example, first.labels),
    )
    optimizer = sfj.nnx.Optimizer(model, tx, layers=layers, returning=options.returning, frozen=policy)
    if mesh is not None:
        place_module(optimizer, mesh)
    step = make_train_step(
        data,
        account,
        total_steps,
        run.keep_activations,
        devices=options.devices,
        mesh=mesh,
        skips=options.recovery.on_nan == "skip",
    )
    freezer = sfj.nnx.Freezer(
        model,
        optimizer,
        policy,
        features=features,
        train_step=step,
        lead=policy_config.lead,
        min_saving=policy_config.min_saving,
    )
    freezer.delay = AHEAD
    return Training(model, optimizer, freezer, step, account)


def make_callbacks(config: RunConfig, settings: dict[str, Any], steps: int | None = None) -> list[sfj.callbacks.Writer]:
    """The callbacks of ``--log``; of a run that goes on after some steps, or none, TensorBoard hides what came then.

    Raises:
        ImportError: If a package that writes for one is not installed.
    """
    made: list[sfj.callbacks.Writer] = []
    for name in config.log if processes.is_first() else ():
        match name:
            case "tensorboard":
                purge_step = None if steps is None else steps + 1
                made.append(sfj.callbacks.TensorBoard(config.out / "tensorboard", purge_step=purge_step))
            case "wandb":
                folder = None if is_remote(config.out) else config.out
                made.append(sfj.callbacks.WandB(project="smartfrz_jax", config=settings, dir=folder))
    return made


def batches_of(data: Data, start: int, stop: int, keep_activations: KeepActivations) -> Iterator[tuple[Any, ...]]:
    """The arguments of the steps from ``start`` to ``stop``, behind model and optimizer."""
    for step, batch in zip(range(start, stop), data.batches(start, stop), strict=True):
        indices = () if keep_activations == "no" else (data.indices(step),)
        key = () if data.views else (data.key(step),)
        yield *indices, *key, batch.inputs, batch.labels


def begin_or_resume(
    freezer: sfj.nnx.Freezer, new: Run, out: Path, started: Sequence[Path], say: Callable[[str], None]
) -> Run:
    """What a run begins with: nothing, or what it goes on from.

    Args:
        freezer: What the run trains with; it is restored, or freezes what is frozen from the beginning.
        new: The run, without any step.
        out: Its folder.
        started: The checkpoints that are there, the newest first.
        say: Prints.

    Returns:
        The run until now.

    Raises:
        ValueError: If no checkpoint is sound, or processes have frozen different layers.
    """
    run = restore_newest(freezer, out, started, say) if started else new
    if not started and (frozen := freezer.start().names):
        run.freezes += freezer.events
        say(f"{len(frozen)} layers are frozen from the beginning")
    check_decisions(freezer)  # else the first step would be another program in each process
    return run


def finetune(options: Options, say: Callable[[str], None], interrupt: Interrupt) -> None:
    """The whole run; writes into ``--out`` as it goes.

    Args:
        options: The command line.
        say: Prints.
        interrupt: Where Ctrl-C is noticed.

    Raises:
        KeyboardInterrupt: After Ctrl-C; a checkpoint has been written, unless it was pressed twice or others train too.
        FileNotFoundError: If data, weights, or a run to resume are not there.
        ValueError: If options do not fit each other, the network or the data.
        FloatingPointError: If the loss is not finite.
    """
    begin = time.perf_counter()
    config, recovery, settings, out = options.run, options.recovery, options.settings(), options.run.out
    started = read_started(out, settings, say) if recovery.resume else []
    if config.keep_programs is not None:
        sfj.enable_compilation_cache(config.keep_programs)
    mesh = make_mesh(options.devices.mesh, batch_size=config.batch_size, accumulate=options.devices.accumulate)
    data, evaluation_data = open_data(
        options.data, options.network.reads, batch_size=config.batch_size, seed=config.seed, mesh=mesh
    )
    total_steps, evaluate_every = config.epochs * data.steps_per_epoch, config.evaluate_every or data.steps_per_epoch
    figures = metrics.metrics_of(options.data.data, options.data.task)
    baseline = (
        [] if config.baseline is None else [read_baseline(config.baseline, settings, total_steps, [*figures, "loss"])]
    )
    model, _, freezer, step, account = make_training(options, data, mesh)
    history = begin_or_resume(freezer, Run(options.policy.policy, freezer.layers.names, settings), out, started, say)
    first, versions = processes.is_first(), report.versions_of(mesh)
    layers, gflop = len(freezer.layers), account.flops().total / 1e9
    say(f"{options.network.model}: {layers} layers, {gflop:.2f} GFLOP a step of {config.batch_size}")
    say(f"{options.data.data}: {data.steps_per_epoch} steps an epoch, {total_steps} in all ({versions})")

    evaluate = make_evaluation(evaluation_data, figures)
    processes.wait_for_all("before the log is written")  # which all have read, or looked for
    with ExitStack() as stack:
        writers = make_callbacks(config, settings, freezer.steps if recovery.resume else None)
        callbacks = [stack.enter_context(writer) for writer in writers]
        bar = tqdm(total=total_steps, initial=freezer.steps, unit="step", disable=config.quiet or not first, ncols=100)
        stack.enter_context(bar)
        log = stack.enter_context(Log(out / "log.jsonl" if first else None, history, callbacks))
        checkpoints = stack.enter_context(make_checkpoints(recovery, out, next(iter(figures))))
        flops = (lambda frozen: account.flops(frozen).total) if options.has_loops else None
        view_of = data.view if data.views else None
        loop = Loop(
            log, freezer, step, flops=flops, log_every=config.log_every, may_skip=recovery.may_skip, view_of=view_of
        )

        def save(figures: Mapping[str, float] | None = None) -> None:
            loop.drain()  # no state is saved that is later than a loss which nobody has seen
            log.flush()
            checkpoints.save(freezer, figures)

        batches = batches_of(data, freezer.steps, total_steps, config.keep_activations)
        read_ahead = stack.enter_context(Prefetch(batches))
        steps = loop.run(interrupt.checked(in_views(data, freezer.steps, read_ahead), on_interrupt=save))
        for done in profiled(loop, steps, out / "profile", config.profile):
            check_decisions(freezer, every=options.policy.lead)
            bar.update()
            if history.steps:
                loss, of_layers = history.steps[-1].loss, f"{len(freezer.frozen.names)}/{layers}"
                bar.set_postfix(loss="nan" if loss is None else f"{loss:.3f}", frozen=of_layers, refresh=False)
            if done % evaluate_every == 0 or done == total_steps:
                loop.drain()
                react(freezer, log, Evaluation(done, evaluate(model)), recovery, say)
                found = ", ".join(f"{name} {value:.4f}" for name, value in log.run.metrics.items())
                if first:
                    bar.write(f"epoch {done / data.steps_per_epoch:g}: {found}", file=sys.stdout)
                save(log.run.metrics)
            elif checkpoints.is_due(done):
                save()

    trained = processes.whole(model)
    if first:
        weights.save(trained, out / "model.safetensors", overwrite=True)
        table = write_report([*baseline, log.run], out, f"{options.network.model} on {options.data.data}", versions)
        say(f"\n{table}\n\neverything is in {out} ({time.perf_counter() - begin:.0f} s in all)")
    processes.wait_for_all("at the end")  # where none waits long for the others


def write_report(runs: list[Run], out: Path, title: str, versions: str) -> str:
    """Writes report.md and report.png; returns the table that compares the runs, of which the last is the new one."""
    table, phases = report.table(runs), report.phases(runs[-1])
    if skipped := runs[-1].skipped:
        table += f"\n\n{skipped} steps were left out, as their loss or what they would have changed was not finite."
    (out / "report.md").write_text(f"{' '.join(sys.argv)}\n\n{versions}\n\n{table}\n\n{phases}\n")
    report.picture(runs, out / "report.png", f"{title} ({versions})")
    return table


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something is wrong, 130 after Ctrl-C, 75 after SIGTERM."""
    options = parse(argv)
    out = options.run.out

    def work(interrupt: Interrupt) -> None:
        if options.devices.distributed:
            processes.start()
        if options.recovery.resume:
            check_begun(out)
        with only_run_in(out):
            if (out / "log.jsonl").exists() and not options.recovery.resume:
                raise FileExistsError(f"out: {out} holds a run; go on with it with --resume, or choose another folder")
            finetune(options, print if processes.is_first() else _no_one, interrupt)

    return exit_code(work, out, go_on=f"go on with --resume --out {out}")


def _no_one(text: str) -> None:
    """Prints nothing: the first process does."""


if __name__ == "__main__":
    leave(main())
