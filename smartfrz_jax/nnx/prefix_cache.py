"""The prefix cache of an NNX model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from smartfrz_jax.caching import prefix_cache
from smartfrz_jax.freezing.transform import Frozen
from smartfrz_jax.nnx.hold import hold
from smartfrz_jax.pytrees import paths

PyTree = Any


class PrefixCache(prefix_cache.PrefixCache):
    """Activations of an NNX model at the end of its frozen layers; see :class:`smartfrz_jax.PrefixCache`.

    A step differs in one line: ``optimizer.value_and_grad(cache.loss)(model, activations, *inputs)``, where activations
    come from ``cache.fetch(model, indices, *inputs)``.

    Args:
        model: The model, in the mode in which it trains; arrays or ``jax.ShapeDtypeStruct``.
        frozen: The frozen set, such as that of its :class:`~smartfrz_jax.nnx.Optimizer`.
        loss_fn: A function of ``(model, *inputs)``.
        *inputs: A batch of at least two examples, or ``jax.ShapeDtypeStruct`` of its shape.
        augmented: Whether an example looks different in each epoch.
        views: Number of augmented views of each example that there are.

    Raises:
        ValueError: As for :class:`smartfrz_jax.PrefixCache`.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax.nnx import find_layers
        >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        >>> x = jnp.ones((16, 8))
        >>> frozen = Frozen(find_layers(model, x), frozenset({"layers/0"}))
        >>> cache = PrefixCache(model, frozen, lambda model, x: (model(x) ** 2).mean(), x)
        >>> cache.frontier
        (ShapeDtypeStruct(shape=(4,), dtype=float32),)
        >>> activations = cache.activations(model, x)
        >>> bool(cache.loss(model, activations) == (model(x) ** 2).mean())
        True
    """

    def __init__(
        self,
        model: nnx.Module,
        frozen: Frozen,
        loss_fn: Callable[..., Any],
        *inputs: Any,
        augmented: bool = False,
        views: int = 1,
    ):
        super().__init__(model, frozen, loss_fn, *inputs, augmented=augmented, views=views)

    def loss(self, params: nnx.Module, activations: tuple[jax.Array, ...], *inputs: Any) -> Any:
        """What ``loss_fn(model, *inputs)`` returns, from the activations; variables of the model change as there.

        Args:
            params: The model.
            activations: Activations of the batch, of :meth:`activations` or :meth:`fetch`.
            *inputs: The batch; ``None`` in place of what is not needed.
        """
        key, variables = self._open(params)
        out, updates = self._live(key, variables, activations, inputs)
        changed = paths.tree_map(lambda name, leaf: updates.get(name, leaf), variables)
        nnx.update(params, changed)
        return out

    def _like(self, params: PyTree, frozen: Frozen) -> PrefixCache:
        return PrefixCache(params, frozen, self._loss_fn, *self._inputs, views=self.views)

    def _open(self, params: nnx.Module) -> tuple[Any, PyTree]:
        graphdef, variables = nnx.split(params)
        return graphdef, nnx.as_pure(variables)

    def _traceable(self, key: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
        def run(variables: PyTree, *inputs: Any) -> tuple[Any, dict[str, Any]]:
            module = nnx.merge(key, variables, copy=True)
            with hold(module, self.frozen):
                out = self._loss_fn(module, *inputs)
            return out, paths.flatten(nnx.as_pure(nnx.state(module)))

        return run
