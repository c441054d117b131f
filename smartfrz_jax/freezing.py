"""Freezing layers so that the compiled step really gets cheaper.

Three things make it so. ``stop_gradient`` on the frozen leaves before differentiation, so that nothing downstream (a
global norm, a clip) can ask for their gradients. ``optax.multi_transform`` over the whole, unchanged parameter tree, so
that weight decay and momentum cannot move them and their optimizer state goes. And a frozen set that is *static*: a
mask known only at run time saves nothing, for the program must then be able to do the full work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax import paths
from smartfrz_jax.layers import Layers
from smartfrz_jax.partition import ACTIVE, FROZEN, partition

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """Which layers of a network are frozen: immutable and hashable, to be a static argument of the train step.

    Attributes:
        layers: The layers of the network.
        names: Names of the frozen ones.

    Raises:
        ValueError: If a name is not a layer of the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> Frozen(layers).add(["a"]).active
        ('b',)
    """

    layers: Layers
    names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(self.layers.check(self.names, "names")))

    @classmethod
    def of_mask(cls, layers: Layers, mask: np.ndarray) -> Frozen:
        """The frozen set of a boolean mask of shape ``(layers,)``, true where frozen.

        Raises:
            ValueError: If it has another shape.
        """
        if np.shape(mask) != (len(layers),):
            raise ValueError(f"mask: got shape {np.shape(mask)}, expected {(len(layers),)}, a boolean for each layer")
        return cls(layers, frozenset(name for name, frozen in zip(layers.names, mask, strict=True) if frozen))

    def add(self, names: Iterable[str]) -> Frozen:
        """This set and the layers of ``names``."""
        return Frozen(self.layers, self.names.union(self.layers.check(names, "names")))

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the layers that train, front to back."""
        return tuple(name for name in self.layers.names if name not in self.names)

    @property
    def mask(self) -> np.ndarray:
        """Boolean array of shape ``(layers,)``, true where frozen."""
        return np.array([name in self.names for name in self.layers.names], bool)

    @functools.cached_property
    def params(self) -> frozenset[str]:
        """Names of the frozen parameters."""
        return frozenset(param for layer in self.layers if layer.name in self.names for param in layer.params)

    def labels(self, params: PyTree) -> PyTree:
        """``'frozen'`` or ``'train'`` for every leaf of ``params``: labels for ``optax.multi_transform``."""
        return paths.tree_map(lambda name, _: FROZEN if self._is_frozen(name) else ACTIVE, params)

    def stop_gradient(self, params: PyTree) -> PyTree:
        """``params`` with ``jax.lax.stop_gradient`` on the frozen leaves."""
        return paths.tree_map(lambda name, leaf: jax.lax.stop_gradient(leaf) if self._is_frozen(name) else leaf, params)

    def active_leaves(self, tree: PyTree) -> dict[str, Any]:
        """Leaves of the layers that train, by name, of a tree shaped like the parameters."""
        return {name: leaf for name, leaf in paths.flatten(tree).items() if not self._is_frozen(name)}

    def _is_frozen(self, param: str) -> bool:
        return self.layers.holding(param) in self.names

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.layers, self.names))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "names": self.names}  # not what is cached, as of Layers

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Frozen) and self.names == other.names and self.layers == other.layers
        )


