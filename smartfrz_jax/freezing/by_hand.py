"""Who decides about a layer: the policy of the run, or somebody by hand, before the run or in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from smartfrz_jax.callbacks.base import FreezeEvent
from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, select
from smartfrz_jax.policies.base import Policy
from smartfrz_jax.pytrees.types import PyTree


class ByHand(NamedTuple):
    """Layers about which the policy does not decide.

    Attributes:
        frozen: Those that are frozen by hand: they stay so.
        active: Those that train again by hand: they do so until they are frozen by hand, or the policy decides anew.
            It has done so once it does not name them after a step.

    Example:
        >>> by_hand = ByHand(frozenset("a")).unfreeze({"b"})
        >>> names, by_hand = by_hand.decide(frozenset("bc"))
        >>> sorted(names), by_hand.decide(frozenset("c"))[1].active
        (['a', 'c'], frozenset())
    """

    frozen: frozenset[str]
    active: frozenset[str] = frozenset()

    def freeze(self, names: Iterable[str]) -> ByHand:
        """With more that is frozen by hand."""
        return ByHand(self.frozen.union(names), self.active.difference(names))

    def unfreeze(self, names: Iterable[str]) -> ByHand:
        """With more that trains again by hand."""
        return ByHand(self.frozen.difference(names), self.active.union(names))

    def decide(self, names: frozenset[str]) -> tuple[frozenset[str], ByHand]:
        """The frozen layers of the network, where the policy names some, and what stands from then on."""
        active = self.active & names
        return names - active | self.frozen, ByHand(self.frozen, active)


def beginning(frozen: Frozen | Selectors | Policy, layers: Layers, params: PyTree) -> tuple[Frozen, frozenset[str]]:
    """The frozen set with which an optimizer is made.

    Args:
        frozen: The set; or the layers, as in ``Frozen(layers, frozen)``; or the policy of the run, for what it has
            frozen from the beginning.
        layers: The network's layers.
        params: Its parameter pytree, or one of shapes, if no policy is given.

    Returns:
        The set, and those of its layers about which the policy goes on deciding: all, or none if no policy is given.

    Raises:
        TypeError: If ``frozen`` is none of these.
        ValueError: If a layer is not one of the network's, or the set is of another network.
    """
    if isinstance(frozen, Policy):
        if frozen.start is None:  # the state of some policies is large
            return Frozen(layers), frozenset()
        names = starting(frozen, frozen.init(layers, params), layers)
        return Frozen(layers, names), names
    if isinstance(frozen, Frozen):
        check_frozen(frozen, layers)
        return frozen, frozenset()
    if getattr(frozen, "__annotations__", {}).get("return") in (Policy, Policy.__name__):
        name = getattr(frozen, "__name__", repr(frozen))
        raise TypeError(f"frozen: got {name}, a function that makes a policy, expected what it makes: {name}(...)")
    return Frozen(layers).changed(frozen), frozenset()


def starting(policy: Policy, state: PyTree, layers: Layers) -> frozenset[str]:
    """The layers that a policy has frozen before the first step.

    Args:
        policy: The policy.
        state: Its first state.
        layers: The network's layers.

    Raises:
        ValueError: If it names a layer that the network does not have.
    """
    if policy.start is None:
        return frozenset()
    return frozenset(layers.check(policy.start(state, layers), "policy's decision"))


def begun(policy: Policy, state: PyTree, frozen: Frozen, names: frozenset[str], steps: int) -> ByHand:
    """Who decides in a run for which an optimizer was made with layers that a policy has frozen from the beginning.

    After the first step another policy may follow on that one: to it, these layers are frozen by hand.

    Args:
        policy: The policy.
        state: Its first state.
        frozen: The frozen set.
        names: The layers with which the optimizer was made.
        steps: Train steps done.

    Raises:
        ValueError: If the policy begins with other layers, and so does the run.
    """
    begins = starting(policy, state, frozen.layers) if names else names
    if not steps:
        check_beginning(begins, names)
    return ByHand(frozen.names - names if begins == names else frozen.names)


def check_beginning(names: frozenset[str], expected: frozenset[str]) -> None:
    """Checks that a policy begins as the one for which an optimizer was made.

    Raises:
        ValueError: If it begins with other layers.
    """
    if names != expected:
        raise ValueError(
            f"policy: has {text(names)} frozen from the beginning, expected {text(expected)}, as the policy for which "
            "the optimizer was made; pass the same policy to both, or make the optimizer anew"
        )


def to_unfreeze(names: Selectors | None, frozen: Frozen, events: Iterable[FreezeEvent]) -> frozenset[str]:
    """The layers that are to train again.

    Args:
        names: What selects them; ``None`` for those that froze last.
        frozen: The frozen set.
        events: What froze when, in order.

    Raises:
        TypeError: If ``names`` selects no layers.
        ValueError: If one of ``names`` is not a layer of the network, or nothing froze in the run.
    """
    if names is not None:
        return frozenset(select(frozen.layers, names))
    undone = [frozen.names.intersection(event.names) for event in events]
    undone = [some for some in undone if some]
    if not undone:
        raise ValueError(
            f"names: got none, and nothing that froze in the run is frozen now ({text(frozen.names)} from its start), "
            "expected names of layers"
        )
    return undone[-1]


def check_adopted(frozen: Frozen, own: Frozen) -> None:
    """Checks a frozen set that was changed by hand.

    Args:
        frozen: The frozen set with which the loop works.
        own: That of the freezer.

    Raises:
        TypeError: If it is no frozen set.
        ValueError: If it is of another network, or layers train that the freezer has frozen.
    """
    check_frozen(frozen)
    if frozen.layers != own.layers:
        raise ValueError(
            f"frozen: is of a network with the layers {text(frozen.layers.names)}, expected those of the freezer, "
            f"{text(own.layers.names)}; freeze by names, or make another Freezer"
        )
    if not own.names <= frozen.names:
        raise ValueError(
            f"frozen: got {text(frozen.names)}, but the freezer has frozen {text(own.names)}, and they stay until the "
            "policy decides otherwise; go on from what its step returned, freeze its `frozen` again, or let layers "
            "train by its unfreeze"
        )


def text(names: Iterable[str]) -> str:
    """Names for a message."""
    names = sorted(names)
    return (", ".join(names[:5]) or "nothing") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
