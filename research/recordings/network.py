"""A network with its train step, compiled once for all learning rates, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from research.recordings.architectures import Architecture
from research.recordings.sets import Arrays
from smartfrz_jax.nnx.hold import hold
from smartfrz_jax.predictor.cka import layer_gram
from smartfrz_jax.predictor.probe import contributions, depths_of
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree
from train.optimizers import OptimizerName, directions

if TYPE_CHECKING:
    from jaxtyping import Array, Float


_EVALUATION_BATCH = 128


class State(NamedTuple):
    """A network in the midst of training; a pytree.

    Attributes:
        params: Its parameters.
        statistics: Those of its BatchNorms.
        streams: Random streams of its dropouts.
        opt_state: The optimizer's state.
    """

    params: PyTree
    statistics: PyTree
    streams: PyTree
    opt_state: PyTree

    @property
    def weights(self) -> dict[str, Any]:
        """Parameters and statistics, by name: what the network computes with."""
        return paths.flatten(self.params) | paths.flatten(self.statistics)

    def with_weights(self, weights: Mapping[str, Any]) -> State:
        """The same with other parameters and statistics."""
        params, statistics = (paths.tree_map(lambda name, _: weights[name], tree) for tree in self[:2])
        return self._replace(params=params, statistics=statistics)


class Figures(NamedTuple):
    """How a network does on held-out examples.

    Attributes:
        loss: Mean cross entropy.
        accuracy: Share classified right.
    """

    loss: float
    accuracy: float


class Network:
    """An architecture with an optimizer, as pure functions of a :class:`State`.

    Args:
        architecture: The architecture.
        num_classes: Width of its head.
        optimizer: ``sgd`` (with momentum 0.9) or ``adamw``.
        fixed_statistics: Whether the BatchNorms use, and keep, the statistics they start with.
        example: A few examples; those on which layers' outputs are compared.

    Attributes:
        layers: The layers.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int,
        optimizer: OptimizerName,
        *,
        fixed_statistics: bool = False,
        example: Arrays,
    ):
        self._make = partial(architecture.make, num_classes=num_classes)
        self._optimizer: OptimizerName = optimizer
        self._fixed_statistics = fixed_statistics
        self._probe = tuple(map(jnp.asarray, example.inputs))
        model = self._new(0)
        self._graphdef = nnx.graphdef(model)
        self.layers = sfj.nnx.find_layers(model, *self._probe)
        if fixed_statistics:  # find_layers looks at the network in training mode
            self._graphdef = nnx.graphdef(self._new(0))
        features = sfj.nnx.features(model, self.layers, *self._probe)
        model.eval()
        self._evaluated = nnx.graphdef(model)
        self._step = jax.jit(self._train_step, static_argnames="frozen")
        self._figures = jax.jit(self._sums)
        self._loss = jax.jit(lambda *args: self._loss_and_rest(*args)[0])
        self._grams = jax.jit(
            lambda params, statistics, streams, *probe: layer_gram(
                features(nnx.merge(self._graphdef, params, statistics, streams), *probe)
            )
        )

    def start(self, seed: int, weights: Mapping[str, Any] | None = None) -> State:
        """The network before the first step, with a fresh head.

        Args:
            seed: Of the initialisation and of dropout.
            weights: Parameters and statistics of such a network, pre-trained; its head may be of another width.
        """
        trees = nnx.split(self._new(seed), nnx.Param, nnx.BatchStat, ...)[1:]
        params, statistics, streams = map(nnx.as_pure, trees)
        state = State(params, statistics, streams, self._transformation(0.0).init(params))
        if weights is None:
            return state
        head = self.layers[-1].params
        return state.with_weights({**weights} | {name: state.weights[name] for name in head})

    def train(
        self,
        state: State,
        rates: Float[np.ndarray, " steps"],
        batches: Callable[[int], Arrays],
        *,
        first_step: int = 0,
        decay: float = 0.0,
        frozen: sfj.Frozen | None = None,
        after_step: Callable[[int, State, Array], object] | None = None,
    ) -> State:
        """Trains for some steps.

        Args:
            state: Where to start.
            rates: The learning rate of each of them.
            batches: Gives the batch of a step.
            first_step: Number of the first of them.
            decay: Weight decay.
            frozen: The layers that do not train; none by default.
            after_step: Called with the number of steps done, the state and the loss.

        Returns:
            The state after them.
        """
        frozen = sfj.Frozen(self.layers) if frozen is None else frozen
        for step, rate in enumerate(rates, start=first_step):
            batch = batches(step)
            state, loss = self._step(state, rate, np.float32(decay), batch.inputs, batch.labels, frozen=frozen)
            if after_step is not None:
                after_step(step + 1, state, loss)
        return state

    def figures(self, state: State, examples: Arrays) -> Figures:
        """Loss and accuracy on examples, in evaluation mode."""
        loss, right = 0.0, 0
        for start in range(0, len(examples), _EVALUATION_BATCH):
            part = examples[start : start + _EVALUATION_BATCH]
            part_loss, part_right = self._figures(*state[:3], part.inputs, part.labels)
            loss, right = loss + float(part_loss), right + int(part_right)
        return Figures(loss / len(examples), right / len(examples))

    def contributions(
        self, state: State, start: State, batches: Sequence[Arrays], n_depths: int
    ) -> Float[np.ndarray, " layers"]:
        """What fronts of the network have contributed since the start; see :mod:`smartfrz_jax.predictor.probe`.

        Args:
            state: The network as it is.
            start: The network before the first step.
            batches: Examples on which to measure, of one size each.
            n_depths: At how many depths.
        """

        def probe(params: PyTree) -> float:
            rest = state.statistics, state.streams
            return float(np.mean([self._loss(params, *rest, batch.inputs, batch.labels) for batch in batches]))

        depths = depths_of(np.ones(len(self.layers), bool), n_depths)
        return contributions(self.layers, probe, state.params, start.params, depths=depths)

    def grams(self, state: State) -> Float[np.ndarray, "layers pairs"]:
        """What is kept of every layer's outputs on the probe; products of two such rows are their linear CKA."""
        return np.asarray(self._grams(*state[:3], *self._probe))

    def _new(self, seed: int) -> nnx.Module:
        model = self._make(rngs=nnx.Rngs(params=seed, dropout=seed + 1))
        model.train()
        for _, module in nnx.iter_modules(model):
            if self._fixed_statistics and isinstance(module, nnx.BatchNorm):
                module.use_running_average = True
        return model

    def _transformation(self, decay: Any) -> optax.GradientTransformation:
        """The optimizer, but for the learning rate."""
        return optax.chain(*directions(self._optimizer, decay))

    def _train_step(
        self, state: State, rate: Any, decay: Any, inputs: tuple[Any, ...], labels: Any, *, frozen: sfj.Frozen
    ) -> tuple[State, Any]:
        def loss_and_rest(params: PyTree) -> tuple[Any, tuple[PyTree, PyTree]]:
            return self._loss_and_rest(params, state.statistics, state.streams, inputs, labels, frozen)

        tx = self._transformation(decay)
        (loss, (statistics, streams)), grads = sfj.value_and_grad(loss_and_rest, frozen, has_aux=True)(state.params)
        # The state of frozen layers stays in its place, as the states before and after a freeze are then of one shape.
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = sfj.apply_updates(state.params, jax.tree.map(lambda leaf: -rate * leaf, updates), frozen)
        return State(params, statistics, streams, opt_state), loss

    def _loss_and_rest(
        self,
        params: PyTree,
        statistics: PyTree,
        streams: PyTree,
        inputs: tuple[Any, ...],
        labels: Any,
        frozen: sfj.Frozen | None = None,
    ) -> tuple[Any, tuple[PyTree, PyTree]]:
        module = nnx.merge(self._graphdef, params, statistics, streams, copy=True)
        with hold(module, sfj.Frozen(self.layers) if frozen is None else frozen):
            logits = module(*inputs)  # pyright: ignore[reportCallIssue]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        _, _, statistics, streams = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
        return loss, (nnx.as_pure(statistics), nnx.as_pure(streams))

    def _sums(
        self, params: PyTree, statistics: PyTree, streams: PyTree, inputs: tuple[Any, ...], labels: Any
    ) -> tuple[Any, Any]:
        logits = nnx.merge(self._evaluated, params, statistics, streams)(*inputs)  # pyright: ignore[reportCallIssue]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()
