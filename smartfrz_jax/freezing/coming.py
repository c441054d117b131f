"""A decision between the moment at which it is made and that of its effect, for which a program is compiled."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from smartfrz_jax.freezing.by_hand import text
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import Saving
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

# From a frozen set to a function that waits for its program, or to nothing.
Prepare = Callable[[Frozen], Callable[[], None] | None]


class Pending(NamedTuple):
    """A decision that has not taken effect yet.

    Attributes:
        due: Number of train steps after which it does.
        frozen: The frozen set from then on.
    """

    due: int
    frozen: Frozen


def wait_for_all(waits: Iterable[Callable[[], None]]) -> None:
    """Waits for programs, one after the other."""
    for wait in waits:
        wait()


def not_known() -> PyTree:
    """In place of the parameters after a step that is not done yet."""
    raise ValueError(
        "policy: looks at the network, so what it will freeze is not known before; give the freezer a lead, and the "
        "program of each decision is compiled ahead"
    )


@dataclasses.dataclass(frozen=True)
class MinSaving:
    """How much a change must save to be made, see :class:`smartfrz_jax.Freezer`.

    Attributes:
        share: Share of a step's FLOPs.
        saving: The share that going from the second frozen set to the first saves; ``None`` if nothing predicts it.

    Raises:
        TypeError: If ``share`` is no number, or ``saving`` no function.
        ValueError: If ``share`` is none, or nothing predicts what is saved.
    """

    share: float
    saving: Callable[[Frozen, Frozen], float] | None

    def __post_init__(self) -> None:
        expected = "a share of a step's FLOPs, from 0 to below 1"
        if not 0 <= checks.number(self.share, "min_saving", expected) < 1:
            raise ValueError(f"min_saving: got {self.share}, expected {expected}")
        if self.saving is not None:
            checks.function(self.saving, "saving", "a function of two frozen sets, such as the account's saving")
        elif self.share:
            raise ValueError(
                f"min_saving: got {self.share}, but nothing predicts what freezing saves; give TrainStep the account"
            )

    def allows(self, wanted: Frozen, frozen: Frozen) -> bool:
        """Whether a change to ``wanted`` saves as much; one by which layers train again is always made."""
        if self.saving is None or not frozen.names <= wanted.names:
            return True
        return self.saving(wanted, frozen) >= self.share

    def of_names(self, layers: Layers) -> Saving | None:
        """What policies ask: the saving of names of layers."""
        saving = self.saving
        if saving is None:
            return None
        return lambda names, before: saving(*(Frozen(layers, frozenset(some)) for some in (names, before)))


class NotCompiledError(Exception):
    """The program for a decision could not be compiled; the cause is why."""


class Coming:
    """A pending decision, and its program.

    Args:
        pending: The decision.
        is_prepared: Whether nothing is to be compiled for it.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}}
        >>> frozen = Frozen(find_layers(params, lambda p, x: x @ p["a"]["kernel"], jnp.ones((1, 2))), "a")
        >>> coming = Coming(Pending(3, frozen))
        >>> [coming.is_due(step, lambda frozen: print("compiling for", *frozen.names)) for step in (2, 3)]
        compiling for a
        [False, True]
    """

    def __init__(self, pending: Pending, *, is_prepared: bool = False):
        self.pending = pending
        self._is_prepared = is_prepared
        self._wait: Callable[[], None] | None = None

    def is_due(self, steps: int, prepare: Prepare | None) -> bool:
        """Has the program compiled, the first time; waits for it once the decision is to take effect.

        Args:
            steps: Train steps done.
            prepare: As of :meth:`smartfrz_jax.Freezer.observe`.

        Raises:
            NotCompiledError: If it cannot be compiled.
            TypeError: If ``prepare`` returns something else.
        """
        if not self._is_prepared and prepare is not None:
            try:
                self._wait = prepare(self.pending.frozen)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                raise NotCompiledError from error
            if self._wait is not None:
                expected = "it to return None, or a function without arguments that waits for the program"
                checks.function(self._wait, "prepare", expected)
        self._is_prepared = True
        if steps < self.pending.due:
            return False
        if self._wait is not None:
            try:
                self._wait()
            except Exception as error:
                raise NotCompiledError from error
        return True


def warn_refused(refused: Frozen, frozen: Frozen, steps: int, error: BaseException | None) -> None:
    """Warns that a decision is dropped, unless that would part the processes of a run.

    Args:
        refused: The frozen set whose program could not be compiled.
        frozen: The one that stays.
        steps: Train steps done.
        error: Why it could not.

    Raises:
        BaseException: ``error``, if there are several processes.
    """
    if jax.process_count() > 1 and error is not None:
        error.add_note(
            "policy's decision: several processes change to the next program together, and this one has none; take a "
            "smaller batch, or resume where there is more memory"
        )
        raise error
    changes = {"freeze": refused.names - frozen.names, "unfreeze": frozen.names - refused.names}
    what = " and ".join(f"{verb} {text(names)}" for verb, names in changes.items() if names)
    warnings.warn(
        f"policy's decision to {what}, due after step {steps}: its program could not be compiled "
        f"({type(error).__name__}: {error!s:.300}), so the run goes on with the program that it has and its frozen "
        f"set, {text(frozen.names)}. Other decisions are tried, this one is not again; free memory for them, or take "
        "a smaller batch",
        RuntimeWarning,
        stacklevel=4,
    )
