"""Which arguments of a train step have frozen sets, and which of these are about to change."""

from __future__ import annotations

import weakref
from typing import Any

import jax

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.programs.arguments import Arguments, has_frozen, is_node
from smartfrz_jax.pytrees.types import PyTree


class Owners:
    """The optimizers and states that a step was called with last, and what was announced of them."""

    def __init__(self) -> None:
        self._called: list[Any] = []
        self._returned: list[Any] = []
        self._frozen: tuple[Frozen, ...] = ()
        self._announced: dict[int, tuple[Frozen, Any]] = {}

    def called(self, args: Arguments) -> None:
        """The step was called with these arguments."""
        self._called = list(map(weakref.ref, args.owners))
        self._frozen = args.frozen

    def returned(self, out: PyTree) -> None:
        """The step returned this: a ``TrainState`` is another one after each step."""
        if len(self._called) > 1 and not all(is_node(owner()) for owner in self._called):
            self._returned = list(map(weakref.ref, filter(has_frozen, jax.tree.leaves(out, is_leaf=has_frozen))))

    def announce(self, last: Arguments, owner: Any, new: Any) -> dict[int, Any]:
        """What to put in place of owners, by place.

        Args:
            last: The arguments to change.
            owner: As of :meth:`TrainStep.prepare`.
            new: As of :meth:`TrainStep.prepare`.

        Raises:
            ValueError: If ``owner`` was none of them.
        """
        place = self._place(last, owner)
        new_ones = {
            other: state
            for other, (before, state) in self._announced.items()
            if other < len(self._frozen) and self._frozen[other] in (before, state.frozen)
        }
        new_ones[place] = new
        self._announced = {other: (self._frozen[other], state) for other, state in new_ones.items()}
        return new_ones

    def _place(self, last: Arguments, owner: Any) -> int:
        known = last.owners
        if len(known) == 1:
            return 0
        for place, called in enumerate(self._called):
            if called() is owner:
                return place
        alike = [place for place, one in enumerate(known) if _is_alike(one, owner)]
        returned = [one() for one in self._returned]
        places = [place for place, one in enumerate([one for one in returned if _is_alike(one, owner)]) if one is owner]
        if not alike:
            raise ValueError(
                f"owner: got {type(owner).__name__} that is none of the {len(known)} in the last call of the step; "
                "prepare what the step is called with"
            )
        return alike[places[0]] if places and places[0] < len(alike) else alike[0]


def _is_alike(one: Any, other: Any) -> bool:
    """Whether both are states of networks with the same layers and parameters."""
    if is_node(one) or is_node(other) or type(one) is not type(other) or one.frozen.layers != other.frozen.layers:
        return False
    shapes, others = (jax.tree.map(jax.numpy.shape, state.params) for state in (one, other))
    return shapes == others
