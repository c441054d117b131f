"""Which arguments of a train step have frozen sets, and which of these are about to change."""

from __future__ import annotations

import weakref
from typing import Any

import jax

from smartfrz_jax.abstract import Arguments, is_node
from smartfrz_jax.freezing import Frozen


class Owners:
    """The optimizers and states that a step was called with last, and what was announced of them."""

    def __init__(self) -> None:
        self._called: list[Any] = []
        self._frozen: tuple[Frozen, ...] = ()
        self._announced: dict[int, tuple[Frozen, Any]] = {}

    def called(self, args: Arguments) -> None:
        """The step was called with these arguments."""
        # Modules stay the same; a TrainState is another one at every step, and only its structure stays.
        self._called = [weakref.ref(owner) if is_node(owner) else None for owner in args.owners]
        self._frozen = args.frozen

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
            if called is not None and called() is owner:
                return place
        structure = jax.tree.structure(owner)
        for place, one in enumerate(known):
            if not is_node(one) and jax.tree.structure(one) == structure:
                return place
        raise ValueError(
            f"owner: got {type(owner).__name__} that is none of the {len(known)} in the last call of the step; prepare "
            "what the step is called with"
        )
