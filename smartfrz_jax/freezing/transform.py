"""Freezing layers so that the compiled step really gets cheaper.

Three things make it so. ``stop_gradient`` on the frozen leaves before differentiation, so that nothing downstream (a
global norm, a clip) can ask for their gradients. ``optax.multi_transform`` over the whole, unchanged parameter tree, so
that weight decay and momentum cannot move them and their optimizer state goes. And a frozen set that is *static*
(:class:`~smartfrz_jax.freezing.frozen.Frozen`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from smartfrz_jax.freezing.accumulation import with_own_windows
from smartfrz_jax.freezing.frozen import ACTIVE, FROZEN, Frozen, check_frozen
from smartfrz_jax.freezing.parts import rows
from smartfrz_jax.freezing.parts.stop_gradient import stop_parts
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


def value_and_grad(loss_fn: Callable[..., Any], frozen: Frozen, *, has_aux: bool = False) -> Callable[..., Any]:
    """``jax.value_and_grad`` with respect to the first argument, without the work for frozen layers.

    The gradients of frozen leaves are exact zeros, so norms and clips over all gradients are over the active layers.

    Args:
        loss_fn: A function of ``(params, *args, **kwargs)`` to a scalar, or to ``(scalar, aux)`` with ``has_aux``.
        frozen: The frozen set; static.
        has_aux: As in ``jax.value_and_grad``.

    Returns:
        A function of the same arguments to ``(value, grads)``.

    Raises:
        TypeError: If ``loss_fn`` is no function, ``frozen`` no :class:`Frozen`, or ``has_aux`` no boolean.
    """
    checks.function(loss_fn, "loss_fn", "a function of (params, *args) to a scalar loss")
    check_frozen(frozen)
    checks.flag(has_aux, "has_aux")

    return jax.value_and_grad(stopped(loss_fn, frozen), has_aux=has_aux)


def stopped(function: Callable[..., Any], frozen: Frozen) -> Callable[..., Any]:
    """A function of ``(params, *args, **kwargs)`` through which derivatives pass to what trains alone."""
    of_parts = stop_parts(function, frozen)

    def of_frozen(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return of_parts(frozen.stop_gradient(params), *args, **kwargs)

    return of_frozen


def freeze(tx: optax.GradientTransformation, frozen: Frozen) -> optax.GradientTransformationExtraArgs:
    """``tx`` for the active layers, nothing for the frozen ones, over the whole parameter tree.

    Everything that belongs to the optimizer (clipping, weight decay, averaging) goes inside ``tx``. Of further
    arguments of ``update``, such as ``grad`` and ``value_fn`` of ``optax.lbfgs``, ``tx`` sees the active layers alone;
    take them from :func:`value_and_grad`. Functions that read an optimizer's state, such as
    ``optax.value_and_grad_from_state``, need what :func:`~smartfrz_jax.freezing.migrate.unfrozen_opt_state` gives.

    Args:
        tx: Any optax gradient transformation.
        frozen: The frozen set.

    Returns:
        ``optax.multi_transform`` with labels from ``frozen``. Transformations of equal ``tx`` and ``frozen`` are equal.

    Raises:
        TypeError: If ``tx`` is no transformation, or ``frozen`` no :class:`Frozen`.
    """
    checks.transformation(tx)
    check_frozen(frozen)
    return optax.GradientTransformationExtraArgs(_Init(tx, frozen), _Update(tx, frozen))


def apply_updates(params: PyTree, updates: PyTree, frozen: Frozen) -> PyTree:
    """``optax.apply_updates`` that returns frozen leaves as they are, bit for bit and without touching their memory.

    Raises:
        TypeError: If ``frozen`` is no :class:`Frozen`.
        ValueError: If ``updates`` have other leaves or shapes than ``params``, or these are of another network.
    """
    check_frozen(frozen)
    checks.same_leaves(updates, params, "updates", but=frozen.params)
    updated = optax.apply_updates(rows.active(params, frozen), rows.active(updates, frozen))
    new = {name: leaf for name, leaf in paths.flatten(updated).items() if not frozen.is_frozen(name)}
    return rows.put(params, new, frozen)


def unshared(opt_state: Any, params: PyTree) -> Any:
    """The state with a copy of every array that stands in it twice, or is a parameter: none can be donated twice."""
    taken = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf: Any) -> Any:
        if id(leaf) in taken:
            leaf = jnp.copy(leaf)
        taken.add(id(leaf))
        return leaf

    return jax.tree.map(own, opt_state)


def partition(tx: optax.GradientTransformation, frozen: Frozen) -> optax.GradientTransformationExtraArgs:
    """:func:`freeze` for parameters of which the stacked ones have only the rows that train."""
    transforms: dict[Hashable, optax.GradientTransformation] = {
        ACTIVE: with_own_windows(tx, frozen.layers.stacks),
        FROZEN: rows.hold_still(frozen),
    }
    return optax.multi_transform(transforms, frozen.labels, mask_compatible_extra_args=True)


@dataclasses.dataclass(frozen=True)
class _Partition:
    """``optax.multi_transform`` for a frozen set, equal for equal sets, so that ``jax.jit`` does not recompile."""

    tx: optax.GradientTransformation
    frozen: Frozen

    @property
    def _partition(self) -> optax.GradientTransformationExtraArgs:
        return partition(self.tx, self.frozen)


class _Init(_Partition):
    def __call__(self, params: PyTree) -> Any:
        try:
            return unshared(self._partition.init(rows.active(params, self.frozen)), params)
        except (IndexError, TypeError, ValueError) as error:
            if self.frozen.active:
                raise
            raise ValueError(
                f"frozen: got all {len(self.frozen.layers)} layers, but tx cannot start without a parameter that "
                f"trains ({error}); leave a layer active, or end the training"
            ) from error


class _Update(_Partition):
    def __call__(self, updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> Any:
        if params is not None:
            extra_args = {k: self._shown(v, params) for k, v in extra_args.items()}
            updates, params = rows.active(updates, self.frozen, params), rows.active(params, self.frozen)
        else:
            updates = rows.active(updates, self.frozen)
        try:
            updates, state = self._partition.update(updates, state, params, **extra_args)
        except (AttributeError, TypeError, ValueError) as error:
            if params is None or self._is_own(state, params):
                raise
            raise ValueError(
                "opt_state: got the state of another optimizer or of another frozen set, expected that of "
                f"{self.frozen!r}; where the frozen set has changed, call migrate_opt_state"
            ) from error
        return rows.spread(updates, self.frozen), state

    def _is_own(self, state: Any, params: PyTree) -> bool:
        """Whether a state has the structure of that which the optimizer begins with."""
        return jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(self._partition.init, params))

    def _shown(self, value: Any, params: PyTree) -> Any:
        """A further argument as ``tx`` is to see it."""
        if callable(value):
            return self._of_active(value, params)
        is_like = jax.tree.structure(value) == jax.tree.structure(params)
        return rows.active(value, self.frozen, params) if is_like else value

    def _of_active(self, function: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
        """A function of parameters, such as a line search calls, for ``tx``, which sees only those that train."""
        labels = self.frozen.labels(params)

        def shown(tree: PyTree) -> PyTree:
            tree = rows.active(tree, self.frozen, params)
            return jax.tree.map(lambda label, leaf: leaf if label == ACTIVE else optax.MaskedNode(), labels, tree)

        def whole(tree: PyTree) -> PyTree:
            if jax.tree.structure(tree) != jax.tree.structure(shown(params)):
                return tree
            return rows.put(params, paths.flatten(tree), self.frozen)

        @functools.wraps(function)  # optax reads its signature
        def of_active(*args: Any, **kwargs: Any) -> Any:
            out = function(*map(whole, args), **{name: whole(arg) for name, arg in kwargs.items()})
            return shown(out) if jax.tree.structure(out) == jax.tree.structure(params) else out

        return of_active
