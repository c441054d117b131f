"""Which caches a run has, one after the other: where they can be, fit and pay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding

from smartfrz_jax.caching.break_even import break_even
from smartfrz_jax.caching.store import Storage
from smartfrz_jax.cost.account import Account
from smartfrz_jax.cost.check import SavingWarning
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.nnx.prefix_cache import PrefixCache


class CacheMaker:
    """Makes the cache for every frozen set of a run; says why, once for each cause, where there can be none.

    Args:
        loss_fn: As of :class:`~smartfrz_jax.nnx.CachedStep`; so are the others.
        examples: Number of examples in the data set.
        storage: Where activations are kept.
        views: Number of views of each example.
        account: The account of the step.
        total_steps: Train steps of the whole run.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        examples: int,
        storage: Storage,
        views: int,
        account: Account | None,
        total_steps: int | None,
    ):
        self._loss_fn, self._examples, self._storage, self._views = loss_fn, examples, storage, views
        self._account, self._total_steps = account, total_steps
        self._said: set[str] = set()

    def make(
        self, model: nnx.Module, frozen: Frozen, inputs: Sequence[Any], done: int, old: PrefixCache | None = None
    ) -> PrefixCache | None:
        """The cache to go on with after so many steps.

        Args:
            model: The model.
            frozen: The frozen set.
            inputs: A batch, or shapes of one.
            done: Steps that were done before.
            old: The cache until then.

        Returns:
            One without a store; ``old`` where that saves more in the steps that are left; ``None`` if there can be none
            or it would not pay.
        """
        if not frozen.names:
            return None
        if old is not None and old.frozen == frozen:
            return old
        try:
            cache = PrefixCache(model, frozen, self._loss_fn, *inputs, views=self._views)
        except ValueError as error:
            self.warn(error)
            return None
        if old is not None and not self.pays(cache, done, old) and old.goes_on(model, frozen):
            return old
        return cache if self.pays(cache, done) else None

    def rebuilt(
        self, model: nnx.Module, history: Sequence[tuple[int, Frozen]], inputs: Sequence[Any]
    ) -> PrefixCache | None:
        """The cache that a run had before it was interrupted, without its store.

        Args:
            model: The model.
            history: The frozen sets of the run, each with the number of steps done before.
            inputs: A batch, or shapes of one.
        """
        cache: PrefixCache | None = None
        for done, frozen in history:
            new = self.make(model, frozen, inputs, done, cache)
            if new is not None and cache is not None and new is not cache:
                new.build_on(cache)
            cache = new
        return cache

    def pays(self, cache: PrefixCache, done: int, old: PrefixCache | None = None) -> bool:
        """Whether to keep activations from now on, after so many steps; rather than those that there are, if any."""
        if self._account is None or self._total_steps is None:
            return True
        left = max(0, self._total_steps - done)
        return break_even(self._account, cache, examples=self._examples, steps=left, old=old).pays

    def has_room(self, cache: PrefixCache, old: PrefixCache | None, sharding: NamedSharding | None) -> bool:
        """Makes room for the activations: beside those of the cache before, if there is enough, or in their place."""
        if cache.store is not None:
            return True
        if old is not None and old.store is not None:
            try:
                cache.take_over(old)
            except ValueError:
                old.clear()
                old.store = None
            else:
                return True
        if old is not None:
            cache.build_on(old)
        where = self._storage
        kept = {"place": where.place, "dtype": where.dtype, "budget": where.budget}
        try:
            cache.keep(self._examples, **kept, sharding=sharding)
        except ValueError as error:
            self.warn(error)
            return False
        return True

    def warn(self, error: ValueError) -> None:
        """Says why activations are not kept."""
        if str(error) not in self._said:
            self._said.add(str(error))
            warnings.warn(f"activations are not kept: {error}", SavingWarning, stacklevel=5)
