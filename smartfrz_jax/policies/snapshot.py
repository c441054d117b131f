"""Copies of arrays by name of kernel, which a policy keeps in its state from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class Snapshot(NamedTuple):
    """Copies, or none.

    Attributes:
        is_taken: 1 where there are copies, else 0.
        copies: By name of kernel, for every kernel of the network; a scalar zero where there is none.
    """

    is_taken: Int[np.ndarray, ""]
    copies: dict[str, Float[Array, "..."]]

    @property
    def held(self) -> dict[str, Float[Array, "..."]]:
        """The copies that are there."""
        return {name: copy for name, copy in self.copies.items() if np.ndim(copy)} if self.is_taken else {}

    @property
    def is_blank(self) -> bool:
        """Whether it is the first one, and there is memory for copies that are none."""
        return not self.is_taken and any(np.ndim(copy) for copy in self.copies.values())


def blank(layers: Layers, params: PyTree) -> Snapshot:
    """The first one, with no copies, but of the shapes that they may have: a checkpoint fits what a run starts with.

    Args:
        layers: The network's layers.
        params: The network's parameter pytree.
    """
    leaves = check_params(layers.unstacked(params))
    zeros = {kernel: jnp.zeros_like(leaves[kernel]) for layer in layers for kernel in layer.kernels}
    return Snapshot(np.asarray(0, np.int32), zeros)


def none(layers: Layers) -> Snapshot:
    """No copies, and no memory for them."""
    zero = jax.device_put(np.zeros((), np.float32))
    return Snapshot(np.asarray(0, np.int32), {kernel: zero for layer in layers for kernel in layer.kernels})


def take(layers: Layers, arrays: Mapping[str, Any]) -> Snapshot:
    """Copies of some arrays, which the step may overwrite (see ``donate`` of ``TrainStep``).

    Args:
        layers: The network's layers.
        arrays: By name of kernel.
    """
    return Snapshot(np.asarray(1, np.int32), none(layers).copies | _copies(dict(arrays)))


def active_kernels(layers: Layers, frozen: Bool[np.ndarray, " layers"]) -> list[str]:
    """Names of the kernels of active layers.

    Args:
        layers: The network's layers.
        frozen: Which are frozen.
    """
    active = [layer for layer, is_frozen in zip(layers, frozen, strict=True) if not is_frozen]
    return [kernel for layer in active for kernel in layer.kernels]


@jax.jit
def _copies(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.copy, arrays)
