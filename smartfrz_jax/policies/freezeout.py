"""Linear freezing: FreezeOut (Brock et al., 2017, arXiv 1706.04983), the paper's first baseline (appendix B)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import (
    NEVER,
    Policy,
    freezable,
    kept,
    scheduled,
)
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree

Spacing = Literal["linear", "cubic"]


def freezeout(
    *, total_steps: int, t0: float = 0.5, spacing: Spacing = "linear", keep: Selectors | None = None
) -> Policy:
    r"""A policy that freezes layers front to back at fixed moments.

    Layer i of L is frozen after the share :math:`t_i = t_0 + (1 - t_0)\, i / (L - 1)` of the run, or after
    :math:`t_i^3` with cubic spacing. FreezeOut anneals each layer's learning rate to zero by that moment: that is the
    optimizer's part, see :func:`freezeout_schedules`.

    Args:
        total_steps: Train steps of the run.
        t0: Moment at which the first layer freezes, as a share of the run (before it is cubed); the paper found 0.5
            best, the original code takes 0.8 with cubic spacing.
        spacing: ``"linear"`` or ``"cubic"``.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = freezeout(total_steps=100, t0=0.5)
        >>> policy.update(policy.init(layers, params), layers, step=50, params=lambda: params)[0]
        frozenset({'a'})
    """
    _check_schedule(total_steps, t0, spacing)
    keep = kept(keep)

    def freeze_at(layers: Layers) -> np.ndarray:
        # Rounded first: 0.7 * 100 is a little above 70, and the layer must not train a step with a rate of zero.
        moments = np.ceil(np.round(_freeze_shares(layers, t0, spacing, keep) * total_steps, 6))
        return np.where(freezable(layers, keep), moments, NEVER)

    options = {
        "name": "freezeout",
        "total_steps": int(total_steps),
        "t0": float(t0),
        "spacing": spacing,
        "keep": described(keep),
    }
    return scheduled(freeze_at, options)


def freezeout_schedules(
    layers: Layers,
    *,
    learning_rate: float,
    total_steps: int,
    t0: float = 0.5,
    spacing: Spacing = "linear",
    scale_rate: bool = False,
    keep: Selectors | None = None,
) -> dict[str, optax.Schedule]:
    r"""Each layer's learning rate in FreezeOut: a cosine to zero at the moment at which :func:`freezeout` freezes it.

    .. math:: \alpha_i(t) = \tfrac12\, \alpha_i(0)\, (1 + \cos(\pi t / t_i))

    Args:
        layers: The network's layers.
        learning_rate: The rate at the start.
        total_steps: Train steps of the run.
        t0: As in :func:`freezeout`.
        spacing: As in :func:`freezeout`.
        scale_rate: Whether a layer starts at ``learning_rate`` divided by its share of the run, so that all layers can
            go equally far.
        keep: As in :func:`freezeout`; a layer that is kept anneals until the end of the run.

    Returns:
        An optax schedule for each layer, by name, for :func:`scale_by_layer_schedule`.

    Raises:
        ValueError: If an option is out of range, or ``keep`` names no layer of the network.
    """
    check_layers(layers)
    _check_schedule(total_steps, t0, spacing)
    checks.flag(scale_rate, "scale_rate")
    checks.positive(learning_rate, "learning_rate")
    shares = _freeze_shares(layers, t0, spacing, kept(keep))
    return {
        name: _cosine(learning_rate / share if scale_rate else learning_rate, share * total_steps)
        for name, share in zip(layers.names, shares.tolist(), strict=True)
    }


def scale_by_layer_schedule(layers: Layers, schedules: Mapping[str, optax.Schedule]) -> optax.GradientTransformation:
    """Multiplies the updates of each layer by minus its own learning rate.

    Chain it after what gives the direction, as ``optax.scale_by_learning_rate`` would be, and inside
    :func:`smartfrz_jax.freezing.transform.freeze`.

    Args:
        layers: The network's layers.
        schedules: Learning rate by the number of updates so far, for each layer by name.

    Returns:
        An optax transformation. Its state counts the updates.

    Raises:
        ValueError: If a layer has no schedule, a schedule has no layer, or, in ``update``, a parameter has no layer.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> schedules = freezeout_schedules(layers, learning_rate=0.1, total_steps=100)
        >>> tx = optax.chain(optax.trace(0.9), scale_by_layer_schedule(layers, schedules))
    """
    check_layers(layers)
    checks.by_name(schedules, "schedules", "a dict from layer names to schedules, as freezeout_schedules gives it")
    layers.check(schedules, "schedules")
    if layers.stacks:
        raise ValueError(
            f"layers: got rows of stacked parameters ({next(iter(layers.stacks))!r}) as layers, expected whole ones: "
            "an optimizer sees rows together, and gives them no rates of their own; find the layers without rows=True"
        )
    without = [name for name in layers.names if name not in schedules]
    if without:
        raise ValueError(f"schedules: got none for layer {without[0]!r}; each of the {len(layers)} layers needs one")
    for name, schedule in schedules.items():
        checks.function(schedule, "schedules", f"a function from the number of updates to a rate for layer {name!r}")

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, optax.ScaleByScheduleState]:
        count = jnp.asarray(state.count)
        rate = functools.cache(lambda layer: jnp.asarray(schedules[layer](count)))  # only of layers that are here

        def scale(name: str, leaf: jax.Array) -> jax.Array:
            if name not in layers.owner:
                raise ValueError(
                    f"updates: {name!r} belongs to no layer; call find_layers on the parameters that train"
                )
            return leaf * -rate(layers.owner[name]).astype(leaf.dtype)

        return paths.tree_map(scale, updates), optax.ScaleByScheduleState(count=optax.safe_increment(count))

    return optax.GradientTransformation(init, update)


def _check_schedule(total_steps: int, t0: float, spacing: str) -> None:
    checks.count(total_steps, "total_steps")
    checks.fraction(t0, "t0", zero=False)
    checks.choice(spacing, "spacing", get_args(Spacing))


def _freeze_shares(layers: Layers, t0: float, spacing: Spacing, keep: Selectors | None) -> np.ndarray:
    """Share of the run for which each layer trains, shape ``(layers,)``; one for a layer that is kept."""
    shares = np.linspace(1.0, t0, len(layers))[::-1]  # from the end, so that a lone layer trains to the end
    return np.where(freezable(layers, keep), shares**3 if spacing == "cubic" else shares, 1.0)


def _cosine(rate: float, steps: float) -> optax.Schedule:
    def schedule(count: Any) -> jax.Array:
        progress = jnp.asarray(count, jnp.float32) / steps
        return jnp.where(progress < 1.0, 0.5 * rate * (1.0 + jnp.cos(jnp.pi * progress)), 0.0)

    return schedule
