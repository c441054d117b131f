"""A case made ready: data, starting weights, account, and programs that its runs share."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from models import weights
from research.long_runs.activations import Feed
from research.long_runs.cases import Case
from research.long_runs.strategies import Situation, Strategy
from research.recordings.pretraining import published_file
from research.recordings.schedules import learning_rates
from research.recordings.sets import Arrays, Batches, DataSet, open_set
from research.trials.classification import loss_fn
from train.data.metrics import confusion, metrics_of
from train.loop import make_step
from train.optimizers import directions

_PROBE = 128  # examples on which contributions are measured and layers' outputs compared
_HELD_OUT = 0.1  # share of the training examples on which learning rates and policies are chosen: the last ones
_EVALUATION_BATCH = 250
# Bytes for the activations of a frozen set; while they move to the next, both are there. A front that needs more, such
# as the first convolution, goes on without until more is frozen.
_ROOM = 6 * 2**30
_EPOCHS_OF_A_VIEW = 3  # at least, as they are what pays for its activations
_TRAINED = Path(__file__).parent / "weights"  # what cases of results.jsonl came to that others start from


class Bench:
    """A case made ready.

    Args:
        name: Name of the case.
        case: The case.
        state: Folder in which weights of finished runs are.
        data_dir: Data directory of TFDS.
        weights_dir: Folder of published weights.

    Attributes:
        data: Training and test examples.
        layers: The layers of the network.
        account: The cost account of its train step.
    """

    def __init__(self, name: str, case: Case, *, state: Path, data_dir: Path, weights_dir: Path | None):
        self.name, self.case = name, case
        self._state, self._weights_dir = state, weights_dir
        whole = slice(None)
        self.data: DataSet = open_set(case.data, case.architecture, data_dir, 10**7, held_out=whole, tokens=case.tokens)
        probe = self.data.train[np.arange(_PROBE)]
        self._probe, self._probe_labels = tuple(map(jnp.asarray, probe.inputs)), jnp.asarray(probe.labels)
        model = self.model(0)
        self.layers = sfj.nnx.find_layers(model, *self._probe)
        self._features = sfj.nnx.features(model, self.layers, *self._probe)
        first = self.data.train[np.arange(case.batch_size)]
        tx = self._optimizer(Strategy(lambda s: sfj.policies.never()), 1, case.rates[0])
        self.account = sfj.nnx.account(model, self.layers, loss_fn, first.inputs, first.labels, tx=tx)
        self.metrics = metrics_of(case.data)

    def config(self) -> dict[str, Any]:
        """What rows of results say of the case."""
        names = ("data", "weights", "batch_size", "optimizer", "weight_decay", "augment", "tokens")
        config = {"size": self.case.architecture.size} | {name: getattr(self.case, name) for name in names}
        return config if (own := self._trained_here()) is None else config | {"start": zlib.crc32(own.read_bytes())}

    def _trained_here(self) -> Path | None:
        """The weights that it starts from, if another case has trained them."""
        if self.case.weights in (None, "published"):
            return None
        own = self._state / f"{self.case.weights}-never-0.safetensors"
        return own if own.exists() else _TRAINED / f"{self.case.weights}.safetensors"

    def model(self, seed: int) -> nnx.Module:
        """The network before the first step, with a fresh head, in training mode."""
        case = self.case
        rngs = nnx.Rngs(params=seed, dropout=seed + 1)
        model = case.architecture.make(num_classes=self.data.num_classes, rngs=rngs)
        if case.weights == "published":
            weights.load(model, published_file(case.architecture, self._weights_dir), new_head=True)
        elif (own := self._trained_here()) is not None:
            weights.load(model, own, new_head=True)
        model.train()
        return model

    def training_set(self, *, tuning: bool) -> Arrays:
        """The examples to train on: all but those held out where something is chosen."""
        return self._divided()[0] if tuning else self.data.train

    def held_out(self, *, tuning: bool) -> Arrays:
        """The examples to judge by: the test set, or training examples where something is chosen."""
        return self._divided()[1] if tuning else self.data.held_out

    def _divided(self) -> tuple[Arrays, Arrays]:
        """The training examples but for those held out, and these: the last ones."""
        kept = len(self.data.train) - round(_HELD_OUT * len(self.data.train))
        return self.data.train[:kept], self.data.train[kept:]

    def epochs_to_steps(self, epochs: float, *, tuning: bool) -> tuple[int, int]:
        """Train steps of a run, and of an epoch."""
        epoch = len(self.training_set(tuning=tuning)) // self.case.batch_size
        return round(epochs * epoch), epoch

    @functools.cached_property
    def costs(self) -> dict[str, float]:
        """Forward FLOPs of every layer."""
        return self.account.flops().forward_by_layer

    def situation(self, seed: int, steps: int, epoch: int, reference: Path | None) -> Situation:
        """What the policies of a run can be made from.

        Args:
            seed: Seed of the run.
            steps: Its steps.
            epoch: Steps of an epoch.
            reference: Weights of a network trained to the end, from another seed.
        """
        model, outputs = self.model(seed), None
        probe = sfj.nnx.probe(model, loss_fn, self._probe, self._probe_labels)
        if reference is not None:
            known = self.model(seed)
            weights.load(known, reference)
            outputs = self.features(known)

        def before() -> dict[str, jax.Array]:
            return self.features(self.model(seed))

        return Situation(steps, epoch, self.costs, before, probe, outputs, seed)

    def features(self, model: nnx.Module) -> dict[str, jax.Array]:
        """Outputs of every layer on the probe batch."""
        return self._features(model, *self._probe)

    def feed(self, strategy: Strategy, seed: int, *, tuning: bool) -> Feed:
        """What the steps of a run are called with."""
        examples = self.training_set(tuning=tuning)
        case = self.case
        batches = Batches(examples, case.batch_size, seed, case.augment, shift=case.architecture.size // 8)
        return Feed(batches, len(examples) // case.batch_size, self._views(strategy))

    def _views(self, strategy: Strategy) -> int:
        most = max(1, round(self.case.epochs) // _EPOCHS_OF_A_VIEW) if self.case.augment else 1
        return min(strategy.views, most)

    def step(
        self, strategy: Strategy, steps: int, rate: float
    ) -> tuple[optax.GradientTransformation, sfj.TrainStep | sfj.nnx.CachedStep]:
        """An optimizer and a compiled train step; it takes what :meth:`feed` gives."""
        tx, views = self._optimizer(strategy, steps, rate), self._views(strategy)
        if not views:
            return tx, sfj.TrainStep(make_step(loss_fn), account=self.account)
        return tx, sfj.nnx.CachedStep(
            make_step,
            loss_fn,
            examples=len(self.training_set(tuning=False)),
            storage=sfj.caching.Storage("host", budget=_ROOM),
            views=views,
            account=self.account,
            total_steps=steps,
        )

    def _optimizer(self, strategy: Strategy, steps: int, rate: float) -> optax.GradientTransformation:
        case = self.case
        if strategy.freezeout is not None:
            schedules = sfj.policies.freezeout_schedules(
                self.layers, learning_rate=rate, total_steps=steps, t0=strategy.freezeout
            )
            scaled = sfj.policies.scale_by_layer_schedule(self.layers, schedules)
        else:
            values = jnp.asarray(learning_rates("cosine", rate, steps))
            scaled = optax.scale_by_learning_rate(lambda count: values[jnp.minimum(count, steps - 1)])
        return optax.chain(*directions(case.optimizer, case.weight_decay), scaled)

    def evaluate(self, model: nnx.Module, examples: Arrays) -> dict[str, float]:
        """Loss and figures of a network on examples, each counted once."""
        evaluated = nnx.merge(*nnx.split(model))  # shares the arrays, not the mode
        evaluated.eval()
        counts, losses = np.zeros((self.data.num_classes,) * 2, np.int64), []
        for start in range(0, len(examples), _EVALUATION_BATCH):
            part = examples[np.arange(start, min(start + _EVALUATION_BATCH, len(examples)))]
            some, loss = _judge(evaluated, part.inputs, jnp.asarray(part.labels))
            counts += np.asarray(some)
            losses.append(np.asarray(loss))
        return {"loss": float(np.concatenate(losses).mean())} | {n: float(f(counts)) for n, f in self.metrics.items()}


@nnx.jit
def _judge(model: Callable[..., jax.Array], inputs: Any, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model(*inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return confusion(logits, labels, jnp.ones(len(labels))), losses
