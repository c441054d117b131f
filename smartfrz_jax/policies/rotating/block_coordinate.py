"""Block coordinate descent: every block trains alone, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import Policy, kept
from smartfrz_jax.policies.rotating.turns import Rest, check_turns, rotating
from smartfrz_jax.pytrees import checks

# The next group is nearer the head, or nearer the input, or the order is drawn.
Order: TypeAlias = Literal["ascending", "descending", "random"]
ORDERS = ("ascending", "descending", "random")


def badam(
    switch_every: int = 100,
    *,
    order: Order = "random",
    rest: Rest = "freeze",
    seed: int = 0,
    keep: Selectors | None = None,
) -> Policy:
    """A policy that trains one block at a time, each for some steps: BAdam (Luo et al., 2024, arXiv 2404.02827).

    With ``order="random"`` the blocks are shuffled anew whenever all had their turn. Embeddings, last norm and head are
    frozen, as in the authors' code. The head is kept by default, as of all policies: one that was not trained before
    has to train all the time, as they advise. ``keep=()`` freezes it, too.

    The paper starts every block's moments afresh: that is ``returning="fresh"`` of the optimizer.

    Args:
        switch_every: Train steps of a block: the paper's K, 100 in the code. The authors advise the steps of an epoch,
            divided by the number of blocks, or 50 if that is more.
        order: ``ascending`` from the input to the head, ``descending``, or ``random``.
        rest: Layers in no block: ``freeze``, ``train`` always, or ``turn``: each is one more block.
        seed: Seed of the order.
        keep: Layers that always train: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` is the head, ``()`` none.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` does not fit the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {f"block{i}": jnp.ones((2, 2)) for i in range(3)}
        >>> def forward(params, x):
        ...     return x @ params["block0"] @ params["block1"] @ params["block2"]
        >>> layers = find_layers(params, forward, jnp.ones((1, 2)))
        >>> policy = badam(10, order="ascending", keep=())
        >>> state = policy.init(layers, params)
        >>> for step in range(0, 30, 10):
        ...     frozen, state = policy.update(state, layers, step=step, params=lambda: params)
        ...     print(sorted(frozen))
        ['block1', 'block2']
        ['block0', 'block2']
        ['block0', 'block1']
    """
    return _in_turn({"name": "badam"}, 1, switch_every, order=order, reshuffled=True, rest=rest, seed=seed, keep=keep)


def hift(
    group: int = 1,
    *,
    switch_every: int = 1,
    order: Order = "ascending",
    rest: Rest = "turn",
    seed: int = 0,
    keep: Selectors | None = (),
) -> Policy:
    """A policy that trains one group of blocks in a step, and the next in the next: HiFT (arXiv 2401.15207).

    Embeddings and head take turns, as blocks do. With ``order="random"`` the blocks are shuffled once, before the run.
    The moments of all groups are kept, in the paper on the host: that is ``returning="kept"`` of the optimizer. The
    paper lowers the learning rate once all groups had their turn; give the optimizer a schedule that counts so, as
    ``lambda step: schedule(step // groups)``.

    Args:
        group: Blocks of a group: the paper's m. The last group may have fewer.
        switch_every: Train steps of a group; 1 in the paper.
        order: ``ascending`` from the input to the head (the paper's bottom2up), ``descending`` (top2down) or
            ``random``.
        rest: Layers in no block: ``turn``: each is a block; ``train`` always, or ``freeze``.
        seed: Seed of the order.
        keep: Layers that always train: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``()`` none, ``None`` is the head.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` does not fit the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {f"block{i}": jnp.ones((2, 2)) for i in range(3)}
        >>> def forward(params, x):
        ...     return x @ params["block0"] @ params["block1"] @ params["block2"]
        >>> layers = find_layers(params, forward, jnp.ones((1, 2)))
        >>> policy = hift(2)
        >>> state = policy.init(layers, params)
        >>> for step in range(3):
        ...     frozen, state = policy.update(state, layers, step=step, params=lambda: params)
        ...     print(sorted(frozen))
        ['block2']
        ['block0', 'block1']
        ['block2']
    """
    checks.count(group, "group")
    own = {"name": "hift", "group": int(group)}
    return _in_turn(own, group, switch_every, order=order, reshuffled=False, rest=rest, seed=seed, keep=keep)


def _in_turn(
    own: Mapping[str, Any],
    group: int,
    switch_every: int,
    *,
    order: Order,
    reshuffled: bool,
    rest: Rest,
    seed: int,
    keep: Selectors | None,
) -> Policy:
    check_turns(switch_every, seed, rest)
    checks.choice(order, "order", ORDERS)
    keep = kept(keep)

    def trained(period: int, parts: int) -> np.ndarray:
        groups = -(-parts // group)
        cycle, place = divmod(period, groups)
        row = np.arange(parts)
        if order == "random":
            row = np.random.default_rng((seed, cycle if reshuffled else 0)).permutation(parts)
        elif order == "descending":
            row = row[::-1]
        return row[place * group : (place + 1) * group]

    options = {
        **own,
        "switch_every": int(switch_every),
        "order": order,
        "rest": rest,
        "seed": int(seed),
        "keep": described(keep),
    }
    return rotating(trained, switch_every=switch_every, rest=rest, keep=keep, options=options)
