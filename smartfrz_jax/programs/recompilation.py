"""Why a train step is compiled when its frozen set has not changed; more programs may take turns than are kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

from smartfrz_jax.cost.check import SavingWarning
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.programs.arguments import Key

# One program may well return after a long while; and of those that never do, not all are remembered.
_OFTEN = 2
_REMEMBERED = 64


class _Purpose(NamedTuple):
    """What a program is for.

    Attributes:
        sets: Its frozen sets.
        frozen: The same, as text.
        batch: Its shapes, as text.
    """

    sets: tuple[Frozen, ...]
    frozen: str
    batch: str


class Recompilations:
    """Tells why programs are compiled beside those for new frozen sets.

    It warns, once, when programs that were released are compiled again.

    Args:
        max_programs: How many programs are kept.

    Example:
        >>> from smartfrz_jax.programs.arguments import Arguments
        >>> import numpy as np
        >>> recompilations = Recompilations(1)
        >>> keys = [Key(None, None, Arguments((np.ones(size),)).batch) for size in (4, 5)]
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always")
        ...     reasons = [recompilations.compiled(key, ()) for key in (*keys, *keys)]
        >>> reasons[1]
        'its batch is (float64[5]), not (float64[4]) as before; pad batches to a few shapes'
        >>> print(str(found[0].message).split(";")[0])
        max_programs: got 1, but 2 programs take turns, so they are compiled anew again and again
    """

    def __init__(self, max_programs: int):
        self._max_programs = max_programs
        self._known: dict[Key, _Purpose] = {}
        self._elsewhere: set[Key] = set()
        self._again = 0

    def compiled(self, key: Key, frozen: tuple[Frozen, ...]) -> str | None:
        """A program was compiled.

        Args:
            key: What it is for.
            frozen: Its frozen sets.

        Returns:
            Why, if these had a program before.
        """
        reason = self._reason(key, frozen)
        if key in self._known:
            self._again += 1
            if self._again == _OFTEN:
                warnings.warn(self._message(), SavingWarning, stacklevel=4)
        text = " with ".join("{" + _some(sorted(one.names), 3) + "}" for one in frozen)
        self._known[key] = _Purpose(frozen, text, _shapes(key))
        if len(self._known) > _REMEMBERED:
            self._known.pop(next(iter(self._known)))
        return reason

    def forget(self, key: Key) -> None:
        """A program is to be compiled again, for arrays that lie elsewhere."""
        self._known.pop(key, None)
        self._elsewhere.add(key)

    def _reason(self, key: Key, frozen: tuple[Frozen, ...]) -> str | None:
        if key in self._elsewhere:
            self._elsewhere.remove(key)
            return "arrays among its arguments have other shapes or types, or lie on other devices, than before"
        if key in self._known:
            return f"it was released, as more programs take turns than max_programs, {self._max_programs}, allows"
        before = [(other, purpose) for other, purpose in self._known.items() if purpose.sets == frozen]
        if not before:
            return None
        if all(other.batch != key.batch for other, _ in before):
            return f"its batch is {_shapes(key)}, not {before[-1][1].batch} as before; pad batches to a few shapes"
        return "modules or optimizers among its arguments are not those of before, or in another mode"

    def _message(self) -> str:
        number = len(self._known)
        batches, sets = (
            list(dict.fromkeys(texts))
            for texts in zip(*((p.batch, p.frozen) for p in self._known.values()), strict=True)
        )
        differ, cures = [], [f"keep them all, with max_programs={number}"]
        if len(batches) > 1:
            differ.append(f"batches of {len(batches)} shapes, {_some(batches)}")
            cures.append("pad batches to a few shapes, and leave out the last of an epoch")
        if len(sets) > 1:
            differ.append(f"{len(sets)} frozen sets, {_some(sets)}")
            cures.append("let fewer sets take turns")
        return (
            f"max_programs: got {self._max_programs}, but {number} programs take turns, so they are compiled anew "
            f"again and again; they are for {' and '.join(differ) or 'modules whose attributes differ'}. "
            f"Cure: {'; or '.join(cures)}"
        )


def _shapes(key: Key) -> str:
    leaves = [leaf for leaf in key.batch[1] if isinstance(leaf, tuple)]
    return "(" + ", ".join(f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in leaves) + ")"


def _some(texts: Iterable[str], number: int = 5) -> str:
    texts = list(texts)
    return ", ".join(texts[:number]) + (f" and {len(texts) - number} more" if len(texts) > number else "")
