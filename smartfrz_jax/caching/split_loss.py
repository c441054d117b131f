"""A loss in two parts: what frozen layers make of the batch before any active layer does, and the rest."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from smartfrz_jax.caching import split, traced_loss
from smartfrz_jax.caching.split import Split
from smartfrz_jax.freezing.transform import Frozen
from smartfrz_jax.jaxprs import example_axis
from smartfrz_jax.pytrees import paths

PyTree = Any


class SplitLoss:
    """A loss in two parts; see :class:`smartfrz_jax.PrefixCache`, which adds a store between them.

    Args:
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        frozen: The frozen set.
        loss_fn: A function of ``(params, *inputs)``.
        *inputs: A batch of at least two examples, or ``jax.ShapeDtypeStruct`` of its shape.
        hold: From a frozen set and the parameters to a context in which its layers run as they do when frozen.
        state_inputs: Positions of inputs that are variables of layers.

    Attributes:
        frozen: The frozen set.

    Raises:
        ValueError: If the first part would not be the same in every epoch, or nothing is worth keeping.
    """

    def __init__(
        self,
        params: PyTree,
        frozen: Frozen,
        loss_fn: Callable[..., Any],
        *inputs: Any,
        hold: Callable[[Frozen, PyTree], contextlib.AbstractContextManager[Any]] | None = None,
        state_inputs: Collection[int] = (),
    ):
        if not inputs:
            raise ValueError("inputs: got none; what depends on the batch is traced, so pass one after the parameters")
        self.frozen = frozen
        self._loss_fn, self._hold, self._state_inputs = loss_fn, hold, frozenset(state_inputs)
        self._inputs = jax.tree.map(_shape, inputs)
        self._examples = example_axis.count(inputs, self._state_inputs)
        self._run = jax.jit(self._activations, static_argnums=0)
        self._split = self._split_for(*self._open(params), inputs)

    @property
    def frontier(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of what is stored for one example."""
        return self._split.frontier

    @property
    def bytes_per_example(self) -> int:
        """Bytes of :attr:`frontier`."""
        return self._split.bytes_per_example

    @property
    def needed(self) -> frozenset[str]:
        """Names of the inputs that :attr:`loss` reads: ``"inputs:0"`` is the first, or part of it.

        In place of the others it takes ``None``.
        """
        return self._split.needed

    @property
    def saved_flops(self) -> float:
        """FLOPs of one example's forward pass that a step with :attr:`loss` does not have."""
        return (self._split.frozen_flops - self._split.repeated_flops) / self._split.examples

    @property
    def build_flops(self) -> float:
        """FLOPs to compute one example's activations."""
        return self._split.frozen_flops / self._split.examples

    def activations(self, params: PyTree, *inputs: Any) -> tuple[jax.Array, ...]:
        """The activations of a batch; jitted.

        Args:
            params: Parameters.
            *inputs: The batch; any number of examples, two at least.

        Returns:
            Arrays of shape ``(examples, ...)``, as in :attr:`frontier`.
        """
        return self._run(*self._open(params), inputs)

    def loss(self, params: PyTree, activations: tuple[jax.Array, ...], *inputs: Any) -> Any:
        """What ``loss_fn(params, *inputs)`` returns, from the activations; to be differentiated.

        Args:
            params: Parameters.
            activations: Activations of the batch, of :meth:`activations` or :meth:`fetch`.
            *inputs: The batch; ``None`` in place of what is not needed.

        Raises:
            ValueError: If the activations are not of this loss, or an input is missing.
        """
        return self._live(*self._open(params), activations, inputs)[0]

    def grown_from(self, old: SplitLoss) -> Grown | None:
        """How to get the activations from those of another split, of a frozen set with fewer layers.

        Args:
            old: The other one.

        Returns:
            A jitted function of ``(params, activations, *inputs)`` that runs only the layers between the two frontiers,
            or None if there is no such: then the activations must be computed from the inputs.
        """
        growth = self._split.grown(old._split)
        if growth is None:
            return None

        @functools.partial(jax.jit, static_argnums=0)
        def grown(key: Any, variables: PyTree, activations: Any, inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
            inputs = self._completed(inputs, activations[0].shape[0])
            growth = self._split_for(key, variables, inputs[0]).grown(old._split_for(key, variables, inputs[0]))
            assert growth is not None
            return growth.run(variables, activations, inputs[1])

        def run(params: PyTree, activations: Any, *inputs: Any) -> tuple[jax.Array, ...]:
            return grown(*self._open(params), activations, inputs)

        return Grown(run, growth.needed)

    def _open(self, params: PyTree) -> tuple[Any, PyTree]:
        """What is static of the parameters, or of the model, and their arrays."""
        return None, params

    def _traceable(self, key: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """The loss of ``(variables, *inputs)`` under the frozen set, and the variables that it changes."""

        def run(variables: PyTree, *inputs: Any) -> tuple[Any, dict[str, Any]]:
            with contextlib.nullcontext() if self._hold is None else self._hold(self.frozen, variables):
                return self._loss_fn(variables, *inputs), {}

        return run

    def _state(self, variables: PyTree, inputs: tuple[Any, ...]) -> Mapping[str, str | None]:
        """Layers of the variables and inputs that are no parameters."""
        state: dict[str, str | None] = {name: layer.name for layer in self.frozen.layers for name in layer.state}
        modules = {_module(param): layer for param, layer in self.frozen.layers.owner.items()}
        for name in paths.flatten(inputs):
            at, *rest = name.split(paths.SEPARATOR)
            if int(at) in self._state_inputs:
                ends = (_module(paths.SEPARATOR.join(rest[start:])) for start in range(len(rest)))
                state[traced_loss.INPUTS + name] = next((modules[end] for end in ends if end in modules), None)
        return state

    def _split_for(self, key: Any, variables: PyTree, inputs: tuple[Any, ...]) -> Split:
        variables, inputs = jax.tree.map(_shape, (variables, inputs))
        traced = traced_loss.trace(self._traceable(key), variables, inputs)
        examples = example_axis.count(inputs, self._state_inputs)
        return split.split(traced, self.frozen, examples, self._state(variables, inputs))

    def _activations(self, key: Any, variables: PyTree, inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        split = self._checked(self._split_for(key, variables, inputs))
        return split.frozen_part(variables, inputs)

    def _live(self, key: Any, variables: PyTree, activations: Any, inputs: tuple[Any, ...]) -> Any:
        got = [tuple(value.shape[1:]) for value in activations]
        if got != [value.shape for value in self.frontier]:
            raise ValueError(
                f"activations: got {got} for an example, expected {[value.shape for value in self.frontier]}; they are "
                "of another frozen set: fetch them from this cache"
            )
        shapes, inputs = self._completed(inputs, activations[0].shape[0])
        split = self._checked(self._split_for(key, variables, shapes))
        return split.live_part(variables, activations, inputs)

    def _checked(self, split: Split) -> Split:
        same = split.digests == self._split.digests or split.examples != self._split.examples
        if split.frontier != self.frontier or not same:
            raise ValueError(
                f"params, inputs: a batch of {split.examples} with this model gives other activations than those that "
                f"are kept ({split.frontier} and {self.frontier} for an example); the model, its mode or the shape of "
                "the inputs has changed: make a new PrefixCache"
            )
        return split

    def _completed(self, inputs: tuple[Any, ...], examples: int) -> tuple[Any, Any]:
        """Shapes of a whole batch of inputs, and the inputs with ``None`` for those that are not there."""
        inputs = (*inputs, *[None] * (len(self._inputs) - len(inputs)))
        given = {name: leaf for name, leaf in paths.flatten(inputs).items() if leaf is not None}

        def complete(name: str, shape: Any) -> Any:
            if name in given:
                return _shape(given[name])
            counts = shape.shape[:1] == (self._examples,)
            return jax.ShapeDtypeStruct((examples, *shape.shape[1:]) if counts else shape.shape, shape.dtype)

        return paths.tree_map(complete, self._inputs), inputs


class Grown:
    """From the activations of fewer frozen layers to those of more: a function of ``(params, activations, *inputs)``.

    Attributes:
        needed: Names of the inputs that it reads, as :attr:`SplitLoss.needed`; the others may be ``None`` or left out.
    """

    def __init__(self, run: Callable[..., tuple[jax.Array, ...]], needed: frozenset[str]):
        self._run, self.needed = run, needed

    def __call__(self, params: PyTree, activations: Any, *inputs: Any) -> tuple[jax.Array, ...]:
        """The activations, of shape ``(examples, ...)``."""
        return self._run(params, activations, *inputs)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _module(name: str) -> str:
    return name.rpartition(paths.SEPARATOR)[0]
