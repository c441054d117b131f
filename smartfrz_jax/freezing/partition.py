"""An optimizer for the layers that train, over the whole parameter tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from smartfrz_jax.freezing.accumulation import with_own_windows
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from smartfrz_jax.freezing.transform import Frozen


ACTIVE = "train"
FROZEN = "frozen"


def partition(tx: optax.GradientTransformation, frozen: Frozen) -> optax.GradientTransformationExtraArgs:
    """See :func:`smartfrz_jax.freeze`."""
    return optax.GradientTransformationExtraArgs(_Init(tx, frozen), _Update(tx, frozen))


def unshared(opt_state: Any, params: PyTree) -> Any:
    """The state with a copy of every array that stands in it twice, or is a parameter: none can be donated twice."""
    taken = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf: Any) -> Any:
        if id(leaf) in taken:
            leaf = jnp.copy(leaf)
        taken.add(id(leaf))
        return leaf

    return jax.tree.map(own, opt_state)


@dataclasses.dataclass(frozen=True)
class _Partition:
    """``optax.multi_transform`` for a frozen set, equal for equal sets, so that ``jax.jit`` does not recompile."""

    tx: optax.GradientTransformation
    frozen: Frozen

    @property
    def _partition(self) -> optax.GradientTransformationExtraArgs:
        transforms: dict[Hashable, optax.GradientTransformation] = {
            ACTIVE: with_own_windows(self.tx),
            FROZEN: optax.set_to_zero(),
        }
        return optax.multi_transform(transforms, self.frozen.labels, mask_compatible_extra_args=True)


class _Init(_Partition):
    def __call__(self, params: PyTree) -> Any:
        try:
            return unshared(self._partition.init(params), params)
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
            extra_args = {k: self._of_active(v, params) if callable(v) else v for k, v in extra_args.items()}
        return self._partition.update(updates, state, params, **extra_args)

    def _of_active(self, function: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
        """A function of parameters, such as a line search calls, for ``tx``, which sees only those that train."""
        labels = self.frozen.labels(params)

        def shown(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda label, leaf: leaf if label == ACTIVE else optax.MaskedNode(), labels, tree)

        def whole(tree: PyTree) -> PyTree:
            if jax.tree.structure(tree) != jax.tree.structure(shown(params)):
                return tree
            active = paths.flatten(tree)
            return paths.tree_map(lambda name, leaf: active.get(name, leaf), params)

        @functools.wraps(function)  # optax reads its signature
        def of_active(*args: Any, **kwargs: Any) -> Any:
            out = function(*map(whole, args), **{name: whole(arg) for name, arg in kwargs.items()})
            return shown(out) if jax.tree.structure(out) == jax.tree.structure(params) else out

        return of_active
