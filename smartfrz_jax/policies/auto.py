"""The policy to begin with: the front of a pre-trained network waits, and what must stop does so late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import Policy, ScheduleState, check_update, kept, numbers_of
from smartfrz_jax.policies.progress import progress
from smartfrz_jax.policies.static_prefix import StagesState, static_prefix
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

# Half of the cost waits for 35 % of the run: docs/results/long-runs.md.
_FRONT = 0.5
_WAIT = 0.35
_NOTHING_STOPS = 1.0
_FROM_SCRATCH = 0.95  # the default of progress


class AutoState(NamedTuple):
    """State of :func:`auto`.

    Attributes:
        waiting: Of the front that waits.
        stopping: Of the layers that stop.
    """

    waiting: StagesState
    stopping: ScheduleState


def auto(
    *,
    total_steps: int,
    costs: Mapping[str, float] | None = None,
    pretrained: bool = True,
    caution: float | None = None,
    keep: Selectors | None = None,
) -> Policy:
    """The policy that the long runs recommend for fine-tuning.

    1. The first layers, half of the network's cost, wait: they are frozen for the first 35 % of the run. What is behind
       them moves furthest then, and the pre-trained front does not have to follow. Gradual unfreezing (Howard and
       Ruder 2018, arXiv 1801.06146) and linear probing before fine-tuning (Kumar et al. 2022, arXiv 2202.10054) do so.
    2. Then all layers train.
    3. With a ``caution`` below 1, layers stop front to back, as with :func:`smartfrz_jax.progress`.

    Nothing of this depends on what happens in the run.

    Args:
        total_steps: Train steps of the run.
        costs: Cost of each layer in any unit, by layer name, such as ``account.flops().forward_by_layer``; ``None``
            makes all equal.
        pretrained: Whether the network starts from well trained weights, not random ones, nor those of an epoch: there
            a front that waited lost one point in one run and four in another (docs/results/long-runs.md). With False
            nothing waits.
        caution: From 0, layers stop early, to 1, none stops: as of :func:`smartfrz_jax.progress`. ``None`` is 1 with
            ``pretrained``, else 0.95. At 0.95 a ResNet-20 lost nothing, and an EfficientNet-Lite0 0.9 points.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        TypeError: If ``pretrained`` is no bool.
        ValueError: If an option is out of range; at ``init``, if ``keep`` or ``costs`` do not fit the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = auto(total_steps=100)
        >>> state = policy.init(layers, params)
        >>> [sorted(policy.update(state, layers, step=step, params=lambda: params)[0]) for step in (1, 34, 35)]
        [['a'], ['a'], []]
    """
    checks.instance(pretrained, bool, "pretrained", "True or False: whether the network starts from trained weights")
    costs, keep = numbers_of(costs), kept(keep)
    front = _FRONT if pretrained else 0.0
    if caution is None:
        caution = _NOTHING_STOPS if pretrained else _FROM_SCRATCH
    waiting = static_prefix([(0.0, front), (_WAIT, 0.0)], total_steps=total_steps, costs=costs, keep=keep)
    stopping = progress(total_steps=total_steps, caution=caution, keep=keep)

    def init(layers: Layers, params: PyTree) -> AutoState:
        return AutoState(waiting.init(layers, params), stopping.init(layers, params))

    def update(
        state: AutoState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], AutoState]:
        check_update(state, AutoState, layers, step)
        waits, _ = waiting.update(state.waiting, layers, step=step, params=params)
        stopped, _ = stopping.update(state.stopping, layers, step=step, params=params)
        return waits | stopped, state

    def start(state: AutoState, layers: Layers) -> frozenset[str]:
        assert waiting.start is not None
        assert stopping.start is not None
        return waiting.start(state.waiting, layers) | stopping.start(state.stopping, layers)

    options = {
        "name": "auto",
        "total_steps": int(total_steps),
        "costs": costs,
        "pretrained": pretrained,
        "caution": float(caution),
        "keep": described(keep),
    }
    return Policy(init, update, options=options, start=start)
