"""The prefix cache of an NNX model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from smartfrz_jax.caching import prefix_cache
from smartfrz_jax.caching.exchange import divided, rows_sharding
from smartfrz_jax.caching.loss_jaxpr import INPUTS
from smartfrz_jax.caching.split_loss import SplitLoss
from smartfrz_jax.caching.store import check_views, stored_shapes
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs import example_axis
from smartfrz_jax.nnx.hold import hold
from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """A :class:`~smartfrz_jax.caching.loss_adapter.LossAdapter` of losses of ``(model, *inputs)``."""

    def split(self, params: nnx.Module) -> tuple[Hashable, PyTree]:
        """As of ``LossAdapter``."""
        check_model(params, "params")
        graphdef, variables = nnx.split(params)
        return graphdef, nnx.as_pure(variables)

    def traceable(
        self, loss_fn: Callable[..., Any], frozen: Frozen, static: Any
    ) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """As of ``LossAdapter``."""

        def run(variables: PyTree, *inputs: Any) -> tuple[Any, dict[str, Any]]:
            module = nnx.merge(static, variables, copy=True)
            with hold(module, frozen):
                out = loss_fn(module, *inputs)
            return out, paths.flatten(nnx.as_pure(nnx.state(module)))

        return run

    def write(self, params: nnx.Module, variables: PyTree, updates: dict[str, Any]) -> None:
        """As of ``LossAdapter``."""
        nnx.update(params, paths.tree_map(lambda name, leaf: updates.get(name, leaf), variables))


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
        check_model(model)
        check_views(views, augmented=augmented)
        self._begin(SplitLoss(model, frozen, loss_fn, inputs, ModelLoss()), views)

    def goes_on(self, model: nnx.Module, frozen: Frozen) -> bool:
        """Whether a step may go on from these activations, of fewer layers, when some more are frozen."""
        if not self.frozen.names < frozen.names or frozen.reads_rows or frozen.lookups:
            return False
        with hold(model, frozen):
            return self._loss.fits(model)


def needed_inputs(cache: PrefixCache, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Inputs, with ``None`` for those that the loss of a cache does not read."""
    return paths.tree_map(lambda name, leaf: leaf if INPUTS + name in cache.needed else None, tuple(inputs))


def inputs_from_activations(cache: PrefixCache, inputs: Sequence[Any], dtype: DTypeLike | None) -> tuple[Any, ...]:
    """Inputs of the loss of a cache, with shapes in place of activations, which are stored as ``dtype``."""
    examples = example_axis.count(inputs)
    shapes, sharding = stored_shapes(cache.frontier, examples, dtype), divided(rows_sharding(inputs), examples)
    return tuple(shape.update(sharding=sharding) for shape in shapes), *needed_inputs(cache, inputs)
