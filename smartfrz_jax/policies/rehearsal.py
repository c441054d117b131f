"""Whether the front of a network is ready to be frozen from the start: tried in a much shorter run, a rehearsal.

Nothing that a policy reads from a run tells beforehand whether pre-training has left the front as it will be needed:
that shows only when the network is trained with and without it. A rehearsal does that at a small part of the price. It
trains the network for a few steps, once with nothing frozen and once under each policy in question, from the same
weights, on the same batches, with the whole schedule of learning rates compressed into these steps, and compares the
loss on held-out examples.

Freezing looks better in a rehearsal than it is: in few steps the front can learn little anyway. So a policy that does
*worse* than training everything even there is not to be used, and that is what :func:`rehearse` goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from smartfrz_jax.policies.base import Policy
from smartfrz_jax.policies.never import never
from smartfrz_jax.pytrees import checks

MakePolicy = Callable[[int], Policy]
"""Makes a policy for a run of so many train steps."""


class Harm(NamedTuple):
    """What freezing cost in a rehearsal, as a share of what was learned without.

    Attributes:
        harm: Held-out loss at the end, less that without freezing, by how far the latter has fallen from before the
            first step. Below 0 if freezing helped; NaN if nothing was learned without, or no more than twice its
            standard error over the held-out examples.
        error: Its standard error over the held-out examples; NaN if there is one number for all. How much another seed
            would change is not part of it.
    """

    harm: float
    error: float


class Rehearsal(NamedTuple):
    """What a rehearsal came to.

    Attributes:
        steps: Train steps.
        start: Mean held-out loss before the first step.
        never: Mean held-out loss after the last one, nothing frozen.
        harms: What each policy cost.
        chosen: The last policy that is good enough; ``None`` if none is, or if nothing was learned without freezing
            (harms are NaN then): more steps may tell.
    """

    steps: int
    start: float
    never: float
    harms: dict[str, Harm]
    chosen: str | None


def rehearse(
    train: Callable[[Policy, int], Any],
    policies: Mapping[str, MakePolicy],
    *,
    steps: int,
    tolerance: float = 0.0,
) -> Rehearsal:
    """Tries policies in a short run, and tells which one can be used in the long one.

    Args:
        train: From a policy and a number of train steps to the losses on held-out examples after them: float of shape
            ``(examples,)``, or one number, of which no standard error is known then. Each call begins with the weights
            that the long run begins with, and takes the same batches in the same order; the schedule of learning rates
            ends with the last of these steps. With 0 steps it only evaluates. The examples are best some hundreds that
            are kept out of the training set: test examples would have a part in the choice.
        policies: From names to functions of the number of train steps to a policy; those that save most come last.
        steps: Train steps of the rehearsal, a twentieth or a tenth of the long run. All takes as much as
            ``steps`` of the long run for ``never``, what every policy leaves of them, and an evaluation before the
            first step, one of ``never`` and one of every policy.
        tolerance: Largest harm, with a standard error added, that is good enough, as a share of what is learned. The
            default asks that a policy is, within what the held-out examples can tell, no worse than ``never``.

    Returns:
        Losses, harms, and the name of the policy to use: the last one that is good enough.

    Raises:
        ValueError: If there are no policies, ``steps`` is less than 1, ``tolerance`` is not finite, or losses are not
            finite or not of the same examples.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import smartfrz_jax as sfj
        >>> def apply(params, x):
        ...     return jnp.tanh(x @ params["front"]) @ params["head"]
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> front = jax.random.normal(jax.random.key(1), (8, 4))
        >>> y = jnp.tanh(x @ front).sum(axis=1, keepdims=True)  # the front is as it should be
        >>> start = {"front": front, "head": jnp.zeros((4, 1))}
        >>> layers = sfj.find_layers(start, apply, x)
        >>> def train(policy, steps):
        ...     params, state = start, policy.init(layers, start)
        ...     for step in range(1, steps + 1):
        ...         names, state = policy.update(state, layers, step=step, params=lambda: params)
        ...         frozen = sfj.Frozen(layers, names)
        ...         loss = lambda p: jnp.square(apply(p, x) - y).mean()
        ...         grads = sfj.value_and_grad(loss, frozen)(params)[1]
        ...         params = sfj.apply_updates(params, jax.tree.map(lambda g: -0.2 * g, grads), frozen)
        ...     return jnp.square(apply(params, x) - y)[:, 0]
        >>> from_the_start = {"front": lambda steps: sfj.static_prefix([(0.0, 0.5)], total_steps=steps)}
        >>> rehearse(train, from_the_start, steps=8, tolerance=0.05).chosen
        'front'
    """
    checks.count(steps, "steps")
    checks.function(train, "train", "a function from a policy and a number of steps to held-out losses")
    checks.by_name(policies, "policies", "a dict from names to functions of the number of steps to a policy")
    for name, make in policies.items():
        checks.function(make, "policies", f"a function from the number of steps to a policy for {name!r}")
    if not policies:
        raise ValueError(
            'policies: got none, expected at least one, such as {"half": lambda steps: static_prefix(...)}'
        )
    expected = "a finite share of what is learned, such as 0"
    if not np.isfinite(checks.number(tolerance, "tolerance", expected)):
        raise ValueError(f"tolerance: got {tolerance}, expected {expected}")
    start = _losses(train(never(), 0), "before the first step", None)
    base = _losses(train(never(), steps), "with nothing frozen", start.shape)
    harms = {
        name: _harm(
            _losses(train(_made(make, steps, name), steps), f"under {name!r}", start.shape) - base, start - base
        )
        for name, make in policies.items()
    }
    good = [name for name, (harm, error) in harms.items() if harm + np.nan_to_num(error) <= tolerance]  # NaN is not
    return Rehearsal(steps, float(start.mean()), float(base.mean()), harms, good[-1] if good else None)


def _made(make: MakePolicy, steps: int, name: str) -> Policy:
    policy = make(steps)
    checks.instance(policy, Policy, "policies", f"a smartfrz_jax.Policy from the function of {name!r}")
    return policy


def _losses(returned: Any, when: str, shape: tuple[int, ...] | None) -> np.ndarray:
    expected = "losses on held-out examples, a float for each"
    losses = np.atleast_1d(checks.array(returned, "train", expected).astype(np.float64))
    if losses.ndim != 1 or losses.size == 0 or losses.shape != (shape or losses.shape):
        raise ValueError(
            f"train: got losses of shape {losses.shape} {when}, expected one for each of the same held-out examples, "
            f"{shape or '(examples,)'}"
        )
    if not np.isfinite(losses).all():
        raise ValueError(
            f"train: got a loss that is NaN or infinite {when}, expected finite numbers; if the training diverged, "
            "lower its learning rate"
        )
    return losses


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, NaN of one value."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def _harm(lost: np.ndarray, learned: np.ndarray) -> Harm:
    mean, error = _mean(learned)
    if mean <= 2 * np.nan_to_num(error):  # harm would be a large share of next to nothing, either way
        return Harm(float("nan"), float("nan"))
    lost_mean, lost_error = _mean(lost)
    return Harm(lost_mean / mean, lost_error / mean)
