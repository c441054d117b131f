"""One recording: a reference run, the run itself, and what freezing would have cost it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import smartfrz_jax as sfj
from research.recordings.architectures import ARCHITECTURES
from research.recordings.network import Figures, Network, State
from research.recordings.plan import Run
from research.recordings.pretraining import starting_weights
from research.recordings.schedules import learning_rates
from research.recordings.seconds import Seconds
from research.recordings.sets import Batches, DataSet, open_set
from smartfrz_jax.learning.harm import branch_harm, swap_harm
from smartfrz_jax.learning.recording import Recording

_PROBE = 64  # examples on which layers' outputs are compared
# The last ones of a split, as strategies are compared on its first; many, as harm is a small difference.
_HELD_OUT, _HELD_OUT_SLOW = 2048, 512
_RECORDS = 120
_PROBES, _PROBED = 2, 128  # batches of training examples on which contributions are measured, and their size
# Shares of the run; often early, where decisions are hard.
_CONTRIBUTION_MOMENTS = (0.042, 0.083, 0.125, 0.167, 0.21, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75, 0.9)
_CONTRIBUTION_DEPTHS = 8
_SWAP_MOMENTS = tuple(i / 10 for i in range(10))  # shares of the run; at its end there is no harm
_BRANCH_MOMENTS = (0.0, 0.25, 0.5, 0.75)
_TRUE_MOMENTS = (0.0, 0.25, 0.5)
# How long a branch lasts: a share of what is left of the run, and at least one of the whole. Branches much shorter than
# that find that a front of random weights does no harm, as in their time it would not have learned anything either.
_BRANCH_OF_REST, _BRANCH_OF_RUN = 1 / 3, 0.1
_BRANCH_ORDERS = (0, 500)  # added to the seed of the batches; harm is the mean over them
_SWAP_PART = 4  # the quotient of all held-out examples and those of a swap, which is measured often
_SWAP_DEPTHS, _BRANCH_DEPTHS = 8, 4  # evenly from front to back; the last is all but the head


class Setting:
    """What a run, its reference and its branches have in common.

    Args:
        run: The run.
        network: Its network.
        data: Its data.
        weights: What it starts from; ``None`` from scratch.
    """

    def __init__(self, run: Run, network: Network, data: DataSet, weights: dict[str, Any] | None):
        self.run, self.network, self.data, self.weights = run, network, data, weights
        self.record_every = max(1, run.steps // _RECORDS)
        self.steps = np.arange(self.record_every, run.steps + 1, self.record_every)
        warmup = 0 if ARCHITECTURES[run.architecture].batch_norm else run.steps // 20
        self.rates = learning_rates(run.schedule, run.learning_rate, run.steps, warmup=warmup)

    def start(self, seed: int) -> State:
        """The network before the first step."""
        return self.network.start(seed, self.weights)

    def train(self, state: State, rates: np.ndarray, *, seed: int, first_step: int = 0, **options: Any) -> State:
        """Trains for as many steps as there are rates, on the batches that the seed gives these steps."""
        batches = Batches(self.data.train, self.run.batch_size, seed, self.run.augment)
        return self.network.train(state, rates, batches, first_step=first_step, decay=self.run.weight_decay, **options)

    def held_out(self, state: State) -> Figures:
        """Loss and accuracy on held-out examples."""
        return self.network.figures(state, self.data.held_out)

    def moments(self, shares: Iterable[float]) -> list[int]:
        """Steps done at the records nearest to some shares of the run; none is as near as the first."""
        return [int(self.steps[np.argmin(np.abs(self.steps - share * self.run.steps))]) for share in shares]

    def depths(self, n: int) -> list[str]:
        """Names of the layers that end the fronts to be frozen: evenly from front to back, last all but the head."""
        names = self.network.layers.names
        return [names[end - 1] for end in sorted({max(1, round((len(names) - 1) * i / n)) for i in range(1, n + 1)})]


class Trained(NamedTuple):
    """What was recorded of a run.

    Attributes:
        start: Tailored weights before the first step.
        weights: The same at each record.
        losses: Mean training loss since the record before.
        contribution: What fronts had contributed, NaN where not measured.
        grams: Layers' outputs at each record, as :meth:`Network.grams` gives them.
        snapshots: States at the moments at which harm is measured, on the host, by steps done.
        end: The last state.
    """

    start: np.ndarray
    weights: np.ndarray
    losses: np.ndarray
    contribution: np.ndarray
    grams: np.ndarray
    snapshots: dict[int, State]
    end: State


def record(
    run: Run,
    out: Path,
    data_dir: Path,
    weights_dir: Path | None,
    say: Callable[[str], object],
    *,
    size: int = 1024,
    harm: bool = True,
) -> Recording:
    """Makes one recording.

    Args:
        run: The run.
        out: Folder of the training set, where pre-trained weights are kept.
        data_dir: Data directory of TFDS.
        weights_dir: Folder of published weights.
        say: Prints.
        size: Weights to sample of every layer.
        harm: Whether to measure, besides CKA, what freezing costs and what layers have contributed.

    Raises:
        FileNotFoundError: If data or weights are not there.
        FloatingPointError: If the training diverges.
    """
    seconds = Seconds()
    with seconds.compiling():
        with seconds.of("preparing"):
            setting = prepare(run, out, data_dir, weights_dir, say)
        with seconds.of("training"):
            reference = setting.train(setting.start(run.seed + 1), setting.rates, seed=run.seed + 1)
            reference_grams = setting.network.grams(reference)
            trained = _train(setting, size, measured=harm)
        with seconds.of("swap"):
            swap = _swap_harm(setting, trained) if harm else None
        with seconds.of("branches"):
            branch = branches(setting, trained.snapshots, run.seed) if harm else None
        with seconds.of("true harm"):
            true_harm = _true_harm(setting, trained) if harm and run.true_harm else None
    held_out, train = setting.held_out(trained.end), setting.network.figures(trained.end, setting.data.train[:1000])
    return Recording(
        layers=setting.network.layers.names,
        steps=setting.steps,
        record_every=setting.record_every,
        total_steps=run.steps,
        weights=trained.weights,
        start=trained.start,
        losses=trained.losses,
        first_loss=float(trained.losses[0]),
        cka=_cka(trained.grams, reference_grams),
        own_cka=_cka(trained.grams, trained.grams[-1]),
        swap_harm=swap,
        branch_harm=branch,
        contribution=trained.contribution if harm else None,
        metadata={
            **dataclasses.asdict(run),
            "name": run.name,
            "seed": run.seed,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.end.params)),
            "train": train._asdict(),
            "held_out": held_out._asdict(),
            "reference_held_out": setting.held_out(reference)._asdict(),
            "true_harm": true_harm,
            "seconds": dict(seconds),
            "jax": jax.__version__,
        },
    )


def prepare(run: Run, out: Path, data_dir: Path, weights_dir: Path | None, say: Callable[[str], object]) -> Setting:
    """Opens the data of a run and makes its network; the arguments are those of :func:`record`.

    Raises:
        FileNotFoundError: If data or weights are not there.
    """
    architecture = ARCHITECTURES[run.architecture]
    held_out = slice(-(_HELD_OUT_SLOW if architecture.published else _HELD_OUT), None)
    data = open_set(run.data, architecture, data_dir, run.examples, held_out=held_out)
    fixed, probe = run.batch_norm == "fixed", data.held_out[:_PROBE]
    network = Network(architecture, data.num_classes, run.optimizer, fixed_statistics=fixed, example=probe)
    return Setting(run, network, data, starting_weights(run, network, out, data_dir, weights_dir, say))


def _train(setting: Setting, size: int, *, measured: bool) -> Trained:
    """The run; without ``measured`` no contributions, and no snapshots to measure harm from."""
    run, network = setting.run, setting.network
    state = setting.start(run.seed)
    tailoring = sfj.predictor.Tailoring.create(network.layers, state.params, size=size)
    start = np.asarray(tailoring(state.params))
    kept = set(setting.moments((*_SWAP_MOMENTS, *_BRANCH_MOMENTS, *_TRUE_MOMENTS)) if measured else ())
    losses: list[Any] = []
    weights, means, grams, snapshots = [], [], [], {}
    contribution = np.full((len(setting.steps), len(network.layers)), np.nan, np.float32)
    probed, begin = set(setting.moments(_CONTRIBUTION_MOMENTS) if measured else ()), jax.device_get(state)
    part = min(_PROBED, len(setting.data.train) // _PROBES)
    probes = [setting.data.train[i * part : (i + 1) * part] for i in range(_PROBES)]

    def after_step(step: int, state: State, loss: Any) -> None:
        losses.append(loss)
        if step % setting.record_every:
            return
        means.append(np.mean(losses))
        losses.clear()
        if not np.isfinite(means[-1]):
            raise FloatingPointError(f"the loss of {run.name} is {means[-1]} at step {step}; lower its learning rate")
        weights.append(np.asarray(tailoring(state.params)))
        grams.append(network.grams(state))
        if step in probed:
            contribution[len(means) - 1] = network.contributions(state, begin, probes, _CONTRIBUTION_DEPTHS)
        if step in kept:
            snapshots[step] = jax.device_get(state)

    end = setting.train(state, setting.rates, seed=run.seed, after_step=after_step)
    return Trained(start, np.stack(weights), np.array(means, np.float32), contribution, np.stack(grams), snapshots, end)


def _cka(grams: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.clip(np.sum(grams * other, axis=-1, dtype=np.float64), 0, 1)


def _swap_harm(setting: Setting, trained: Trained) -> np.ndarray:
    coarser = 2 if ARCHITECTURES[setting.run.architecture].published else 1
    held_out = setting.data.held_out[: max(1, len(setting.data.held_out) // _SWAP_PART)]
    return swap_harm(
        setting.network.layers,
        setting.steps,
        {step: trained.snapshots[step].weights for step in setting.moments(_SWAP_MOMENTS[::coarser])},
        trained.end.weights,
        lambda weights: setting.network.figures(trained.end.with_weights(weights), held_out).loss,
        depths=setting.depths(_SWAP_DEPTHS // coarser),
    )


def branches(setting: Setting, snapshots: Mapping[int, State], seed: int) -> np.ndarray:
    """Harm of freezing, measured in branches; in these the learning rate falls from where it is to zero.

    It is the mean over two orders of the batches: what a branch comes to depends on them.

    Args:
        setting: The run.
        snapshots: Its states, by steps done; of these, those at :func:`branch_moments` are used.
        seed: Of the batches; with that of the run, half of the branches go on with those that the run would have had
            next.

    Returns:
        As :func:`smartfrz_jax.learning.harm.branch_harm` gives it.
    """

    def branch(step: int, frozen: sfj.Frozen, order: int) -> float:
        total = setting.run.steps
        length = max(1, round(_BRANCH_OF_RUN * total), round(_BRANCH_OF_REST * (total - step)))
        highest = setting.rates[step : step + length].max()  # in the warm-up: that which it comes to
        rates = learning_rates("linear", highest, length)
        state = setting.train(snapshots[step], rates, seed=seed + order, first_step=step, frozen=frozen)
        return setting.held_out(state).loss

    return branch_harm(
        setting.network.layers, setting.steps, {step: step for step in branch_moments(setting)},
        lambda step, frozen: float(np.mean([branch(step, frozen, order) for order in _BRANCH_ORDERS])),
        depths=setting.depths(_BRANCH_DEPTHS),
    )  # fmt: skip


def branch_moments(setting: Setting) -> list[int]:
    """Steps done when branches begin."""
    return setting.moments(_BRANCH_MOMENTS)


def _true_harm(setting: Setting, trained: Trained) -> list[dict[str, Any]]:
    """What the run comes to if its front is frozen from some moment to the end; for each, the difference."""
    without, names, table = setting.held_out(trained.end), setting.network.layers.names, []
    for step in setting.moments(_TRUE_MOMENTS):
        for depth in setting.depths(_BRANCH_DEPTHS):
            front = names[: names.index(depth) + 1]
            state = setting.train(
                trained.snapshots[step], setting.rates[step:], seed=setting.run.seed, first_step=step,
                frozen=sfj.Frozen(setting.network.layers, frozenset(front)),
            )  # fmt: skip
            figures = setting.held_out(state)
            table.append(
                {
                    "step": step,
                    "layer": depth,
                    "layers": len(front),
                    "loss": figures.loss - without.loss,
                    "accuracy": figures.accuracy - without.accuracy,
                }
            )
    return table
