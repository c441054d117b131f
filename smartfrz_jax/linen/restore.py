"""Restores a part of a run's checkpoint into a pytree of parameters."""

from __future__ import annotations

from smartfrz_jax.freezing import saved_run
from smartfrz_jax.layers.layers import check_params
from smartfrz_jax.layers.restore import Restored, restore
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.pytrees.file_paths import PathLike
from smartfrz_jax.pytrees.types import PyTree


def restore_params(
    path: PathLike, params: PyTree, select: Selectors = ..., *, strict: bool = True
) -> tuple[PyTree, Restored]:
    """Reads the weights of a run, or some of them: a backbone without its head, for instance.

    Only what is selected is read. The run may have had any policy, optimizer and frozen layers, and another head.

    Args:
        path: Directory of the checkpoint, from the ``save`` of a ``Freezer``, or the ``save_run`` of one of
            :mod:`smartfrz_jax`.
        params: Parameter pytree, or one of several collections that was saved as such.
        select: Names of parameters, such as ``"encoder/kernel"``, globs (``"encoder/*"``), regular expressions,
            predicates or NNX filters of paths; see :func:`smartfrz_jax.layers.select.select`. ``...`` is all.
        strict: Whether what is selected must be the same in ``params`` and checkpoint. Else what is in one of them
            alone is left.

    Returns:
        The pytree with what was restored; and names of that, of what was selected and not found, and of what was left
        in the checkpoint.

    Raises:
        FileNotFoundError: If there is no such directory.
        TypeError: If ``params`` is no pytree of arrays, or ``select`` selects no names.
        ValueError: If the checkpoint is damaged, something is missing, nothing is found, or an array has another shape
            or dtype.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> import smartfrz_jax as sfj
        >>> params = {"backbone": jnp.ones((2, 3)), "head": jnp.ones((3, 4))}
        >>> layers = sfj.find_layers(params, lambda p, x: x @ p["backbone"] @ p["head"], jnp.ones((1, 2)))
        >>> path = tempfile.mkdtemp() + "/run"
        >>> sfj.Freezer(sfj.policies.never(), layers, params).save_run(path, params)
        >>> params, restored = restore_params(path, {"backbone": jnp.zeros((2, 3)), "head": jnp.zeros((3, 7))}, "back*")
        >>> float(params["backbone"].sum()), restored.left
        (6.0, ('head',))
    """
    check_params(params)
    return restore(path, params, select, saved_run.KIND, strict=strict)
