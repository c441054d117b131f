"""Restores a part of a run's checkpoint into a model."""

from __future__ import annotations

from flax import nnx

from smartfrz_jax.freezing import saved_run
from smartfrz_jax.layers.restore import Restored, restore
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.pytrees.file_paths import PathLike


def restore_params(path: PathLike, model: nnx.Module, select: Selectors = ..., *, strict: bool = True) -> Restored:
    """Reads the weights of a run, or some of them, into a model: a backbone without its head, for instance.

    Only what is selected is read. The run may have had any policy, optimizer and frozen layers, and another head. Its
    statistics and whatever other variables it had count, too, but for random streams. Make the optimizer afterwards.

    Args:
        path: Directory of the checkpoint, from the ``save`` of a ``Freezer``.
        model: The model; it is changed.
        select: Names of variables, such as ``"encoder/0/kernel"``, globs (``"encoder/*"``), regular expressions,
            predicates or NNX filters of paths; see :func:`smartfrz_jax.layers.select.select`. ``...`` is all.
        strict: Whether what is selected must be the same in model and checkpoint. Else what is in one of them alone
            is left.

    Returns:
        Names of what was restored, of what was selected and not found, and of what was left in the checkpoint.

    Raises:
        FileNotFoundError: If there is no such directory.
        TypeError: If ``model`` is no module, or ``select`` selects no names.
        ValueError: If the checkpoint is damaged, something is missing, nothing is found, or an array has another shape
            or dtype. Nothing has changed then.

    Example:
        >>> import jax.numpy as jnp, optax, tempfile
        >>> import smartfrz_jax as sfj
        >>> def make(classes):
        ...     layers = [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, classes, rngs=nnx.Rngs(1))]
        ...     return nnx.Dict(backbone=layers[0], head=layers[1])
        >>> def forward(model, x):
        ...     return model.head(model.backbone(x))
        >>> model = make(4)
        >>> layers = sfj.nnx.find_layers(model, jnp.ones((1, 2)), forward=forward)
        >>> optimizer = sfj.nnx.Optimizer(model, optax.adam(1e-3), layers=layers)
        >>> path = tempfile.mkdtemp() + "/run"
        >>> sfj.nnx.Freezer(model, optimizer, sfj.policies.never()).save(path)
        >>> restore_params(path, make(7), "backbone/*").left
        ('head/bias', 'head/kernel')
    """
    check_model(model)
    state = nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngState)))
    new, restored = restore(path, state, select, saved_run.KIND, strict=strict)
    nnx.update(model, new)
    return restored
