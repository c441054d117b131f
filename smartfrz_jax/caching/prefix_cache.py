"""The forward pass of frozen layers, run once for every example instead of once for every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from smartfrz_jax.caching.fill import Base, Source, missing
from smartfrz_jax.caching.loss_adapter import Hold, PytreeLoss
from smartfrz_jax.caching.split_loss import Grown, SplitLoss
from smartfrz_jax.caching.store import ActivationCache, Place, check_place, check_views, narrowed
from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Int


class PrefixCache:
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
        views: Number of views of each example.
        store: The activations that are kept, if :meth:`keep` was called.
        variables: Names of the arrays, beside inputs, that they are computed from; whether each is read as a whole.

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
        hold: Hold | None = None,
        state_inputs: Collection[int] = (),
        augmented: bool = False,
        views: int = 1,
    ):
        check_views(views, augmented=augmented)
        if hold is not None:
            checks.function(hold, "hold", "a function of a frozen set and parameters to a context, such as linen.hold")
        self._begin(SplitLoss(params, frozen, loss_fn, inputs, PytreeLoss(hold), state_inputs), views)

    def _begin(self, loss: SplitLoss, views: int) -> None:
        """A cache of this loss, without a store."""
        self._loss, self.views, self.variables = loss, views, loss.variables
        self.store: ActivationCache | None = None
        self._source: Source | None = None
        self._base: Base | None = None
        self._kept: dict[str, Any] = {}

    @property
    def frozen(self) -> Frozen:
        """The frozen set."""
        return self._loss.frozen

    @property
    def frontier(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of what is stored for one example."""
        return self._loss.split.frontier

    @property
    def bytes_per_example(self) -> int:
        """Bytes of :attr:`frontier`."""
        return self._loss.split.bytes_per_example

    @property
    def needed(self) -> frozenset[str]:
        """Names of the inputs that :attr:`loss` reads: ``"inputs:0"`` is the first, or part of it.

        In place of the others it takes ``None``.
        """
        return self._loss.split.needed

    @property
    def saved_flops(self) -> float:
        """FLOPs of one example's forward pass that a step with :attr:`loss` does not have."""
        split = self._loss.split
        return (split.frozen_flops - split.repeated_flops) / split.examples

    @property
    def build_flops(self) -> float:
        """FLOPs to compute one example's activations."""
        return self._loss.split.frozen_flops / self._loss.split.examples

    def activations(self, params: PyTree, *inputs: Any) -> tuple[jax.Array, ...]:
        """The activations of a batch; jitted.

        Args:
            params: Parameters.
            *inputs: The batch; any number of examples, two at least.

        Returns:
            Arrays of shape ``(examples, ...)``, as in :attr:`frontier`.
        """
        return self._loss.activations(params, inputs)

    def loss(self, params: PyTree, activations: tuple[jax.Array, ...], *inputs: Any) -> Any:
        """What ``loss_fn(params, *inputs)`` returns, from the activations; to be differentiated.

        Args:
            params: Parameters. Variables of an NNX model change as ``loss_fn`` changes them.
            activations: Activations of the batch, of :meth:`activations` or :meth:`fetch`.
            *inputs: The batch; ``None`` in place of what is not needed.

        Raises:
            ValueError: If the activations are not of this loss, or an input is missing.
        """
        return self._loss.rest(params, activations, inputs)

    def grown_from(self, old: PrefixCache) -> Grown | None:
        """How to get the activations from those of another cache, for a frozen set with fewer layers.

        Args:
            old: The other one.

        Returns:
            A jitted function of ``(params, activations, *inputs)`` that runs only the layers between the two frontiers,
            or None if there is no such: then the activations must be computed from the inputs.
        """
        checks.instance(old, PrefixCache, "old", "the PrefixCache for another frozen set")
        return self._loss.grown_from(old._loss)

    def keep(
        self,
        examples: int,
        *,
        place: Place | str = "device",
        dtype: DTypeLike | None = None,
        budget: int | None = None,
        sharding: NamedSharding | None = None,
    ) -> ActivationCache:
        """Makes room for the activations of a data set; see :class:`~smartfrz_jax.caching.store.ActivationCache`.

        Args:
            examples: Number of examples in the data set.
            place: ``"device"``, ``"host"``, or a directory; of several processes each needs its own.
            dtype: Type to store them in, such as ``"bfloat16"``; their own by default.
            budget: Most bytes to use; what is free by default.
            sharding: How a batch is divided among the devices of a mesh; so are the activations then.

        Returns:
            The store, which is also :attr:`store`.

        Raises:
            ValueError: If they would not fit.
        """
        kept: dict[str, Any] = {"place": place, "dtype": dtype, "budget": budget, "sharding": sharding}
        self.store = ActivationCache(self.frontier, examples, views=self.views, **kept)
        self._kept = {"examples": examples} | kept
        return self.store

    def fetch(
        self, params: PyTree, indices: Int[np.ndarray, " n"], *inputs: Any, view: int = 0
    ) -> tuple[jax.Array, ...]:
        """The activations of a batch: looked up where they are there, else computed and kept.

        What is missing is computed a quarter of a batch at a time, always by the same program: an example's activations
        have the same bits whenever they are computed. Where the frozen set has grown, what is stored of the set before
        comes first, all of it, if nothing else is needed for that; the rest is computed by way of that set.

        Args:
            params: Parameters.
            indices: Which examples of the data set they are; on the host.
            *inputs: The batch; once everything is stored, ``None`` in place of what is not needed.
            view: Which view of the examples the batch is.

        Returns:
            Arrays of shape ``(n, ...)``, as in :attr:`frontier`, in the dtype in which they are kept.

        Raises:
            ValueError: If :meth:`keep` was not called, an index is wrong, or there is not one for each example.
        """
        store, indices = self._checked_store(), np.asarray(indices)
        self._loss.check_batch(inputs, indices.size)
        if self._source is not None and self._source.needs_no_inputs:
            self._source.grow_into(store, self._loss.taken_apart(params), self._loss.part)
            self._source = None
        for part in missing(store, self._source, indices, view, self._loss.part):
            params = self._loss.taken_apart(params)  # once: what is taken apart stays as it is
            some = self._loss.rows_of(inputs, part.rows, len(indices))
            if part.source is None:
                activations = self._computed(params, some, self._kept["dtype"])
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
        source, flops = self._source, 0.0
        grown = 0.0 if source is None else self.build_flops - source.build_flops
        if source is not None and source.needs_no_inputs:
            flops += grown * sum(len(rows) for _, rows in source.batches(self._loss.part))
        parts = missing(self._checked_store(), source, np.asarray(indices), view, self._loss.part)
        return flops + sum(len(part.rows) * (self.build_flops if part.source is None else grown) for part in parts)

    def follow(self, params: PyTree, frozen: Frozen, *, place: Place | str | None = None) -> PrefixCache:
        """The cache for another frozen set.

        If that has more layers, what is stored is the input for what will be. The first :meth:`fetch` goes through all
        of it and releases it; where inputs are needed too, it is released when every example has been fetched. If that
        cannot be, or the set has fewer layers, it is dropped as soon as there is room, and budget, for both at once.
        To have it dropped first, set :attr:`store` to None, and call :meth:`keep` of the new cache.

        Args:
            params: Parameters.
            frozen: The new frozen set.
            place: Where to keep its activations; where they are by default. Needed if they are on disk.

        Returns:
            The new cache; this one if the frozen set is the same.

        Raises:
            ValueError: As for :class:`PrefixCache` and :meth:`keep`. This cache stays as it was then if the new set
                has all its layers; else some train from now on, and what is stored is forgotten.
            FileExistsError: If the directory is not empty. So it is with the cache then.
        """
        check_frozen(frozen, self.frozen.layers)
        if place is not None:
            check_place(place)
        if frozen == self.frozen:
            return self
        new = copy.copy(self)
        try:
            new._begin(self._loss.with_frozen(params, frozen), self.views)
            new.take_over(self, place=place)
        except (ValueError, OSError):
            if not self.frozen.names <= frozen.names:
                self.clear()  # layers that it is of train until they are frozen again
            raise
        return new

    def clear(self) -> None:
        """Forgets what is stored, as when frozen layers have other parameters now; the space stays taken."""
        if self.store is not None:
            self.store.clear()
        self._source = None

    def take_over(self, old: PrefixCache, *, place: Place | str | None = None) -> None:
        """Makes room as another cache has it, and takes over what is stored there; see :meth:`follow`.

        Args:
            old: The cache for another frozen set, of the same loss; without its store afterwards.
            place: As in :meth:`follow`.

        Raises:
            ValueError: As for :meth:`keep`. Both caches stay as they were then.
            FileExistsError: If the directory is not empty. So they do then.
        """
        if place is not None:
            check_place(place)
        self.build_on(old)
        if old.store is None:
            return
        kept: dict[str, Any] = old._kept | ({} if place is None else {"place": place})
        held = old.store.nbytes_here + (old._source.store.nbytes_here if old._source else 0)
        budget = None if kept["budget"] is None else max(0, kept["budget"] - held)
        self.keep(**{**kept, "budget": budget})
        self._kept = kept
        if self._base is not None:
            self._source = Source(old.store, self._base.grown, old.build_flops)
        old.store, old._source = None, None  # not before: if there is no room, that cache goes on

    def build_on(self, old: PrefixCache) -> None:
        """Computes activations by way of those of another cache, as after :meth:`take_over`; it needs no store.

        With one for each frozen set that it had, a restored run computes what it had stored by the same programs.

        Args:
            old: The cache for another frozen set, of the same loss.
        """
        grown = self.grown_from(old)
        self._base = None if grown is None else Base(old._computed, grown)

    def _computed(self, params: PyTree, inputs: tuple[Any, ...], dtype: DTypeLike | None) -> tuple[jax.Array, ...]:
        """Activations of a part of a batch, by the programs by which others were computed before."""
        if self._base is None:
            return self.activations(params, *inputs)
        return self._base.grown(params, narrowed(self._base.computed(params, inputs, dtype), dtype), *inputs)

    def _checked_store(self) -> ActivationCache:
        if self.store is None:
            raise ValueError("store: there is none; call keep with the number of examples in the data set first")
        return self.store