def value_and_grad(loss_fn: Callable[..., Any], frozen: Frozen, *, has_aux: bool = False) -> Callable[..., Any]:
    """``jax.value_and_grad`` with respect to the first argument, without the work for frozen layers.

    The gradients of frozen leaves are exact zeros, so norms and clips over all gradients are over the active layers.

    Args:
        loss_fn: A function of ``(params, *args, **kwargs)`` to a scalar, or to ``(scalar, aux)`` with ``has_aux``.
        frozen: The frozen set; static.
        has_aux: As in ``jax.value_and_grad``.

    Returns:
        A function of the same arguments to ``(value, grads)``.
    """

    def with_frozen(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return loss_fn(frozen.stop_gradient(params), *args, **kwargs)

    return jax.value_and_grad(with_frozen, has_aux=has_aux)


def freeze(tx: optax.GradientTransformation, frozen: Frozen) -> optax.GradientTransformationExtraArgs:
    """``tx`` for the active layers, nothing for the frozen ones, over the whole parameter tree.

    Everything that belongs to the optimizer (clipping, weight decay, averaging) goes inside ``tx``. Of further
    arguments of ``update``, such as ``grad`` and ``value_fn`` of ``optax.lbfgs``, ``tx`` sees the active layers alone;
    take them from :func:`value_and_grad`, for ``optax.value_and_grad_from_state`` knows nothing of frozen layers.

    Args:
        tx: Any optax gradient transformation.
        frozen: The frozen set.

    Returns:
        ``optax.multi_transform`` with labels from ``frozen``. Transformations of equal ``tx`` and ``frozen`` are equal.
    """
    return partition(tx, frozen)


def apply_updates(params: PyTree, updates: PyTree, frozen: Frozen) -> PyTree:
    """``optax.apply_updates`` that returns frozen leaves as they are, bit for bit and without touching their memory."""
    updated = optax.apply_updates(params, updates)
    return paths.tree_map(lambda name, old, new: old if name in frozen.params else new, params, updated)


def migrate(
    opt_state: Any,
    tx: optax.GradientTransformation,
    params: PyTree,
    frozen: Frozen,
    *,
    kept: Mapping[str, Any] | None = None,
) -> Any:
    """Optimizer state for a new frozen set, every value kept that the new state has a place for.

    State of layers that freeze is dropped (its memory is free once the old state is), that of layers that stay active
    is carried over unchanged, as the same arrays, that of layers that return is initialised afresh, or taken from
    ``kept``. Shared state such as step counts goes on in either case; :class:`~smartfrz_jax.kept.Kept` says what this
    means for Adam.

    Args:
        opt_state: State of ``freeze(tx, other)`` for any other set, or of ``tx`` itself.
        tx: The optax transformation.
        params: Parameter pytree.
        frozen: The new frozen set.
        kept: What :func:`dropped` gave when the layers that return froze. It is placed as fresh state would be: with
            the sharding of the parameter, as far as ``tx`` gives it that.

    Returns:
        State of ``freeze(tx, frozen)``.

    Raises:
        ValueError: If a value is missing, left over, or has another shape or dtype than ``tx`` gives it for ``params``,
            or ``tx`` keeps state that cannot be split by layer, as ``optax.flatten`` does.
    """
    opt_state = _with_groups(opt_state, tx, params)
    old = by_path(opt_state)
    target = freeze(tx, frozen)
    abstract = jax.eval_shape(target.init, params)
    wanted = by_path(abstract)
    unfit = _unfit(old, wanted, dropped=_masked(opt_state), absent=_masked(abstract))
    if unfit is not None:
        got = f"{unfit} is {_text(old.get(unfit))}, but tx makes it {_text(wanted.get(unfit))}"
        if _is_of_all_layers(unfit, tx, params, frozen.layers):
            raise ValueError(
                f"opt_state: {got} with this frozen set; state that is not shaped like the parameters cannot be split "
                "by layer. Leave out of tx what joins them: optax.flatten(optax.adam(0.1)) is optax.adam(0.1)"
            )
        raise ValueError(
            f"opt_state: {got} for these params; pass the tx that made opt_state, and the params it was made for"
        )
    source = old
    if wanted.keys() - old.keys():  # a layer returns
        fresh = {path: leaf for path, leaf in by_path(target.init(params)).items() if path not in old}
        source = old | (fresh if kept is None else {path: _put_back(kept, path, leaf) for path, leaf in fresh.items()})
    return jax.tree_util.tree_map_with_path(lambda path, _: source[keystr(path)], abstract)


def dropped(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> dict[str, Any]:
    """What :func:`migrate` to a new frozen set drops: the state of layers that freeze, by key path.

    Args:
        opt_state: State of ``freeze(tx, other)`` for any other set, or of ``tx`` itself.
        tx: The optax transformation.
        params: Parameter pytree.
        frozen: The new frozen set.
    """
    wanted = by_path(jax.eval_shape(freeze(tx, frozen).init, params))
    return {path: leaf for path, leaf in by_path(_with_groups(opt_state, tx, params)).items() if path not in wanted}


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by key path, as ``jax.tree_util.keystr`` writes it."""
    return {keystr(path): leaf for path, leaf in tree_leaves_with_path(tree)}


def _with_groups(opt_state: Any, tx: optax.GradientTransformation, params: PyTree) -> Any:
    """A state of ``tx`` itself as one of ``freeze(tx, nothing)``; one of ``freeze(tx, other)`` as it is."""
    # Where tx itself is a multi_transform, the type alone does not tell its own state from that of freeze(tx, other).
    if not isinstance(opt_state, optax.MultiTransformState) or (
        by_path(opt_state).keys() == by_path(jax.eval_shape(tx.init, params)).keys()
    ):
        return optax.MultiTransformState(
            {ACTIVE: optax.MaskedState(opt_state), FROZEN: optax.MaskedState(optax.EmptyState())}
        )
    return opt_state


def _put_back(kept: Mapping[str, Any], path: str, fresh: Any) -> jax.Array:
    """A value that was put aside, on the devices on which a fresh one would be."""
    if _text(kept.get(path)) != _text(fresh):
        raise ValueError(
            f"kept: {path} is {_text(kept.get(path))}, but tx makes it {_text(fresh)}; pass all that was dropped when "
            "the layers that return froze, or None to let them start afresh"
        )
    # A copy: on a CPU the array could share its memory with NumPy's, which a step that donates it would write over.
    value = jax.numpy.array(kept[path])
    return jax.device_put(value, fresh.sharding) if fresh.committed else value


def _unfit(old: dict[str, Any], wanted: dict[str, Any], *, dropped: list[str], absent: list[str]) -> str | None:
    """Path at which the two differ, beside the leaves of layers that return (``dropped``) or freeze (``absent``)."""
    for path in [*wanted, *(path for path in old if path not in wanted)]:
        got, expected = _text(old.get(path)), _text(wanted.get(path))
        masked = dropped if path not in old else absent if path not in wanted else ()
        if got != expected and not any(path.startswith(prefix) for prefix in masked):
            return path
    return None


def _is_of_all_layers(path: str, tx: optax.GradientTransformation, params: PyTree, layers: Layers) -> bool:
    """Whether ``tx`` makes the value at a path for all active layers together: it has another shape for fewer."""
    if len(layers) < 2:
        return False
    some = (Frozen(layers), Frozen(layers, frozenset(layers.names[:1])))
    values = [by_path(jax.eval_shape(freeze(tx, frozen).init, params)).get(path) for frozen in some]
    return None not in values and _text(values[0]) != _text(values[1])


def _masked(tree: Any) -> list[str]:
    """Paths at which a transformation has dropped the state of a parameter."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return [keystr(path) for path, node in tree_leaves_with_path(tree, is_leaf=is_masked) if is_masked(node)]


def _text(leaf: Any) -> str:
    return "missing" if leaf is None else f"{jax.numpy.result_type(leaf)}{list(np.shape(leaf))}"
