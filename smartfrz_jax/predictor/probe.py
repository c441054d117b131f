"""What the front of a network has learned so far, measured while it trains.

The layers up to some depth get the weights back that they had before the first step, and the training loss is taken on
a few batches. If it does not rise, the front has contributed nothing yet: the network either came with a front that is
good enough, or has not begun to learn. Weights alone do not tell this. It takes forward passes only.

Unlike :func:`~smartfrz_jax.learning.harm.swap_harm`, it needs no finished network: a policy can ask at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.pytrees import checks, paths, rows
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_FIRST = 12  # part of a run after which a policy measures first
PROBE_DEPTHS = 3
"""At how many depths a policy measures, unless told otherwise."""

Probe = Callable[[PyTree], Any]
"""From parameters to the training loss on some batch, always the same, without a trace in the network."""


def depths_of(active: Bool[np.ndarray, " layers"], n: int) -> list[int]:
    """Layers that end the fronts to be measured: evenly from front to back, the last one before the network's last.

    Where everything up to the next depth is frozen there is nothing to decide, so nothing is measured.

    Args:
        active: Which layers train, shape ``(layers,)``.
        n: Most depths.

    Returns:
        Indices of layers, ascending.
    """
    ends = _even(len(active) - 1, n)
    return [end for end, following in zip(ends, [*ends[1:], *ends[-1:]], strict=True) if active[: following + 1].any()]


def contributions(
    layers: Layers,
    probe: Probe,
    params: PyTree,
    start: PyTree,
    *,
    depths: Iterable[int],
) -> Float[np.ndarray, " layers"]:
    """Training loss with the start of the layers up to some depth, less that of the network as it is.

    Args:
        layers: The network's layers.
        probe: From a pytree like ``params`` to the loss.
        params: Parameters as they are.
        start: The same before the first step.
        depths: Indices of the layers that end the fronts.

    Returns:
        float32 of shape ``(layers,)``, NaN at other depths.

    Raises:
        TypeError: If a loss is no number.
        ValueError: If it is not a finite scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> now, start = ({"a": jnp.full((1, 1), a), "b": jnp.ones((1, 1))} for a in (1.0, 3.0))
        >>> layers = find_layers(now, lambda p, x: x @ p["a"] @ p["b"], jnp.ones((1, 1)))
        >>> contributions(layers, lambda p: (p["a"] * p["b"] - 1).sum() ** 2, now, start, depths=[0]).tolist()
        [4.0, nan]
    """
    found, before = np.full(len(layers), np.nan, np.float32), paths.flatten(start)
    base = _loss(probe, params)
    for depth in depths:
        found[depth] = _loss(probe, paths.tree_map(_reverted(before, layers, depth), params)) - base
    return found


def spread(measured: Float[np.ndarray, " layers"]) -> Float[np.ndarray, " layers"]:
    """Contributions up to every layer, from those at some: linear between them, from zero for no layers.

    Args:
        measured: NaN where not measured.

    Returns:
        Shape ``(layers,)``; NaN behind the deepest that was measured.
    """
    at = np.flatnonzero(~np.isnan(measured))
    if not len(at):
        return np.full(len(measured), np.nan, np.float32)
    layers = np.arange(len(measured))
    between = np.interp(layers, np.append(-1, at), np.append(0.0, measured[at]))
    return np.where(layers <= at[-1], between, np.nan).astype(np.float32)


def by_policy(measured: Float[np.ndarray, "records layers"]) -> Float[np.ndarray, "records layers"]:
    """Of many measurements in a run those that a policy would have made, by the defaults of ``smartfrz``.

    It measures at :data:`PROBE_DEPTHS` depths, and waits twice as long each time. A predictor must learn from no more:
    interpolated over fewer depths, contributions of front layers come out larger, as in truth they rise slowly there.

    Args:
        measured: NaN where not measured.

    Returns:
        The same with NaN elsewhere. The first record that is kept is a twelfth of the records into the run; every other
        comes after twice as many records, or more. Of depths those nearest to where a policy measures are kept.
    """
    kept, ends = np.full_like(measured, np.nan), _even(measured.shape[1] - 1, PROBE_DEPTHS)
    for record in due_records(measured):
        at = np.flatnonzero(~np.isnan(measured[record]))
        nearest = [at[np.argmin(np.abs(at - end))] for end in ends]
        kept[record, nearest] = measured[record, nearest]
    return kept


def due_records(measured: Float[np.ndarray, "records layers"]) -> list[int]:
    """The records of a run at which a policy would have measured, by the defaults of ``smartfrz``.

    Args:
        measured: NaN where not measured.

    Returns:
        Of the records at which anything was measured the first from a twelfth of them on, and every other that comes
        after twice as many records, or more.
    """
    due, wanted = [], max(1, len(measured) // _FIRST)
    for record in np.flatnonzero(~np.isnan(measured).all(axis=1)).tolist():
        if record + 1 >= wanted:
            due.append(record)
            wanted = 2 * (record + 1)
    return due


def latest(measured: Float[np.ndarray, "records layers"]) -> Float[np.ndarray, "records layers"]:
    """The contributions that were known at every record: those last measured, up to every layer.

    Args:
        measured: NaN where not measured.

    Returns:
        Shape ``(records, layers)``; NaN before the first measurement.
    """
    known, row = np.full(measured.shape, np.nan, np.float32), np.full(measured.shape[1], np.nan, np.float32)
    for record in range(len(measured)):
        if not np.isnan(measured[record]).all():
            row = spread(measured[record])
        known[record] = row
    return known


def _even(candidates: int, n: int) -> list[int]:
    """At most ``n`` of so many indices, evenly, the last one among them."""
    return sorted({max(1, round(candidates * i / n)) - 1 for i in range(1, n + 1)}) if candidates > 0 else []


def _reverted(before: dict[str, Any], layers: Layers, depth: int) -> Callable[[str, Any], Any]:
    """From name and leaf to the leaf, or the rows of it, as they were before if they are of layers up to some."""
    front = set(layers.names[: depth + 1])

    def choose(name: str, leaf: Any) -> Any:
        of_rows = layers.arrays.get(name, ())
        indices = [row for row, layer in enumerate(of_rows) if layer in front]
        if len(indices) == len(of_rows):
            return jax.device_put(before[name]) if of_rows else leaf
        if not indices or name not in layers.stacks:  # a table is as it was only with all its layers
            return leaf
        axis = layers.stacks[name].axis
        return rows.put(leaf, rows.take(jnp.asarray(before[name]), indices, axis), indices, axis)

    return choose


def _loss(probe: Probe, params: PyTree) -> float:
    expected = "a finite scalar; return the mean loss over a batch"
    loss = checks.number(probe(params), "probe", expected)
    if not np.isfinite(loss):
        raise ValueError(f"probe: got {loss}, expected {expected}")
    return loss
