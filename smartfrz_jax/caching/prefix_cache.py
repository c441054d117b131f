"""The forward pass of frozen layers, run once for every example instead of once for every epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jax
import numpy as np
from jax.typing import DTypeLike

from smartfrz_jax.caching.split_loss import Grown, SplitLoss
from smartfrz_jax.caching.store import ActivationCache, Place
from smartfrz_jax.freezing.transform import Frozen
from smartfrz_jax.pytrees import paths

if TYPE_CHECKING:
    from jaxtyping import Int

PyTree = Any


class PrefixCache(SplitLoss):
    """Activations at the end of the frozen layers that work on the batch before any active layer does.

    The loss is split in two: :meth:`activations` is what depends on frozen layers and the batch alone, :attr:`loss` is
    the rest, with the same value and gradients. Since an example's activations are the same in every epoch, they are
    kept, and a step with :attr:`loss` computes no more than what trains::

        cache = PrefixCache(params, frozen, loss_fn, images, labels)
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
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        frozen: The frozen set.
        loss_fn: A function of ``(params, *inputs)`` to a scalar, or to anything else that a step needs, such as
            ``(loss, aux)``.
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
        >>> cache = PrefixCache(params, Frozen(layers, frozenset({"a"})), loss_fn, x, y)
        >>> cache.bytes_per_example, cache.needed
        (16, frozenset({'inputs:1'}))
        >>> bool(cache.loss(params, cache.activations(params, x, y), None, y) == loss_fn(params, x, y))
        True
    """

    def __init__(
        self,
        params: PyTree,
        frozen: Frozen,
        loss_fn: Callable[..., Any],
        *inputs: Any,
        hold: Callable[[Frozen, PyTree], contextlib.AbstractContextManager[Any]] | None = None,
        state_inputs: Collection[int] = (),
        augmented: bool = False,
        views: int = 1,
    ):
        if augmented and views == 1:
            raise ValueError(
                "augmented: an example looks different in every epoch, so its activations are never the same; let the "
                "loader draw from a fixed number of augmented views of each example and pass that number (views), or "
                "augment nothing"
            )
        super().__init__(params, frozen, loss_fn, *inputs, hold=hold, state_inputs=state_inputs)
        self.views = views
        self.store: ActivationCache | None = None
        self._source: _Source | None = None
        self._kept: dict[str, Any] = {}

    def keep(
        self,
        examples: int,
        *,
        place: Place | str = "device",
        dtype: DTypeLike | None = None,
        budget: int | None = None,
    ) -> ActivationCache:
        """Makes room for the activations of a data set; see :class:`~smartfrz_jax.caching.store.ActivationCache`.

        Args:
            examples: Number of examples in the data set.
            place: ``"device"``, ``"host"``, or a directory; of several processes each needs its own.
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
        """The activations of a batch: looked up where they are there, else computed and kept.

        What is missing of a batch is computed a quarter of a batch at a time, or all at once. Where the frozen set has
        grown, what is stored of the set before comes first, all of it, if nothing else is needed for that.

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
        store, indices = self._checked_store(), np.asarray(indices)
        if _sweeps(self._source):
            self._grow(params, self._source)
        for part in self._parts(indices, view):
            some = self._rows_of(inputs, part.rows, len(indices))
            if part.source is None:
                activations = self.activations(params, *some)
            else:
                activations = part.source.grown(params, part.source.store.take(indices[part.rows], view), *some)
            store.put(indices[part.rows], activations, view)
        if store.is_complete:
            self._source = None
        return store.take(indices, view)

    def fetch_flops(self, indices: Int[np.ndarray, " n"], view: int = 0) -> float:
        """FLOPs that :meth:`fetch` would take for a batch: none for what is stored.

        Args:
            indices: Which examples of the data set they are; on the host.
            view: Which view of the examples the batch is.

        Raises:
            ValueError: As for :meth:`fetch`.
        """
        source = self._source
        grown = 0.0 if source is None else self.build_flops - source.build_flops
        swept = sum(len(rows) for _, parts in self._stored_in(source) for rows in parts) if _sweeps(source) else 0
        parts = self._parts(np.asarray(indices), view)
        return swept * grown + sum(len(rows) * (grown if part else self.build_flops) for rows, part in parts)

    def follow(self, params: PyTree, frozen: Frozen, *, place: Place | str | None = None) -> PrefixCache:
        """The cache for another frozen set.

        If that has more layers, what is stored is the input for what will be. The first :meth:`fetch` goes through all
        of it and releases it; where inputs are needed too, it is released when every example has been fetched. If that
        cannot be, or the set has fewer layers, it is dropped as soon as there is room for the new one beside it.
        To have it dropped first, set :attr:`store` to None, and call :meth:`keep` of the new cache.

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
        new.take_over(self, place=place)
        return new

    def take_over(self, old: PrefixCache, *, place: Place | str | None = None) -> None:
        """Makes room as another cache has it, and takes over what is stored there; see :meth:`follow`.

        Args:
            old: The cache for another frozen set, of the same loss; without its store afterwards.
            place: As in :meth:`follow`.

        Raises:
            ValueError: As for :meth:`keep`. Both caches stay as they were then.
            FileExistsError: If the directory is not empty. So they do then.
        """
        if old.store is None:
            return
        grown = self.grown_from(old)
        self.keep(**{**old._kept, **({} if place is None else {"place": place})})
        if grown is not None:
            self._source = _Source(old.store, grown, old.build_flops)
        old.store, old._source = None, None  # not before: if there is no room, that cache goes on

    def _grow(self, params: PyTree, source: _Source) -> None:
        """Computes all that can be from what the cache before has stored."""
        store = self._checked_store()
        for view, parts in self._stored_in(source):
            for rows in parts:
                store.put(rows, source.grown(params, source.store.take(rows, view)), view)
        self._source = None

    def _stored_in(self, source: _Source) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Views, and which of their examples are stored, in batches; of the last one some may be in it twice."""
        for view in range(self.views):
            rows = np.flatnonzero(source.store.filled[:, view])
            batches = -(-len(rows) // self._examples)
            yield view, np.split(np.resize(rows, batches * self._examples), batches) if batches else []

    def _parts(self, indices: np.ndarray, view: int) -> list[_Part]:
        """What of a batch is to be computed, in parts of two sizes, as every size is a program."""
        missing, source = ~self._checked_store().stored(indices, view), self._source
        there = np.zeros_like(missing) if source is None else missing & source.store.stored(indices, view)
        parts = [_Part(rows, None) for rows in _in_parts(np.flatnonzero(missing & ~there), len(indices))]
        if _sweeps(source):
            return parts
        return parts + [_Part(rows, source) for rows in _in_parts(np.flatnonzero(there), len(indices))]

    def _rows_of(self, inputs: tuple[Any, ...], rows: np.ndarray, n: int) -> tuple[Any, ...]:
        """Some examples of a batch of ``n``."""
        if np.array_equal(rows, np.arange(n)):
            return inputs

        def some(name: str, leaf: Any) -> Any:
            is_state = int(name.split(paths.SEPARATOR)[0]) in self._state_inputs
            if leaf is None or is_state or shapes[name].shape[:1] != (self._examples,):
                return leaf
            return leaf[rows]

        shapes = paths.flatten(self._inputs)
        return paths.tree_map(some, inputs)

    def _checked_store(self) -> ActivationCache:
        if self.store is None:
            raise ValueError("store: there is none; call keep with the number of examples in the data set first")
        return self.store

    def _like(self, params: PyTree, frozen: Frozen) -> PrefixCache:
        hold, state = self._hold, self._state_inputs
        return PrefixCache(
            params, frozen, self._loss_fn, *self._inputs, hold=hold, state_inputs=state, views=self.views
        )


class _Part(NamedTuple):
    """Examples of a batch whose activations are computed together.

    Attributes:
        rows: Their places in the batch; some may be in it twice.
        source: What they are computed from; ``None`` for the inputs.
    """

    rows: np.ndarray
    source: _Source | None


def _in_parts(rows: np.ndarray, n: int) -> list[np.ndarray]:
    """Rows, in quarters of a batch, or all at once if they take all four, filled up with rows that are there."""
    quarter = max(2, -(-n // 4))
    parts = -(-len(rows) // quarter)
    if parts * quarter >= n:
        return [rows if len(rows) == n else np.resize(rows, n)]
    return np.split(np.resize(rows, parts * quarter), parts) if parts else []


class _Source(NamedTuple):
    """What activations are computed from where the frozen set has grown.

    Attributes:
        store: Those of the set before.
        grown: From these to the new ones.
        build_flops: FLOPs that one example of them took.
    """

    store: ActivationCache
    grown: Grown
    build_flops: float


def _sweeps(source: _Source | None) -> TypeGuard[_Source]:
    """Whether all that is stored can be gone through at once: no inputs are needed."""
    return source is not None and not source.grown.needed
