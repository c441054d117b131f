"""The forward pass of frozen layers, run once for every example instead of once for every epoch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import DTypeLike

from smartfrz_jax import example_axis, paths, prefix
from smartfrz_jax.activation_cache import ActivationCache, Place
from smartfrz_jax.freezing import Frozen
from smartfrz_jax.prefix import Split

if TYPE_CHECKING:
    from jaxtyping import Int

PyTree = Any


class PrefixCache:
    """Activations at the end of the frozen layers that work on the batch before any active layer does.

    The loss is split in two: :meth:`activations` is what depends on frozen layers and the batch alone, :attr:`loss` is
    the rest, with the same value and gradients. Since an example's activations are the same in every epoch, they are
    kept, and a step with :attr:`loss` computes no more than what trains::

        cache = PrefixCache(loss_fn, frozen, params, images, labels)
        cache.keep(len(data), place="host")
        for indices, images, labels in batches:
            activations = cache.fetch(params, indices, images, labels)
            loss, grads = smartfrz_jax.value_and_grad(cache.loss, frozen)(params, activations, None, labels)

    In a jitted step make the cache a static argument. What is kept is of one frozen set: when that changes, go on with
    :meth:`follow`. Parameters of frozen layers must not change otherwise.

    Inputs of which the first axis is as long as that of the first input count examples; others may change from step to
    step, and nothing that depends on them is kept. The part that trains is given the inputs that it reads, as before
    (:attr:`needed`); only what is computed from them by frozen layers is stored. What it needs and is cheap to compute
    again from what is stored, or from inputs, is computed again, if fewer bytes are stored for it.

    Args:
        loss_fn: A function of ``(params, *inputs)`` to a scalar, or to anything else that a step needs, such as
            ``(loss, aux)``.
        frozen: The frozen set.
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        *inputs: A batch of at least two examples, or ``jax.ShapeDtypeStruct`` of its shape.
        hold: From a frozen set and the parameters to a context in which its layers run as they do when frozen: in
            Linen, ``smartfrz_jax.linen.hold``.
        state_inputs: Positions of inputs that are variables of layers, such as the ``batch_stats`` of a Linen module.
        augmented: Whether an example looks different in each epoch.
        views: Number of augmented views of each example that there are; 1 if there is no augmentation.

    Attributes:
        frozen: The frozen set.
        views: Number of views of each example.
        store: The activations that are kept, if :meth:`keep` was called.

    Raises:
        ValueError: If keeping activations would change results (examples that depend on each other, as in a BatchNorm
            in training mode; random numbers; changing inputs or variables; augmentation), or nothing is worth it.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 2))}
        >>> def loss_fn(params, x, y):
        ...     return ((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2).mean()
        >>> x, y = jnp.ones((16, 8)), jnp.ones((16, 2))
        >>> layers = find_layers(params, loss_fn, x, y)
        >>> cache = PrefixCache(loss_fn, Frozen(layers, frozenset({"a"})), params, x, y)
        >>> cache.bytes_per_example, cache.needed
        (16, frozenset({'inputs:1'}))
        >>> bool(cache.loss(params, cache.activations(params, x, y), None, y) == loss_fn(params, x, y))
        True
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        frozen: Frozen,
        params: PyTree,
        *inputs: Any,
        hold: Callable[[Frozen, PyTree], contextlib.AbstractContextManager[Any]] | None = None,
        state_inputs: Collection[int] = (),
        augmented: bool = False,
        views: int = 1,
    ):
        if not inputs:
            raise ValueError("inputs: got none; what depends on the batch is traced, so pass one after the parameters")
        if augmented and views == 1:
            raise ValueError(
                "augmented: an example looks different in every epoch, so its activations are never the same; let the "
                "loader draw from a fixed number of augmented views of each example and pass that number (views), or "
                "augment nothing"
            )
        self.frozen, self.views = frozen, views
        self.store: ActivationCache | None = None
        self._loss_fn, self._hold, self._state_inputs = loss_fn, hold, frozenset(state_inputs)
        self._inputs = jax.tree.map(_shape, inputs)
        self._examples = example_axis.count(inputs, self._state_inputs)
        self._source: tuple[ActivationCache, Callable[..., Any]] | None = None
        self._kept: dict[str, Any] = {}
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

    def keep(
        self,
        examples: int,
        *,
        place: Place | str = "device",
        dtype: DTypeLike | None = None,
        budget: int | None = None,
    ) -> ActivationCache:
        """Makes room for the activations of a data set; see :class:`~smartfrz_jax.activation_cache.ActivationCache`.

        Args:
            examples: Number of examples in the data set.
            place: ``"device"``, ``"host"``, or a directory.
            dtype: Type to store them in, ``"bfloat16"`` for instance; their own by default.
            budget: Most bytes to use; what is free by default.

        Returns:
            The store, which is also :attr:`store`.

        Raises:
            ValueError: If they would not fit.
        """
        self._kept = {"examples": examples, "place": place, "dtype": dtype, "budget": budget}
        self.store = ActivationCache(self.frontier, views=self.views, **self._kept)
        return self.store

    def fetch(
        self, params: PyTree, indices: Int[np.ndarray, " n"], *inputs: Any, view: int = 0
    ) -> tuple[jax.Array, ...]:
        """The activations of a batch, looked up if they are all there, else computed and kept.

        Args:
            params: Parameters.
            indices: Which examples of the data set they are; on the host.
            *inputs: The batch; once everything is stored, ``None`` in place of what is not needed.
            view: Which view of the examples the batch is.

        Returns:
            Arrays of shape ``(n, ...)``, as in :attr:`frontier`, in the dtype in which they are kept.

        Raises:
            ValueError: If :meth:`keep` was not called, or an index is wrong.
        """
        if self.store is None:
            raise ValueError("store: there is none; call keep with the number of examples in the data set first")
        if not self.store.has(indices, view):
            if self._source is not None and self._source[0].has(indices, view):
                source, run = self._source
                activations = run(params, source.take(indices, view), *inputs)
            else:
                activations = self.activations(params, *inputs)
            self.store.put(indices, activations, view)
            if self.store.is_complete:
                self._source = None
        return self.store.take(indices, view)

    def grown_from(self, old: PrefixCache) -> Callable[..., tuple[jax.Array, ...]] | None:
        """How to get the activations from those of another cache, of a frozen set with fewer layers.

        Args:
            old: The other cache.

        Returns:
            A jitted function of ``(params, activations, *inputs)`` that runs only the layers between the two frontiers,
            or None if there is no such: then the activations must be computed from the inputs.
        """
        if self._split.grown(old._split) is None:
            return None

        @functools.partial(jax.jit, static_argnums=0)
        def grown(key: Any, variables: PyTree, activations: Any, inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
            inputs = self._completed(inputs, activations[0].shape[0])
            run = self._split_for(key, variables, inputs[0]).grown(old._split_for(key, variables, inputs[0]))
            assert run is not None
            return run(variables, activations, inputs[1])

        return lambda params, activations, *inputs: grown(*self._open(params), activations, inputs)

    def follow(self, params: PyTree, frozen: Frozen, *, place: Place | str | None = None) -> PrefixCache:
        """The cache for another frozen set.

        If that has more layers, what is stored is the input for what will be, as it is fetched, and is released when
        all has been; if that cannot be, or the set has fewer layers, it is dropped as soon as there is room for the new
        one beside it. To have it dropped first, set :attr:`store` to None, and call :meth:`keep` of the new cache.

        Args:
            params: Parameters.
            frozen: The new frozen set.
            place: Where to keep its activations; where they are by default. Needed if they are on disk.

        Returns:
            The new cache; this one if the frozen set is the same.

        Raises:
            ValueError: As for :class:`PrefixCache` and :meth:`keep`. This cache stays as it was then.
            FileExistsError: If the directory is not empty. So it does then.
        """
        if frozen == self.frozen:
            return self
        new = self._like(params, frozen)
        if self.store is None:
            return new
        grown = new.grown_from(self)
        if grown is not None:
            new._source = self.store, grown
        new.keep(**{**self._kept, **({} if place is None else {"place": place})})
        self.store, self._source = None, None  # not before: if there is no room, this cache goes on
        return new

    def _like(self, params: PyTree, frozen: Frozen) -> PrefixCache:
        hold, state = self._hold, self._state_inputs
        return PrefixCache(
            self._loss_fn, frozen, params, *self._inputs, hold=hold, state_inputs=state, views=self.views
        )

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
                state[prefix.INPUTS + name] = next((modules[end] for end in ends if end in modules), None)
        return state

    def _split_for(self, key: Any, variables: PyTree, inputs: tuple[Any, ...]) -> Split:
        variables, inputs = jax.tree.map(_shape, (variables, inputs))
        traced = prefix.trace(self._traceable(key), variables, inputs)
        examples = example_axis.count(inputs, self._state_inputs)
        return prefix.split(traced, self.frozen, examples, self._state(variables, inputs))

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


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _module(name: str) -> str:
    return name.rpartition(paths.SEPARATOR)[0]
