"""LISA (Pan et al., 2024, arXiv 2403.17919): a few blocks train at a time, beside embeddings and head."""

from __future__ import annotations

import numpy as np

from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import Policy, kept
from smartfrz_jax.policies.rotating.turns import Rest, check_turns, rotating
from smartfrz_jax.pytrees import checks


def lisa(
    active: int = 2,
    *,
    switch_every: int = 20,
    max_sets: int | None = None,
    rest: Rest = "train",
    seed: int = 0,
    keep: Selectors | None = None,
) -> Policy:
    """A policy that trains some blocks at a time, drawn at random, and all that is in no block.

    Algorithm 1 of the paper: every ``switch_every`` steps, ``active`` blocks are drawn without replacement, each with
    the same probability; the others are frozen. Embeddings, last norm and head train all the time, with memory for
    their gradients and moments: in a small language model that is most of what LISA was to save. ``rest="freeze"``
    leaves them as they are, but for the head, unless ``keep=()``.

    Every set needs a program of its own, and of 30 blocks there are 435 pairs. With ``max_sets`` the sets are drawn
    beforehand, so that every block is in as many as any other, but for one; a run then compiles no more programs than
    that. Give ``TrainStep`` as many as its ``max_programs``.

    The paper's implementation makes a new optimizer at every switch: that is ``returning="fresh"`` of the optimizer.

    Args:
        active: Blocks that train at a time: the paper's gamma.
        switch_every: Train steps between draws: the paper's K. More than the ``lead`` of the freezer.
        max_sets: How many different sets there are; ``None``, as in the paper, for all that can be drawn.
        rest: Layers in no block: ``train`` always, ``freeze``, or ``turn``: each is drawn as a block is.
        seed: Seed of the draws.
        keep: Layers that always train: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` is the head, ``()`` none.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` does not fit the network, or it has fewer
            blocks than ``active``.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {f"block{i}": jnp.ones((2, 2)) for i in range(3)}
        >>> def forward(params, x):
        ...     return x @ params["block0"] @ params["block1"] @ params["block2"]
        >>> layers = find_layers(params, forward, jnp.ones((1, 2)))
        >>> policy = lisa(1, switch_every=5, keep=())
        >>> sorted(policy.update(policy.init(layers, params), layers, step=0, params=lambda: params)[0])
        ['block0', 'block1']
    """
    checks.count(active, "active")
    if max_sets is not None:
        checks.count(max_sets, "max_sets")
    check_turns(switch_every, seed, rest)
    keep = kept(keep)

    def trained(period: int, parts: int) -> np.ndarray:
        if active > parts:
            raise ValueError(
                f"active: got {active}, but only {parts} blocks of the network take turns; draw at most that many"
            )
        rng = np.random.default_rng((seed, period))
        if max_sets is None:
            return rng.choice(parts, active, replace=False)
        return _dealt(parts, active, max_sets, seed)[rng.integers(max_sets)]

    options = {
        "name": "lisa",
        "active": int(active),
        "switch_every": int(switch_every),
        "max_sets": None if max_sets is None else int(max_sets),
        "rest": rest,
        "seed": int(seed),
        "keep": described(keep),
    }
    return rotating(trained, switch_every=switch_every, rest=rest, keep=keep, options=options)


def _dealt(parts: int, active: int, sets: int, seed: int) -> list[np.ndarray]:
    """Sets of ``active`` parts each, from a shuffled row of all that is dealt out again and again."""
    row = np.random.default_rng(seed).permutation(parts)
    return [row[np.arange(number * active, (number + 1) * active) % parts] for number in range(sets)]
