"""Notices that a train step is compiled for the same again and again, for more programs take turns than are kept."""

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
        frozen: Its frozen sets, as text.
        batch: Its shapes, as text.
    """

    frozen: str
    batch: str


class Recompilations:
    """Warns, once, when programs that were released are compiled again.

    Args:
        max_programs: How many programs are kept.

    Example:
        >>> from smartfrz_jax.programs.arguments import Arguments
        >>> import numpy as np
        >>> recompilations = Recompilations(1)
        >>> keys = [Key(None, None, Arguments((np.ones(size),)).batch) for size in (4, 5)]
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always")
        ...     for key in (*keys, *keys):
        ...         recompilations.compiled(key, ())
        >>> print(str(found[0].message).split(";")[0])
        max_programs: got 1, but 2 programs take turns, so they are compiled anew again and again
    """

    def __init__(self, max_programs: int):
        self._max_programs = max_programs
        self._known: dict[Key, _Purpose] = {}
        self._again = 0

    def compiled(self, key: Key, frozen: tuple[Frozen, ...]) -> None:
        """A program was compiled.

        Args:
            key: What it is for.
            frozen: Its frozen sets.
        """
        if key in self._known:
            self._again += 1
            if self._again == _OFTEN:
                warnings.warn(self._message(), SavingWarning, stacklevel=4)
        self._known[key] = _Purpose(
            " with ".join("{" + _some(sorted(one.names), 3) + "}" for one in frozen), _shapes(key)
        )
        if len(self._known) > _REMEMBERED:
            self.forget(next(iter(self._known)))

    def forget(self, key: Key) -> None:
        """A program is to be compiled again for another reason."""
        self._known.pop(key, None)

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
