"""Several processes that train one network: how they start, and what only the first of them does."""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import nnx
from jax.experimental import multihost_utils

from smartfrz_jax.pytrees import hosts

# Seconds after which a process that is not heard of counts as dead, and then in which the others end.
HEARTBEAT = 20
SHUTDOWN = 20

T = TypeVar("T", bound=nnx.Module)


def start() -> None:
    """Joins the other processes; before anything that uses a device.

    Who they are is found out by ``jax.distributed.initialize``: on SLURM, Open MPI, Kubernetes and TPU pods by itself.
    Their devices are connected here, where all are at the same moment: on CPU they have 30 seconds for that.

    Raises:
        ValueError: If it finds nothing, or a process of that number is there already.
    """
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN)
    except ValueError as error:
        raise ValueError(
            f"--distributed: JAX finds no cluster to be part of ({error}), expected a process that SLURM (srun), Open "
            "MPI (mpirun), Kubernetes (with the package kubernetes) or a TPU pod has started; leave it out for one "
            "process"
        ) from error
    wait_for_all("at the start")


def is_first() -> bool:
    """Whether this process writes the log, the report and the weights, and prints."""
    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Waits until every process is at the same moment; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def whole(module: T) -> T:
    """A module whose arrays this process has whole; the module itself where there is one process.

    All processes must call it.
    """
    if jax.process_count() == 1:
        return module
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, hosts.fetch(state))
