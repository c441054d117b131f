"""One run of a strategy on a case."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from research.recordings.architectures import ARCHITECTURES
from research.recordings.network import Network
from research.recordings.pretraining import starting_weights
from research.recordings.schedules import learning_rates
from research.recordings.sets import Arrays, Batches, open_set
from research.trials.cases import Case
from research.trials.classification import loss_fn, losses_on
from research.trials.result import Result
from research.trials.strategies import Situation, Strategy
from smartfrz_jax.pytrees import paths
from train.log import Log, Run
from train.loop import Loop, make_step
from train.optimizers import directions

# Examples on which layers' outputs are compared, and contributions measured; as in recordings.
_PROBE = 128
_HELD_OUT_OF_REHEARSALS, _AT_MOST = 256, 0.2  # training examples, and at most this share of them
MIN_SAVING = 0.05
_REFERENCE_SEED = 1000


class _Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function, self.calls = function, 0

    def __call__(self, argument: Any) -> Any:
        self.calls += 1
        return self._function(argument)


class Bench:
    """A case made ready: data, starting weights, account, and programs that its runs share.

    Args:
        name: Name of the case.
        case: The case.
        out: Folder in which pre-trained weights are kept.
        data_dir: Data directory of TFDS.
        weights_dir: Folder of published weights.
        say: Prints.
    """

    def __init__(
        self,
        name: str,
        case: Case,
        *,
        out: Path,
        data_dir: Path,
        weights_dir: Path | None,
        say: Callable[[str], object],
    ):
        setup = case.setup
        self.name, self.setup = name, setup
        architecture = ARCHITECTURES[setup.architecture]
        self.data = open_set(setup.data, architecture, data_dir, setup.examples, held_out=slice(case.held_out))
        self._make = architecture.make
        network = Network(architecture, self.data.num_classes, setup.optimizer, example=self.data.train[np.arange(2)])
        self._weights = starting_weights(setup, network, out, data_dir, weights_dir, say) or {}
        self._head = set(network.layers[-1].params)
        probe = self.data.train[:_PROBE]
        self._probe, self._probe_labels = tuple(map(jnp.asarray, probe.inputs)), probe.labels
        model = self.model(0)
        self.layers = sfj.nnx.find_layers(model, *self._probe)
        self._features = sfj.nnx.features(model, self.layers, *self._probe)
        self._steps: dict[tuple[bool, float, float], tuple[optax.GradientTransformation, sfj.TrainStep]] = {}
        first = self.data.train[np.arange(setup.batch_size)]
        self.account = sfj.nnx.account(
            model, self.layers, loss_fn, first.inputs, first.labels, tx=self._optimizer(Strategy(_never))
        )
        self._reference: Mapping[str, jax.Array] | None = None

    def model(self, seed: int) -> nnx.Module:
        """The network before the first step, with a fresh head, in training mode."""
        model = self._make(num_classes=self.data.num_classes, rngs=nnx.Rngs(params=seed, dropout=seed + 1))
        variables = nnx.as_pure(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        head = self._head
        nnx.update(
            model,
            paths.tree_map(lambda name, leaf: leaf if name in head else self._weights.get(name, leaf), variables),
        )
        model.train()
        for _, module in nnx.iter_modules(model):
            if self.setup.batch_norm == "fixed" and isinstance(module, nnx.BatchNorm):
                module.use_running_average = True
        return model

    def steps(self, strategy: Strategy) -> int:
        """Train steps of a strategy."""
        return round(self.setup.steps * strategy.length)

    def optimizer(self, model: nnx.Module, strategy: Strategy) -> sfj.nnx.Optimizer:
        """The optimizer of a strategy before the first step."""
        return sfj.nnx.Optimizer(model, self._step(strategy)[0], wrt=nnx.Param, layers=self.layers)

    def batches(self, examples: Arrays, seed: int, strategy: Strategy) -> Iterator[tuple[Any, ...]]:
        """Inputs and labels of every step of a strategy."""
        batches = Batches(examples, self.setup.batch_size, seed, self.setup.augment)
        for step in range(self.steps(strategy)):
            batch = batches(step)
            yield batch.inputs, batch.labels

    def trial(self, name: str, strategy: Strategy, seed: int, *, predictor: Path | None) -> Result:
        """Runs a strategy.

        Args:
            name: Its name.
            strategy: The strategy.
            seed: Seed of the head, the order of examples and the policy.
            predictor: Checkpoint of the predictor that the strategy needs, which has not seen the network.

        Raises:
            FloatingPointError: If the training diverges.
        """
        total_steps = self.steps(strategy)
        model = self.model(seed)
        probe = _Counted(sfj.nnx.probe(model, loss_fn, self._probe, jnp.asarray(self._probe_labels)))
        situation = Situation(total_steps, self.costs(), self.reference, predictor, probe, seed)
        policy = strategy.policy(situation)
        log, looked = self._train(name, strategy, policy, model, seed, self.data.train)
        losses, right = losses_on(model, self.data.held_out)
        frozen = [(event.step, list(event.names)) for event in log.freezes]
        compute, cached = self.compute(frozen, total_steps)
        probing = (probe.calls + looked) * self.forward_share(len(self._probe_labels))
        return Result(
            self.name,
            name,
            seed,
            float(right.mean()),
            float(losses.mean()),
            compute + probing,
            cached + probing,
            log.seconds + log.wait_seconds - log.programs[0].waited,
            log.seconds - log.policy_seconds,
            frozen,
        )

    def rehearse(
        self, strategies: Mapping[str, Strategy], share: float, seed: int
    ) -> tuple[sfj.policies.Rehearsal, float]:
        """Tries strategies in a share of the full run's steps, on the training examples alone.

        The last of these are held out, so that the examples on which full runs are measured have no part in the choice.

        Args:
            strategies: Strategies of full length that need no predictor; those that save most come last.
            share: Steps of the rehearsal, as a share of those of the full run.
            seed: Seed of the head and the order of examples.

        Returns:
            The rehearsal, and the FLOPs of all of it, evaluation included, as a share of those of the full run.
        """
        short, compute = Strategy(_never, length=share), 0.0
        examples = len(self.data.train)
        kept = examples - min(_HELD_OUT_OF_REHEARSALS, int(_AT_MOST * examples))
        train_on, held_out = self.data.train[:kept], self.data.train[kept:]

        def train(policy: sfj.Policy, steps: int) -> np.ndarray:
            nonlocal compute
            model = self.model(seed)
            if steps:
                log, looked = self._train("rehearsal", short, policy, model, seed, train_on)
                compute += looked * self.forward_share(len(self._probe_labels))
                compute += self.compute([(event.step, list(event.names)) for event in log.freezes], steps)[0]
            compute += self.forward_share(len(held_out))
            return losses_on(model, held_out)[0]

        def policy(strategy: Strategy, steps: int) -> sfj.Policy:
            return strategy.policy(Situation(steps, self.costs(), self.reference, None, None, seed))

        makers = {name: functools.partial(policy, strategy) for name, strategy in strategies.items()}
        return sfj.rehearse(train, makers, steps=self.steps(short)), compute

    def costs(self) -> dict[str, float]:
        """Forward FLOPs of every layer."""
        return self.account.flops().forward_by_layer

    def compute(self, frozen: list[tuple[int, list[str]]], total_steps: int) -> tuple[float, float]:
        """FLOPs of a run as a share of the full run's: as it is, and with the frozen front's activations kept.

        With augmentation both are the same: an example is another one in each epoch.
        """
        epoch = self.setup.examples // self.setup.batch_size
        forward = self.costs()
        full = self.account.flops().total * self.setup.steps
        total, kept, since = 0.0, 0.0, 0
        names: frozenset[str] = frozenset()
        in_front: dict[str, int] = {}
        for until, more in [*frozen, (total_steps, [])]:
            total += (until - since) * self.account.flops(sfj.Frozen(self.layers, names)).total
            # In the first epoch after a layer joined the frozen front, its activations are computed once more.
            kept += sum(forward[name] * max(0, until - max(since, start + epoch)) for name, start in in_front.items())
            since, names = until, names | frozenset(more)
            for name in self.layers.names:
                if name not in names:
                    break
                in_front.setdefault(name, until)
        return total / full, (total - (0.0 if self.setup.augment else kept)) / full

    def forward_share(self, examples: int) -> float:
        """FLOPs of a forward pass on so many examples as a share of those of the full run."""
        forward = sum(parts.forward for parts in self.account.flops().by_layer.values())
        return forward * examples / self.setup.batch_size / (self.account.flops().total * self.setup.steps)

    def reference(self) -> Mapping[str, jax.Array]:
        """Outputs of a network that was trained to the end, from another seed."""
        if self._reference is None:
            model = self.model(_REFERENCE_SEED)
            self._train("reference", Strategy(_never), sfj.policies.never(), model, _REFERENCE_SEED, self.data.train)
            self._reference = self._features(model, *self._probe)
        return self._reference

    def _train(
        self, name: str, strategy: Strategy, policy: sfj.Policy, model: nnx.Module, seed: int, examples: Arrays
    ) -> tuple[Run, int]:
        """The run, and how often the policy looked at layers' outputs on the probe batch."""
        features = _Counted(lambda model: self._features(model, *self._probe))
        _, step = self._step(strategy)
        optimizer = self.optimizer(model, strategy)
        freezer = sfj.nnx.Freezer(
            model,
            optimizer,
            policy,
            features=features,
            train_step=step,
            min_saving=MIN_SAVING,
        )
        log_run = Run(name, self.layers.names, dataclasses.asdict(self.setup) | {"seed": seed})
        with tempfile.TemporaryDirectory() as folder, Log(Path(folder) / "log.jsonl", log_run) as log:
            for _ in Loop(log, freezer, step).run(self.batches(examples, seed, strategy)):
                pass
        return log.run, features.calls

    def _step(self, strategy: Strategy) -> tuple[optax.GradientTransformation, sfj.TrainStep]:
        # One optimizer for all runs of a kind: another object would be another program.
        kind = strategy.freezeout, strategy.length, strategy.rate
        if kind not in self._steps:
            self._steps[kind] = self._optimizer(strategy), sfj.TrainStep(make_step(loss_fn), account=self.account)
        return self._steps[kind]

    def _optimizer(self, strategy: Strategy) -> optax.GradientTransformation:
        setup, steps = self.setup, self.steps(strategy)
        peak = setup.learning_rate * strategy.rate
        if strategy.freezeout:
            schedules = sfj.policies.freezeout_schedules(self.layers, learning_rate=peak, total_steps=steps)
            rate = sfj.policies.scale_by_layer_schedule(self.layers, schedules)
        else:
            values = jnp.asarray(learning_rates(setup.schedule, peak, steps))
            rate = optax.scale_by_learning_rate(lambda count: values[jnp.minimum(count, steps - 1)])
        return optax.chain(*directions(setup.optimizer, setup.weight_decay), rate)


def _never(situation: Situation) -> sfj.Policy:
    return sfj.policies.never()
