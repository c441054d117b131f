"""The part of each batch that a process reads, and the devices that its examples go to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.devices.mesh import by_example, replicate


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process reads of every batch.

    Attributes:
        mesh: The devices that train, perhaps of several processes; None for the one that JAX takes by default.
        batch_size: Examples in a batch, of all processes.
    """

    mesh: Mesh | None
    batch_size: int

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Places in the batch of the examples that this process reads, in ascending order, int64.

        Those of all processes are a partition of the batch.
        """
        if self.mesh is None:
            return np.arange(self.batch_size)
        parts = by_example(self.mesh).addressable_devices_indices_map((self.batch_size,)).values()
        return np.unique(np.concatenate([np.arange(self.batch_size)[part] for part in parts]))

    def put(self, arrays: Any) -> Any:
        """The batch on the devices.

        Args:
            arrays: Pytree of NumPy arrays with the examples of :attr:`rows` along the first axis.

        Returns:
            Arrays of the whole batch, of which each device holds its examples.
        """
        if self.mesh is None:
            return jax.device_put(arrays)
        sharding = by_example(self.mesh)

        def of_process(local: Any) -> jax.Array:
            shape = (self.batch_size, *np.shape(local)[1:])
            return jax.make_array_from_process_local_data(sharding, local, shape)

        return jax.tree.map(of_process, arrays)

    def replicate(self, arrays: Any) -> Any:
        """Arrays that every process has, whole on every device."""
        return jax.device_put(arrays) if self.mesh is None else replicate(arrays, self.mesh)
