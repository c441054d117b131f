"""Full training: the baseline of every table of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import Policy
from smartfrz_jax.pytrees.types import PyTree


def never() -> Policy:
    """A policy that freezes nothing.

    Returns:
        The policy; its state is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"], jnp.ones((1, 2)))
        >>> policy = never()
        >>> policy.update(policy.init(layers, params), layers, step=1, params=lambda: params)
        (frozenset(), ())
    """

    def init(layers: Layers, params: PyTree) -> tuple[()]:
        return ()

    def update(
        state: tuple[()], layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], tuple[()]]:
        return frozenset(), state

    return Policy(init, update, options={"name": "never"})
